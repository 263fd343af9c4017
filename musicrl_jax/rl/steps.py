"""The jitted functions of a step of RL, and how all that they touch lies on a mesh: what `train_rl` runs and
`musicrl plan` compiles.

Legend: B clips, L text pieces, F frames.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from musicrl_jax.core import sharding
from musicrl_jax.core.keys import row_keys, step_key
from musicrl_jax.core.state import Optimiser, in_dtype
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.models.musiclm import MusicLM, Value
from musicrl_jax.rl.learner import AtHand, Learner, RLState
from musicrl_jax.rl.rewards import LoadedMixture, Units
from musicrl_jax.rl.rollout import Loaded, Rollout
from musicrl_jax.rl.sample import Sampling

# XLA's effort O1, by platform: of the work of compiling two networks of convolutions for a TPU it leaves a quarter, and
# of a step of seconds it takes 0.02 s more. Loops of thousands of steps are several times slower by it.
REWARD_OPTIONS = {"tpu": {"optimization_level": 19}}


class Steps(NamedTuple):
    """What happens to a batch, in its order, and where the state is while it does.

    `keys`: (seed, step, stream) -> a key for each of B rows. `gather`: (policy, frozen) -> the same, SoundStorm in its
    dtype, the policy whole but for the tensor axis and the rest whole; a loop of thousands of small steps would else
    fetch them in every one, and a program that computes takes minutes longer to compile if it also fetches a thousand
    arrays. `rollout`: both, text [B, L] and keys -> Rollout. `gather_scorers`: scorers -> the same, whole. `reward`:
    these, the rollout and units -> (f32 [B], its terms). `gather_learner`: (state, anchor) -> AtHand. `update`: (state,
    these, rollout, reward) -> (state, metrics); the old state is gone.
    """

    shapes: Any  # of the learner's RLState
    shardings: Any  # of the same
    learning: Any  # of AtHand; the policy's is that of drawing too
    keys: Any
    gather: Any
    rollout: Any
    gather_scorers: Any
    reward: Any
    gather_learner: Any
    update: Any


def build(
    loaded: Loaded,
    mixture: LoadedMixture,
    mesh: Mesh,
    *,
    steps: int,
    batch_size: int,
    clip_seconds: float,
    kl_strength: float,
    policy_optimiser: Optimiser,
    value_optimiser: Optimiser,
    gradient: PolicyGradient,
    updates: int,
    kl_target: float | None,
    temperature: float,
    top_k: int | None,
    microbatches: int,
    remat: bool,
    dtype: str,
) -> tuple[Learner, Steps]:
    """The learner and the functions of a run with these settings of `train_rl`, without weights.

    ValueError where the batch does not divide among the mesh's devices.
    """
    sharding.rows_a_shard(mesh, batch_size)
    studio, frames, config = loaded.studio, loaded.studio.frames(clip_seconds), loaded.studio.musiclm.config
    lanes = loaded.studio.musiclm.lanes
    learner = Learner(
        MusicLM(config, remat, lanes),
        Value(config, remat, lanes),
        policy_optimiser.build(steps * updates),
        value_optimiser.build(steps * updates),
        gradient,
        kl_strength,
        Sampling(temperature, top_k),
        updates,
        None if kl_target is None else kl_target * clip_seconds,
        microbatches,
        dtype,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes, shardings = sharding.laid_out(mesh, learner.create, key)
    gathered = sharding.laid_out(mesh, learner.create, key, rules=sharding.DRAWING_RULES)[1]
    learning = AtHand(gathered.policy, gathered.policy, gathered.value)
    whole, by_row = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def keys(seed: jax.Array, step: jax.Array, stream: jax.Array) -> jax.Array:
        return row_keys(step_key(seed, step, stream), batch_size)

    def gather(policy: Any, frozen: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return policy, {name: in_dtype(tree, dtype) if name == "soundstorm" else tree for name, tree in frozen.items()}

    def gather_learner(state: RLState, anchor: Any) -> AtHand:
        return jax.tree.map(jnp.copy, learner.at_hand(state, anchor))  # the state itself is given away

    def rollout(policy: Any, frozen: Any, text: jax.Array, keys: jax.Array) -> Rollout:
        return studio.rollout(policy, frozen, text, keys, frames, learner.sampling)

    def reward(scorers: Any, rollout: Rollout, units: Units) -> tuple[jax.Array, dict[str, jax.Array]]:
        terms = mixture.score(scorers, rollout)
        return mixture.total(terms, units), terms

    return learner, Steps(
        shapes,
        shardings,
        learning,
        keys=jax.jit(keys, out_shardings=by_row),
        gather=jax.jit(gather, out_shardings=(learning.policy, whole)),
        rollout=jax.jit(rollout, out_shardings=by_row),
        gather_scorers=jax.jit(lambda scorers: scorers, out_shardings=whole),
        reward=jax.jit(
            reward, out_shardings=by_row, compiler_options=REWARD_OPTIONS.get(mesh.devices.flat[0].platform)
        ),
        gather_learner=jax.jit(gather_learner, out_shardings=learning),
        update=jax.jit(
            partial(learner.update, layout=shardings, gathered=gathered),
            donate_argnums=0,
            out_shardings=(shardings, whole),
        ),
    )
