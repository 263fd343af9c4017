"""The models of the rows in JAX, built from what today's checkouts and older ones both have.

Legend: B clips, S tokens, F frames, T codec frames, Q codec levels, V codes, D width, M MuLan
levels.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from contestants.pipeline import Pipeline, Stage, bytes_of, random_weights, size_of
from contestants.rows import CLIPS_PER_PROMPT, LEARNING_RATE, SIZES, Row
from flax.core import meta

from musicrl_jax.core import sharding
from musicrl_jax.losses.lm import cross_entropy
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.models.bert import BertConfig
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.transformer import Cache, Transformer, TransformerConfig
from musicrl_jax.objectives.policy import PolicyObjective
from musicrl_jax.objectives.step import training_step

try:
    from musicrl_jax.losses.optimiser import Optimiser, create_state
    from musicrl_jax.models.tokens import FRAMES_PER_SECOND, TokenLayout
except ModuleNotFoundError:  # f1186c7
    from musicrl_jax.core.state import Optimiser, create_state
    from musicrl_jax.core.tokens import FRAMES_PER_SECOND, TokenLayout

MULAN_LEVELS, COARSE_LEVELS, LEVELS = 12, 4, 12
OPTIMISER = Optimiser(LEARNING_RATE)
GRADIENT = PolicyGradient(baseline="leave_one_out", group=CLIPS_PER_PROMPT)
STEPS_A_RUN = 10  # of the learning rate's schedule
# The codecs. 'demo' is that of the repository, 'base' the paper's.
CODECS = {
    "demo": SoundStreamConfig(16_000, (8, 5, 4, 2), 8, 64, LEVELS, 256),
    "base": SoundStreamConfig(levels=LEVELS),
    "tiny": SoundStreamConfig(16_000, (8, 5, 4, 2), 1, 8, LEVELS, 7),
}


# --- configs and weights ---


def music_config(row: Row) -> MusicLMConfig:
    """Returns the policy's config."""
    size = SIZES[row.size]
    return MusicLMConfig(
        TransformerConfig(*size.temporal, dropout=0.1),
        TransformerConfig(*size.depth, dropout=0.1),
        TokenLayout(size.semantic_codes, size.acoustic_codes, COARSE_LEVELS),
        MULAN_LEVELS,
        size.acoustic_codes,
    )


def frozen_configs(row: Row) -> dict[str, Any]:
    """Returns configs of the models between prompt and wav, of gin/sizes/shipped.gin, by part."""
    codes, tiny = SIZES[row.size].acoustic_codes, row.size == "tiny"
    conformer = ConformerConfig(2, 4, 16, 16) if tiny else ConformerConfig(2, 4, 128, 384)
    text = BertConfig(1, 2, 8, 8, 64, 16) if tiny else BertConfig(6, 12, 384, 1536, 512, 30_522)
    return {
        "mulan": MuLanConfig(
            16_000,
            5.0,
            ResNetConfig(mels=8, widths=(4,), blocks=1),  # not used: prompts are texts
            text,
            text_length=64,
            embed=8 if tiny else 128,
            hidden=0 if tiny else 512,
            levels=MULAN_LEVELS,
            codes=codes,
        ),
        "soundstorm": SoundStormConfig(conformer, LEVELS, COARSE_LEVELS, codes, first_passes=1),
        "soundstream": CODECS["tiny" if tiny else "demo"],
    }


def shapes_of(module: nn.Module, *inputs: Any) -> Any:
    """Returns the shapes of a module's variables."""
    return meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))


def frozen_variables(configs: dict[str, Any]) -> dict[str, Any]:
    """Returns random variables of the models between prompt and wav."""
    storm, stream = configs["soundstorm"], SoundStream(configs["soundstream"])
    wav, text = jnp.zeros((1, 16_000)), jnp.ones((1, 64), jnp.int32)
    codes = jnp.zeros((1, 2, storm.levels), jnp.int32)
    shapes = {
        "mulan": shapes_of(MuLan(configs["mulan"]), wav, text),
        "soundstorm": shapes_of(SoundStorm(storm), codes, codes > 0, storm.coarse_levels),
        "soundstream": shapes_of(stream, wav, jax.random.key(0)),
    }
    return random_weights(shapes)


def row_keys(row: Row) -> jax.Array:
    """Returns a random key for each clip, [B]."""
    return jax.random.split(jax.random.key(0), row.batch)


def text_pieces(row: Row) -> np.ndarray:
    """Returns the pieces of B prompts, int32 [B, 64]."""
    return np.ones((row.batch, 64), np.int32)


def frames_of(row: Row) -> int:
    """Returns F of a clip."""
    return round(row.clip_seconds * FRAMES_PER_SECOND)


def mulan_tokens(row: Row) -> np.ndarray:
    """Returns the prefix of B clips, int32 [B, M]."""
    return np.zeros((row.batch, MULAN_LEVELS), np.int32)


def bytes_read(row: Row, policy: Any) -> int:
    """Returns bytes of weights that sampling a batch reads: each for every frame, or code."""
    if row.is_plain:
        return row.length * (bytes_of(policy["decoder"]) + bytes_of(policy["head"]))
    trunk = policy["trunk"]
    depth = (1 + 2 * COARSE_LEVELS) * bytes_of(trunk["depth"])
    return frames_of(row) * (bytes_of(trunk["temporal"]) + depth)


def first_rl_state(shapes: Any, kl_strength: float) -> Any:
    """Returns an RLState of a random policy without moments."""
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    policy = random_weights(shapes.policy)
    return state.replace(policy=policy, kl_strength=np.float32(kl_strength))


# --- the plain decoder ---


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    """Sizes of a plain decoder.

    Attributes:
      transformer: the network.
      codes: the vocabulary, V.
    """

    transformer: TransformerConfig
    codes: int

    @property
    def layout(self) -> SimpleNamespace:
        """One code in a frame, as `MusicLMConfig.layout` says it."""
        return SimpleNamespace(depth=1, vocabulary=self.codes)

    @property
    def mulan_levels(self) -> int:
        """Tokens of a condition, which is not used."""
        return 1


class PlainDecoder(nn.Module):
    """A decoder of one code a position, with the methods of `MusicLM`: each frame has one code.

    Attributes:
      config: sizes.
      remat: as in `Transformer`.
      lanes: as in `Transformer`.
    """

    config: PlainConfig
    remat: bool = False
    lanes: int = 1

    def setup(self) -> None:
        c = self.config
        width, codes = c.transformer.embed, c.codes
        normal = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.table = self.param("table", normal, (codes, width))
        self.begin = self.param("begin", nn.initializers.normal(0.02), (width,))
        self.decoder = Transformer(c.transformer, self.remat, self.lanes)
        normal = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "vocab"))
        self.head = self.param("head", normal, (width, codes))

    def __call__(
        self, tokens: jax.Array, condition: jax.Array, deterministic: bool = True
    ) -> jax.Array:
        """Returns the logits of each token: int32 [B, S, 1] -> f32 [B, S, 1, V]."""
        past = self.table[tokens[:, :-1, 0]]
        begin = jnp.broadcast_to(self.begin, (len(tokens), 1, self.begin.shape[0]))
        x = self.decoder(jnp.concatenate([begin, past], axis=1), deterministic)
        return (x @ self.head)[:, :, None]

    # --- cached decoding ---

    def temporal_bias(self, length: int) -> jax.Array:
        """Returns the position bias of a sequence."""
        return self.decoder.bias(length)

    def depth_bias(self) -> None:
        """Returns nothing: there is no depth transformer."""

    def start_clip(self, condition: jax.Array, length: int, bias: jax.Array) -> Cache:
        """Returns an empty cache of a sequence."""
        return self.decoder.empty_cache(condition.shape[0], length, self.head.dtype)

    def next_frame(
        self, previous: jax.Array, cache: Cache, place: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Returns the hidden vector [B, D] of a place, from the code before it, int32 [B, 1]."""
        x = jnp.where(place > 0, self.table[previous[:, 0]], self.begin[None])
        x, cache = self.decoder.extend(x[:, None], cache, place, bias)
        return x[:, 0], cache

    def empty_depth_cache(self, batch: int) -> tuple[()]:
        """Returns nothing to carry from code to code of a frame."""
        return ()

    def next_logits(
        self, hidden: jax.Array, previous: Any, cache: tuple[()], place: Any, bias: None
    ) -> tuple[jax.Array, tuple[()]]:
        """Returns the logits f32 [B, V] of a frame's one code."""
        return hidden @ self.head, cache


def plain_config(row: Row) -> PlainConfig:
    """Returns the plain decoder's config."""
    size = SIZES[row.size]
    return PlainConfig(TransformerConfig(*size.decoder, dropout=0.0), size.codes)


# --- rows that are the same in all checkouts ---


@dataclasses.dataclass(frozen=True)
class PlainObjective:
    """Next-token prediction of a plain decoder."""

    model: PlainConfig

    def loss(self, params: Any, state: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        """Returns nats per token."""
        logits = PlainDecoder(self.model).apply({"params": params}, batch["tokens"], None)
        loss, metrics = cross_entropy(logits, batch["tokens"])
        return loss, (state, {"loss": loss, **metrics})


def training(row: Row) -> Pipeline:
    """Returns a step of supervised training."""
    if row.is_plain:
        objective = PlainObjective(plain_config(row))
        batch = {"tokens": np.zeros((row.batch, row.length, 1), np.int32)}
    else:
        objective, frames = PolicyObjective(data=None, model=music_config(row)), frames_of(row)
        batch = {
            "semantic": np.zeros((row.batch, frames), np.int32),
            "acoustic": np.zeros((row.batch, 2 * frames, COARSE_LEVELS), np.int32),
            "mulan": mulan_tokens(row),
        }

    # A random model without moments.
    transform, mesh = OPTIMISER.build(STEPS_A_RUN), sharding.make_mesh()
    variables = policy_shapes(row)
    shapes = jax.eval_shape(lambda: create_state({"params": random_weights(variables)}, transform))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    state = state.replace(params=random_weights(shapes.params))
    step = training_step(objective, transform, 0, mesh, sharding.replicated(mesh))
    stage = Stage(
        "training step",
        lambda state, batch: step(state, {}, batch),
        ("state", "batch"),
        ("state", "metrics"),
        donates=True,
    )
    return Pipeline([stage], {"state": state, "batch": batch}, size_of(shapes.params))


def decoding(row: Row) -> Pipeline:
    """Returns the decoder of a codec."""
    config = CODECS[row.size]
    module, key = SoundStream(config), jax.random.key(0)
    shapes = shapes_of(module, jnp.zeros((1, config.sample_rate_hz)), key)
    frames = round(row.clip_seconds * config.sample_rate_hz / config.stride)

    def decode(variables: Any, codes: jax.Array) -> jax.Array:
        return module.apply(variables, codes, method="decode")

    values = {
        "variables": random_weights(shapes),
        "codes": np.zeros((row.batch, frames, config.levels), np.int32),
    }
    stage = Stage("codec decode", decode, ("variables", "codes"), ("wav",))
    return Pipeline([stage], values, size_of(shapes["params"]))


# --- policies ---


def policy_module(row: Row) -> MusicLM | PlainDecoder:
    """Returns the row's policy."""
    return PlainDecoder(plain_config(row)) if row.is_plain else MusicLM(music_config(row))


def policy_shapes(row: Row) -> Any:
    """Returns the shapes of the policy's weights, its layers not stacked."""
    module = policy_module(row)
    tokens = jnp.zeros((1, 1, module.config.layout.depth), jnp.int32)
    mulan = jnp.zeros((1, module.config.mulan_levels), jnp.int32)
    return shapes_of(module, tokens, mulan)["params"]
