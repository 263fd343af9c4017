#!/usr/bin/env bash
# Finetunes the shipped models with RL, in six minutes on two cores. Writes a model and a page with
# its audio.
#   launch/quickstart.sh [more flags for `musicrl run`]
#   launch/quickstart.sh --from_scratch [more flags]   first trains small models on real music
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
# XLA buffers on huge pages have fewer page faults.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
run=quickstart
if [ "${1:-}" = --from_scratch ]; then
  run=from_scratch
  shift
fi
exec .venv/bin/musicrl run --gin_file="gin/runs/$run.gin" "$@"
