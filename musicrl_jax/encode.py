"""Encodes clips to tokens, once for all models that are trained on tokens.

Legend: B clips, N samples.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from musicrl_jax.core import checkpoint, hosts, lock, sharding
from musicrl_jax.core.progress import Progress
from musicrl_jax.inputs import tokens
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.systems import folder
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import put_rows

Encoder = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # wav f32 [B, N] -> tokens [B, ...]


@lock.holds("tokens_dir")
def encode(data: Clips, system: str, tokens_dir: str, batch_size: int = 32) -> None:
    """Writes the tokens of all clips, split by split, with a manifest; skips finished splits.

    Args:
      data: the clips.
      system: folder of the system that encodes them.
      tokens_dir: folder of the token data set.
      batch_size: clips in a batch, rounded up to a multiple of the devices; does not change the
        tokens.

    Raises:
      ValueError: if the system cannot encode, `tokens_dir` has tokens of other clips by the same
        models, or the models' output for a clip is not finite.
    """
    # The system, on all devices.
    loaded = folder.load(system, parts=folder.encoding_parts(system))
    mesh = sharding.make_mesh()
    rows, encoder = sharding.round_up_rows(mesh, batch_size), _encoder(loaded, mesh)

    # Token data sets record their origin: models, layout and clips.
    origin = (
        loaded.system.data_models(loaded.hashes),
        {"sample_rate_hz": loaded.system.sample_rate_hz, **loaded.system.data_layout()},
        checkpoint.describe(data),
    )

    # All hosts encode; the first one writes.
    clips = dataclasses.replace(data, with_captions=True)
    for split in data.splits():
        if hosts.first_decides(lambda split=split: tokens.complete(tokens_dir, split, *origin)):
            print(f"{tokens_dir}: {split} encoded already")
            continue
        examples = _examples(clips, split, rows, encoder)
        if hosts.first():
            tokens.write_tokens(tokens_dir, split, examples, *origin)
        else:
            deque(examples, maxlen=0)  # runs the iterator to its end
    hosts.wait_for_all("encoded")


def _encoder(loaded: LoadedSystem, mesh: Mesh) -> Encoder:
    """Returns the function that encodes a batch; each device computes its own rows."""
    replicated = sharding.replicated(mesh)
    frozen = sharding.put(loaded.frozen, jax.tree.map(lambda _: replicated, loaded.frozen))
    jitted = jax.jit(loaded.system.encode, out_shardings=sharding.batch_sharding(mesh))

    def encoder(wav: np.ndarray) -> Mapping[str, np.ndarray]:
        with jax.set_mesh(mesh):
            return sharding.fetch(jitted(frozen, put_rows(mesh, wav)))

    return encoder


def _examples(clips: Clips, split: str, rows: int, encoder: Encoder) -> Iterator[dict[str, Any]]:
    """Yields the tokens, id and caption of each clip, the same on all hosts."""
    batches = clips.batches(split, rows, seed=0, epochs=1)
    for batch in Progress(batches, f"encode {split}", -(-clips.count(split) // rows)):
        # Silence fills the last batch.
        count = len(batch["audio"])
        codes = encoder(np.pad(batch["audio"], ((0, rows - count), (0, 0))))
        for row in range(count):
            # Models mark codes of features that are not finite with -1.
            if invalid := [name for name, code in codes.items() if code[row].min() < 0]:
                raise ValueError(
                    f"clip {batch['id'][row]!r} of {split!r} has no {' and no '.join(invalid)} "
                    "tokens: the models' output is not finite; train that model again, with a "
                    "lower Optimiser.learning_rate"
                )
            texts = {name: batch[name][row] for name in tokens.TEXTS}
            yield {name: code[row] for name, code in codes.items()} | texts
