"""Level matching against BS.1770 from the ITU's tables, and FLAC read back."""

import io

import numpy as np
import pytest
import soundfile
from scipy import signal

from musicrl_jax.report import loudness


def itu_lufs(wav: np.ndarray, sample_rate_hz: int) -> float:
    """Computes ITU-R BS.1770-4 for mono from its printed 48 kHz coefficients.

    Other rates are resampled first.
    """
    wav = signal.resample_poly(np.asarray(wav, np.float64), 48000, sample_rate_hz)
    shelf = (
        [1.53512485958697, -2.69169618940638, 1.19839281085285],
        [1.0, -1.69065929318241, 0.73248077421585],
    )
    high_pass = [1.0, -2.0, 1.0], [1.0, -1.99004745483398, 0.99007225036621]
    weighted = signal.lfilter(*high_pass, signal.lfilter(*shelf, wav))
    starts = range(0, len(weighted) - 19200 + 1, 4800)
    powers = np.array([np.mean(weighted[s : s + 19200] ** 2) for s in starts])

    def lufs(power):
        return -0.691 + 10.0 * np.log10(power + 1e-30)

    gated = powers[lufs(powers) > -70.0]
    gated = gated[lufs(gated) > lufs(gated.mean()) - 10.0]
    return float(lufs(gated.mean()))


def plucks(seed: int, seconds: float, sample_rate_hz: int, level: float) -> np.ndarray:
    """Returns decaying tones with pauses between them, on which the gates have an effect."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(0.5 * sample_rate_hz)) / sample_rate_hz
    notes = []
    for _ in range(round(seconds / 0.5)):
        wave = np.sin(2.0 * np.pi * rng.uniform(100.0, 3000.0) * t)
        notes.append(wave * np.exp(-8.0 * t) * rng.choice([0.01, 1.0]))
    return (level * np.concatenate(notes)).astype(np.float32)


def decibels(wav: np.ndarray) -> float:
    return 10.0 * np.log10(np.mean(np.square(wav.astype(np.float64))))


@pytest.mark.parametrize("sample_rate_hz", [16000, 24000, 48000])
def test_matched_clips_are_equally_loud(sample_rate_hz):
    clips = [plucks(1, 4.0, sample_rate_hz, 0.02), plucks(2, 4.0, sample_rate_hz, 0.9)]
    matched = loudness.level_match(clips, sample_rate_hz)
    first, second = (itu_lufs(clip.wav, sample_rate_hz) for clip in matched)
    assert abs(first - second) < 0.1
    for clip, before in zip(matched, clips, strict=True):
        assert clip.loudness == pytest.approx(itu_lufs(before, sample_rate_hz), abs=0.1)
        assert clip.unit == "LUFS"
        scaled = before * 10.0 ** (clip.gain_db / 20.0)
        np.testing.assert_allclose(clip.wav, scaled, rtol=1e-5, atol=1e-7)


def test_steady_tones_reach_the_target():
    t = np.arange(32000) / 16000
    clips = [a * np.sin(2.0 * np.pi * 1000.0 * t) for a in (0.01, 0.5)]
    for clip in loudness.level_match(clips, 16000):
        assert itu_lufs(clip.wav, 16000) == pytest.approx(loudness.TARGET_LUFS, abs=0.1)
        assert clip.wav.dtype == np.float32


def test_a_peak_brings_both_clips_down_together():
    t = np.arange(64000) / 16000
    steady = (0.1 * np.sin(2.0 * np.pi * 440.0 * t)).astype(np.float32)
    click = 0.1 * steady
    click[30000] = 0.9
    matched = loudness.level_match([steady, click], 16000)
    peak = max(np.max(np.abs(clip.wav)) for clip in matched)
    assert peak == pytest.approx(10.0 ** (-1.0 / 20.0), rel=1e-5)
    levels = [itu_lufs(clip.wav, 16000) for clip in matched]
    assert levels[0] == pytest.approx(levels[1], abs=0.1)
    assert levels[0] < loudness.TARGET_LUFS - 5.0


def test_silence_stays_silent_and_does_not_limit_others():
    music = plucks(3, 4.0, 16000, 0.3)
    for quiet in (np.zeros(64000, np.float32), np.full(64000, 1e-6, np.float32)):
        silent, other = loudness.level_match([quiet, music], 16000)
        assert silent.silent and silent.gain_db == 0.0
        np.testing.assert_array_equal(silent.wav, quiet)
        assert not other.silent
        assert other.gain_db == loudness.level_match([music, music], 16000)[0].gain_db
    both = loudness.level_match([np.zeros(64000), np.zeros(64000)], 16000)
    assert all(clip.silent and not np.any(clip.wav) for clip in both)


@pytest.mark.parametrize("samples", [1, 100, 6399])
def test_very_short_clips_are_matched_by_rms(samples):
    rng = np.random.default_rng(samples)
    clips = [(a * rng.uniform(0.5, 1.0, samples)).astype(np.float32) for a in (0.01, 0.8)]
    matched = loudness.level_match(clips, 16000)
    assert decibels(matched[0].wav) == pytest.approx(decibels(matched[1].wav), abs=1e-3)
    assert decibels(matched[0].wav) == pytest.approx(loudness.TARGET_LUFS, abs=1e-3)
    assert [clip.unit for clip in matched] == ["dBFS", "dBFS"]


def test_one_gating_block_is_long_enough():
    clips = [plucks(5, 0.5, 16000, a)[:6400] for a in (0.05, 0.5)]
    assert [clip.unit for clip in loudness.level_match(clips, 16000)] == ["LUFS", "LUFS"]


def tone(seconds: float, amplitude: float, sample_rate_hz: int = 16000) -> np.ndarray:
    t = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    return (amplitude * np.sin(2.0 * np.pi * 440.0 * t)).astype(np.float32)


@pytest.mark.parametrize("sample_rate_hz", [8000, 16000, 24000, 48000])
def test_a_clip_is_brought_to_its_loudness(sample_rate_hz):
    quiet = plucks(1, 4.0, sample_rate_hz, 0.1)
    level = loudness.levelled(quiet, sample_rate_hz, -23.0)
    assert itu_lufs(level.wav, sample_rate_hz) == pytest.approx(-23.0, abs=0.15)
    assert level.loudness == pytest.approx(itu_lufs(quiet, sample_rate_hz), abs=0.15)
    assert level.loudness + level.gain_db == pytest.approx(-23.0)


def test_pauses_do_not_count():
    """Half a second of tone in five seconds of silence is as loud as that tone."""
    clip = np.concatenate([tone(0.5, 0.1), np.zeros(72000, np.float32)])
    level = loudness.levelled(clip, 16000, -16.0)
    assert level.loudness == pytest.approx(itu_lufs(clip, 16000), abs=0.1)
    assert itu_lufs(level.wav, 16000) == pytest.approx(-16.0, abs=0.1)
    assert not level.wav[9000:].any() and np.max(np.abs(level.wav)) <= loudness.PEAK


@pytest.mark.parametrize("samples", [0, 1, 6399, 6400, 64000])
@pytest.mark.parametrize("level", [0.0, 1e-7])
def test_silence_stays_silence(samples, level):
    clip = np.full(samples, level, np.float32)
    levelled = loudness.levelled(clip, 16000, -16.0)
    assert levelled.silent and levelled.gain_db == 0.0
    np.testing.assert_array_equal(levelled.wav, clip)


def test_nan_of_the_library_means_silence(monkeypatch):
    monkeypatch.setattr(loudness.pyloudnorm.Meter, "integrated_loudness", lambda self, wav: np.nan)
    assert loudness.levelled(tone(1.0, 0.1), 16000, -16.0).silent


@pytest.mark.parametrize("seconds", [0.01, 0.3, 0.4, 4.0])
def test_a_peak_limits_the_gain(seconds):
    """A peak between samples counts too: a tone at a quarter of the rate, sampled at 0.7 of it."""
    t = np.arange(round(seconds * 16000))
    click = (0.001 * np.sin(t / 3)).astype(np.float32)
    click[len(click) // 2] = 0.9
    between = (np.sin(np.pi * t / 2 + np.pi / 4) * np.hanning(len(t))).astype(np.float32)
    for clip in (click, between):
        level = loudness.levelled(clip, 16000, -1.0)
        assert level.loudness + level.gain_db < -1.5
        peak = np.max(np.abs(signal.resample_poly(level.wav.astype(np.float64), 16, 1)))
        assert peak == pytest.approx(loudness.PEAK, rel=0.02)


def test_the_gain_of_noise_is_limited():
    noise = np.random.default_rng(0).normal(0, 10 ** (-60 / 20), 32000).astype(np.float32)
    assert loudness.levelled(noise, 16000, -16.0).gain_db == loudness.MOST_GAIN_DB


def test_a_true_peak_is_found_in_any_block():
    clip = np.zeros((1 << 18) * 2 + 500, np.float32)
    for start in ((1 << 18) - 50, 1 << 18, (1 << 18) * 2 + 300):
        clip[start : start + 100] = np.sin(np.pi * np.arange(100) / 2 + np.pi / 4) * np.hanning(100)
        whole = np.max(np.abs(signal.resample_poly(clip.astype(np.float64), 4, 1)))
        assert loudness.true_peak(clip) == pytest.approx(whole, rel=1e-6)
        clip[:] = 0


def test_flac_keeps_length_rate_and_samples():
    wav = plucks(4, 1.5, 16000, 0.7)
    decoded, rate = soundfile.read(io.BytesIO(loudness.flac(wav, 16000)), dtype="float32")
    assert rate == 16000 and decoded.shape == wav.shape
    np.testing.assert_allclose(decoded, wav, atol=1.0 / 32768)
