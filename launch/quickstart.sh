#!/usr/bin/env bash
# RL finetuning of the models that ship, in ten minutes on two cores: a finetuned model and a page to listen to.
#   launch/quickstart.sh [more flags for `musicrl run`]
#   launch/quickstart.sh --from_scratch [more flags]    trains everything first, small, from real music
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}  # XLA buffers on huge pages: fewer page faults
run=quickstart
if [ "${1:-}" = --from_scratch ]; then
  run=from_scratch
  shift
fi
exec .venv/bin/musicrl run --gin_file="gin/runs/$run.gin" "$@"
