"""The jitted functions of a step of RL, and how all that they touch lies on a mesh: what `train_rl` runs and
`musicrl plan` compiles.

Legend: B clips, L text pieces.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from musicrl_jax.core import sharding
from musicrl_jax.core.keys import row_keys, step_key
from musicrl_jax.losses.optimiser import Optimiser, in_dtype
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.models.layers import stacked, unstacked
from musicrl_jax.models.musiclm import MusicLM, Value
from musicrl_jax.rl.learner import AtHand, Learner, RLState
from musicrl_jax.rl.rewards import LoadedMixture, Units
from musicrl_jax.rl.rollout import Loaded, Rollout
from musicrl_jax.rl.sample import Drawn, Sampling

# XLA's effort O1, by platform, for what reads prompts, decodes and rewards clips: of the work of compiling that for a
# TPU it leaves a quarter or less, and takes 0.05 to 0.09 s of a step of seconds. In loops of thousands of steps, as
# drawing has, it takes several times as long.
LITTLE_EFFORT = {"tpu": {"optimization_level": 19}}
# Platforms on which frozen networks go through their layers in a loop, which is compiled as one layer is.
LOOPED = ("tpu",)


class Steps(NamedTuple):
    """What happens to a batch, in its order, and where the state is while it does.

    `keys`: (seed, step, stream) -> a key for each of B rows. `gather`: (policy, frozen) -> the same, SoundStorm in its
    dtype, the policy's layers apart and whole but for the tensor axis, the rest whole, and `stacked` on LOOPED
    platforms; a loop of thousands of small steps would else fetch them in every one, and a program that computes takes
    minutes longer to compile if it also fetches a thousand arrays. `read`, `draw`, `fill`, `sound`: those of
    `rl.rollout.Studio`, a network each; one of all four needs 5 GiB more while it draws, is compiled with one effort,
    and is no faster. `gather_scorers`: scorers -> the same, whole. `reward`: these, the rollout and units -> (f32 [B],
    its terms). `gather_learner`: (state, anchor) -> AtHand. `update`: (state, these, rollout, reward) -> (state,
    metrics); the old state is gone.
    """

    shapes: Any  # of the learner's RLState
    shardings: Any  # of the same
    drawing: Any  # of the policy as it draws
    learning: Any  # of AtHand
    keys: Any
    gather: Any
    read: Any
    draw: Any
    fill: Any
    sound: Any
    gather_scorers: Any
    reward: Any
    gather_learner: Any
    update: Any

    def rollout(self, policy: Any, frozen: dict[str, Any], text: jax.Array, keys: jax.Array) -> Rollout:
        """What `gather` gave, text int32 [B, L] and keys [B] -> a clip for each prompt, as `Studio.rollout` has it."""
        embedding, mulan = self.read(frozen["mulan"], text)
        drawn = self.draw(policy, mulan, keys)
        acoustic = self.fill(frozen["soundstorm"], drawn.tokens, keys)
        wav = self.sound(frozen["soundstream"], acoustic)
        return Rollout(text, embedding, mulan, *drawn, acoustic, wav)


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
    gathered, drawing = (
        sharding.laid_out(mesh, create, key, rules=sharding.DRAWING_RULES)[1]
        for create in (learner.create, lambda key: unstacked(learner.create(key).policy))
    )
    learning = AtHand(gathered.policy, gathered.policy, gathered.value)
    whole, by_row = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    platform = mesh.devices.flat[0].platform
    little_effort, looped = LITTLE_EFFORT.get(platform), platform in LOOPED

    def keys(seed: jax.Array, step: jax.Array, stream: jax.Array) -> jax.Array:
        return row_keys(step_key(seed, step, stream), batch_size)

    def gather(policy: Any, frozen: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        frozen = {name: in_dtype(tree, dtype) if name == "soundstorm" else tree for name, tree in frozen.items()}
        return unstacked(policy), stacked(frozen) if looped else frozen

    def gather_learner(state: RLState, anchor: Any) -> AtHand:
        return jax.tree.map(jnp.copy, learner.at_hand(state, anchor))  # the state itself is given away

    def draw(policy: Any, mulan: jax.Array, keys: jax.Array) -> Drawn:
        return studio.draw(policy, mulan, keys, frames, learner.sampling)

    def reward(scorers: Any, rollout: Rollout, units: Units) -> tuple[jax.Array, dict[str, jax.Array]]:
        terms = mixture.score(scorers, rollout)
        return mixture.total(terms, units), terms

    return learner, Steps(
        shapes,
        shardings,
        drawing,
        learning,
        keys=jax.jit(keys, out_shardings=by_row),
        gather=jax.jit(gather, out_shardings=(drawing, whole)),
        read=jax.jit(studio.read, out_shardings=by_row, compiler_options=little_effort),
        draw=jax.jit(draw, out_shardings=by_row),
        fill=jax.jit(studio.fill, out_shardings=by_row),
        sound=jax.jit(studio.sound, out_shardings=by_row, compiler_options=little_effort),
        gather_scorers=jax.jit(lambda scorers: scorers, out_shardings=whole),
        reward=jax.jit(reward, out_shardings=by_row, compiler_options=little_effort),
        gather_learner=jax.jit(gather_learner, out_shardings=learning),
        update=jax.jit(
            partial(learner.update, layout=shardings, gathered=gathered),
            donate_argnums=0,
            out_shardings=(shardings, whole),
        ),
    )
