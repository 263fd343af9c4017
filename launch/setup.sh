#!/usr/bin/env bash
# Makes .venv with the package, its extras and the versions that CI uses; does nothing where that is done already.
#   launch/setup.sh                     takes `python3`; PYTHON=python3.12 launch/setup.sh another, 3.11 or newer
#   launch/setup.sh parity benchmark    further extras of setup.py
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed, $python is $version: set PYTHON=..." >&2
  exit 1
}
what=(setup.py)
pins=()
if [ -e "launch/constraints-$version.txt" ]; then
  what+=("launch/constraints-$version.txt")
  pins=(--constraint "launch/constraints-$version.txt")
fi
stamp=.venv/installed-$version-$(cat "${what[@]}" | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
  echo "Installing into .venv ..."
  "$python" -m venv --clear .venv
  .venv/bin/python -m pip install --quiet --upgrade pip
  .venv/bin/python -m pip install --quiet ${pins[@]+"${pins[@]}"} --editable '.[data,listeners,report,serve,test]'
  touch "$stamp"
fi
for extra in "$@"; do
  if [ ! -e "$stamp-$extra" ]; then
    echo "Installing the extra '$extra' ..."
    .venv/bin/python -m pip install --quiet ${pins[@]+"${pins[@]}"} --editable ".[$extra]"
    touch "$stamp-$extra"
  fi
done
