"""Clips -> tokens, written once for all models that are trained on tokens.

Legend: B clips, N samples.
"""

import dataclasses
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


@lock.holds("tokens_dir")
def encode(data: Clips, system: str, tokens_dir: str, batch_size: int = 32) -> None:
    """Writes the tokens of every clip of every split, with a manifest; leaves finished splits alone.

    Args:
      data: the clips.
      system: folder of the system whose tokens they become.
      tokens_dir: where the token data set goes.
      batch_size: clips at a time; rounded up to a multiple of the devices, and changes nothing in
        the result.

    Raises:
      ValueError: if the system cannot encode, its tokens of other clips are in `tokens_dir`, or a
        clip has none.
    """
    loaded = folder.load(system, parts=folder.encoding_parts(system))
    written_by = (
        loaded.system.data_models(loaded.hashes),
        {"sample_rate_hz": loaded.system.sample_rate_hz, **loaded.system.data_layout()},
        checkpoint.describe(data),
    )
    mesh = sharding.make_mesh()
    rows = sharding.round_up_rows(mesh, batch_size)
    encoder = _encoder(loaded, mesh)
    clips = dataclasses.replace(data, with_captions=True)
    for split in data.splits():
        done = hosts.first_decides(
            lambda split=split: tokens.complete(tokens_dir, split, *written_by)
        )
        if done:
            print(f"{tokens_dir}: {split} encoded already")
            continue
        examples = _examples(clips, split, rows, encoder)
        if hosts.first():
            tokens.write_tokens(tokens_dir, split, examples, *written_by)
        else:
            for _ in examples:
                pass
    hosts.wait_for_all("encoded")


def _encoder(loaded: LoadedSystem, mesh: Mesh) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Returns wav f32 [B, N] -> token arrays [B, ...]; each device computes its own rows."""
    by_row, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    jitted = jax.jit(loaded.system.encode, out_shardings=by_row)
    frozen = sharding.put(loaded.frozen, jax.tree.map(lambda _: whole, loaded.frozen))

    def encoder(wav: np.ndarray) -> dict[str, np.ndarray]:
        with jax.set_mesh(mesh):
            return sharding.fetch(jitted(frozen, sharding.put_batch(mesh, {"wav": wav})["wav"]))

    return encoder


def _examples(
    clips: Clips, split: str, rows: int, encoder: Callable[[np.ndarray], Mapping[str, np.ndarray]]
) -> Iterator[dict[str, Any]]:
    """Yields every clip's tokens, id and caption, the same on all hosts."""
    hosts.wait_for_all(
        "encode"
    )  # for the first, which imports what it writes with; Gloo waits 30 s
    batches = clips.batches(split, rows, seed=0, epochs=1)
    for batch in Progress(batches, f"encode {split}", -(-clips.count(split) // rows)):
        count = len(batch["audio"])
        codes = encoder(np.pad(batch["audio"], ((0, rows - count), (0, 0))))
        for i in range(count):
            if wrong := [name for name, code in codes.items() if code[i].min() < 0]:
                raise ValueError(
                    f"clip {batch['id'][i]!r} of {split!r} has no {' and no '.join(wrong)} tokens: "
                    "what the models computed is not finite; train that model again, with a lower "
                    "Optimiser.learning_rate"
                )
            texts = {name: batch[name][i] for name in tokens.TEXTS}
            yield {name: code[i] for name, code in codes.items()} | texts
