#!/usr/bin/env bash
# Makes .venv with the package, its extras and the versions that CI uses; does nothing where it is made already.
#   launch/setup.sh                     uses `python3`; PYTHON=python3.12 launch/setup.sh another one (3.11 or newer)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
constraints=launch/constraints-$version.txt
stamp=.venv/installed-$(cat setup.py "$constraints" 2>/dev/null | sha256sum | cut -c1-16)
[ -e "$stamp" ] && exit 0
"$python" -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
[ -x .venv/bin/python ] || "$python" -m venv .venv
[ -e "$constraints" ] && pinned=(--constraint "$constraints") || pinned=()
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet "${pinned[@]}" --editable '.[data,report,test]'
touch "$stamp"
