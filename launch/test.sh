#!/usr/bin/env bash
# The tests: lint, the fast ones, then the slow ones. `launch/test.sh fast` leaves the slow ones out.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
# Tests against PyTorch's implementations are left out where CI's versions do not name it: there it comes with CUDA, 3 GB.
version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if grep -qs '^torch==' "launch/constraints-$version.txt"; then launch/setup.sh parity; fi
[ "${1:-}" = fast ] || launch/setup.sh plan  # the TPU compiler; no test needs a TPU
# The page of `musicrl serve` is tried in Chromium. On Debian as root it is installed; where it is missing that test is skipped.
if ! command -v chromedriver > /dev/null && command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
  packages=(chromium chromium-driver)
  apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null ||
    echo "no ${packages[*]}: the test of the page is skipped" >&2
fi
export JAX_PLATFORMS=cpu
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}  # XLA buffers on huge pages: fewer page faults
.venv/bin/ruff check .
.venv/bin/python -m pytest -m "not slow" --numprocesses=2 --dist=loadfile  # a file in one process: its fixtures are made once
[ "${1:-}" = fast ] || .venv/bin/python -m pytest -m slow
