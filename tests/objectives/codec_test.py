"""Training the codec: what each loss moves, and the finished model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from musicrl_jax.losses import codec
from musicrl_jax.models import rvq
from musicrl_jax.models.discriminators import Discriminators, DiscriminatorsConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.objectives.codec import CodecObjective

MODEL = SoundStreamConfig(16000, strides=(8, 5), channels=4, embed=8, levels=2, codes=8)
DISCRIMINATORS = DiscriminatorsConfig(wave_scales=0, stft_windows=(), periods=(2,), channels=4)
KEY = jax.random.key(0)


# --- data ---


class Tones:
    """Eight clips of one tone each, in another order in each of three batches."""

    def batches(self, split="train", batch_size=8, seed=0, start_step=0, epochs=None):
        time = np.arange(800) / 16000
        for turn in range(3):
            hertz = np.roll(np.tile([220.0, 440.0, 330.0, 550.0], 2), turn)
            wav = 0.3 * np.sin(2 * np.pi * np.outer(hertz, time))
            yield {"audio": wav.astype(np.float32)}

    def count(self, split):
        return 8


BATCH = {"audio": jnp.asarray(next(Tones().batches())["audio"])}
WAV = BATCH["audio"]


def first_variables(objective):
    """Returns (params, the other collections) before the first step."""
    variables = dict(jax.jit(objective.init)(KEY, BATCH))
    return variables.pop("params"), variables


# --- training ---


def test_a_few_steps_lower_the_distances():
    objective = CodecObjective(MODEL, data=Tones(), windows=(128, 512))
    params, state = first_variables(objective)
    optimiser = optax.adam(3e-3)
    moments = optimiser.init(params)

    @jax.jit
    def step(params, state, moments, key):
        gradient = jax.value_and_grad(objective.loss, has_aux=True)
        (_, (state, metrics)), gradients = gradient(params, state, {}, BATCH, key)
        with jax.numpy_dtype_promotion("standard"):  # inside optax
            updates, moments = optimiser.update(gradients, moments)
        return optax.apply_updates(params, updates), state, moments, metrics

    evaluate = jax.jit(objective.evaluate)
    for i in range(40):
        params, state, moments, metrics = step(params, state, moments, jax.random.key(i))
        if i == 0:
            before = evaluate(params, state, {}, BATCH, KEY)
    after = evaluate(params, state, {}, BATCH, KEY)
    assert set(metrics) == {"loss", "spectral", "waveform", "commitment", "perplexity"}
    assert set(after) == {"mel_distance", "stft_distance", "si_sdr", "perplexity"}
    assert all(np.isfinite(value) and value.shape == () for value in (metrics | after).values())
    assert after["mel_distance"] < 0.8 * before["mel_distance"]
    assert set(state["balance"]) == {"spectral", "waveform"}


@pytest.fixture(scope="module")
def adversarial():
    """Returns an objective with discriminators, its first variables and its jitted gradient."""
    objective = CodecObjective(MODEL, Tones(), windows=(128,), discriminators=DISCRIMINATORS)
    gradient = jax.jit(jax.grad(objective.loss, has_aux=True))
    return objective, *first_variables(objective), gradient


def test_codec_and_discriminators_each_move_by_their_own_loss(adversarial):
    objective, params, state, gradient = adversarial
    _, (state, _) = gradient(params, state, {}, BATCH, KEY)  # starts the codebooks
    gradients, (after, metrics) = gradient(params, state, {}, BATCH, KEY)
    assert metrics["discriminator"] > 0.0 and metrics["feature"] > 0.0
    assert after["balance"]["feature"] > 0.0

    # The same losses, written out.
    codec_params = {name: value for name, value in params.items() if name != "discriminators"}
    weights, norms = params["discriminators"], after["balance"]

    def decode(codec_params):
        variables = {"params": codec_params, "codebooks": state["codebooks"]}
        return SoundStream(MODEL).apply(variables, WAV, KEY)

    def layers(weights, decoded):
        apply = Discriminators(DISCRIMINATORS).apply
        return [apply({"params": weights}, wav) for wav in (WAV, decoded)]

    def discriminator_loss(weights, decoded):
        return codec.discriminator_hinge(*layers(weights, decoded))

    def codec_loss(codec_params):
        """Returns the balanced sum: four losses, each divided by its gradient's norm."""
        output = decode(codec_params)
        real, fake = layers(weights, output.wav)
        shares = {
            "spectral": (1.0, codec.reconstruction(WAV, output.wav, 16000, (128,))),
            "waveform": (objective.waveform_weight, jnp.mean(jnp.abs(WAV - output.wav))),
            "adversarial": (objective.adversarial_weight, codec.generator_hinge(fake)),
            "feature": (objective.feature_weight, codec.feature_distance(real, fake)),
        }
        total = sum(weight * loss / norms[name] for name, (weight, loss) in shares.items())
        total = total / sum(weight for weight, _ in shares.values())
        return total / 8 + objective.commitment_weight * output.commitment

    expected, decoded = jax.jit(lambda params: (jax.grad(codec_loss)(params), decode(params).wav))(
        codec_params
    )
    for name in ("encoder", "decoder"):
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[name]))
        jax.tree.map(
            lambda a, b, most=largest: np.testing.assert_allclose(a, b, atol=1e-3 * most),
            gradients[name],
            expected[name],
        )
    expected = jax.jit(jax.grad(discriminator_loss))(weights, decoded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        gradients["discriminators"],
        expected,
    )


# --- the finished codec ---


def test_the_finished_codec_has_fitted_codebooks_and_no_discriminators(adversarial):
    objective, params, state, _ = adversarial
    variables = objective.finish({"params": params, **state}, {}, Tones().batches)
    assert set(variables) == {"params", "codebooks"}
    assert set(variables["params"]) == {"encoder", "decoder"}
    apply = jax.jit(SoundStream(MODEL).apply, static_argnames="method")
    vectors = [
        apply(variables, batch["audio"], method=SoundStream.vectors) for batch in Tones().batches()
    ]
    points = jnp.concatenate(vectors).reshape(-1, 8)
    fitted = rvq.fit(KEY, points, 2, 8, state["codebooks"]["rvq"]["codebooks"])
    np.testing.assert_allclose(variables["codebooks"]["rvq"]["codebooks"], fitted, atol=1e-5)


def test_a_codec_with_dacs_quantizer_trains_and_finishes():
    model = SoundStreamConfig(16000, (8, 5), 4, 8, 2, 8, "snake", 4, False)
    objective = CodecObjective(model, data=Tones(), windows=(128,))
    params, state = first_variables(objective)
    gradient, (state, metrics) = jax.jit(jax.grad(objective.loss, has_aux=True))(
        params, state, {}, BATCH, KEY
    )
    assert set(state) == {"balance"} and np.isfinite(metrics["loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert set(objective.finish({"params": params, **state}, {}, Tones().batches)) == {"params"}


def test_balance_and_codebooks_are_those_of_the_global_batch(adversarial):
    _, params, state, gradient = adversarial
    scale = jnp.repeat(jnp.array([1.0, 0.5]), 4)[:, None]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = {"audio": scale * WAV}
    one, many = (
        gradient(params, state, {}, wavs, KEY) for wavs in (batch, jax.device_put(batch, rows))
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_clips_to_listen_to_are_the_batch_and_its_decoded_clips(adversarial):
    objective, params, state, _ = adversarial
    clips = jax.jit(objective.clips)({"params": params, **state}, BATCH)
    np.testing.assert_array_equal(clips["original"], BATCH["audio"])
    assert clips["decoded"].shape == BATCH["audio"].shape and np.isfinite(clips["decoded"]).all()
    assert not np.allclose(clips["decoded"], clips["original"])


def test_too_little_audio_for_a_codebook_is_named_before_training():
    model = SoundStreamConfig(16000, (8, 5), 4, 8, 2, 161)
    complaint = "codes = 161, but the training clips have 160 codec frames"
    with pytest.raises(ValueError, match=complaint):
        CodecObjective(model, data=Tones()).check(BATCH)
