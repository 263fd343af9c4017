#!/usr/bin/env bash
# jax 0.10.2 stores a compiled function as two files: the entry, and a small one with the time of
# its last use. If the cache has a size limit, one entry without its second file stops all writing
# for ever. Later functions are compiled again in each process, and the only sign is a warning. A
# process that is killed between the two writes leaves such an entry.
# Remedy: before JAX starts, remove entries without their second file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 filelock==4.2.12
cat > "$folder/compile.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

cache, factor = sys.argv[1], float(sys.argv[2])
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_compilation_cache_max_size", 10**8)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.jit(lambda x: jnp.sin(x) * factor)(1.0)
PYTHON
export JAX_PLATFORMS=cpu
entries() { find "$folder/cache" -name '*-cache' | wc -l; }
compile() { "$folder/venv/bin/python" -W ignore "$folder/compile.py" "$folder/cache" "$1" 2> /dev/null; }
compile 1
compile 2
before=$(entries)
find "$folder/cache" -name '*-atime' | head -n 1 | xargs rm
compile 3
compile 4
after=$(entries)
echo "entries: $before after two functions; $after after two more, once one entry had lost its second file"
[ "$before" = 2 ] && [ "$after" = 2 ]
# Output:
#   entries: 2 after two functions; 2 after two more, once one entry had lost its second file
