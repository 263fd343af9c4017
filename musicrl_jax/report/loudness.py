"""Equal loudness for clips that are compared, and their encoding for browsers.

The louder of two clips sounds better, so clips of unequal level are compared by their level.

Legend: N samples.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyloudnorm
from scipy import signal

from musicrl_jax.core.audio import encode

TARGET_LUFS = -20.0
# Sample peak of -1 dB full scale.
PEAK = 10.0 ** (-1.0 / 20.0)
# Gating block of BS.1770; a shorter clip has no LUFS.
BLOCK_SECONDS = 0.4
# Anything that needs more gain is the noise of a codec.
MOST_GAIN_DB = 30.0
# True peaks are those at four times the sample rate (BS.1770-4, annex 2).
OVERSAMPLED = 4
# The absolute gate of BS.1770 in LUFS. For clips shorter than a block: in dB full scale.
SILENCE = -70.0


@dataclasses.dataclass(frozen=True)
class Levelled:
    """A clip with a gain applied.

    Attributes:
      wav: f32 [N], sample peak at most -1 dB full scale.
      loudness: before the gain; -inf for a silent clip.
      unit: of `loudness`: "LUFS", or "dBFS" for a clip that is too short for LUFS.
      gain_db: the gain; 0 for a silent clip.
    """

    wav: np.ndarray
    loudness: float
    unit: str
    gain_db: float

    @property
    def silent(self) -> bool:
        """Whether nothing in the clip is above -70."""
        return not np.isfinite(self.loudness)


# --- Gain ---


def level_match(clips: Sequence[np.ndarray], sample_rate_hz: int) -> list[Levelled]:
    """Brings clips, each f32 [N], to -20 LUFS, integrated and gated (ITU-R BS.1770-4).

    If a peak would exceed -1 dB full scale, all clips get less gain, so that they stay equally loud
    without clipping or limiting. If a clip is shorter than a gating block, 0.4 s, all are matched
    by RMS instead, to -20 dBFS. A silent clip (-70 at most) stays unchanged and is not counted.
    """
    unit, measured = _measure(clips, sample_rate_hz)
    # The loudest level at which no peak exceeds the ceiling.
    target = TARGET_LUFS
    for clip, loudness in zip(clips, measured, strict=True):
        # The loudness at which the peak reaches the ceiling.
        if np.isfinite(loudness):
            target = min(target, loudness + 20.0 * np.log10(PEAK / np.max(np.abs(clip))))
    return [
        _amplified(clip, loudness, unit, target - loudness)
        for clip, loudness in zip(clips, measured, strict=True)
    ]


def levelled(wav: np.ndarray, sample_rate_hz: int, target_lufs: float) -> Levelled:
    """Brings one clip to a loudness, with a true peak of at most -1 dB full scale.

    A clip shorter than a gating block, 0.4 s, is measured by its RMS in dB full scale. A silent
    clip stays unchanged.

    Args:
      wav: f32 [N].
      sample_rate_hz: of `wav`.
      target_lufs: integrated loudness of the result. Gating leaves pauses out: half a second of
        tone in five seconds of silence is as loud as that tone.

    Returns:
      The clip. Its `loudness` + `gain_db` is below the target if the peak or MOST_GAIN_DB limits
      the gain.
    """
    unit, (loudness,) = _measure([wav], sample_rate_hz)
    # A silent clip has no gain.
    gain_db = 0.0
    if np.isfinite(loudness):
        headroom = 20.0 * np.log10(PEAK / true_peak(wav))
        gain_db = min(target_lufs - loudness, headroom, MOST_GAIN_DB)
    return _amplified(wav, loudness, unit, gain_db)


def true_peak(wav: np.ndarray) -> float:
    """Returns the largest magnitude of wav, f32 [N], also between its samples."""
    # Samples at a time; those around them that the filter reads.
    block, margin = 1 << 18, 64
    peak = float(np.max(np.abs(wav), initial=0.0))
    # In blocks, so that a long clip does not need four times its memory in float64.
    for start in range(0, len(wav), block):
        first = max(start - margin, 0)
        part = np.asarray(wav[first : start + block + margin], np.float64)
        upsampled = signal.resample_poly(part, OVERSAMPLED, 1)
        inner = upsampled[(start - first) * OVERSAMPLED :][: block * OVERSAMPLED]
        peak = max(peak, float(np.max(np.abs(inner))))
    return peak


def flac(wav: np.ndarray, sample_rate_hz: int) -> bytes:
    """Encodes wav, f32 [N] in [-1, 1], as 16-bit FLAC, which is lossless.

    Chromium, Firefox and Safari (11 and newer) play it. 4 s at 16 kHz are about 90 kB.
    """
    return encode(wav, sample_rate_hz, "flac")


# --- Measurement ---


def _measure(clips: Sequence[np.ndarray], sample_rate_hz: int) -> tuple[str, list[float]]:
    """Returns the unit and the loudness of clips, each [N]; -inf for silent ones."""
    if min(map(len, clips)) < BLOCK_SECONDS * sample_rate_hz:
        return "dBFS", [_rms_decibels(clip) for clip in clips]
    meter = pyloudnorm.Meter(sample_rate_hz, block_size=BLOCK_SECONDS)
    measured = [float(meter.integrated_loudness(np.asarray(clip, np.float64))) for clip in clips]
    # The library returns NaN if no block passes the absolute gate.
    return "LUFS", [-np.inf if np.isnan(loudness) else loudness for loudness in measured]


def _amplified(wav: np.ndarray, loudness: float, unit: str, gain_db: float) -> Levelled:
    gain_db = float(gain_db) if np.isfinite(loudness) else 0.0
    scaled = np.asarray(wav, np.float64) * 10.0 ** (gain_db / 20.0)
    return Levelled(scaled.astype(np.float32), loudness, unit, gain_db)


def _rms_decibels(wav: np.ndarray) -> float:
    """Returns the RMS of wav [N] in dB full scale; -inf up to SILENCE."""
    power = float(np.sum(np.square(np.asarray(wav, np.float64)))) / max(len(wav), 1)
    return 10.0 * float(np.log10(power)) if power > 10.0 ** (SILENCE / 10.0) else -np.inf
