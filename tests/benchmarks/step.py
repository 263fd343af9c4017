"""A step of RL at the paper's size on the accelerator that is here: seconds, drift, and what the machine could do.

    python tests/benchmarks/step.py                  one GPU or TPU
    python tests/benchmarks/step.py --size=tiny      a CPU, to see that it runs

The jitted functions are those of `train_rl`; weights are random, for speed does not depend on them. The rollout and the
update are timed in turns, in float32 and in bfloat16; the limits are the bfloat16 matrix products and the copying that
this machine shows between those turns. Drift is what a token's log-probability as sampled and as the update scores it
differ by, in nats, and a clip's sum.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta

from musicrl_jax.core import sharding
from musicrl_jax.core.flops import flops
from musicrl_jax.core.state import Optimiser
from musicrl_jax.core.tokens import TokenLayout
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.transformer import LANES, TransformerConfig
from musicrl_jax.rl.rollout import Loaded, Studio
from musicrl_jax.rl.steps import build

TINY = Studio(
    MusicLM(MusicLMConfig(TransformerConfig(2, 64, 2, 128), TransformerConfig(1, 32, 2, 64), TokenLayout(64, 64, 4))),
    SoundStorm(SoundStormConfig(ConformerConfig(1, 2, 32, 64), codes=64)),
    SoundStream(SoundStreamConfig(channels=4, embed=16, codes=64)),
    MuLan(MuLanConfig()),
)


def seconds(function: Callable[[], Any]) -> float:
    """Of one call, to the end of what it started."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def limits(side: int) -> tuple[float, float]:
    """(FLOP/s of bfloat16 products, bytes/s read and written by a copy), the best of five each."""
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product, copied = jax.jit(lambda a: a @ a), jax.jit(lambda a: -a)
    jax.block_until_ready((product(a), copied(a)))
    return (
        2 * side**3 / min(seconds(lambda: product(a)) for _ in range(5)),
        4 * side**2 / min(seconds(lambda: copied(a)) for _ in range(5)),
    )


def random_weights(init: Callable[[jax.Array], Any]) -> Any:
    """Of the shapes that `init` makes, without compiling it."""
    shapes = meta.unbox(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32), x.dtype), shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    asked = parser.parse_args()
    studio = TINY
    if asked.size == "base":
        lanes = LANES.get(jax.default_backend(), 1)
        stream = SoundStream(SoundStreamConfig())
        studio = Studio(
            MusicLM(MusicLMConfig(), lanes=lanes), SoundStorm(SoundStormConfig()), stream, MuLan(MuLanConfig())
        )
    joint, storm = studio.mulan.config, studio.soundstorm.config
    wav = jnp.zeros((1, studio.sample_rate_hz))
    codes = jnp.zeros((1, 2, storm.levels), jnp.int32)
    text = jnp.ones((asked.clips, joint.text_length), jnp.int32)
    frozen = {
        "mulan": random_weights(lambda key: studio.mulan.init(key, wav, text[:1])),
        "soundstream": random_weights(lambda key: studio.soundstream.init(key, wav, key)),
        "soundstorm": random_weights(lambda key: studio.soundstorm.init(key, codes, codes > 0, storm.coarse_levels)),
    }
    mesh = sharding.make_mesh()
    side = 8192 if asked.size == "base" else 512
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {asked.clips} clips of {asked.seconds:g} s", flush=True
    )

    runs = {}
    with jax.set_mesh(mesh):
        for dtype in asked.dtypes:
            learner, steps = build(
                Loaded(studio, None, frozen, b"", {}, b"{}"),
                None,
                mesh,
                steps=10,
                batch_size=asked.clips,
                clip_seconds=asked.seconds,
                kl_strength=0.01,
                policy_optimiser=Optimiser(1e-5),
                value_optimiser=Optimiser(1e-5),
                gradient=PolicyGradient(),
                updates=1,
                kl_target=None,
                temperature=0.99,
                top_k=None,
                microbatches=asked.microbatches,
                remat=asked.size == "base",
                dtype=dtype,
            )
            state, _ = sharding.born_sharded(mesh, learner.create, jax.random.key(0))
            anchor = jax.tree.map(jnp.copy, state.policy)
            state = learner.started(state, anchor)
            keys = steps.keys(*(np.int32(n) for n in (0, 0, 3)))
            start = time.perf_counter()
            rollout = steps.rollout(*steps.gather(state.policy, frozen), text, keys)
            jax.block_until_ready(rollout)
            compiled = time.perf_counter() - start
            reward = jnp.linspace(0.0, 1.0, asked.clips)
            traced = steps.update.trace(state, learner.at_hand(state, anchor), rollout, reward)
            start = time.perf_counter()
            state, metrics = steps.update(state, steps.gather_learner(state, anchor), rollout, reward)
            print(
                f"{dtype}: drift {float(metrics['sampler_drift']):.4f} at most, a clip's sum "
                f"{float(metrics['sampler_drift_clip']):.3f}; compiled in {compiled:.0f} and "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
            work = flops(traced.jaxpr).matmul
            runs[dtype] = dict(steps=steps, state=state, anchor=anchor, keys=keys, rollout=rollout, work=work)
            runs[dtype] |= {"reward": reward, "rollouts": [], "updates": []}
        found = []
        for _ in range(asked.turns):
            for run in runs.values():
                steps = run["steps"]
                run["rollouts"].append(
                    seconds(
                        lambda run=run, steps=steps: steps.rollout(
                            *steps.gather(run["state"].policy, frozen), text, run["keys"]
                        )
                    )
                )

                def update(run: dict[str, Any] = run, steps: Any = steps) -> Any:
                    at_hand = steps.gather_learner(run["state"], run["anchor"])
                    run["state"], metrics = steps.update(run["state"], at_hand, run["rollout"], run["reward"])
                    return metrics

                run["updates"].append(seconds(update))
            found.append(limits(side))
    products, copying = (max(column) for column in zip(*found, strict=True))
    print(f"this machine: {products / 1e12:.0f} TFLOP/s of bfloat16 products, {copying / 1e9:.0f} GB/s by a copy\n")
    print("| function | dtype | median s | of | real time | matrix units' s | ratio |\n|---|---|---|---|---|---|---|")
    for dtype, run in runs.items():
        took = float(np.median(run["rollouts"]))
        print(f"| rollout | {dtype} | {took:.2f} | {asked.turns} | {asked.clips * asked.seconds / took:.1f} x | | |")
    for dtype, run in runs.items():
        took, least = float(np.median(run["updates"])), run["work"] / products
        print(f"| update | {dtype} | {took:.3f} | {asked.turns} | | {least:.3f} | {took / least:.1f} |")


if __name__ == "__main__":
    main()
