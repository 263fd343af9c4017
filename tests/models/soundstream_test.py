"""SoundStream against NumPy: causality, clips in parts, companding, training, the linear start."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.models import soundstream

CONFIG = soundstream.SoundStreamConfig(
    sample_rate_hz=16000, strides=(4, 5), channels=4, embed=6, levels=3, codes=16
)
DAC = dataclasses.replace(CONFIG, activation="snake", code_width=3, companding=False)


@functools.partial(jax.jit, static_argnames=("config", "method", "mutable"))
def apply(config, variables, *arguments, method=None, mutable=False):
    module = soundstream.SoundStream(config)
    return module.apply(variables, *arguments, method=method, mutable=mutable)


@functools.cache
def random_variables(config):
    """Returns random weights; a fresh codec's residual units are identities."""
    shapes = jax.eval_shape(config.init, jax.random.key(0))
    rng = np.random.default_rng(3)

    def draw(leaf):
        if leaf.ndim == 0:
            return np.zeros((), np.int32)
        spread = 0.5 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
        return rng.normal(0, spread, leaf.shape).astype(np.float32)

    variables = jax.tree.map(draw, shapes)
    if config.code_width is None:
        variables["codebooks"]["rvq"]["codebooks"] *= 3
    return variables


def noise(clips, samples, seed=0):
    return np.random.default_rng(seed).normal(size=(clips, samples)).astype(np.float32)


# --- NumPy ---


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def numpy_conv(p, x, stride=1, dilation=1):
    """Convolves x [N, D] by the definition, one output at a time."""
    out = []
    for end in range(stride - 1, len(x), stride):
        places = end - dilation * np.arange(len(p["kernel"]) - 1, -1, -1)
        out.append(p["bias"] + sum(x[n] @ p["kernel"][k] for k, n in enumerate(places) if n >= 0))
    return np.stack(out)


def numpy_units(p, block, x):
    for dilation in (1, 3, 9):
        unit = p[f"unit_{block}_{dilation}"]
        h = elu(numpy_conv(unit["wide"], x, dilation=dilation))
        x = x + h @ unit["narrow"]["kernel"] + unit["narrow"]["bias"]
    return x


def numpy_encode(p, wav):
    x = numpy_conv(p["first"], wav[:, None])
    for block, stride in enumerate(CONFIG.strides):
        x = numpy_conv(p[f"down_{block}"], numpy_units(p, block, x), stride)
    x = numpy_conv(p["last"], x)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / length * np.log1p(length)


def numpy_upsample(p, x, stride):
    """Adds a kernel of two strides for every frame, and cuts the tail."""
    out = np.zeros(((len(x) + 1) * stride, len(p["bias"]))) + p["bias"]
    for t, frame in enumerate(x):
        out[t * stride : (t + 2) * stride] += np.einsum("d,dkf->kf", frame, p["kernel"])
    return out[: len(x) * stride]


def numpy_decode(p, x):
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    x = numpy_conv(p["first"], x / length * np.expm1(length))
    for block in (1, 0):
        x = numpy_units(p, block, numpy_upsample(p[f"up_{block}"], x, CONFIG.strides[block]))
    return numpy_conv(p["last"], x)[:, 0]


def test_encoder_quantizer_and_decoder_equal_numpy():
    variables, wav = random_variables(CONFIG), noise(1, 200)
    params, codebooks = variables["params"], variables["codebooks"]["rvq"]["codebooks"]
    residual, expected = numpy_encode(params["encoder"], wav[0]), []  # [T, D]
    for codebook in codebooks:
        code = np.square(residual[:, None] - codebook[None]).sum(-1).argmin(-1)
        residual = residual - codebook[code]
        expected.append(code)
    codes = apply(CONFIG, variables, wav, method="encode")
    assert codes.shape == (1, 10, 3)
    np.testing.assert_array_equal(codes[0], np.stack(expected, -1))
    for levels in (3, 2):
        quantized = sum(codebooks[q][expected[q]] for q in range(levels))
        decoded = apply(CONFIG, variables, codes[..., :levels], method="decode")[0]
        np.testing.assert_allclose(decoded, numpy_decode(params["decoder"], quantized), atol=1e-4)


# --- causality ---


@pytest.mark.parametrize("config", [CONFIG, DAC], ids=["SoundStream", "DAC"])
@pytest.mark.parametrize("frames", [(1,) * 20, (7, 1, 12)], ids=["frame by frame", "parts"])
def test_a_clip_in_parts_gives_the_result_of_the_whole_clip(config, frames):
    variables, wav = random_variables(config), noise(2, 400)
    codes = apply(config, variables, wav, method="encode")
    decoded = apply(config, variables, codes, method="decode")
    code_parts, wav_parts, encoder, decoder, start = [], [], {}, {}, 0
    for count in frames:
        end = start + count * config.stride
        stream = {"mutable": ("stream",)}
        part, encoder = apply(
            config, {**variables, **encoder}, wav[:, start:end], method="encode", **stream
        )
        sound, decoder = apply(config, {**variables, **decoder}, part, method="decode", **stream)
        code_parts.append(part)
        wav_parts.append(sound)
        start = end
    np.testing.assert_array_equal(jnp.concatenate(code_parts, 1), codes)
    np.testing.assert_allclose(jnp.concatenate(wav_parts, 1), decoded, atol=1e-5)
    assert np.abs(decoded).max() > 0.01


def test_a_part_without_its_past_is_another_clip():
    variables, wav = random_variables(CONFIG), noise(2, 400)
    codes = apply(CONFIG, variables, wav, method="encode")
    alone = apply(CONFIG, variables, wav[:, 200:], method="encode")
    assert (np.asarray(codes[:, 10:]) != np.asarray(alone)).any()


def test_no_sample_depends_on_later_frames():
    variables, wav, other = random_variables(CONFIG), noise(2, 400), noise(2, 400, seed=1)

    def roundtrip(wav):
        codes = apply(CONFIG, variables, wav, method="encode")
        return apply(CONFIG, variables, codes, method="decode")

    before = roundtrip(wav)
    for cut in (20, 215, 399):
        after = roundtrip(np.concatenate([wav[:, :cut], 5 * other[:, cut:]], 1))
        start = cut // CONFIG.stride * CONFIG.stride  # of the first changed frame
        np.testing.assert_array_equal(before[:, :start], after[:, :start])
        if cut < 399:
            assert np.abs(before[:, start:] - after[:, start:]).max() > 1e-3


def test_the_gradient_of_a_sample_ends_with_its_frame():
    bound = soundstream.SoundStream(CONFIG).bind(random_variables(CONFIG))
    gradient = jax.jit(jax.grad(lambda wav: bound.wav(bound.vectors(wav))[0, 133]))
    sensitivity = gradient(jnp.asarray(noise(1, 400)))[0]
    assert (np.asarray(sensitivity[140:]) == 0).all()
    assert sensitivity[139] != 0


# --- companding and training ---


def test_expand_inverts_compress():
    x = jnp.asarray(noise(50, 6)) * jnp.logspace(-6, 3, 50)[:, None]
    packed = soundstream.compress(x)
    lengths = np.log1p(np.linalg.norm(x, axis=-1))
    np.testing.assert_allclose(np.linalg.norm(packed, axis=-1), lengths, rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(soundstream.expand(packed), x, rtol=1e-3, atol=1e-6)
    for function in (soundstream.compress, soundstream.expand):
        slope = jax.grad(lambda x, function=function: jnp.sum(jnp.square(function(x))))
        assert np.isfinite(slope(jnp.zeros((2, 6)))).all()


def decode_first_levels(config, variables, codes):
    """Returns clips decoded from their first 1, 2 and 3 levels, [3, B, N]."""
    clips = []
    for levels in (1, 2, 3):
        silent = jnp.where(jnp.arange(3)[None, None] < levels, codes, -1)
        clips.append(apply(config, variables, silent, method="decode"))
    return np.stack(clips)


def test_dacs_quantizer_decodes_its_training_codes_and_has_no_moving_averages():
    variables, wav = random_variables(DAC), noise(2, 400)
    assert set(variables) == {"params"}

    def loss(params):
        output = soundstream.SoundStream(DAC).apply({"params": params}, wav, jax.random.key(1))
        return jnp.sum(jnp.square(output.wav)) + output.commitment, output

    gradients, output = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    codes = apply(DAC, variables, wav, method="encode")
    np.testing.assert_array_equal(output.codes, codes)
    decoded = decode_first_levels(DAC, variables, codes)
    assert np.abs(decoded - np.asarray(output.wav)[None]).max(-1).min(0).max() < 1e-4
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_a_training_pass_decodes_its_codes_and_updates_the_codebooks():
    variables, wav = random_variables(CONFIG), noise(4, 400)  # 80 vectors for 16 codes
    output, changed = apply(CONFIG, variables, wav, jax.random.key(1), mutable=("codebooks",))
    state = changed["codebooks"]["rvq"]
    assert state["updates"] == 1
    assert not np.allclose(state["codebooks"], variables["codebooks"]["rvq"]["codebooks"])
    trained = {"params": variables["params"], **changed}
    codes = apply(CONFIG, trained, wav, method="encode")
    # k-means has moved the codewords nearly to their means.
    assert (np.asarray(output.codes) == np.asarray(codes)).mean() > 0.9
    decoded = decode_first_levels(CONFIG, trained, codes)
    error = np.abs(decoded - np.asarray(output.wav)[None]).max(-1).min(0).max()
    assert error < 0.2 * np.abs(decoded).max()


# --- the linear start ---


@functools.partial(jax.jit, static_argnums=0)
def linear_variables(config, key):
    variables = config.init(key)
    return variables | {"params": soundstream.linear_start(config, variables["params"], key)}


def test_the_linear_start_reaches_the_best_projection_of_a_stride():
    config = soundstream.SoundStreamConfig(16000, (4, 5), channels=4, embed=10, levels=1, codes=2)
    variables = linear_variables(config, jax.random.key(0))
    wav = np.asarray(soundstream.brown_noise(jax.random.key(2), 40, 1000))

    @jax.jit
    def decode(wav):
        bound = soundstream.SoundStream(config).bind(variables)
        return bound.decoder(bound.encoder(wav))

    error = np.square(np.asarray(decode(wav)) - wav).mean()
    strides = wav.reshape(-1, 20)
    energy = np.linalg.eigvalsh(strides.T @ strides / strides.size)
    best = energy[:10].sum()  # the error of the 10 strongest of 20 directions
    assert best * 0.99 < error < 1.25 * best + 1e-6


def test_the_linear_start_leaves_no_unit_of_the_decoder_without_a_gradient():
    """A unit with zeros on both sides, without an activation between, would stay at zero."""
    config = soundstream.SoundStreamConfig(16000, (8, 5), channels=16, embed=10, levels=1, codes=2)
    decoder = linear_variables(config, jax.random.key(1))["params"]["decoder"]
    inputs = np.abs(decoder["first"]["kernel"]).max(axis=(0, 1)) > 0
    outputs = np.abs(decoder["up_1"]["kernel"]).max(axis=(1, 2)) > 0
    assert not outputs.all() and (inputs | outputs).all()


def test_brown_noise_falls_by_6_db_an_octave():
    brown = np.asarray(soundstream.brown_noise(jax.random.key(0), 64, 1024))
    power = np.square(np.abs(np.fft.rfft(brown))).mean(0)
    octaves = 10 * np.log10([power[k : 2 * k].mean() for k in (8, 16, 32, 64, 128)])
    np.testing.assert_allclose(np.diff(octaves), -6.02, atol=0.7)
    np.testing.assert_allclose(np.square(brown).mean(), 1.0, rtol=1e-5)


# --- configs ---


def test_the_default_codec_has_50_frames_a_second():
    config = soundstream.SoundStreamConfig()
    assert (config.stride, config.sample_rate_hz) == (480, 480 * 50)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strides": ()}, "strides"),
        ({"strides": (7, 5)}, "does not divide"),
        ({"codes": 1}, "codes"),
        ({"levels": 0}, "levels"),
        ({"activation": "relu"}, "activation"),
        ({"code_width": 0}, "code_width"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        soundstream.SoundStreamConfig(sample_rate_hz=16000, **{"strides": (4, 5), **fields})


@pytest.mark.parametrize("samples", [0, 30])
def test_a_clip_that_is_not_whole_frames_is_refused(samples):
    with pytest.raises(ValueError, match="whole number of codec frames"):
        apply(CONFIG, random_variables(CONFIG), jnp.zeros((1, samples)), method="encode")
