"""The rows of a checkout before `musicrl_jax.systems`, such as f1186c7: its sampler and learner.

Legend: B clips, K codes in a frame.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contestants import jax_models
from contestants.pipeline import Compiled, Pipeline, Stage, random_weights, size_of
from contestants.rows import KL_STRENGTH, TEMPERATURE, Row
from flax.core import meta

from musicrl_jax.models.layers import stacked, unstacked
from musicrl_jax.models.musiclm import MusicLM
from musicrl_jax.models.transformer import LANES
from musicrl_jax.rl.learner import Learner
from musicrl_jax.rl.rollout import MuLan, Rollout, SoundStorm, SoundStream, Studio
from musicrl_jax.rl.sample import Sampling, sample

SAMPLING = Sampling(TEMPERATURE)


def lanes() -> int:
    """Returns the lanes of this platform."""
    return LANES.get(jax.default_backend(), 1)


def drawing(row: Row) -> Pipeline:
    """Returns a draw, without an update."""
    module = jax_models.policy_module(row).clone(lanes=lanes())
    frames = row.length or jax_models.frames_of(row)
    shapes = jax.eval_shape(stacked, jax_models.policy_shapes(row))

    def draw(weights: Any, mulan: jax.Array, keys: jax.Array) -> Any:
        return sample(module, weights, mulan, keys, frames, SAMPLING)

    mulan = jax_models.mulan_tokens(row)[:, : module.config.mulan_levels]
    values = {"policy": random_weights(shapes), "mulan": mulan, "keys": jax_models.row_keys(row)}
    stages = [
        Stage("draw", unstacked, ("policy",), ("weights",)),
        Stage("draw", draw, ("weights", "mulan", "keys"), ("sampled",)),
    ]
    return Pipeline(stages, values, size_of(shapes))


def reinforcing(row: Row) -> Pipeline:
    """Returns a step of RL: a draw and an update."""
    draw = drawing(row)
    transform = jax_models.OPTIMISER.build(jax_models.STEPS_A_RUN)
    learner = Learner(
        jax_models.policy_module(row).clone(lanes=lanes()),
        None,  # the baseline needs no values
        transform,
        transform,
        jax_models.GRADIENT,
        KL_STRENGTH,
        SAMPLING,
    )
    shapes = meta.unbox(jax.eval_shape(learner.create, jax.random.key(0)))

    def copy(state: Any, anchor: Any) -> Any:
        # The update donates the state.
        return jax.tree.map(jnp.copy, learner.at_hand(state, anchor))

    def update(state: Any, weights: Any, mulan: jax.Array, sampled: Any, reward: jax.Array) -> Any:
        rollout = Rollout((), (), mulan, *sampled, (), ())
        return learner.update(state, weights, rollout, reward)

    inputs = "state", "learner's weights", "mulan", "sampled", "reward"
    stages = [
        Stage("draw", lambda state: unstacked(state.policy), ("state",), ("weights",)),
        draw.stages[-1],
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
    studio = Studio(
        MusicLM(jax_models.music_config(row), lanes=lanes()),
        SoundStorm(configs["soundstorm"]),
        SoundStream(configs["soundstream"]),
        MuLan(configs["mulan"]),
    )
    frozen = jax_models.frozen_variables(configs)
    frames, figure = jax_models.frames_of(row), "prompt to wav"

    def sample_tokens(weights: Any, mulan: jax.Array, keys: jax.Array) -> jax.Array:
        return studio.draw(weights, mulan, keys, frames, SAMPLING).tokens

    stages = [
        Stage(figure, unstacked, ("policy",), ("weights",)),
        Stage(figure, studio.read, ("mulan's weights", "text"), ("embedding", "mulan")),
        Stage(figure, sample_tokens, ("weights", "mulan", "keys"), ("tokens",)),
        Stage(figure, studio.fill, ("soundstorm's weights", "tokens", "keys"), ("codes",)),
        Stage(figure, studio.sound, ("soundstream's weights", "codes"), ("wav",)),
    ]
    named = {f"{name}'s weights": variables for name, variables in frozen.items()}
    values = {**draw.values, **named, "text": jax_models.text_pieces(row)}
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
