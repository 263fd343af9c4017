"""The rows of a checkout that has `musicrl_jax.systems`: what `train_rl` and `generate` call.

Legend: B clips, S tokens of a clip, V codes.
"""

import dataclasses
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from contestants import jax_models
from contestants.jax_models import PlainConfig, PlainDecoder
from contestants.pipeline import Compiled, Pipeline, Stage, random_weights, size_of
from contestants.rows import KL_STRENGTH, TEMPERATURE, Row
from flax.core import meta

from musicrl_jax.losses.policy_gradient import token_log_probs
from musicrl_jax.models import layers
from musicrl_jax.models.transformer import LANES
from musicrl_jax.rl.config import RLConfig
from musicrl_jax.rl.learner import Learner
from musicrl_jax.systems.musiclm import MuLanCondition, MusicLMSystem
from musicrl_jax.systems.sampling import SampledTokens, Sampling
from musicrl_jax.systems.system import MusicSystem, Rollout, Weights

SAMPLING = Sampling(TEMPERATURE)
# Some checkouts join the weights of several products before sampling, and have a sampler of codes.
joined = getattr(layers, "joined", lambda weights: weights)
categorical = find_spec("musicrl_jax.models.categorical") and import_module(
    "musicrl_jax.models.categorical"
)


@dataclasses.dataclass(frozen=True)
class PlainSystem(MusicSystem):
    """A plain decoder behind the contract; it makes no sound."""

    PARTS: ClassVar = {"policy": PlainConfig}
    sample_rate_hz, frame_seconds, frame_tokens = 16_000, 0.04, 1
    config: PlainConfig
    remat: bool = False
    lanes: int = 1

    @property
    def _policy(self):
        return PlainDecoder(self.config, self.remat, self.lanes)

    @classmethod
    def from_models(cls, models):
        return cls(models["policy"].config)

    def tuned(self, platform, remat=False):
        return dataclasses.replace(self, remat=remat, lanes=LANES.get(platform, 1))

    def compute_copy(self, weights, dtype):
        return Weights(joined(layers.unstacked(weights.policy)), weights.frozen)

    def read(self, prompts):
        return {"clip": np.zeros(len(prompts), np.int32)}

    def condition(self, frozen, text):
        return text["clip"]

    def init(self, key):
        tokens = jnp.zeros((1, 1, 1), jnp.int32)
        return layers.stacked(self._policy.init(key, tokens, tokens)["params"])

    def sample(self, policy, condition, keys, length, sampling, beginning=None):
        model, variables, batch = self._policy, {"params": policy}, keys.shape[0]

        def apply(method, *arguments):
            return model.apply(variables, *arguments, method=method)

        bias = apply(PlainDecoder.temporal_bias, length)

        def sample_token(carry, place):
            previous, cache = carry
            hidden, cache = apply(PlainDecoder.next_frame, previous, cache, place, bias)
            logits, _ = apply(PlainDecoder.next_logits, hidden, None, (), 0, None)
            allowed = sampling.allowed(logits)
            scores = sampling.log_distribution(logits, allowed)
            place_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, place)
            code = sample_codes(place_keys, scores)
            sampled = SampledTokens(code, token_log_probs(scores, code), allowed)
            if beginning is not None:
                code = jnp.where(place < beginning.length, beginning.tokens[:, place], code)
            return (code[:, None], cache), sampled.replace(tokens=code)

        cache = apply(PlainDecoder.start_clip, condition, length, bias)
        start = jnp.zeros((batch, 1), jnp.int32), cache
        _, sampled = jax.lax.scan(sample_token, start, jnp.arange(length, dtype=jnp.int32))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), sampled)

    def distributions(self, policy, condition, sampled, sampling):
        variables = {"params": policy if self.remat else layers.unstacked(policy)}
        logits = self._policy.apply(variables, sampled.tokens[:, :, None], condition)
        return sampling.log_distribution(logits[:, :, 0], sampled.allowed)

    def decode(self, frozen, codes):
        return jnp.zeros((len(codes), 1, 1))


def sample_codes(keys: jax.Array, scores: jax.Array) -> jax.Array:
    """Returns a code of each distribution f32 [B, V], int32 [B]."""
    if not categorical:
        return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
    return categorical.sample_codes(scores, jax.vmap(lambda key: jax.random.uniform(key, 2))(keys))


def system_of(row: Row, **parts: Any) -> MusicSystem:
    """Returns the row's system, in its fastest form for this platform."""
    if row.is_plain:
        system = PlainSystem(jax_models.plain_config(row))
    else:
        system = MusicLMSystem({"policy": jax_models.music_config(row), **parts})
    return system.tuned(jax.default_backend())


def sampling_stages(row: Row, system: MusicSystem, figure: str, reads: int) -> list[Stage]:
    """Returns the stages from weights, condition and keys to tokens."""
    length = row.length or system.length(row.clip_seconds)

    def copy(policy: Any, frozen: Any) -> Weights:
        return system.compute_copy(Weights(policy, frozen), "float32")

    def sample(weights: Weights, condition: Any, keys: jax.Array) -> SampledTokens:
        return system.sample(weights.policy, condition, keys, length, SAMPLING)

    inputs = "weights", "condition", "keys"
    return [
        Stage(figure, copy, ("policy", "frozen"), ("weights",)),
        Stage(figure, sample, inputs, ("sampled",), reads=reads),
    ]


def drawing(row: Row) -> Pipeline:
    """Returns a draw, without an update."""
    system = system_of(row)
    shapes = meta.unbox(jax.eval_shape(system.init, jax.random.key(0)))
    reads = jax_models.bytes_read(row, shapes)
    values = {"policy": random_weights(shapes), "frozen": {}, "keys": jax_models.row_keys(row)}
    values["condition"] = condition_of(row)
    return Pipeline(sampling_stages(row, system, "draw", reads), values, size_of(shapes))


def condition_of(row: Row) -> Any:
    """Returns what B clips are conditioned on."""
    if row.is_plain:
        return np.zeros(row.batch, np.int32)
    return MuLanCondition(np.zeros((row.batch, 1), np.float32), jax_models.mulan_tokens(row))


def reinforcing(row: Row) -> Pipeline:
    """Returns a step of RL: a draw and an update."""
    draw, system = drawing(row), system_of(row)
    seconds = row.length * system.frame_seconds if row.is_plain else row.clip_seconds
    config = RLConfig(
        steps=jax_models.STEPS_A_RUN,
        batch_size=row.batch,
        clip_seconds=seconds,
        kl_strength=KL_STRENGTH,
        policy_optimiser=jax_models.OPTIMISER,
        value_optimiser=jax_models.OPTIMISER,
        gradient=jax_models.GRADIENT,
        sampling=SAMPLING,
    )
    learner = Learner(system, config)
    shapes = meta.unbox(jax.eval_shape(learner.create, jax.random.key(0)))

    sampling_copy, sample = draw.stages

    def copy_policy(state: Any, frozen: Any) -> Any:
        return sampling_copy.function(state.policy, frozen)

    def copy(state: Any, anchor: Any) -> Any:
        # The update donates the state.
        return jax.tree.map(jnp.copy, learner.compute_copy(state, anchor))

    def update(state: Any, weights: Any, condition: Any, sampled: Any, reward: jax.Array) -> Any:
        return learner.update(state, weights, Rollout(condition, sampled, (), ()), reward)

    inputs = "state", "learner's weights", "condition", "sampled", "reward"
    stages = [
        dataclasses.replace(sampling_copy, function=copy_policy, inputs=("state", "frozen")),
        sample,
        Stage("update", copy, ("state", "anchor"), ("learner's weights",)),
        Stage("update", update, inputs, ("state", "metrics"), donates=True),
    ]
    values = {name: value for name, value in draw.values.items() if name != "policy"}
    values |= {
        "state": jax_models.first_rl_state(shapes, KL_STRENGTH),
        "anchor": draw.values["policy"],
        "reward": np.linspace(0.0, 1.0, row.batch, dtype=np.float32),
    }
    return Pipeline(stages, values, draw.weights)


def playing(row: Row) -> Pipeline:
    """Returns what turns prompts into wavs."""
    draw, configs = drawing(row), jax_models.frozen_configs(row)
    system, figure = system_of(row, **configs), "prompt to wav"

    def codes(weights: Weights, sampled: SampledTokens, keys: jax.Array) -> Any:
        return system.codes(weights.frozen, sampled.tokens, keys)

    copy, sample = sampling_stages(row, system, figure, draw.stages[-1].reads)
    stages = [
        copy,
        Stage(
            figure,
            lambda weights, text: system.condition(weights.frozen, {"pieces": text}),
            ("weights", "text"),
            ("condition",),
        ),
        sample,
        Stage(figure, codes, ("weights", "sampled", "keys"), ("codes",)),
        Stage(
            figure,
            lambda weights, codes: system.decode(weights.frozen, codes),
            ("weights", "codes"),
            ("wav",),
        ),
    ]
    frozen = jax_models.frozen_variables(configs)
    values = {**draw.values, "frozen": frozen, "text": jax_models.text_pieces(row)}
    return Pipeline(stages, values, draw.weights)


PIPELINES = {
    "draw": drawing,
    "rl": reinforcing,
    "wav": playing,
    "train": jax_models.training,
    "decode": jax_models.decoding,
}


def work(row: Row) -> Compiled:
    """Compiles the row."""
    return Compiled(PIPELINES[row.kind](row))
