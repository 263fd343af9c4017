"""A step of RL at the paper's size on this machine: seconds, drift, and the limits of the machine.

    python tests/benchmarks/step.py                  one GPU or TPU
    python tests/benchmarks/step.py --size=tiny --seconds=1      a CPU, to see that it runs

The functions are those of `train_rl`, without rewards. Weights are random: speed does not depend on
them. Runs in float32 and in bfloat16 take turns. Between turns the machine's speed in bfloat16
matrix products and in copying is measured; these are the limits. The memory limit of sampling is
reading the policy's weights: those of the temporal model once a frame, those of the depth model
once a code. Drift is the difference in nats between the log-prob of a token when it was sampled and
when the update scores it, and the sum of these differences over a clip.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh

from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.core.keys import Stream
from musicrl_jax.losses.optimiser import Optimiser
from musicrl_jax.models.mulan import MuLanConfig
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.soundstorm import SoundStormConfig
from musicrl_jax.models.soundstream import SoundStreamConfig
from musicrl_jax.planning.flops import flops
from musicrl_jax.planning.models import PLANNED, PROMPT, STAND_INS
from musicrl_jax.rl.config import RLConfig
from musicrl_jax.rl.rewards import LoadedMixture
from musicrl_jax.rl.steps import Run
from musicrl_jax.systems import folder

BASE = {
    "policy": MusicLMConfig(),
    "soundstorm": SoundStormConfig(),
    "soundstream": SoundStreamConfig(),
    "mulan": MuLanConfig(),
}
STEPS_A_RUN = 10  # of the learning rate's schedule
CALLS = 8  # in a row, of a product or a copy
BATCHES_OF_CALLS = 5  # the fastest one counts


# --- the system and its functions ---


def random_system(configs: Mapping[str, Any]) -> folder.LoadedSystem:
    """Returns a MusicLM of random weights, without compiling the models' init."""
    rng = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape.shape, np.float32)).astype(shape.dtype)

    def read(name: str, _: type) -> checkpoint.Model:
        shapes = meta.unbox(jax.eval_shape(configs[name].init, jax.random.key(0)))
        return checkpoint.Model(configs[name], jax.tree.map(draw, shapes), PLANNED, STAND_INS)

    parts = {name: {"folder": name, "hash": ""} for name in configs}
    return folder.load("random", read=read, described={"kind": "musiclm", "parts": parts})


class Timed:
    """A jitted function that is compiled in its first call; every call is timed.

    Attributes:
      compile_seconds: of tracing and compiling.
      products: floating-point operations of matrix products in a call.
      seconds: of each call.
    """

    def __init__(self, name: str, function: Any):
        self.name, self.function, self.program = name, function, None
        self.seconds: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function, and waits for its results."""
        if self.program is None:
            start = time.perf_counter()
            traced = self.function.trace(*arguments)
            self.products = flops(traced.jaxpr).matmul
            self.program = traced.lower().compile()
            self.compile_seconds = time.perf_counter() - start
            print(f"  {self.name} compiled in {self.compile_seconds:.0f} s", flush=True)
        start = time.perf_counter()
        results = jax.block_until_ready(self.program(*arguments))
        self.seconds.append(time.perf_counter() - start)
        return results


class TimedRun:
    """A run of RL with constant rewards, whose functions are timed one by one.

    Attributes:
      functions: in the order of a step.
      sampling_bytes: bytes of weights that sampling a batch reads.
    """

    def __init__(self, loaded: folder.LoadedSystem, config: RLConfig, mesh: Mesh):
        # No rewards are loaded: `step` gives constant ones to the update.
        self.run = run = Run(loaded, LoadedMixture(None, {}), config, mesh)
        self.state, self.anchor = run.start()
        self.prompts = [PROMPT] * config.batch_size
        self.reward = run.player.put(np.linspace(0.0, 1.0, config.batch_size, dtype=np.float32))

        # Replace the jitted functions by timed ones.
        player, system = run.player, run.player.system
        player.compute_copy = Timed("compute copy", player.compute_copy)
        for name, function in player.jitted.items():
            player.jitted[name] = Timed(name, function)
        player.sample = Timed("sample", player.sample)
        run.compute_copy = Timed("learner's compute copy", run.compute_copy)
        run.update = Timed("update", run.update)
        rollout = (player.jitted["condition"], player.sample)
        rollout += (player.jitted["codes"], player.jitted["decode"])
        self.functions = (player.compute_copy, *rollout, run.compute_copy, run.update)

        # The weights that sampling reads.
        temporal, depth = (
            sum(leaf.nbytes for leaf in jax.tree.leaves(self.anchor["trunk"][name]))
            for name in ("temporal", "depth")
        )
        frames = system.length(config.clip_seconds) // system.frame_tokens
        self.sampling_bytes = frames * (temporal + system.frame_tokens * depth)

    def step(self) -> dict[str, jax.Array]:
        """Samples and updates; returns the update's metrics."""
        rollout = self.run.draw(self.state.policy, self.prompts, 0, Stream.ROLLOUT)
        copy = self.run.compute_copy(self.state, self.anchor)
        self.state, metrics = self.run.update(self.state, copy, rollout, self.reward)
        return metrics


# --- the machine ---


def fastest(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Returns the seconds of one of CALLS calls in a row; the fastest of BATCHES_OF_CALLS."""
    jax.block_until_ready(function(x))
    seconds = []
    for _ in range(BATCHES_OF_CALLS):
        start = time.perf_counter()
        jax.block_until_ready([function(x) for _ in range(CALLS)])
        seconds.append((time.perf_counter() - start) / CALLS)
    return min(seconds)


def machine_limits(side: int, dtype: Any = jnp.bfloat16) -> tuple[float, float]:
    """Returns (FLOP/s of products in a dtype, bytes/s read and written by a copy)."""
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    tall = jax.random.normal(jax.random.key(0), (8 * side, side), dtype)
    product_seconds = fastest(jax.jit(lambda x: x @ x), square)
    copy_seconds = fastest(jax.jit(lambda x: -x), tall)
    return 2 * side**3 / product_seconds, 2 * tall.nbytes / copy_seconds


# --- the table ---


def print_table(
    runs: Mapping[str, TimedRun], products: float, copying: float, turns: int, clips: int
) -> None:
    """Prints seconds of each function beside the limits FLOP/s and bytes/s."""
    print(
        f"this machine: {products / 1e12:.3g} TFLOP/s of bfloat16 products, "
        f"{copying / 1e9:.0f} GB/s by a copy\n"
    )
    head = ["function", "dtype", f"median s of {turns}", "limit of products"]
    head += ["limit of memory", "ratio to the higher", "compiled in s"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for dtype, run in runs.items():
        total = 0.0
        for function in run.functions:
            median = float(np.median(function.seconds))
            total += median
            matrix = function.products / products
            memory = run.sampling_bytes / copying if function.name == "sample" else 0.0
            limit = max(matrix, memory)
            cells = [function.name, dtype, f"{median:.4f}", f"{matrix:.4f}"]
            cells += [f"{memory:.4f}" if memory else "", f"{median / limit:.1f}" if limit else ""]
            print(f"| {' | '.join(cells)} | {function.compile_seconds:.0f} |")
        print(f"| all | {dtype} | {total:.4f}: {clips / total:.2f} clips a second | | | | |")


def main() -> None:
    """Compiles and times the runs in turns, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--clips", type=int, default=8, help="clips of a batch")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a clip")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    flags = parser.parse_args()

    # The system.
    configs, side = BASE, 8192
    if flags.size == "tiny":
        sys.path.append(str(Path(__file__).parents[1]))
        from tiny_musiclm import CONFIGS

        configs, side = {name: CONFIGS[name] for name in BASE}, 512
    loaded, mesh = random_system(configs), sharding.make_mesh()
    clips = f"{flags.clips} clips of {flags.seconds:g} s"
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {clips}", flush=True)

    # Compile in the first step; then take turns.
    runs, limits = {}, []
    with jax.set_mesh(mesh):
        for dtype in flags.dtypes:
            print(f"{dtype}:", flush=True)
            config = RLConfig(
                STEPS_A_RUN,
                flags.clips,
                flags.seconds,
                kl_strength=0.01,
                policy_optimiser=Optimiser(1e-5),
                value_optimiser=Optimiser(1e-5),
                microbatches=flags.microbatches,
                remat=flags.size == "base",
                dtype=dtype,
            )
            run = runs[dtype] = TimedRun(loaded, config, mesh)
            metrics = run.step()
            token, clip = float(metrics["sampler_drift"]), float(metrics["sampler_drift_clip"])
            print(f"  drift {token:.2g} a token at most, {clip:.2g} a clip at most", flush=True)
            for function in run.functions:
                function.seconds.clear()
        for _ in range(flags.turns):
            for run in runs.values():
                run.step()
            limits.append(machine_limits(side))
    products, copying = np.max(limits, axis=0)
    print_table(runs, products, copying, flags.turns, flags.clips)


if __name__ == "__main__":
    main()
