#!/usr/bin/env bash
# The tests: lint, the fast ones, then the slow ones. `launch/test.sh fast` leaves the slow ones out.
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
# Tests against PyTorch's implementations are left out where CI's versions do not name it: there it comes with CUDA, 3 GB.
version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if grep -qs '^torch==' "launch/requirements-$version.txt"; then launch/setup.sh parity; fi
[ "${1:-}" = fast ] || launch/setup.sh plan  # the TPU compiler; no test needs a TPU
# The page of `musicrl serve` is tried in Chromium, and steps of the clock with libfaketime. On Debian as root both are
# installed; the tests of what is missing are skipped.
install() {
  apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" > /dev/null ||
    echo "no $*: the tests that need it are skipped" >&2
}
if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
  command -v chromedriver > /dev/null || install chromium chromium-driver
  command -v faketime > /dev/null || install faketime
fi
export JAX_PLATFORMS=cpu
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}  # XLA buffers on huge pages: fewer page faults
trap 'exit 130' INT  # Ctrl-C ends both halves
failed=0
.venv/bin/ruff check . && .venv/bin/ruff format --check --quiet . || failed=$?
# A file in one process: its fixtures are made once. What fails here does not hide how the slow ones end.
.venv/bin/python -m pytest -m "not slow" --numprocesses=2 --dist=loadfile || failed=$?
[ "${1:-}" = fast ] || .venv/bin/python -m pytest -m slow || failed=$?
exit "$failed"
