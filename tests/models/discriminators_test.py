"""The discriminators: one per setting, independent clips, columns and bands, SciPy's spectrum."""

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
NAMES = {"wave_0", "wave_1", "stft_256", "period_2", "period_5", "bands_256"}
SAMPLES = 1024


def noise(clips, samples=SAMPLES):
    return jnp.asarray(np.random.default_rng(0).normal(size=(clips, samples)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    """Returns random weights; `init` would take longer to compile than to test."""
    shapes = jax.eval_shape(Discriminators(ALL).init, jax.random.key(0), noise(2))["params"]
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if leaf.ndim > 1:  # a kernel, which weight normalisation scales
            return jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
        return (jnp.ones if "scale" in jax.tree_util.keystr(path) else jnp.zeros)(leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def judge(params):
    apply = jax.jit(lambda wav: Discriminators(ALL).apply({"params": params}, wav))
    return lambda wav: jax.device_get(apply(wav))


def test_a_config_gives_one_discriminator_for_each_setting(params, judge):
    assert set(params) == NAMES
    outputs = judge(noise(2))
    assert len(outputs) == 6
    for layers in outputs:
        assert len(layers) > 4
        assert layers[-1].shape[0] == 2 and layers[-1].shape[-1] == 1
        assert all(np.isfinite(layer).all() for layer in layers)


def test_a_clip_does_not_depend_on_its_batch(judge):
    wav = noise(2)
    before, after = judge(wav), judge(wav.at[1].multiply(-3.0))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert (a[1] != b[1]).any()


def test_the_spectrum_is_scipys():
    wav = np.asarray(noise(1))[0]
    window, hop = 64, 16
    hann = scipy.signal.get_window("hann", window)
    spectrum = np.asarray(discriminators.spectrum(jnp.asarray(wav)[None], window))[0]
    padded = np.pad(wav, ((window - hop) // 2, window))
    for s in (0, 7, 63):
        expected = np.fft.rfft(padded[s * hop : s * hop + window] * hann) / np.linalg.norm(hann)
        np.testing.assert_allclose(spectrum[s, :, 0] + 1j * spectrum[s, :, 1], expected, atol=1e-4)


@pytest.mark.parametrize(("period", "changed"), [(2, 1), (5, 2)])
def test_a_period_scores_each_column_separately(params, period, changed):
    weights = {"params": params[f"period_{period}"]}
    scores = jax.jit(lambda wav: discriminators.Period(4, period).apply(weights, wav)[-1])
    wav = noise(1, 400)
    before, after = scores(wav), scores(wav.at[:, changed::period].add(1.0))  # [1, rows, period, 1]
    same = np.delete(np.arange(period), changed)
    np.testing.assert_allclose(before[:, :, same], after[:, :, same], atol=1e-5)
    assert np.abs(before[:, :, changed] - after[:, :, changed]).max() > 1e-3


def test_a_tone_in_the_highest_band_leaves_the_lowest_unchanged(params):
    weights = {"params": params["bands_256"]}
    bands = jax.jit(lambda wav: discriminators.Bands(4, 256).apply(weights, wav))
    wav = noise(1)
    tone = jnp.asarray(np.sin(2 * np.pi * 0.45 * np.arange(SAMPLES)), jnp.float32)[None]
    middle = slice(4, -4)  # the clip's ends spread over all frequencies
    before, after = bands(wav), bands(wav + tone)
    lowest, highest = (np.abs(before[i] - after[i])[:, middle].max() for i in (0, -2))
    assert lowest < 1e-3 < highest


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
