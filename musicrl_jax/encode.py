"""Clips -> MuLan, semantic and acoustic tokens, written once for all token models.

Legend: B clips, M MuLan levels, F frames, T codec frames, Q codec levels.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from musicrl_jax.core import checkpoint, lock
from musicrl_jax.core.progress import Progress
from musicrl_jax.inputs import tokens
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig


@lock.holds("tokens_dir")
def encode(data: Clips, codec: str, semantic: str, mulan: str, tokens_dir: str, batch_size: int = 32) -> None:
    """Writes the tokens of every clip of every split to `tokens_dir`, with a manifest; leaves finished splits alone.

    ValueError where the same models wrote tokens of other clips there, or find none for a clip.

    Args:
      data: the clips.
      codec, semantic, mulan: folders of the three checkpoints.
      tokens_dir: where the token data set goes.
      batch_size: clips at a time; changes nothing in the result.
    """
    identity = checkpoint.describe(data)
    data = dataclasses.replace(data, with_captions=True)
    models = {
        "codec": checkpoint.load_model(codec, SoundStreamConfig),
        "semantic": checkpoint.load_model(semantic, SemanticConfig),
        "mulan": checkpoint.load_model(mulan, MuLanConfig),
    }
    configs = {name: model.config for name, model in models.items()}
    variables = {name: model.variables for name, model in models.items()}
    hashes = {name: model.hash for name, model in models.items()}
    layout = {
        "sample_rate_hz": configs["codec"].sample_rate_hz,
        "acoustic_levels": configs["codec"].levels,
        "acoustic_codes": configs["codec"].codes,
        "semantic_codes": configs["semantic"].codes,
        "mulan_levels": configs["mulan"].levels,
        "mulan_codes": configs["mulan"].codes,
    }

    @jax.jit
    def read(variables: dict[str, Any], wav: jax.Array) -> dict[str, jax.Array]:
        mulan_module = MuLan(configs["mulan"])
        embedding = mulan_module.apply(variables["mulan"], wav, method="embed_audio")
        return {
            "semantic": SemanticEncoder(configs["semantic"]).apply(
                variables["semantic"], wav, method="tokens"
            ),  # [B, F]
            "acoustic": SoundStream(configs["codec"]).apply(variables["codec"], wav, method="encode"),  # [B, T, Q]
            "mulan": mulan_module.apply(variables["mulan"], embedding, method="quantize"),  # [B, M]
        }

    def examples(split: str) -> Iterator[dict[str, Any]]:
        batches = data.batches(split, batch_size, seed=0, epochs=1)
        for batch in Progress(batches, f"encode {split}", -(-data.count(split) // batch_size)):
            count = len(batch["audio"])
            wav = np.pad(batch["audio"], ((0, batch_size - count), (0, 0)))
            codes = jax.device_get(read(variables, wav))
            for i in range(count):
                if wrong := [name for name, code in codes.items() if code[i].min() < 0]:
                    raise ValueError(
                        f"clip {batch['id'][i]!r} of {split!r} has no {' and no '.join(wrong)} tokens: what the models "
                        "computed is not finite; train that model again, with a lower Optimiser.learning_rate"
                    )
                yield {name: code[i] for name, code in codes.items()} | {
                    "id": batch["id"][i],
                    "caption": batch["caption"][i],
                }

    for split in data.splits():
        if tokens.complete(tokens_dir, split, hashes, layout, identity):
            print(f"{tokens_dir}: {split} encoded already")
        else:
            tokens.write_tokens(tokens_dir, split, examples(split), hashes, layout, identity)
