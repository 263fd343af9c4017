r"""Measures SoundStorm's fine levels: distance of the audio from the original, and speed.

    python tests/benchmarks/soundstorm.py --run runs/quickstart --data_dir runs/data \
        --dataset score_clips/quickstart

Prints three tables with 95 % bootstrap intervals over pieces.

1. Distances of decoded held-out clips to the originals: with all true levels (the limit of the
   codec); with the coarse levels alone; and with true coarse levels and fine levels that are
   sampled uniformly, sampled by the frequencies in the training tokens, or filled by SoundStorm in
   several numbers of passes. The last row has the codes nearest to the vector that SoundStorm
   expects at each level, the best guess in squared distance.
2. Nats and accuracy of each fine level, when it is masked and the true levels below are given,
   against the entropy of the level's frequencies.
3. Clips a second of SoundStorm and of an autoregressive transformer of the same width, depth and
   number of weights, which samples the fine codes of a clip one after the other with caches. Its
   weights are random: speed does not depend on them. They take turns in one process. The limit is
   the time of the matrix products and of reading the caches, at this machine's speed between turns.

It takes ten minutes on a CPU core at the quickstart's size. `--skip_speed` omits the third table.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import checkpoint
from musicrl_jax.core.keys import row_keys
from musicrl_jax.core.statistics import mean_interval, printed
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.inputs.tokens import read
from musicrl_jax.losses.codec import mel_distance, stft_distance
from musicrl_jax.models.layers import kernel_init
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig, fill_fine
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.transformer import Transformer, TransformerConfig

MARGINAL_CLIPS = 2000


def main() -> None:
    """Prints the three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="a run's folder with codec, fine and tokens")
    parser.add_argument("--codec", help="another folder of the codec")
    parser.add_argument("--fine", help="another folder of SoundStorm")
    parser.add_argument("--tokens", help="another folder of the tokens")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument(
        "--first_passes",
        type=int,
        nargs="+",
        default=[1, 4, 16, 32],
        help="over the first fine level",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that each of the two takes")
    parser.add_argument("--skip_speed", action="store_true")
    flags = parser.parse_args()
    # The models.
    run = Path(flags.run)
    codec = checkpoint.load_model(flags.codec or run / "codec", SoundStreamConfig)
    storm = checkpoint.load_model(flags.fine or run / "fine", SoundStormConfig)
    if (spoken := storm.json_asset("tokens.json", {"codec": str})["codec"]) != codec.hash:
        raise SystemExit(
            f"SoundStorm was trained on tokens of codec {spoken[:12]}, not of {codec.hash[:12]}"
        )
    # Held-out clips, and their codes.
    data = Clips(
        {flags.dataset: 1.0}, flags.data_dir, codec.config.sample_rate_hz, with_captions=True
    )
    count = min(flags.clips, data.count(flags.split)) // flags.batch_size * flags.batch_size
    batches = data.batches(flags.split, flags.batch_size, seed=0)
    examples = [next(batches) for _ in range(count // flags.batch_size)]
    wav, names = (np.concatenate([batch[field] for batch in examples]) for field in ("audio", "id"))
    known = data.attributes(flags.split)
    places = np.asarray([known[name]["piece"] for name in names])
    encode = jax.jit(
        lambda wav: SoundStream(codec.config).apply(codec.variables, wav, method=SoundStream.encode)
    )
    codes = np.concatenate([encode(part) for part in parts(wav, flags.batch_size)])
    shares = frequencies(str(flags.tokens or run / "tokens"), storm.config)
    c, weights = storm.config, sum(leaf.size for leaf in jax.tree.leaves(storm.variables))
    print(
        f"{count} clips of {wav.shape[1] / codec.config.sample_rate_hz:g} s of {flags.dataset} "
        f"{flags.split}; {c.levels} levels of {c.codes} codes, {c.levels - c.coarse_levels} fine; "
        f"{codes.shape[1]} codec frames a clip; SoundStorm: {weights / 1e6:.1f} M weights"
    )
    # The tables.
    distances(codec, storm, wav, codes, shares, places, flags)
    levels(storm, codes, shares, places, flags.batch_size)
    if not flags.skip_speed:
        speed(storm, codes[: flags.batch_size], flags.rounds)


def parts(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yields slices of `size` along the first axis."""
    return (array[at : at + size] for at in range(0, len(array), size))


def frequencies(tokens: str, config: SoundStormConfig) -> np.ndarray:
    """Returns the share of each code in each level of the training tokens, f64 [Q, C].

    One is added to each count.
    """
    rows = read(tokens, "train")[0]
    codes = np.stack(
        [row["acoustic"] for row in rows.__getitems__(list(range(min(len(rows), MARGINAL_CLIPS))))]
    )
    counts = [
        np.bincount(codes[:, :, q].reshape(-1), minlength=config.codes) + 1
        for q in range(config.levels)
    ]
    return np.stack([count / count.sum() for count in counts])


def distances(
    codec: checkpoint.Model,
    storm: checkpoint.Model,
    wav: np.ndarray,
    codes: np.ndarray,
    shares: np.ndarray,
    places: np.ndarray,
    flags: argparse.Namespace,
) -> None:
    """Prints the first table."""
    c, coarse = storm.config, codes[:, :, : storm.config.coarse_levels]
    decode = jax.jit(
        lambda codes: SoundStream(codec.config).apply(
            codec.variables, codes, method=SoundStream.decode
        )
    )

    @jax.jit
    def measure(wav: jax.Array, decoded: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Of each clip, [B] both.
        mel = jax.vmap(lambda x, y: mel_distance(x[None], y[None], codec.config.sample_rate_hz))
        return mel(wav, decoded), jax.vmap(lambda x, y: stft_distance(x[None], y[None]))(
            wav, decoded
        )

    def distances_of(codes: np.ndarray) -> np.ndarray:
        # Mel and STFT distance of each clip, [B, 2].
        pairs = zip(parts(wav, flags.batch_size), parts(codes, flags.batch_size), strict=True)
        return np.concatenate([np.stack(measure(x, decode(code)), axis=1) for x, code in pairs])

    random = np.random.default_rng(0)
    uniform, by_frequency = codes.copy(), codes.copy()
    for q in range(c.coarse_levels, c.levels):
        uniform[:, :, q] = random.integers(c.codes, size=codes.shape[:2])
        by_frequency[:, :, q] = random.choice(c.codes, size=codes.shape[:2], p=shares[q])
    rows = {
        "all true levels": distances_of(codes),
        "coarse levels alone": distances_of(coarse),
        "fine levels uniform": distances_of(uniform),
        "fine levels by frequency": distances_of(by_frequency),
    }
    for first in flags.first_passes:
        fill = filler(dataclasses.replace(c, first_passes=first))
        keys = row_keys(jax.random.key(0), len(codes))
        both = zip(parts(coarse, flags.batch_size), parts(keys, flags.batch_size), strict=True)
        filled = np.concatenate([fill(storm.variables, x, key) for x, key in both])
        rows[f"SoundStorm, {first + c.levels - c.coarse_levels - 1} passes"] = distances_of(filled)
    guess = jax.jit(functools.partial(nearest_to_expected, c))
    books = SoundStream(codec.config).apply(codec.variables, method=SoundStream.codebooks)
    rows["nearest to what is expected"] = distances_of(
        np.concatenate(
            [guess(storm.variables, books, part) for part in parts(codes, flags.batch_size)]
        )
    )
    print(
        f"\n{'':28} {'mel distance, nat':>24} {'STFT distance':>24} "
        f"{'mel, less than coarse alone':>30}"
    )
    for name, figures in rows.items():
        gain = interval(rows["coarse levels alone"][:, 0] - figures[:, 0], places)
        print(
            f"{name:28} {interval(figures[:, 0], places):>24} "
            f"{interval(figures[:, 1], places):>24} {gain:>30}"
        )


def nearest_to_expected(
    config: SoundStormConfig, variables: Any, books: jax.Array, codes: jax.Array
) -> jax.Array:
    """Returns, level after level, the code nearest to the expected vector of the codebook.

    Args:
      config: SoundStorm's sizes.
      variables: SoundStorm's weights.
      books: f32 [Q, C, D].
      codes: int32 [B, T, Q], of which the coarse levels stay.
    """
    for level in range(config.coarse_levels, config.levels):
        masked = jnp.broadcast_to(jnp.arange(config.levels)[None, None, :] >= level, codes.shape)
        chances = jax.nn.softmax(
            SoundStorm(config).apply(variables, codes, masked, level)
        )  # [B, T, C]
        expected = chances @ books[level]  # [B, T, D]
        distance = (
            jnp.sum(jnp.square(books[level]), axis=1)[None, None, :] - 2 * expected @ books[level].T
        )
        codes = codes.at[:, :, level].set(distance.argmin(axis=2).astype(codes.dtype))
    return codes


def filler(config: SoundStormConfig) -> Callable[..., jax.Array]:
    """Compiles `fill_fine`: (variables, coarse codes, keys) -> all codes."""
    return jax.jit(functools.partial(fill_fine, SoundStorm(config)))


def interval(values: np.ndarray, places: np.ndarray) -> str:
    """Returns mean and 95 % bootstrap interval over pieces."""
    return printed(mean_interval(values, clusters=places))


def levels(
    storm: checkpoint.Model,
    codes: np.ndarray,
    shares: np.ndarray,
    places: np.ndarray,
    batch_size: int,
) -> None:
    """Prints the second table."""
    c = storm.config

    @jax.jit
    def nats_and_hits(
        variables: Any, codes: jax.Array, level: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        # Nats and hits of each code of a level, [B, T] both.
        masked = jnp.broadcast_to(jnp.arange(c.levels)[None, None, :] >= level, codes.shape)
        scores = jax.nn.log_softmax(SoundStorm(c).apply(variables, codes, masked, level))
        truth = codes[:, :, level]
        return -jnp.take_along_axis(scores, truth[:, :, None], axis=2)[:, :, 0], scores.argmax(
            axis=2
        ) == truth

    print(
        f"\n{'level':>5} {'nats a code':>24} {'by frequency':>14} {'accuracy':>9}   "
        f"(uniform: {np.log(c.codes):.3f})"
    )
    for q in range(c.coarse_levels, c.levels):
        both = [
            nats_and_hits(storm.variables, part, jnp.int32(q)) for part in parts(codes, batch_size)
        ]
        nats, hits = (np.concatenate(parts_of_both) for parts_of_both in zip(*both, strict=True))
        chance = -np.log(shares[q])[codes[:, :, q]].mean()
        print(f"{q:5} {interval(nats.mean(axis=1), places):>24} {chance:14.3f} {hits.mean():9.3f}")


class Autoregressive(nn.Module):
    """Samples the fine codes of a clip one after the other, after its coarse frames."""

    config: SoundStormConfig
    transformer: TransformerConfig

    def setup(self) -> None:
        c, width = self.config, self.transformer.embed
        self.body = Transformer(self.transformer)
        self.table = self.param(
            "table", kernel_init(None, None, None, fan_in_axes=2), (c.levels, c.codes, width)
        )
        self.head = self.param(
            "head",
            kernel_init(None, None, None, fan_in_axes=2),
            (c.levels - c.coarse_levels, width, c.codes),
        )

    def __call__(self, coarse: jax.Array, key: jax.Array) -> jax.Array:
        """Samples fine codes int32 [B, T, Q - coarse_levels] from coarse [B, T, coarse_levels]."""
        c, (batch, frames, _) = self.config, coarse.shape
        fine = c.levels - c.coarse_levels
        x = sum(self.table[q][coarse[:, :, q]] for q in range(c.coarse_levels))  # [B, T, D]
        bias = self.body.bias(frames * (1 + fine))
        y, cache = self.body.extend(
            x, self.body.empty_cache(batch, frames * (1 + fine), jnp.float32), 0, bias
        )

        def step(state: tuple, number: jax.Array) -> tuple[tuple, jax.Array]:
            y, cache = state  # y [B, D], of the position before
            level = number % fine
            noise = jax.random.gumbel(jax.random.fold_in(key, number), (batch, c.codes))
            code = jnp.argmax(y @ self.head[level] + noise, axis=-1)  # [B]
            x = self.table[c.coarse_levels + level, code][:, None]
            y, cache = self.body.extend(x, cache, frames + number, bias)
            return (y[:, 0], cache), code.astype(jnp.int32)

        _, codes = jax.lax.scan(step, (y[:, -1], cache), jnp.arange(frames * fine))
        return codes.T.reshape(batch, frames, fine)


def speed(storm: checkpoint.Model, codes: np.ndarray, rounds: int) -> None:
    """Prints the third table."""
    c, net = storm.config, storm.config.conformer
    batch, frames, _ = codes.shape
    fine = c.levels - c.coarse_levels
    mlp = (
        4 * net.mlp + 3 * net.embed
    ) // 3  # gives a block as many weights in its products as the conformer's has
    peer = Autoregressive(c, TransformerConfig(net.layers, net.embed, net.heads, mlp))
    coarse, keys = codes[:, :, : c.coarse_levels], row_keys(jax.random.key(0), batch)
    weights = nn.meta.unbox(jax.jit(peer.init)(jax.random.key(0), coarse[:, :1], jax.random.key(0)))
    runs: dict[str, Callable[[], jax.Array]] = {}
    for name, config in (
        ("SoundStorm", c),
        ("SoundStorm, 1 pass a level", dataclasses.replace(c, first_passes=1)),
    ):
        fill = filler(config)
        label = (
            f"{name}, {config.first_passes + fine - 1} passes"
            if config is c
            else f"{name}, {fine} passes"
        )
        runs[label] = lambda fill=fill: fill(storm.variables, coarse, keys)
    draw = jax.jit(peer.apply)
    runs[f"autoregressive, {frames * fine} steps"] = lambda: draw(
        weights, coarse, jax.random.key(1)
    )
    machine = {
        "many rows": products(batch * frames, net.embed, net.mlp),
        "few rows": products(batch, net.embed, mlp),
        "reading": reading(),
    }
    times: dict[str, list[float]] = {name: [] for name in (*runs, *machine)}
    for turn in range(rounds + 1):
        for name, call in (runs | {name: call for name, (call, _) in machine.items()}).items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:  # the first one compiled
                times[name].append(time.perf_counter() - start)
    many, few, read_speed = (amount / min(times[name]) for name, (_, amount) in machine.items())

    # Multiply-adds of the products at one position.
    block, own = 4 * net.embed * net.mlp + 7 * net.embed**2, 3 * net.embed * mlp + 4 * net.embed**2
    head = net.embed * c.codes
    passed = (
        batch * frames * (net.layers * (block + 2 * net.embed * frames) + head)
    )  # one pass over all clips
    steps = frames * fine
    cached = (
        4 * 2 * net.embed * (frames + steps / 2)
    )  # bytes of a clip's and layer's keys and values, halfway through
    sampling_seconds = (
        steps * batch * (2 * (net.layers * own + head) / few + net.layers * cached / read_speed)
    )
    limits = [2 * passed * passes / many for passes in (c.first_passes + fine - 1, fine)] + [
        sampling_seconds
    ]
    slowest = np.median(times[next(reversed(runs))])
    print(
        f"\nbatches of {batch} clips on {jax.devices()[0].device_kind}: products at "
        f"{many / 1e9:.0f} GFLOP/s with {batch * frames} rows, {few / 1e9:.0f} with {batch}, "
        f"reading at {read_speed / 1e9:.0f} GB/s; blocks of {net.layers} x {block / 1e6:.2f} M "
        f"weights and of {net.layers} x {own / 1e6:.2f} M"
    )
    print(f"{'':42} {'clips/s':>9} {'range':>17} {'times faster':>13} {'limit':>9} {'of it':>7}")
    for name, limit in zip(runs, limits, strict=True):
        middle, (low, high) = np.median(times[name]), (min(times[name]), max(times[name]))
        print(
            f"{name:42} {batch / middle:9.3f} {f'{batch / high:.3f} - {batch / low:.3f}':>17} "
            f"{slowest / middle:13.1f} {batch / limit:9.3f} {limit / middle:7.2f}"
        )


def products(rows: int, width: int, hidden: int) -> tuple[Callable[[], jax.Array], float]:
    """Returns a function of a hundred float32 products, and its FLOPs.

    The products are [rows, width] x [width, hidden] and back.
    """
    up, down = (
        jax.random.normal(jax.random.key(n), shape)
        for n, shape in enumerate([(width, hidden), (hidden, width)])
    )
    scale = (width * hidden) ** -0.5
    chain = jax.jit(
        lambda x, up, down: jax.lax.fori_loop(0, 50, lambda _, x: x @ up @ down * scale, x)
    )
    x = jax.random.normal(jax.random.key(2), (rows, width))
    return lambda: chain(x, up, down), 50 * 4 * rows * width * hidden


def reading(count: int = 2**26) -> tuple[Callable[[], jax.Array], float]:
    """Returns a function that reads memory too large for a CPU's caches, and the bytes."""
    x = jnp.ones(count)
    total = jax.jit(jnp.sum)
    return lambda: total(x), 4.0 * count


if __name__ == "__main__":
    main()
