#!/usr/bin/env bash
# The tests.
#   launch/test.sh         lint, and the tests of a change: a quarter of an hour on two cores
#   launch/test.sh unit    lint, and the tests that compile no model: two minutes
#   launch/test.sh all     the slow ones as well: several hosts, whole runs, a browser, the TPU's compiler
#   launch/test.sh beam    those of Apache Beam, in .venv-beam: four minutes
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-change}
case $which in
  beam)
    launch/setup.sh beam
    exec env JAX_PLATFORMS=cpu .venv-beam/bin/python -m pytest --durations=20 tests/data/beam_test.py
    ;;
  unit) tests=unit ;;
  change | all) tests="not slow" ;;
  *) echo "test.sh: '$which' is none of unit, change, all and beam" >&2 && exit 2 ;;
esac
launch/setup.sh

# What some tests need. Those that lack it are skipped.
version=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$which" != unit ]; then
  launch/setup.sh wandb
  # Elsewhere PyTorch comes with CUDA, 3 GB.
  if grep -qs '^torch==' "launch/requirements-$version.txt"; then launch/setup.sh parity; fi
fi
install() {  # Debian packages, as root
  apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" > /dev/null ||
    echo "no $*: the tests that need it are skipped" >&2
}
if [ "$which" = all ]; then
  launch/setup.sh plan  # the TPU compiler; no test needs a TPU
  if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    command -v chromedriver > /dev/null || install chromium chromium-driver
    command -v faketime > /dev/null || install faketime  # for tests of a clock that jumps
  fi
fi

export JAX_PLATFORMS=cpu
# XLA's buffers on huge pages: fewer page faults.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
trap 'exit 130' INT  # Ctrl-C ends all parts
failed=0
.venv/bin/ruff check . && .venv/bin/ruff format --check --quiet . || failed=$?
# A file runs in one process, so its fixtures are made once. A failure does not hide how the rest ends.
# A test that hangs ends its process, with all stacks, and is tried once more.
.venv/bin/python -m pytest -m "$tests" --numprocesses=2 --dist=loadfile --durations=20 \
  --max-worker-restart=1 -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true ||
  failed=$?
[ "$which" != all ] || .venv/bin/python -m pytest -m slow --durations=20 || failed=$?
exit "$failed"
