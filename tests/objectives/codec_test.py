import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from musicrl_jax.losses import codec
from musicrl_jax.models import rvq, soundstream
from musicrl_jax.models.discriminators import Discriminators, DiscriminatorsConfig
from musicrl_jax.objectives.codec import CodecObjective

MODEL = soundstream.SoundStreamConfig(
    sample_rate_hz=16000, strides=(8, 5), channels=4, embed=8, levels=2, codes=8
)
JUDGES = DiscriminatorsConfig(wave_scales=0, stft_windows=(), periods=(2,), channels=4)


class Tones:
    """Clips of one tone, in another order in each batch."""

    def batches(self, split="train", batch_size=4, seed=0, start_step=0, epochs=None):
        time = np.arange(1600) / 16000
        for turn in range(3):
            hertz = np.roll([220.0, 440.0, 330.0, 550.0], turn)
            yield {"audio": (0.3 * np.sin(2 * np.pi * np.outer(hertz, time))).astype(np.float32)}

    def count(self, split):
        return 4


BATCH = {"audio": jnp.asarray(next(Tones().batches())["audio"])}


def begun(objective):
    variables = dict(jax.jit(objective.init)(jax.random.key(0), BATCH))
    return variables.pop("params"), variables


def test_a_few_steps_lower_the_distances_and_the_metrics_are_those_promised():
    objective = CodecObjective(MODEL, data=Tones(), windows=(128, 512))
    params, state = begun(objective)
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
            before = evaluate(params, state, {}, BATCH, jax.random.key(0))
    after = evaluate(params, state, {}, BATCH, jax.random.key(0))
    assert set(metrics) == {"loss", "spectral", "waveform", "commitment", "perplexity"}
    assert set(after) == {"mel_distance", "stft_distance", "si_sdr", "perplexity"}
    assert all(np.isfinite(value) and value.shape == () for value in (metrics | after).values())
    assert after["mel_distance"] < 0.8 * before["mel_distance"]
    assert set(state["balance"]) == {"spectral", "waveform"}


@pytest.fixture(scope="module")
def judged():
    objective = CodecObjective(MODEL, data=Tones(), windows=(128,), discriminators=JUDGES)
    return objective, *begun(objective), jax.jit(jax.grad(objective.loss, has_aux=True))


def test_codec_and_discriminators_each_move_by_their_own_loss(judged):
    objective, params, state, gradient = judged
    _, (state, _) = gradient(params, state, {}, BATCH, jax.random.key(0))  # starts the codebooks
    late, (after, metrics) = gradient(params, state, {}, BATCH, jax.random.key(0))
    assert metrics["discriminator"] > 0.0 and metrics["feature"] > 0.0
    assert after["balance"]["feature"] > 0.0

    module, judges = soundstream.SoundStream(MODEL), Discriminators(JUDGES)
    codec_params = {name: value for name, value in params.items() if name != "discriminators"}
    codebooks = {"codebooks": state["codebooks"]}

    def decode(codec_params):
        return module.apply(
            {"params": codec_params, **codebooks}, BATCH["audio"], jax.random.key(0)
        )

    def of_judges(weights):
        real, fake = (
            judges.apply({"params": weights}, wav)
            for wav in (BATCH["audio"], decode(codec_params).wav)
        )
        return codec.discriminator_hinge(real, fake)

    expected = jax.jit(jax.grad(of_judges))(params["discriminators"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), late["discriminators"], expected
    )

    def of_codec(codec_params):
        """The balanced sum written out: four losses, each over its own norm."""
        output = decode(codec_params)
        held = params["discriminators"]
        real, fake = (judges.apply({"params": held}, wav) for wav in (BATCH["audio"], output.wav))
        norms = after["balance"]
        total = (
            codec.reconstruction(BATCH["audio"], output.wav, 16000, (128,)) / norms["spectral"]
            + objective.waveform_weight
            * jnp.mean(jnp.abs(BATCH["audio"] - output.wav))
            / norms["waveform"]
            + objective.adversarial_weight * codec.generator_hinge(fake) / norms["adversarial"]
            + objective.feature_weight * codec.feature_distance(real, fake) / norms["feature"]
        )
        weights = (
            1.0
            + objective.waveform_weight
            + objective.adversarial_weight
            + objective.feature_weight
        )
        return total / weights / 4 + objective.commitment_weight * output.commitment

    expected = jax.jit(jax.grad(of_codec))(codec_params)
    for name in ("encoder", "decoder"):
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[name]))
        jax.tree.map(
            lambda a, b, most=largest: np.testing.assert_allclose(a, b, atol=1e-3 * most),
            late[name],
            expected[name],
        )


def test_the_finished_codec_has_codebooks_fitted_to_its_encoder_and_no_discriminators(judged):
    objective, params, state, _ = judged
    variables = objective.finish({"params": params, **state}, {}, Tones().batches)
    assert set(variables) == {"params", "codebooks"}
    assert set(variables["params"]) == {"encoder", "decoder"}
    module = soundstream.SoundStream(MODEL)
    wavs = [jnp.asarray(batch["audio"]) for batch in Tones().batches()]
    encode = jax.jit(
        lambda wav: module.apply(variables, wav, method=soundstream.SoundStream.vectors)
    )
    vectors = jnp.concatenate([encode(wav) for wav in wavs]).reshape(-1, 8)
    fitted = rvq.fit(jax.random.key(0), vectors, 2, 8, state["codebooks"]["rvq"]["codebooks"])
    np.testing.assert_allclose(variables["codebooks"]["rvq"]["codebooks"], fitted, atol=1e-5)


def test_a_codec_with_dacs_quantizer_trains_and_finishes():
    model = soundstream.SoundStreamConfig(16000, (8, 5), 4, 8, 2, 8, "snake", 4, False)
    objective = CodecObjective(model, data=Tones(), windows=(128,))
    params, state = begun(objective)
    gradient, (state, metrics) = jax.jit(jax.grad(objective.loss, has_aux=True))(
        params, state, {}, BATCH, jax.random.key(0)
    )
    assert set(state) == {"balance"} and np.isfinite(metrics["loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert set(objective.finish({"params": params, **state}, {}, Tones().batches)) == {"params"}


def test_balance_and_codebooks_are_those_of_the_global_batch(judged):
    _, params, state, gradient = judged
    batch = {"audio": jnp.concatenate([BATCH["audio"], 0.5 * BATCH["audio"]])}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(
        batch, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    one, many = (gradient(params, state, {}, wavs, jax.random.key(0)) for wavs in (batch, spread))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_too_little_audio_for_a_codebook_is_named_before_training():
    model = soundstream.SoundStreamConfig(16000, (8, 5), 4, 8, 2, 161)
    with pytest.raises(
        ValueError, match="codes = 161, but the training clips have 160 codec frames"
    ):
        CodecObjective(model, data=Tones()).check(BATCH)
