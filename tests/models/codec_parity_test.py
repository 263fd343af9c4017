"""SoundStream's parts against EnCodec's and DAC's in `transformers`, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax.models import rvq, soundstream

torch = pytest.importorskip(
    "torch", reason="parity needs PyTorch, whose small CPU wheel is for Python 3.11 only"
)
pytest.importorskip("transformers", reason="parity needs transformers: pip install .[parity]")

RNG = np.random.default_rng(0)


def their_conv(theirs, kernel, bias):
    """Sets a weight-normalised convolution from a kernel [taps, in, out]."""
    with torch.no_grad():
        if hasattr(theirs, "parametrizations"):
            torch.nn.utils.parametrize.remove_parametrizations(theirs, "weight")
        theirs.weight = torch.nn.Parameter(torch.tensor(np.transpose(kernel, (2, 1, 0)).copy()))
        theirs.bias = torch.nn.Parameter(torch.tensor(bias))


def run(theirs, x):
    """Applies a PyTorch module, which takes [B, D, N], to x [B, N, D]."""
    with torch.no_grad():
        return theirs(torch.tensor(np.transpose(x, (0, 2, 1)).copy())).numpy().transpose(0, 2, 1)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def encodec():
    from transformers import EncodecConfig
    from transformers.models.encodec import modeling_encodec

    return modeling_encodec, EncodecConfig(
        pad_mode="constant",
        use_causal_conv=True,
        trim_right_ratio=1.0,
        codebook_size=16,
        codebook_dim=6,
        hidden_size=6,
        target_bandwidths=[1.2],
    )


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(7, 1, 1), (7, 1, 9), (3, 1, 1), (4, 2, 1), (16, 8, 1)]
)
def test_causal_convolution_is_encodecs(encodec, kernel, stride, dilation):
    module, config = encodec
    weight, bias, x = draw(kernel, 3, 5), draw(5), draw(2, 48, 3)
    theirs = module.EncodecConv1d(config, 3, 5, kernel, stride, dilation)
    their_conv(theirs.conv, weight, bias)
    ours = soundstream.CausalConv(5, kernel, stride, dilation)
    got = ours.apply({"params": {"kernel": weight, "bias": bias}}, jnp.asarray(x))
    np.testing.assert_allclose(got, run(theirs, x), atol=1e-5)


@pytest.mark.parametrize("stride", [2, 5])
def test_causal_upsampling_is_encodecs(encodec, stride):
    module, config = encodec
    weight, bias, x = draw(3, 2 * stride, 4), draw(4), draw(2, 11, 3)
    theirs = module.EncodecConvTranspose1d(config, 3, 4, 2 * stride, stride)
    # PyTorch's transposed kernels are [in, out, taps].
    their_conv(theirs.conv, weight.transpose(1, 2, 0), bias)
    ours = soundstream.CausalUpsample(4, stride)
    got = ours.apply({"params": {"kernel": weight, "bias": bias}}, jnp.asarray(x))
    np.testing.assert_allclose(got, run(theirs, x), atol=1e-5)


def test_residual_quantizer_is_encodecs(encodec):
    module, config = encodec
    theirs = module.EncodecResidualVectorQuantizer(config)
    codebooks, x = draw(theirs.num_quantizers, 16, 6), draw(2, 30, 6)
    for layer, codebook in zip(theirs.layers, codebooks, strict=True):
        layer.codebook.embed.copy_(torch.tensor(codebook))
    codes = theirs.encode(torch.tensor(x.transpose(0, 2, 1).copy()))  # [Q, B, T]
    got = rvq.quantize(jnp.asarray(codebooks), jnp.asarray(x))
    np.testing.assert_array_equal(got, codes.numpy().transpose(1, 2, 0))
    expected = theirs.decode(codes).numpy().transpose(0, 2, 1)
    np.testing.assert_allclose(rvq.dequantize(jnp.asarray(codebooks), got), expected, atol=1e-5)


@pytest.fixture(scope="module")
def dac():
    from transformers import DacConfig
    from transformers.models.dac import modeling_dac

    config = DacConfig(
        n_codebooks=3, codebook_size=16, codebook_dim=4, hidden_size=6, quantizer_dropout=0.0
    )
    assert config.hidden_size == 6
    return modeling_dac, config


@pytest.mark.parametrize("dilation", [1, 9])
def test_snake_residual_unit_is_dacs(dac, dilation):
    """DAC's is centred: its branch is ours, 3 * dilation samples earlier."""
    theirs = dac[0].DacResidualUnit(5, dilation).eval()
    wide, wide_bias, narrow, narrow_bias = draw(7, 5, 5), draw(5), draw(1, 5, 5), draw(5)
    alphas = 0.5 + np.abs(draw(2, 5))
    their_conv(theirs.conv1, wide, wide_bias)
    their_conv(theirs.conv2, narrow, narrow_bias)
    with torch.no_grad():
        for snake, alpha in zip((theirs.snake1, theirs.snake2), alphas, strict=True):
            snake.alpha.copy_(torch.tensor(alpha)[None, :, None])
    x, shift = draw(2, 90, 5), 3 * dilation
    params = {
        "before": {"alpha": alphas[0]},
        "wide": {"kernel": wide, "bias": wide_bias},
        "between": {"alpha": alphas[1]},
        "narrow": {"kernel": narrow[0], "bias": narrow_bias},
    }
    unit = soundstream.ResidualUnit(dilation, "snake")
    branch = np.asarray(unit.apply({"params": params}, jnp.asarray(x))) - x
    expected = run(theirs, x) - x
    np.testing.assert_allclose(branch[:, 2 * shift :], expected[:, shift:-shift], atol=1e-4)


@pytest.fixture(scope="module")
def factored(dac):
    module, config = dac
    theirs = module.DacResidualVectorQuantizer(config)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.tensor(draw(*weight.shape)))
    numpy = [
        {name: value.detach().numpy() for name, value in level.named_parameters()}
        for level in theirs.quantizers
    ]
    factors = {
        "in": np.stack([level["in_proj.weight"][:, :, 0].T for level in numpy]),
        "in_bias": np.stack([level["in_proj.bias"] for level in numpy]),
        "codebooks": np.stack([level["codebook.weight"] for level in numpy]),
        "out": np.stack([level["out_proj.weight"][:, :, 0].T for level in numpy]),
        "out_bias": np.stack([level["out_proj.bias"] for level in numpy]),
    }
    return theirs, jax.tree.map(jnp.asarray, factors)


def test_factored_quantizer_is_dacs(factored):
    theirs, factors = factored
    x = draw(2, 30, 6)
    with torch.no_grad():
        expected, codes, *_ = theirs.eval()(torch.tensor(x.transpose(0, 2, 1).copy()))
    got = rvq.quantize_factored(factors, jnp.asarray(x))
    np.testing.assert_array_equal(got, codes.numpy().transpose(0, 2, 1))
    decoded = rvq.dequantize(rvq.full_codebooks(factors), got)
    np.testing.assert_allclose(decoded, expected.numpy().transpose(0, 2, 1), atol=1e-4)


def test_factored_training_has_dacs_losses_and_gradients(factored):
    """Without dropout, 0.25 * commitment is DAC's 0.25 * commitment + codebook loss per level."""
    theirs, factors = factored
    levels, weights = len(theirs.quantizers), draw(2, 30, 6)
    x = draw(2, 30, 6)
    there = torch.tensor(x.transpose(0, 2, 1).copy(), requires_grad=True)
    quantized, _, _, commitment, codebook = theirs.eval()(there)
    loss = (0.25 * commitment.mean() + codebook.mean()) / levels
    (loss + (quantized * torch.tensor(weights.transpose(0, 2, 1).copy())).sum()).backward()

    def ours(factors, x):
        trained = rvq.train_factored(factors, x, jax.random.key(0))
        return 0.25 * trained.commitment + jnp.sum(trained.x * weights), trained.commitment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rvq, "_dropout_mask", lambda key, levels, clips: jnp.ones((levels, clips)))
        (_, got), (of_factors, of_x) = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(
            factors, jnp.asarray(x)
        )
    np.testing.assert_allclose(0.25 * got, loss.detach(), rtol=1e-5)
    np.testing.assert_allclose(of_x, there.grad.numpy().transpose(0, 2, 1), atol=1e-3)
    first = theirs.quantizers[0]
    np.testing.assert_allclose(of_factors["codebooks"][0], first.codebook.weight.grad, atol=1e-3)
    np.testing.assert_allclose(of_factors["in"][0], first.in_proj.weight.grad[:, :, 0].T, atol=1e-2)
    np.testing.assert_allclose(
        of_factors["out"][0], first.out_proj.weight.grad[:, :, 0].T, atol=1e-2
    )
