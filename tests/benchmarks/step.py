"""A step of RL at the paper's size on the accelerator that is here: seconds, drift, and what the machine could do.

    python tests/benchmarks/step.py                  one GPU or TPU
    python tests/benchmarks/step.py --size=tiny      a CPU, to see that it runs

The jitted functions are those of `train_rl`; weights are random, for speed does not depend on them. All are compiled
at once, then timed in turns, in float32 and in bfloat16; the limits are the bfloat16 matrix products and the copying
that this machine shows between those turns. Of drawing, the copying's limit is that of reading the policy's weights
once for each token (the temporal part's once a frame). Drift is what a token's log-probability as sampled and as the
update scores it differ by, in nats, and a clip's sum.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import meta
from jax.sharding import Mesh

from musicrl_jax.core import sharding
from musicrl_jax.losses.optimiser import Optimiser
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import LANES, TransformerConfig
from musicrl_jax.planning.flops import flops
from musicrl_jax.rl.learner import Learner
from musicrl_jax.rl.rollout import Loaded, Studio
from musicrl_jax.rl.steps import Steps, build

TINY = Studio(
    MusicLM(
        MusicLMConfig(
            TransformerConfig(2, 64, 2, 128),
            TransformerConfig(1, 32, 2, 64),
            TokenLayout(64, 64, 4),
        )
    ),
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
    """(FLOP/s of bfloat16 products, bytes/s read and written by a copy), the best of five each, of 8 calls in a row."""
    a, b = (
        jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        for shape in ((side, side), (8 * side, side))
    )
    product, copied = jax.jit(lambda a: a @ a), jax.jit(lambda b: -b)
    jax.block_until_ready((product(a), copied(b)))
    return (
        8 * 2 * side**3 / min(seconds(lambda: [product(a) for _ in range(8)]) for _ in range(5)),
        8 * 4 * b.size / min(seconds(lambda: [copied(b) for _ in range(8)]) for _ in range(5)),
    )


def random_weights(init: Callable[[jax.Array], Any]) -> Any:
    """Of the shapes that `init` makes, without compiling it."""
    shapes = meta.unbox(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32), x.dtype), shapes
    )


class Run:
    """A step in one dtype: its functions, compiled all at once and timed one by one, and what they act on."""

    def __init__(
        self, learner: Learner, steps: Steps, mesh: Mesh, frozen: dict[str, Any], text: jax.Array
    ) -> None:
        self.frozen, self.text = frozen, text
        state, _ = sharding.create_sharded(mesh, learner.create, jax.random.key(0))
        self.anchor = jax.tree.map(jnp.copy, state.policy)
        self.state = learner.started(state, self.anchor)
        self.keys = steps.keys(*(np.int32(n) for n in (0, 0, 3)))
        self.reward = jnp.linspace(0.0, 1.0, len(text))
        policy, others = jax.eval_shape(steps.gather, state.policy, frozen)
        rollout = jax.eval_shape(steps.rollout, policy, others, text, self.keys)
        arguments = {
            "gather": (state.policy, frozen),
            "read": (others["mulan"], text),
            "draw": (policy, rollout.mulan, self.keys),
            "fill": (others["soundstorm"], rollout.tokens, self.keys),
            "sound": (others["soundstream"], rollout.acoustic),
            "gather_learner": (self.state, self.anchor),
            "update": (
                self.state,
                jax.eval_shape(steps.gather_learner, state, self.anchor),
                rollout,
                self.reward,
            ),
        }
        traces = {name: getattr(steps, name).trace(*given) for name, given in arguments.items()}
        self.work = {name: flops(traced.jaxpr).matmul for name, traced in traces.items()}
        self.took: dict[str, list[float]] = {name: [] for name in traces}
        self.compiled: dict[str, float] = {}
        with ThreadPoolExecutor() as pool:
            programs = dict(zip(traces, pool.map(self._compile, traces.items()), strict=True))
        self.steps = steps._replace(
            **{name: partial(self._timed, name, program) for name, program in programs.items()}
        )

    def _compile(self, named: tuple[str, Any]) -> Any:
        name, traced = named
        start = time.perf_counter()
        program = traced.lower().compile()
        self.compiled[name] = time.perf_counter() - start
        print(f"  {name} compiled in {self.compiled[name]:.0f} s", flush=True)
        return program

    def _timed(self, name: str, program: Callable[..., Any], *given: Any) -> Any:
        start = time.perf_counter()
        found = jax.block_until_ready(program(*given))
        self.took[name].append(time.perf_counter() - start)
        return found

    def step(self) -> dict[str, Any]:
        """All of them in their order; what the update measured."""
        steps = self.steps
        rollout = steps.rollout(*steps.gather(self.state.policy, self.frozen), self.text, self.keys)
        learning = steps.gather_learner(self.state, self.anchor)
        self.state, metrics = steps.update(self.state, learning, rollout, self.reward)
        return metrics

    def weights_read(self, config: MusicLMConfig, frames: int) -> int:
        """Bytes of the policy's weights that `draw` reads if each is read once for every frame, or code, it serves."""
        trunk = self.state.policy["trunk"]
        temporal, depth = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(trunk[part]))
            for part in ("temporal", "depth")
        )
        return frames * (temporal + config.layout.depth * depth)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
            MusicLM(MusicLMConfig(), lanes=lanes),
            SoundStorm(SoundStormConfig()),
            stream,
            MuLan(MuLanConfig()),
        )
    joint, storm = studio.mulan.config, studio.soundstorm.config
    wav = jnp.zeros((1, studio.sample_rate_hz))
    codes = jnp.zeros((1, 2, storm.levels), jnp.int32)
    text = jnp.ones((asked.clips, joint.text_length), jnp.int32)
    frozen = {
        "mulan": random_weights(lambda key: studio.mulan.init(key, wav, text[:1])),
        "soundstream": random_weights(lambda key: studio.soundstream.init(key, wav, key)),
        "soundstorm": random_weights(
            lambda key: studio.soundstorm.init(key, codes, codes > 0, storm.coarse_levels)
        ),
    }
    mesh = sharding.make_mesh()
    side = 8192 if asked.size == "base" else 512
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {asked.clips} clips of {asked.seconds:g} s",
        flush=True,
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
            print(f"{dtype}:", flush=True)
            run = runs[dtype] = Run(learner, steps, mesh, frozen, text)
            drift = [float(run.step()[f"sampler_drift{which}"]) for which in ("", "_clip")]
            print(f"  drift {drift[0]:.4f} at most, a clip's sum {drift[1]:.3f}", flush=True)
            for times in run.took.values():
                times.clear()
        found = []
        for _ in range(asked.turns):
            for run in runs.values():
                jax.block_until_ready(run.step())
            found.append(limits(side))
    products, copying = (max(column) for column in zip(*found, strict=True))
    print(
        f"this machine: {products / 1e12:.0f} TFLOP/s of bfloat16 products, {copying / 1e9:.0f} GB/s by a copy\n"
    )
    print(
        f"| function | dtype | median s of {asked.turns} | matrix s | memory s | ratio to the higher | compiled in s |"
    )
    print("|---|---|---|---|---|---|---|")
    frames = studio.frames(asked.seconds)
    for dtype, run in runs.items():
        medians = {name: float(np.median(times)) for name, times in run.took.items()}
        for name, took in medians.items():
            matrix = run.work[name] / products
            memory = (
                run.weights_read(studio.musiclm.config, frames) / copying if name == "draw" else 0.0
            )
            limit = max(matrix, memory)
            print(
                f"| {name} | {dtype} | {took:.4f} | {matrix:.4f} | {f'{memory:.4f}' if memory else ''} | "
                f"{f'{took / limit:.1f}' if limit else ''} | {run.compiled[name]:.0f} |"
            )
        whole = sum(medians.values())
        print(f"| all | {dtype} | {whole:.4f}: {asked.clips / whole:.2f} clips a second | | | | |")


if __name__ == "__main__":
    main()
