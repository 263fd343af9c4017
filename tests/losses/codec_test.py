"""The codec's losses against NumPy, by hand, and the balance of gradients."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np

from musicrl_jax.losses import codec


def numpy_stft(wav, window):
    """Returns magnitudes [B, S, K]; a hop is a quarter of the Hann window."""
    hop = window // 4
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.pad(wav.astype(np.float64), ((0, 0), ((window - hop) // 2, window)))
    starts = range(0, wav.shape[1] // hop * hop, hop)
    return np.abs(np.fft.rfft(np.stack([padded[:, s : s + window] * hann for s in starts], 1)))


def numpy_mel(wav, window):
    filters = librosa.filters.mel(sr=16000, n_fft=window, n_mels=64)
    return numpy_stft(wav, window) @ filters.T


def waves(samples=2048):
    rng = np.random.default_rng(0)
    wav = 0.1 * rng.normal(size=(2, samples)).astype(np.float32)
    return wav, (0.7 * wav + 0.02 * rng.normal(size=wav.shape)).astype(np.float32)


def test_reconstruction_equals_numpy():
    wav, decoded = waves()
    windows, terms = (512, 1024), []
    for window in windows:
        a, b = numpy_mel(wav, window), numpy_mel(decoded, window)
        floor = 1e-8 * window
        logs = np.log(np.maximum(a, floor)) - np.log(np.maximum(b, floor))
        l1 = np.abs(a - b).sum(-1).mean()
        terms.append(l1 + np.sqrt(window / 2) * np.sqrt(np.square(logs).sum(-1)).mean())
    loss = codec.reconstruction(jnp.asarray(wav), jnp.asarray(decoded), 16000, windows)
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-4)


def test_perfect_and_silent_reconstructions_have_finite_gradients():
    wav = jnp.asarray(waves()[0])

    def loss(decoded):
        return codec.reconstruction(wav, decoded, 16000, (64, 256))

    value_and_gradient = jax.jit(jax.value_and_grad(loss))
    value, perfect = value_and_gradient(wav)
    assert value < 0.1
    assert np.isfinite(perfect).all()
    assert np.isfinite(value_and_gradient(jnp.zeros_like(wav))[1]).all()


def test_si_sdr_returns_a_known_ratio_at_any_gain():
    rng = np.random.default_rng(1)
    wav = rng.normal(size=(1, 4000))
    noise = rng.normal(size=(1, 4000))
    noise -= (noise * wav).sum() / np.square(wav).sum() * wav
    noise *= np.sqrt(np.square(wav).sum() / np.square(noise).sum()) * 10 ** (-12 / 20)
    for gain in (1.0, 0.3):
        decoded = jnp.asarray(gain * (wav + noise), jnp.float32)
        np.testing.assert_allclose(
            codec.si_sdr(jnp.asarray(wav, jnp.float32), decoded), [12.0], atol=1e-3
        )


def test_mel_distance_of_a_halved_clip_is_ln_2():
    wav = jnp.asarray(waves()[0])
    np.testing.assert_allclose(codec.mel_distance(wav, 0.5 * wav, 16000), np.log(2.0), rtol=1e-3)


def test_stft_distance_equals_numpy():
    wav, decoded = waves(4096)
    terms = []
    for window in (2048, 512):
        a, b = numpy_stft(wav, window), numpy_stft(decoded, window)
        log_ratio = 2 * np.log10(np.maximum(a, 1e-5) / np.maximum(b, 1e-5))
        terms.append(np.abs(a - b).mean() + np.abs(log_ratio).mean())
    distance = codec.stft_distance(jnp.asarray(wav), jnp.asarray(decoded))
    np.testing.assert_allclose(distance, np.mean(terms), rtol=1e-4)


def features(*scores):
    """Returns two layers per discriminator: an inner one and its scores."""
    return [[jnp.asarray([[1.0, 2.0]]) * (i + 1), jnp.asarray(s)] for i, s in enumerate(scores)]


def test_hinge_losses_by_hand():
    real, decoded = features([[0.5, 2.0]], [[-1.0]]), features([[0.0, -3.0]], [[1.0]])
    np.testing.assert_allclose(
        codec.discriminator_hinge(real, decoded), ((0.25 + 0.5) + (2.0 + 2.0)) / 2
    )
    np.testing.assert_allclose(codec.generator_hinge(decoded), ((1.0 + 4.0) / 2 + 0.0) / 2)


def test_the_feature_distance_leaves_out_the_scores():
    real, decoded = features([[9.0]], [[9.0]]), features([[0.0]], [[0.0]])
    decoded[1][0] = decoded[1][0] + jnp.asarray([[1.0, -2.0]])
    np.testing.assert_allclose(codec.feature_distance(real, decoded), (0.0 + 1.5) / 2)


def test_balanced_gradients_have_their_weights_in_any_units():
    rng = np.random.default_rng(0)
    directions = {"a": rng.normal(size=(2, 50)), "b": rng.normal(size=(2, 50))}
    weights = {"a": 1.0, "b": 3.0}
    norms = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    totals = []
    for units in ({"a": 1.0, "b": 1.0}, {"a": 1e6, "b": 1e-6}):
        gradients = {
            name: jnp.asarray(units[name] * d, jnp.float32) for name, d in directions.items()
        }
        total, averages = codec.balanced(gradients, weights, norms)
        totals.append(total)
    np.testing.assert_allclose(*totals, rtol=1e-4)
    clip_norms = {name: np.linalg.norm(d, axis=-1).mean() for name, d in directions.items()}
    expected = sum(weights[name] / 4 * d / clip_norms[name] / 2 for name, d in directions.items())
    np.testing.assert_allclose(totals[0], expected, rtol=1e-4)
    np.testing.assert_allclose(averages["a"], 1e6 * clip_norms["a"], rtol=1e-5)
    twice, after = codec.balanced({name: 2 * g for name, g in gradients.items()}, weights, averages)
    # 0.99 of the old average, 0.01 of the doubled norm.
    np.testing.assert_allclose(after["a"], 1.01 * averages["a"], rtol=1e-5)
    np.testing.assert_allclose(twice, 2 / 1.01 * totals[1], rtol=1e-4)


def test_a_loss_without_a_gradient_yet_has_no_share():
    gradients = {"a": jnp.ones((1, 4)), "late": jnp.zeros((1, 4))}
    total, norms = codec.balanced(
        gradients, {"a": 1.0, "late": 1.0}, {"a": jnp.zeros(()), "late": jnp.zeros(())}
    )
    np.testing.assert_allclose(total, jnp.full((1, 4), 0.5))  # all of the total, which has norm 1
    assert norms["late"] == 0.0
    late = {"a": jnp.ones((1, 4)), "late": 5 * jnp.ones((1, 4))}
    total, norms = codec.balanced(late, {"a": 1.0, "late": 1.0}, norms)
    np.testing.assert_allclose(norms["late"], 10.0)
    np.testing.assert_allclose(total, jnp.full((1, 4), 0.5))
