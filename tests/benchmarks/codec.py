"""What the codec keeps of held-out clips at every rate, against Opus.

    python tests/benchmarks/codec.py --codec runs/demo/codec --data_dir runs/data --dataset score_clips/demo

Prints three tables over the test split, whose pieces no model has seen; brackets hold 95 % bootstraps over pieces.

1. Ours with its first q levels, and Opus (as libsndfile writes it) at several settings, the first of which is the
   lowest it can reach: kilobits a second, mel distance (mean absolute difference of natural log-mels, 80 bands), STFT
   distance (windows 2048 and 512), SI-SDR and, over `--visqol` clips, ViSQOL's MOS-LQO in audio mode (1 to 5).
   Lower is better, but for the last two. Rates are bits counted, not nominal: ours those of a clip's codes packed into
   bytes, Opus's those of its packets, both without a container.
2. By how much ours at the rates below 3 and 6 kbps beats Opus at the lowest and at about 12 kbps, paired by clip.
3. Each level's codebook: codes in use, perplexity (the effective number of codes) and both as shares of its size.

About ten minutes on two CPU cores for 300 clips of 5 s.
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
        help="clips that ViSQOL hears, about a second each and rate",
    )
    asked = parser.parse_args()
    model = checkpoint.load_model(asked.codec, SoundStreamConfig)
    config, rate_hz = model.config, model.config.sample_rate_hz
    module = SoundStream(config)
    encode = jax.jit(lambda wav: module.apply(model.variables, wav, method=SoundStream.encode))
    decode = jax.jit(lambda codes: module.apply(model.variables, codes, method=SoundStream.decode))
    clips = Clips({asked.dataset: 1.0}, asked.data_dir, rate_hz, with_captions=True)
    wavs, places = held_out(clips, config.stride, asked.clips)  # [clips, N], [clips]
    seconds = wavs.shape[1] / rate_hz

    found = {}  # name -> figure -> [clips]
    codes = np.concatenate([encode(jnp.asarray(part)) for part in batches(wavs, "encode")])
    for levels in sorted({-(-config.levels * part // 12) for part in (1, 2, 3, 4, 6, 7, 8, 12)}):
        parts = batches(codes[..., :levels], f"{levels} levels")
        decoded = np.concatenate([decode(jnp.asarray(part)) for part in parts])
        kept = codes.shape[1] * levels * math.log2(config.codes)
        rates = np.full(len(wavs), 8 * math.ceil(kept / 8) / seconds / 1000)
        found[f"ours, {levels} levels"] = judged(wavs, decoded, rates, rate_hz, asked.visqol)
    for level in OPUS_LEVELS:
        decoded, bits = opus(wavs, rate_hz, level)
        found[f"Opus, compression {level}"] = judged(
            wavs, decoded, bits / seconds / 1000, rate_hz, asked.visqol
        )

    print(f"\n{len(wavs)} clips of {seconds:g} s")
    for name, figures in found.items():
        if silent := int(np.isnan(figures["visqol"]).sum()):
            print(
                f"{name}: {silent} of {len(figures['visqol'])} clips are silent for ViSQOL, and left out of its mean"
            )
    names = ("kbps", "mel", "stft", "si_sdr", "visqol")
    print("  ".join([f"{'':26}", *(f"{name:>22}" for name in names)]))
    for name, figures in found.items():
        print(
            "  ".join(
                [f"{name:26}", *(f"{interval(figures[figure], places):>22}" for figure in names)]
            )
        )

    print("\nours minus Opus, paired; below 0 ours is nearer to the original")
    peers = [name for name in found if name.startswith("Opus")]
    for limit, peer in ((6.1, peers[OPUS_LOWEST]), (3.1, peers[OPUS_12])):
        ours = max(
            (
                name
                for name in found
                if name.startswith("ours") and found[name]["kbps"].mean() <= limit
            ),
            key=lambda name: found[name]["kbps"].mean(),
        )
        gains = "  ".join(
            f"{f} {interval(found[ours][f] - found[peer][f], places)}" for f in LOWER_IS_BETTER
        )
        rates = [found[name]["kbps"].mean() for name in (ours, peer)]
        print(f"{ours} ({rates[0]:.2f} kbps) - {peer} ({rates[1]:.2f} kbps)  {gains}")

    print(f"\n{'level':>5}  {'codes in use':>14}  {'perplexity':>18}")
    perplexity = np.asarray(rvq.perplexity(jnp.asarray(codes), config.codes))
    for level, effective in enumerate(perplexity):
        used = len(np.unique(codes[..., level]))
        shares = used / config.codes, effective / config.codes
        print(f"{level + 1:5}  {used:6} ({shares[0]:4.0%})  {effective:8.1f} ({shares[1]:4.0%})")


def held_out(clips: Clips, stride: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `count` clips of the test split [clips, N], cut to whole codec frames, and the piece of each [clips]."""
    parts = list(clips.batches("test", min(BATCH, clips.count("test")), 0, epochs=1))
    wavs, names = (
        np.concatenate([part[field] for part in parts])[:count] for field in ("audio", "id")
    )
    known = clips.attributes("test")
    return wavs[:, : wavs.shape[1] // stride * stride], np.asarray(
        [known[name]["piece"] for name in names]
    )


def batches(items: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """Parts of at most BATCH items, with progress."""
    return iter(
        Progress(
            (items[i : i + BATCH] for i in range(0, len(items), BATCH)),
            name,
            -(-len(items) // BATCH),
        )
    )


def judged(
    wavs: np.ndarray, decoded: np.ndarray, kbps: np.ndarray, rate_hz: int, visqol_clips: int
) -> dict[str, np.ndarray]:
    """Each figure of each decoded clip."""
    figures = {"kbps": kbps, "mel": [], "stft": [], "si_sdr": []}
    for wav, heard in zip(wavs, decoded, strict=True):
        for name, value in distances(jnp.asarray(wav), jnp.asarray(heard), rate_hz).items():
            figures[name].append(float(value))
    count = min(visqol_clips, len(wavs))
    figures["visqol"] = [
        visqol(wavs[i], decoded[i], rate_hz) for i in Progress(range(count), "ViSQOL", count)
    ]
    return {name: np.asarray(values) for name, values in figures.items()}


@functools.partial(jax.jit, static_argnames="rate_hz")
def distances(wav: jax.Array, decoded: jax.Array, rate_hz: int) -> dict[str, jax.Array]:
    """Those of one clip [N]."""
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
    """Returns a decoded clip's MOS-LQO in audio mode at 48 kHz; the original has no more bandwidth than it has here.

    NaN where either clip is silent: ViSQOL divides by its level, and gives NaN with warnings.
    """
    if not (np.any(wav) and np.any(decoded)):
        return math.nan
    original, heard = (
        soxr.resample(x, rate_hz, VISQOL_HZ).astype(np.float64) for x in (wav, decoded)
    )
    return float(_visqol().measure_from_arrays(original, heard, VISQOL_HZ).moslqo)


def opus(wavs: np.ndarray, rate_hz: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Clips [clips, N] through Opus at a compression level, and the bits of each one's packets [clips]."""
    decoded, bits = [], []
    for wav in Progress(wavs, f"Opus {level}", len(wavs)):
        file = io.BytesIO()
        with soundfile.SoundFile(
            file, "w", rate_hz, 1, format="OGG", subtype="OPUS", compression_level=level
        ) as sink:
            sink.write(wav)
        bits.append(8 * sum(packets(file.getvalue())[2:]))  # the first two are headers
        file.seek(0)
        heard = soundfile.read(file, dtype="float32")[0][: len(wav)]
        decoded.append(np.pad(heard, (0, len(wav) - len(heard))))
    return np.stack(decoded), np.asarray(bits)


def packets(ogg: bytes) -> list[int]:
    """Bytes of each packet of an Ogg stream (RFC 3533): runs of segments, the last shorter than 255."""
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
    """Returns mean and 95 % bootstrap interval over pieces; values that are NaN do not count."""
    known = ~np.isnan(values)
    if not known.any():
        return "-"
    return printed(mean_interval(values[known], clusters=places[: len(values)][known]))


if __name__ == "__main__":
    main()
