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


def a_model(config):
    module = soundstream.SoundStream(config)
    shapes = jax.eval_shape(
        lambda key: module.init(key, jnp.zeros((1, 400)), key), jax.random.key(0)
    )
    rng = np.random.default_rng(
        3
    )  # all weights random: a fresh codec's residual units are identities

    def draw(leaf):
        spread = 0.5 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
        return (
            np.zeros((), np.int32)
            if leaf.ndim == 0
            else rng.normal(0, spread, leaf.shape).astype(np.float32)
        )

    variables = jax.tree.map(draw, shapes)
    if config.code_width is None:
        variables["codebooks"]["rvq"]["codebooks"] *= 3
    return module, variables


@pytest.fixture(scope="module")
def model():
    return a_model(CONFIG)


def noise(clips, samples, seed=0):
    return np.random.default_rng(seed).normal(size=(clips, samples)).astype(np.float32)


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def numpy_conv(p, x, stride=1, dilation=1):
    """Causal convolution of x [N, D] by its definition, one output at a time."""
    out = []
    for end in range(stride - 1, len(x), stride):
        places = end - dilation * np.arange(len(p["kernel"]) - 1, -1, -1)
        out.append(p["bias"] + sum(x[n] @ p["kernel"][k] for k, n in enumerate(places) if n >= 0))
    return np.stack(out)


def numpy_unit(p, x, dilation):
    return (
        x
        + elu(numpy_conv(p["wide"], x, dilation=dilation)) @ p["narrow"]["kernel"]
        + p["narrow"]["bias"]
    )


def numpy_encode(p, wav):
    x = numpy_conv(p["first"], wav[:, None])
    for block, stride in enumerate(CONFIG.strides):
        for dilation in (1, 3, 9):
            x = numpy_unit(p[f"unit_{block}_{dilation}"], x, dilation)
        x = numpy_conv(p[f"down_{block}"], x, stride)
    x = numpy_conv(p["last"], x)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / length * np.log1p(length)


def numpy_upsample(p, x, stride):
    """Transposed convolution by its definition: every frame adds a kernel of two strides; the tail is cut."""
    out = np.zeros(((len(x) + 1) * stride, len(p["bias"]))) + p["bias"]
    for t, frame in enumerate(x):
        out[t * stride : (t + 2) * stride] += np.einsum("d,dkf->kf", frame, p["kernel"])
    return out[: len(x) * stride]


def numpy_decode(p, x):
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    x = numpy_conv(p["first"], x / length * np.expm1(length))
    for block in (1, 0):
        x = numpy_upsample(p[f"up_{block}"], x, CONFIG.strides[block])
        for dilation in (1, 3, 9):
            x = numpy_unit(p[f"unit_{block}_{dilation}"], x, dilation)
    return numpy_conv(p["last"], x)[:, 0]


def test_stacks_equal_numpy(model):
    module, variables = model
    wav = noise(1, 200)
    params = variables["params"]
    vectors = numpy_encode(params["encoder"], wav[0])  # [T, D]
    codebooks = variables["codebooks"]["rvq"]["codebooks"]
    residual, codes = vectors, []
    for codebook in codebooks:
        code = np.square(residual[:, None] - codebook[None]).sum(-1).argmin(-1)
        residual = residual - codebook[code]
        codes.append(code)
    got = module.apply(variables, jnp.asarray(wav), method="encode")
    assert got.shape == (1, 10, 3)
    np.testing.assert_array_equal(got[0], np.stack(codes, -1))
    for levels in (3, 2):
        quantized = sum(codebooks[q][codes[q]] for q in range(levels))
        decoded = module.apply(variables, got[..., :levels], method="decode")
        np.testing.assert_allclose(
            decoded[0], numpy_decode(params["decoder"], quantized), atol=1e-4
        )


@pytest.mark.parametrize("config", [CONFIG, DAC], ids=["SoundStream", "DAC"])
@pytest.mark.parametrize("frames", [(1,) * 20, (7, 1, 12)], ids=["frame by frame", "parts"])
def test_a_clip_in_parts_gives_what_the_clip_at_once_gives(config, frames):
    module, variables = a_model(config)
    wav = noise(2, 400)
    codes = module.apply(variables, jnp.asarray(wav), method="encode")
    decoded = module.apply(variables, codes, method="decode")
    heard, told, past, future, at = [], [], {}, {}, 0

    @functools.partial(jax.jit, static_argnums=0)
    def step(method, past, x):
        return module.apply({**variables, **past}, x, method=method, mutable=["stream"])

    for count in frames:
        part, past = step("encode", past, jnp.asarray(wav[:, at * 20 : (at + count) * 20]))
        sound, future = step("decode", future, part)
        heard.append(part)
        told.append(sound)
        at += count
    np.testing.assert_array_equal(jnp.concatenate(heard, 1), codes)
    np.testing.assert_allclose(jnp.concatenate(told, 1), decoded, atol=1e-5)
    assert np.abs(decoded).max() > 0.01


def test_parts_without_their_past_are_another_clip(model):
    module, variables = model
    wav = jnp.asarray(noise(1, 400))
    codes = module.apply(variables, wav, method="encode")
    alone = module.apply(variables, wav[:, 200:], method="encode")
    assert (np.asarray(codes[:, 10:]) != np.asarray(alone)).any()


def test_companding_is_undone():
    x = jnp.asarray(noise(50, 6)) * jnp.logspace(-6, 3, 50)[:, None]
    packed = soundstream.compress(x)
    lengths = np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(
        np.linalg.norm(packed, axis=-1), np.log1p(lengths), rtol=1e-3, atol=2e-6
    )
    np.testing.assert_allclose(soundstream.expand(packed), x, rtol=1e-3, atol=1e-6)
    for f in (soundstream.compress, soundstream.expand):
        assert np.isfinite(
            jax.grad(lambda x, f=f: jnp.sum(jnp.square(f(x))))(jnp.zeros((2, 6)))
        ).all()


def test_dacs_quantizer_decodes_what_it_trains_on_and_has_no_moving_averages():
    module, variables = a_model(DAC)
    assert set(variables) == {"params"}
    wav = jnp.asarray(noise(3, 400))
    output = module.apply(variables, wav, jax.random.key(1))
    codes = module.apply(variables, wav, method="encode")
    np.testing.assert_array_equal(output.codes, codes)
    decoded = np.stack(
        [module.apply(variables, codes[..., :q], method="decode") for q in (1, 2, 3)]
    )  # [q, B, N]
    assert np.abs(decoded - np.asarray(output.wav)[None]).max(-1).min(0).max() < 1e-4

    def loss(params):
        output = module.apply({"params": params}, wav, jax.random.key(1))
        return jnp.sum(jnp.square(output.wav)) + output.commitment

    gradient = jax.grad(loss)(variables["params"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_no_sample_hears_the_future(model):
    module, variables = model
    wav, other = noise(1, 400), noise(1, 400, seed=1)

    @jax.jit
    def roundtrip(wav):
        bound = module.bind(variables)
        return bound.decode(bound.encode(wav))

    before = roundtrip(jnp.asarray(wav))
    for cut in (20, 215, 399):
        changed = roundtrip(jnp.asarray(np.concatenate([wav[:, :cut], 5 * other[:, cut:]], 1)))
        start = (
            cut // CONFIG.stride * CONFIG.stride
        )  # of the frame that holds the first changed sample
        np.testing.assert_array_equal(before[:, :start], changed[:, :start])
        if cut < 399:
            assert np.abs(before[:, start:] - changed[:, start:]).max() > 1e-3


def test_gradient_of_a_sample_ends_with_its_frame(model):
    module, variables = model
    bound = module.bind(variables)
    sensitivity = jax.grad(lambda w: bound.wav(bound.vectors(w))[0, 133])(
        jnp.asarray(noise(1, 400))
    )[0]
    assert (np.asarray(sensitivity[140:]) == 0).all()
    assert sensitivity[139] != 0


def test_training_pass_decodes_its_codes_and_moves_the_codebooks(model):
    module, variables = model
    wav = jnp.asarray(noise(4, 400))  # 80 vectors for 16 codes: enough to start from as they are
    output, changed = module.apply(variables, wav, jax.random.key(1), mutable=["codebooks"])
    state = changed["codebooks"]["rvq"]
    assert state["updates"] == 1
    assert not np.allclose(state["codebooks"], variables["codebooks"]["rvq"]["codebooks"])
    trained = {"params": variables["params"], **changed}
    codes = module.apply(trained, wav, method="encode")
    assert (
        np.asarray(output.codes) == np.asarray(codes)
    ).mean() > 0.9  # k-means: nearly their own means
    decoded = np.stack(
        [module.apply(trained, codes[..., :q], method="decode") for q in (1, 2, 3)]
    )  # [q, B, N]
    assert (
        np.abs(decoded - np.asarray(output.wav)[None]).max(-1).min(0).max()
        < 0.2 * np.abs(decoded).max()
    )


def test_linear_start_keeps_what_the_best_projection_of_a_stride_keeps():
    config = soundstream.SoundStreamConfig(16000, (4, 5), channels=4, embed=10, levels=1, codes=2)
    module = soundstream.SoundStream(config)

    @jax.jit
    def start(key):
        variables = module.init(key, jnp.zeros((1, 40)), key)
        return variables | {"params": soundstream.linear_start(config, variables["params"], key)}

    variables = start(jax.random.key(0))
    wav = np.asarray(soundstream.brown_noise(jax.random.key(2), 40, 1000))
    bound = module.bind(variables)
    error = np.square(np.asarray(bound.decoder(bound.encoder(jnp.asarray(wav)))) - wav).mean()
    strides = wav.reshape(-1, 20)
    energy = np.linalg.eigvalsh(strides.T @ strides / strides.size)
    best = energy[:10].sum()  # what the 10 strongest of 20 directions leave
    assert best * 0.99 < error < 1.25 * best + 1e-6


def test_linear_start_leaves_no_unit_of_the_decoder_with_zeros_on_both_sides():
    """Between its first two convolutions nothing bends: a unit that neither hears nor is heard would stay so."""
    config = soundstream.SoundStreamConfig(16000, (8, 5), channels=16, embed=10, levels=1, codes=2)
    params = soundstream.SoundStream(config).init(
        jax.random.key(0), jnp.zeros((1, 40)), jax.random.key(0)
    )["params"]
    decoder = jax.jit(lambda p: soundstream.linear_start(config, p, jax.random.key(1)))(params)[
        "decoder"
    ]
    hears = np.abs(decoder["first"]["kernel"]).max(axis=(0, 1)) > 0
    heard = np.abs(decoder["up_1"]["kernel"]).max(axis=(1, 2)) > 0
    assert not heard.all() and (hears | heard).all()


def test_brown_noise_falls_by_6_db_an_octave():
    noise = np.asarray(soundstream.brown_noise(jax.random.key(0), 64, 1024))
    power = np.square(np.abs(np.fft.rfft(noise))).mean(0)
    octaves = 10 * np.log10([power[k : 2 * k].mean() for k in (8, 16, 32, 64, 128)])
    np.testing.assert_allclose(np.diff(octaves), -6.02, atol=0.7)
    np.testing.assert_allclose(np.square(noise).mean(), 1.0, rtol=1e-5)


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
def test_a_clip_of_part_frames_is_refused(model, samples):
    module, variables = model
    with pytest.raises(ValueError, match="whole number of codec frames"):
        module.apply(variables, jnp.zeros((1, samples)), method="encode")
