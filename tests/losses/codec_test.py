import jax
import jax.numpy as jnp
import librosa
import numpy as np

from musicrl_jax.losses import codec


def numpy_mel(wav, window):
    hop = window // 4
    left = (window - hop) // 2
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    padded = np.pad(wav.astype(np.float64), (left, window))
    frames = np.stack([padded[s * hop : s * hop + window] * hann for s in range(len(wav) // hop)])
    return np.abs(np.fft.rfft(frames)) @ librosa.filters.mel(sr=16000, n_fft=window, n_mels=64).T


def waves():
    rng = np.random.default_rng(0)
    wav = 0.1 * rng.normal(size=(2, 2048)).astype(np.float32)
    return wav, (0.7 * wav + 0.02 * rng.normal(size=wav.shape)).astype(np.float32)


def test_reconstruction_equals_numpy():
    wav, decoded = waves()
    windows = (512, 1024)
    expected = 0.0
    for window in windows:
        for x, y in zip(wav, decoded, strict=True):
            a, b = numpy_mel(x, window), numpy_mel(y, window)
            l1 = np.abs(a - b).sum(-1).mean()
            log = np.sqrt(
                np.square(
                    np.log(np.maximum(a, 1e-8 * window)) - np.log(np.maximum(b, 1e-8 * window))
                ).sum(-1)
            ).mean()
            expected += (l1 + np.sqrt(window / 2) * log) / (len(windows) * len(wav))
    got = codec.reconstruction(jnp.asarray(wav), jnp.asarray(decoded), 16000, windows)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_perfect_and_silent_reconstructions_have_finite_gradients():
    wav = jnp.asarray(waves()[0])

    def loss(decoded):
        return codec.reconstruction(wav, decoded, 16000, (64, 256))

    value, gradient = jax.jit(jax.value_and_grad(loss))(wav)
    assert value < 0.1
    assert np.isfinite(gradient).all()
    assert np.isfinite(jax.grad(loss)(jnp.zeros_like(wav))).all()


def test_si_sdr_is_the_ratio_it_was_made_with_and_ignores_gain():
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
    rng = np.random.default_rng(4)
    wav = 0.1 * rng.normal(size=(2, 4096)).astype(np.float32)
    decoded = (0.7 * wav + 0.02 * rng.normal(size=wav.shape)).astype(np.float32)
    terms = []
    for window in (2048, 512):
        hop = window // 4
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
        left = (window - hop) // 2
        pads = [np.pad(x.astype(np.float64), ((0, 0), (left, window))) for x in (wav, decoded)]
        a, b = (
            np.abs(
                np.fft.rfft(
                    np.stack(
                        [p[:, s * hop : s * hop + window] * hann for s in range(4096 // hop)], 1
                    )
                )
            )
            for p in pads
        )
        log_ratio = 2 * np.log10(np.maximum(a, 1e-5) / np.maximum(b, 1e-5))
        terms.append(np.abs(a - b).mean() + np.abs(log_ratio).mean())
    np.testing.assert_allclose(
        codec.stft_distance(jnp.asarray(wav), jnp.asarray(decoded)), np.mean(terms), rtol=1e-4
    )


def features(*scores):
    """Two layers a discriminator: an inner one and its scores."""
    return [[jnp.asarray([[1.0, 2.0]]) * (i + 1), jnp.asarray(s)] for i, s in enumerate(scores)]


def test_hinge_losses_by_hand():
    real, decoded = features([[0.5, 2.0]], [[-1.0]]), features([[0.0, -3.0]], [[1.0]])
    np.testing.assert_allclose(
        codec.discriminator_hinge(real, decoded), ((0.25 + 0.5) + (2.0 + 2.0)) / 2
    )
    np.testing.assert_allclose(codec.generator_hinge(decoded), ((1.0 + 4.0) / 2 + 0.0) / 2)


def test_features_are_compared_layer_by_layer_without_the_scores():
    real, decoded = features([[9.0]], [[9.0]]), features([[0.0]], [[0.0]])
    decoded[1][0] = decoded[1][0] + jnp.asarray([[1.0, -2.0]])
    np.testing.assert_allclose(codec.feature_distance(real, decoded), (0.0 + 1.5) / 2)


def test_balanced_gradients_pull_by_their_weights_whatever_their_units():
    rng = np.random.default_rng(0)
    directions = {"a": rng.normal(size=(2, 50)), "b": rng.normal(size=(2, 50))}
    weights = {"a": 1.0, "b": 3.0}
    norms = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    pulls = []
    for units in ({"a": 1.0, "b": 1.0}, {"a": 1e6, "b": 1e-6}):
        gradients = {
            name: jnp.asarray(units[name] * d, jnp.float32) for name, d in directions.items()
        }
        pull, moved = codec.balanced(gradients, weights, norms)
        pulls.append(pull)
    np.testing.assert_allclose(*pulls, rtol=1e-4)
    clip_norms = {name: np.linalg.norm(d, axis=-1).mean() for name, d in directions.items()}
    expected = sum(weights[name] / 4 * d / clip_norms[name] / 2 for name, d in directions.items())
    np.testing.assert_allclose(pulls[0], expected, rtol=1e-4)
    np.testing.assert_allclose(moved["a"], 1e6 * clip_norms["a"], rtol=1e-5)
    twice, after = codec.balanced({name: 2 * g for name, g in gradients.items()}, weights, moved)
    np.testing.assert_allclose(
        after["a"], 1.01 * moved["a"], rtol=1e-5
    )  # 0.99 of the old, 0.01 of the double
    np.testing.assert_allclose(twice, 2 / 1.01 * pulls[1], rtol=1e-4)


def test_a_loss_that_has_not_begun_neither_pulls_nor_leaves_a_mark():
    gradients = {"a": jnp.ones((1, 4)), "late": jnp.zeros((1, 4))}
    pull, norms = codec.balanced(
        gradients, {"a": 1.0, "late": 1.0}, {"a": jnp.zeros(()), "late": jnp.zeros(())}
    )
    np.testing.assert_allclose(pull, jnp.full((1, 4), 0.5))  # all of the pull: of norm 1
    assert norms["late"] == 0.0
    late = {"a": jnp.ones((1, 4)), "late": 5 * jnp.ones((1, 4))}
    pull, norms = codec.balanced(late, {"a": 1.0, "late": 1.0}, norms)
    np.testing.assert_allclose(norms["late"], 10.0)
    np.testing.assert_allclose(pull, jnp.full((1, 4), 0.5))
