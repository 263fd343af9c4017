#!/usr/bin/env bash
# Everything, small, in ten minutes on two cores: real music in, an RL-finetuned model and a page to listen to out.
#   launch/quickstart.sh [more flags for `musicrl run`]
set -euo pipefail
cd "$(dirname "$0")/.."
launch/setup.sh
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-runs/xla-cache} TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}  # XLA buffers on huge pages: fewer page faults
exec .venv/bin/musicrl run --gin_file=gin/runs/quickstart.gin "$@"
