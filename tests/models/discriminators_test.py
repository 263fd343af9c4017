import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from musicrl_jax.models import discriminators
from musicrl_jax.models.discriminators import Discriminators, DiscriminatorsConfig

ALL = DiscriminatorsConfig(
    wave_scales=2, stft_windows=(256,), periods=(2, 5), band_windows=(256,), channels=4
)


def noise(clips, samples, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(clips, samples)), jnp.float32)


@pytest.fixture(scope="module")
def judges():
    module = Discriminators(ALL)
    variables = jax.jit(module.init)(jax.random.key(0), noise(2, 2048))
    return jax.jit(module.apply), variables


def test_there_is_one_discriminator_for_each_that_the_config_names(judges):
    judge, variables = judges
    assert set(variables["params"]) == {
        "wave_0",
        "wave_1",
        "stft_256",
        "period_2",
        "period_5",
        "bands_256",
    }
    found = judge(variables, noise(2, 2048))
    assert len(found) == 6
    for layers in found:
        assert len(layers) > 4
        assert layers[-1].shape[0] == 2 and layers[-1].shape[-1] == 1
        assert all(np.isfinite(layer).all() for layer in layers)


def test_a_clip_is_judged_by_itself(judges):
    judge, variables = judges
    wav = noise(2, 2048)
    both, beside_another = judge(variables, wav), judge(variables, wav.at[1].multiply(-3.0))
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(beside_another), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert (a[1] != b[1]).any()


def test_spectrum_is_scipys():
    wav = np.asarray(noise(1, 1024))[0]
    window, hop = 64, 16
    hann = scipy.signal.get_window("hann", window)
    got = np.asarray(discriminators.spectrum(jnp.asarray(wav)[None], window))[0]
    padded = np.pad(wav, ((window - hop) // 2, window))
    for s in (0, 7, 63):
        expected = np.fft.rfft(padded[s * hop : s * hop + window] * hann) / np.linalg.norm(hann)
        np.testing.assert_allclose(got[s, :, 0] + 1j * got[s, :, 1], expected, atol=1e-4)


@pytest.mark.parametrize(("period", "moved"), [(2, 1), (5, 2)])
def test_a_period_looks_at_columns(judges, period, moved):
    """Scores of a column depend on its own samples alone: moving another column changes nothing in it."""
    variables = {"params": judges[1]["params"][f"period_{period}"]}
    column = jax.jit(discriminators.Period(4, period).apply)
    wav = noise(1, 400)
    before = column(variables, wav)[-1]  # [1, rows, period, 1]
    after = column(variables, wav.at[:, moved::period].add(1.0))[-1]
    same = np.delete(np.arange(period), moved)
    np.testing.assert_allclose(before[:, :, same], after[:, :, same], atol=1e-5)
    assert np.abs(before[:, :, moved] - after[:, :, moved]).max() > 1e-3


def test_bands_look_at_their_own_frequencies(judges):
    """A tone in the highest band leaves the layers of the lowest alone."""
    variables = {"params": judges[1]["params"]["bands_256"]}
    bands = jax.jit(discriminators.Bands(4, 256).apply)
    wav = noise(1, 2048)
    tone = jnp.asarray(np.sin(2 * np.pi * 0.45 * np.arange(2048)), jnp.float32)[None]
    mid = slice(8, -8)  # frames that the clip's sudden ends do not spread over all frequencies
    before, after = bands(variables, wav), bands(variables, wav + tone)
    assert (
        np.abs(before[0] - after[0])[:, mid].max()
        < 1e-3
        < np.abs(before[-2] - after[-2])[:, mid].max()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wave_scales": 0, "stft_windows": ()}, "no discriminator"),
        ({"channels": 6}, "multiple of 4"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorsConfig(**fields)
