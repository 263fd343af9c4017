r"""Measures what the codec keeps of held-out clips at each bit rate, against Opus.

    python tests/benchmarks/codec.py --codec runs/demo/codec --data_dir runs/data \
        --dataset score_clips/demo

Prints three tables over the test split, whose pieces no model was trained on. Brackets have 95 %
bootstrap intervals over pieces.

1. Our codec with its first q levels, and Opus (libsndfile) at several settings, the first of which
   is its lowest bit rate: kilobits a second, mel distance (mean absolute difference of natural
   log-mels, 80 bands), STFT distance (windows 2048 and 512), SI-SDR, and ViSQOL's MOS-LQO in audio
   mode (1 to 5) over `--visqol` clips. Distances are better if lower, the last two if higher. Rates
   are counted bits: of a clip's codes packed into bytes, and of Opus's packets, without containers.
2. Our distances minus those of Opus, paired by clip: below 6 kbps against Opus's lowest rate, and
   below 3 kbps against Opus at about 12 kbps.
3. Codes in use and perplexity (the effective number of codes) of each level's codebook, also as
   shares of its size.

It takes about ten minutes on two CPU cores for 300 clips of 5 s.
"""

import argparse
import functools
import io
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
import soxr
from visqol import VisqolApi

from musicrl_jax.core import checkpoint
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.statistics import mean_interval, printed
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.losses import codec
from musicrl_jax.models import rvq
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig

BATCH = 20
OPUS_LEVELS = (
    1.0,
    0.98,
    0.95,
)  # libsndfile's compression levels: about 6, 11 and 19 kbps for one channel at 16 kHz
OPUS_LOWEST, OPUS_12 = 0, 1
VISQOL_HZ = 48_000
LOWER_IS_BETTER = ("mel", "stft")


def main() -> None:
    """Prints the three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codec", required=True, help="folder of the trained codec")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument(
        "--visqol",
        type=int,
        default=20,
        help="clips for ViSQOL, which takes about a second for each clip and rate",
    )
    flags = parser.parse_args()
    # The codec and the clips.
    model = checkpoint.load_model(flags.codec, SoundStreamConfig)
    config, rate_hz = model.config, model.config.sample_rate_hz
    module = SoundStream(config)
    encode = jax.jit(lambda wav: module.apply(model.variables, wav, method=SoundStream.encode))
    decode = jax.jit(lambda codes: module.apply(model.variables, codes, method=SoundStream.decode))
    clips = Clips({flags.dataset: 1.0}, flags.data_dir, rate_hz, with_captions=True)
    wavs, places = held_out(clips, config.stride, flags.clips)  # [clips, N], [clips]
    seconds = wavs.shape[1] / rate_hz

    # Our codec with its first levels, then Opus.
    results = {}  # name -> figure -> [clips]
    codes = np.concatenate([encode(jnp.asarray(part)) for part in batches(wavs, "encode")])
    for levels in sorted({-(-config.levels * part // 12) for part in (1, 2, 3, 4, 6, 7, 8, 12)}):
        parts = batches(codes[..., :levels], f"{levels} levels")
        decoded = np.concatenate([decode(jnp.asarray(part)) for part in parts])
        code_bits = codes.shape[1] * levels * math.log2(config.codes)
        rates = np.full(len(wavs), 8 * math.ceil(code_bits / 8) / seconds / 1000)
        results[f"ours, {levels} levels"] = measure(wavs, decoded, rates, rate_hz, flags.visqol)
    for level in OPUS_LEVELS:
        decoded, bits = opus(wavs, rate_hz, level)
        results[f"Opus, compression {level}"] = measure(
            wavs, decoded, bits / seconds / 1000, rate_hz, flags.visqol
        )

    # Figures of each codec and rate.
    print(f"\n{len(wavs)} clips of {seconds:g} s")
    for name, figures in results.items():
        if silent := int(np.isnan(figures["visqol"]).sum()):
            print(
                f"{name}: {silent} of {len(figures['visqol'])} clips are silent for ViSQOL, and "
                "not in its mean"
            )
    names = ("kbps", "mel", "stft", "si_sdr", "visqol")
    print("  ".join([f"{'':26}", *(f"{name:>22}" for name in names)]))
    for name, figures in results.items():
        print(
            "  ".join(
                [f"{name:26}", *(f"{interval(figures[figure], places):>22}" for figure in names)]
            )
        )

    # Differences at similar rates.
    print("\nours minus Opus, paired; below 0 ours is nearer to the original")
    peers = [name for name in results if name.startswith("Opus")]
    for limit, peer in ((6.1, peers[OPUS_LOWEST]), (3.1, peers[OPUS_12])):
        ours = max(
            (
                name
                for name in results
                if name.startswith("ours") and results[name]["kbps"].mean() <= limit
            ),
            key=lambda name: results[name]["kbps"].mean(),
        )
        gains = "  ".join(
            f"{f} {interval(results[ours][f] - results[peer][f], places)}" for f in LOWER_IS_BETTER
        )
        rates = [results[name]["kbps"].mean() for name in (ours, peer)]
        print(f"{ours} ({rates[0]:.2f} kbps) - {peer} ({rates[1]:.2f} kbps)  {gains}")

    # The codebooks.
    print(f"\n{'level':>5}  {'codes in use':>14}  {'perplexity':>18}")
    perplexity = np.asarray(rvq.perplexity(jnp.asarray(codes), config.codes))
    for level, effective in enumerate(perplexity):
        used = len(np.unique(codes[..., level]))
        shares = used / config.codes, effective / config.codes
        print(f"{level + 1:5}  {used:6} ({shares[0]:4.0%})  {effective:8.1f} ({shares[1]:4.0%})")


def held_out(clips: Clips, stride: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (up to `count` clips of the test split f32 [clips, N], the piece of each [clips]).

    Clips are cut to whole codec frames.
    """
    parts = list(clips.batches("test", min(BATCH, clips.count("test")), 0, epochs=1))
    wavs, names = (
        np.concatenate([part[field] for part in parts])[:count] for field in ("audio", "id")
    )
    known = clips.attributes("test")
    return wavs[:, : wavs.shape[1] // stride * stride], np.asarray(
        [known[name]["piece"] for name in names]
    )


def batches(items: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """Yields parts of at most BATCH items, and prints progress."""
    return iter(
        Progress(
            (items[i : i + BATCH] for i in range(0, len(items), BATCH)),
            name,
            -(-len(items) // BATCH),
        )
    )


def measure(
    wavs: np.ndarray, decoded: np.ndarray, kbps: np.ndarray, rate_hz: int, visqol_clips: int
) -> dict[str, np.ndarray]:
    """Returns each figure of each decoded clip."""
    figures = {"kbps": kbps, "mel": [], "stft": [], "si_sdr": []}
    for wav, output in zip(wavs, decoded, strict=True):
        for name, value in distances(jnp.asarray(wav), jnp.asarray(output), rate_hz).items():
            figures[name].append(float(value))
    count = min(visqol_clips, len(wavs))
    figures["visqol"] = [
        visqol(wavs[i], decoded[i], rate_hz) for i in Progress(range(count), "ViSQOL", count)
    ]
    return {name: np.asarray(values) for name, values in figures.items()}


@functools.partial(jax.jit, static_argnames="rate_hz")
def distances(wav: jax.Array, decoded: jax.Array, rate_hz: int) -> dict[str, jax.Array]:
    """Returns the distances of one clip, wav and decoded f32 [N]."""
    wav, decoded = wav[None], decoded[None]
    return {
        "mel": codec.mel_distance(wav, decoded, rate_hz),
        "stft": codec.stft_distance(wav, decoded),
        "si_sdr": codec.si_sdr(wav, decoded)[0],
    }


@functools.cache
def _visqol() -> VisqolApi:
    api = VisqolApi()
    api.create(mode="audio")
    return api


def visqol(wav: np.ndarray, decoded: np.ndarray, rate_hz: int) -> float:
    """Returns the MOS-LQO of a decoded clip in audio mode, at 48 kHz.

    Resampling adds no bandwidth. NaN if either clip is silent: ViSQOL divides by its level.
    """
    if not (np.any(wav) and np.any(decoded)):
        return math.nan
    original, output = (
        soxr.resample(x, rate_hz, VISQOL_HZ).astype(np.float64) for x in (wav, decoded)
    )
    return float(_visqol().measure_from_arrays(original, output, VISQOL_HZ).moslqo)


def opus(wavs: np.ndarray, rate_hz: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns clips [clips, N] decoded from Opus, and the bits of the packets of each [clips]."""
    decoded, bits = [], []
    for wav in Progress(wavs, f"Opus {level}", len(wavs)):
        file = io.BytesIO()
        with soundfile.SoundFile(
            file, "w", rate_hz, 1, format="OGG", subtype="OPUS", compression_level=level
        ) as sink:
            sink.write(wav)
        bits.append(8 * sum(packets(file.getvalue())[2:]))  # the first two are headers
        file.seek(0)
        output = soundfile.read(file, dtype="float32")[0][: len(wav)]
        decoded.append(np.pad(output, (0, len(wav) - len(output))))
    return np.stack(decoded), np.asarray(bits)


def packets(ogg: bytes) -> list[int]:
    """Returns the bytes of each packet of an Ogg stream (RFC 3533).

    A packet is a run of segments, of which the last is shorter than 255.
    """
    sizes, size, at = [], 0, 0
    while at < len(ogg):
        if ogg[at : at + 4] != b"OggS":
            raise ValueError(f"no Ogg page at byte {at}")
        segments = ogg[at + 27 : at + 27 + ogg[at + 26]]
        for segment in segments:
            size += segment
            if segment < 255:
                sizes.append(size)
                size = 0
        at += 27 + len(segments) + sum(segments)
    return sizes


def interval(values: np.ndarray, places: np.ndarray) -> str:
    """Returns the mean and its 95 % interval over pieces, without the values that are NaN."""
    known = ~np.isnan(values)
    if not known.any():
        return "-"
    return printed(mean_interval(values[known], clusters=places[: len(values)][known]))


if __name__ == "__main__":
    main()
