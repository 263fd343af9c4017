#!/usr/bin/env bash
# Makes .venv with the package, its extras and the versions of CI. Does nothing if it is up to date.
#   launch/setup.sh                      uses `python3`
#   PYTHON=python3.12 launch/setup.sh    uses another Python
#   launch/setup.sh parity benchmark     installs more extras of setup.py
#   launch/setup.sh beam                 makes .venv-beam: Apache Beam needs another protobuf
#   VENV=/opt/musicrl launch/setup.sh    installs there, with the package as a wheel
# Checks files against the hashes in launch/requirements-PYTHON.txt, which launch/lock.py writes.
# Does not check PyTorch, of the extra parity. A Python without such a file gets the newest
# versions, unchecked.
set -euo pipefail
cd "$(dirname "$0")/.."
apart=
for extra in "$@"; do [ "$extra" != beam ] || apart=beam; done
venv=${VENV:-.venv${apart:+-$apart}}
editable=--editable
[ -z "${VENV:-}" ] || editable=
python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Python 3.11 or newer is needed, $python is $version: set PYTHON=..." >&2
  exit 1
}
pinned=launch/requirements-$version.txt
replaced=launch/requirements-$apart-$version.txt
what=(setup.py pyproject.toml)
[ ! -e "$pinned" ] || what+=("$pinned")
[ ! -e "$replaced" ] || what+=("$replaced")
stamp=$venv/installed-$version-$(cat "${what[@]}" | sha256sum | cut -c1-16)

for extra in "$@"; do
  grep -q "\"$extra\": \[" setup.py || { echo "setup.sh: setup.py has no extra '$extra'" >&2 && exit 1; }
done

# Prints the pinned entries with those of an extra that needs other versions in their place.
merged() {
  awk '/^[A-Za-z0-9]/ { split($1, pin, "=="); other = pin[1] in replaced }
       FNR == NR { replaced[pin[1]]; next }
       !other' "$replaced" "$pinned"
  cat "$replaced"
}

install() {
  "$venv/bin/python" -m pip install --quiet "$@"
}

# The pinned setuptools builds source packages: an isolated build would fetch another, unchecked.
install_pinned() {
  install --require-hashes --no-build-isolation --requirement "$1"
}

install_extra() {
  if [ ! -e "$pinned" ]; then
    install ${editable:+"$editable"} ".[$1]"
    return
  fi
  # pip skips lines with `extra ==`. Give the lines of this extra a marker that is always true.
  sed "s/extra == '$1'/python_version > '3'/" "$pinned" > "$venv/requirements-$1.txt"
  install_pinned "$venv/requirements-$1.txt"
  if [ "$1" = parity ]; then
    grep -o '^[A-Za-z0-9._-]*==[^ ]*' "$pinned" > "$venv/versions.txt"
    install --constraint "$venv/versions.txt" torch
  fi
}

if [ ! -e "$stamp" ]; then
  echo "Installing into $venv: about 4 GB, 2 of them TensorFlow. Takes two to five minutes ..."
  "$python" -m venv --clear "$venv"
  if [ -n "$apart" ] && [ -e "$pinned" ]; then
    merged > "$venv/requirements.txt"
    pinned=$venv/requirements.txt
  fi
  if [ -e "$pinned" ]; then
    sed -nE '/^(pip|setuptools)==/,/[^\]$/p' "$pinned" > "$venv/requirements-tools.txt"
    install --require-hashes --requirement "$venv/requirements-tools.txt"
    install_pinned "$pinned"
    # Separately, because pip accepts no editable package with --require-hashes.
    install --no-deps --no-build-isolation ${editable:+"$editable"} .
  else
    install --upgrade pip setuptools
    install ${editable:+"$editable"} ".[data,listeners,report,serve,test${apart:+,$apart}]"
  fi
  touch "$stamp"
fi
[ -z "$apart" ] || [ ! -e "$venv/requirements.txt" ] || pinned=$venv/requirements.txt
for extra in "$@"; do
  [ "$extra" != "$apart" ] || continue  # installed above
  if [ ! -e "$stamp-$extra" ]; then
    echo "Installing the extra '$extra' ..."
    install_extra "$extra"
    touch "$stamp-$extra"
  fi
done
