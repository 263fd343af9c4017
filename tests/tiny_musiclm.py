"""A MusicLM of a few thousand random weights, for tests that need its own models."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from flax.core import meta
from tokenizers import models as tokenizer_models
from tokenizers import pre_tokenizers, processors

from musicrl_jax.core import checkpoint
from musicrl_jax.models.bert import BertConfig
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.mulan import MuLanConfig
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.models.rewards import QualityConfig
from musicrl_jax.models.semantic import SemanticConfig
from musicrl_jax.models.soundstorm import SoundStormConfig
from musicrl_jax.models.soundstream import SoundStreamConfig
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import TransformerConfig

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "slow", "fast", "jig", "air", "for", "flute")
PROMPTS = ["a slow jig", "a fast air", "air for flute", "a jig", "slow air", "fast", "a", "flute"]
CONFIGS = {
    "policy": MusicLMConfig(
        TransformerConfig(2, 24, 2, 32, dropout=0.1, relative_buckets=8, relative_distance=16),
        TransformerConfig(2, 16, 2, 24, dropout=0.1),
        TokenLayout(semantic_codes=5, acoustic_codes=7, coarse_levels=2),
        mulan_levels=3,
        mulan_codes=4,
    ),
    "soundstorm": SoundStormConfig(
        ConformerConfig(2, 2, 16, 16), levels=4, coarse_levels=2, codes=7
    ),
    "soundstream": SoundStreamConfig(strides=(5, 6, 16), channels=2, embed=8, levels=4, codes=7),
    "mulan": MuLanConfig(
        window_seconds=0.1,
        audio=ResNetConfig(8, (4,), 1),
        text=BertConfig(2, 2, 8, 16, 6, len(WORDS)),
        text_length=6,
        embed=8,
        levels=3,
        codes=4,
    ),
    "semantic": SemanticConfig(mels=8, encoder=ConformerConfig(2, 2, 16, 16), layer=1, codes=5),
    "quality": QualityConfig(24_000, window_seconds=0.1, network=ResNetConfig(8, (4,), 1)),
}
PARTS = ("policy", "soundstorm", "soundstream", "mulan", "semantic")


@functools.cache
def model(name: str) -> checkpoint.Model:
    """Returns a model of random weights, the same on every machine."""
    rng = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = np.prod(shape.shape[:-1]) ** -0.5 if shape.ndim > 1 else 0.3
        array = rng.standard_normal(shape.shape, np.float32)
        return (np.float32(scale) * array).astype(shape.dtype)

    shapes = meta.unbox(jax.eval_shape(CONFIGS[name].init, jax.random.key(0)))
    variables = jax.tree.map(draw, shapes)
    assets = {}
    if name == "mulan":
        assets["vocabulary"] = vocabulary()
    if name in ("policy", "soundstorm"):
        lineage = {"codec": model("soundstream").hash, "mulan": model("mulan").hash}
        assets[checkpoint.LINEAGE] = json.dumps(lineage).encode()
    return checkpoint.Model(CONFIGS[name], variables, checkpoint.content_hash(variables), assets)


def models(names: Sequence[str] = PARTS) -> dict[str, checkpoint.Model]:
    """Returns models of one system by name."""
    return {name: model(name) for name in names}


def save(directory: Path, name: str, **changes: Any) -> str:
    """Writes a model, with changed fields, to `directory`/name and returns that folder."""
    fields = {**vars(model(name)), **changes}
    del fields["hash"]
    checkpoint.save_model(directory / name, **fields)
    return str(directory / name)


def vocabulary() -> bytes:
    """Returns a BERT's tokenizer.json for WORDS."""
    ids = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizer_models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer.to_str().encode()
