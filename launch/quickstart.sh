#!/usr/bin/env bash
# Finetunes the shipped models with RL, in ten minutes on two cores. Writes a model and a page with its audio.
#   launch/quickstart.sh [more flags for `musicrl run`]
#   launch/quickstart.sh --from_scratch [more flags]    first trains all models, in a small size, on real music
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}  # XLA buffers on huge pages have fewer page faults
run=quickstart
if [ "${1:-}" = --from_scratch ]; then
  run=from_scratch
  shift
fi
exec .venv/bin/musicrl run --gin_file="gin/runs/$run.gin" "$@"
