"""Equal loudness for clips that are heard side by side, and the bytes that a browser plays.

The louder of two clips sounds better, so a comparison at unequal level compares levels. Letters: N samples.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyloudnorm
from scipy import signal

from musicrl_jax.core.audio import encoded

TARGET_LUFS = -20.0
PEAK = 10.0 ** (-1.0 / 20.0)  # Sample peak of -1 dB full scale.
BLOCK_SECONDS = 0.4  # One gating block of BS.1770: a shorter clip has no loudness in its sense.
MOST_GAIN_DB = (
    30.0  # What is quieter than that below the target is the noise of a codec, not music.
)
OVERSAMPLED = 4  # True peaks are those of the signal at four times its rate (BS.1770-4, annex 2).
SILENCE = (
    -70.0
)  # The absolute gate of BS.1770, in LUFS; for clips shorter than a block in dB full scale.


@dataclasses.dataclass(frozen=True)
class Levelled:
    """A clip brought to the common level.

    Attributes:
        wav: f32 [N], sample peak at most -1 dB full scale.
        loudness: level before matching, -inf where the clip is silent.
        unit: of `loudness`: "LUFS", or "dBFS" where a clip was too short for it.
        gain_db: what was added to get there; 0 for a silent clip.
    """

    wav: np.ndarray
    loudness: float
    unit: str
    gain_db: float

    @property
    def silent(self) -> bool:
        """Whether nothing in the clip is above -70."""
        return not np.isfinite(self.loudness)


def level_match(clips: Sequence[np.ndarray], sample_rate_hz: int) -> list[Levelled]:
    """Bring clips, each f32 [N], to one loudness: -20 LUFS, integrated and gated (ITU-R BS.1770-4).

    If a clip's peak would then pass -1 dB full scale, all of them come down together, so that they stay equal
    and nothing is clipped or limited. If any is shorter than one gating block, 0.4 s, all are matched by RMS
    instead, to -20 dBFS. A clip under -70 throughout is silent: it stays as it is and holds no other back.
    """
    if min(len(clip) for clip in clips) < BLOCK_SECONDS * sample_rate_hz:
        unit, measured = "dBFS", [_rms_decibels(clip) for clip in clips]
    else:
        unit, measured = "LUFS", [_integrated_lufs(clip, sample_rate_hz) for clip in clips]
    highest = [  # the loudness at which each audible clip's peak would touch the ceiling
        loudness + 20.0 * np.log10(PEAK / np.max(np.abs(clip)))
        for clip, loudness in zip(clips, measured, strict=True)
        if np.isfinite(loudness)
    ]
    target = min([TARGET_LUFS, *highest])
    gains = [float(target - loudness) if np.isfinite(loudness) else 0.0 for loudness in measured]
    scaled = [
        (np.asarray(clip, np.float64) * 10.0 ** (gain / 20.0)).astype(np.float32)
        for clip, gain in zip(clips, gains, strict=True)
    ]
    return [
        Levelled(wav, loudness, unit, gain)
        for wav, loudness, gain in zip(scaled, measured, gains, strict=True)
    ]


def levelled(wav: np.ndarray, sample_rate_hz: int, target_lufs: float) -> Levelled:
    """Brings one clip to a loudness, as far as its true peak stays at or under -1 dB full scale.

    A clip shorter than one gating block, 0.4 s, is measured by its RMS in dB full scale. A silent one stays as it is.

    Args:
        wav: f32 [N].
        sample_rate_hz: of `wav`.
        target_lufs: its integrated loudness afterwards. Gating leaves pauses out, so that half a second of tone in
            five seconds of silence is as loud as that tone.

    Returns:
        The clip; its `loudness` + `gain_db` is under the target where the peak, or MOST_GAIN_DB, did not allow more.
    """
    if len(wav) < BLOCK_SECONDS * sample_rate_hz:
        unit, loudness = "dBFS", _rms_decibels(wav)
    else:
        unit, loudness = "LUFS", _integrated_lufs(wav, sample_rate_hz)
    if not np.isfinite(loudness):
        return Levelled(np.asarray(wav, np.float32), -np.inf, unit, 0.0)
    headroom = 20.0 * np.log10(PEAK / true_peak(wav))
    gain = float(min(target_lufs - loudness, headroom, MOST_GAIN_DB))
    return Levelled(
        (np.asarray(wav, np.float64) * 10.0 ** (gain / 20.0)).astype(np.float32),
        loudness,
        unit,
        gain,
    )


def true_peak(wav: np.ndarray) -> float:
    """Returns the largest magnitude of wav, f32 [N], between its samples too."""
    block, margin = 1 << 18, 64  # samples at a time, and those around them that the filter reads
    peak = float(np.max(np.abs(wav), initial=0.0))
    for start in range(0, len(wav), block):
        first = max(start - margin, 0)
        part = signal.resample_poly(
            np.asarray(wav[first : start + block + margin], np.float64), OVERSAMPLED, 1
        )
        inner = part[(start - first) * OVERSAMPLED :][: block * OVERSAMPLED]
        peak = max(peak, float(np.max(np.abs(inner))))
    return peak


def flac(wav: np.ndarray, sample_rate_hz: int) -> bytes:
    """Encode wav, f32 [N] in [-1, 1], as 16-bit FLAC: lossless, so a listener judges the model and no codec.

    Chromium, Firefox and Safari (11 and newer) play it. 4 s at 16 kHz are about 90 kB.
    """
    return encoded(wav, sample_rate_hz, "flac")


def _integrated_lufs(wav: np.ndarray, sample_rate_hz: int) -> float:
    """Gated loudness of wav [N], at least 0.4 s; -inf when no block passes the absolute gate."""
    meter = pyloudnorm.Meter(sample_rate_hz, block_size=BLOCK_SECONDS)
    loudness = float(meter.integrated_loudness(np.asarray(wav, np.float64)))
    return -np.inf if np.isnan(loudness) else loudness


def _rms_decibels(wav: np.ndarray) -> float:
    """RMS of wav [N] in dB full scale; -inf at or under the level that counts as silence."""
    power = float(np.sum(np.square(np.asarray(wav, np.float64)))) / max(len(wav), 1)
    return 10.0 * float(np.log10(power)) if power > 10.0 ** (SILENCE / 10.0) else -np.inf
