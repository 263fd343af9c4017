import jax
import jax.numpy as jnp
import numpy as np
import optax

from musicrl_jax.models import soundstream
from musicrl_jax.objectives.codec import CodecObjective

MODEL = soundstream.SoundStreamConfig(sample_rate_hz=16000, strides=(8, 5), channels=4, embed=8, levels=2, codes=8)


def test_a_few_steps_lower_the_loss_and_the_metrics_are_those_promised():
    objective = CodecObjective(MODEL, data=None, windows=(128, 512))
    time = np.arange(1600) / 16000
    wav = 0.3 * np.sin(2 * np.pi * np.outer([220.0, 440.0, 330.0, 550.0], time))
    batch = {"audio": jnp.asarray(wav, jnp.float32)}
    variables = dict(jax.jit(objective.init)(jax.random.key(0), batch))
    params, state = variables.pop("params"), variables
    optimiser = optax.adam(3e-3)
    moments = optimiser.init(params)

    @jax.jit
    def step(params, state, moments, key):
        gradient = jax.value_and_grad(objective.loss, has_aux=True)
        (_, (state, metrics)), gradients = gradient(params, state, {}, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # inside optax
            updates, moments = optimiser.update(gradients, moments)
        return optax.apply_updates(params, updates), state, moments, metrics

    evaluate = jax.jit(objective.evaluate)
    for i in range(40):
        params, state, moments, metrics = step(params, state, moments, jax.random.key(i))
        if i == 0:
            before = evaluate(params, state, {}, batch, jax.random.key(0))
    after = evaluate(params, state, {}, batch, jax.random.key(0))
    assert set(metrics) == {"loss", "spectral_l1", "spectral_log", "waveform_l1", "commitment", "perplexity"}
    assert set(after) == {"loss", "mel_distance", "si_sdr", "perplexity"}
    assert all(np.isfinite(value) and value.shape == () for value in (metrics | after).values())
    assert after["loss"] < 0.8 * before["loss"]
