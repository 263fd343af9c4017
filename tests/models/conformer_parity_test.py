"""The conformer against transformers' with the same random weights, to 1e-5.

Wav2Vec2-BERT's block is ours but for two differences, and the weights make both compute the same:

* Its convolution is causal. Our taps on the future are zero.
* It rotates the input of the query and key projections, where RoFormer and we rotate their output.
  The projections commute with the rotation and have no bias.

Two tests compare the rest. Rotary attention with any weights is compared with Llama's. The
symmetric convolution is compared with Wav2Vec2-Conformer's, with its BatchNorm replaced; its
pointwise convolutions have no bias, so ours is zero.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from musicrl_jax.models import conformer

torch = pytest.importorskip("torch", reason="the reference implementation is PyTorch")
pytest.importorskip("transformers", reason="the reference implementation is transformers'")

from transformers import LlamaConfig, Wav2Vec2BertConfig, Wav2Vec2ConformerConfig
from transformers.models.llama import modeling_llama
from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert
from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer

CONFIG = conformer.ConformerConfig(layers=2, heads=2, embed=16, mlp=24, kernel=9)
SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_act": "swish",
}
CAUSAL_TAPS = 5  # those of our nine that look at the past and the present
EPSILON = 1e-6  # Flax's; PyTorch's is 1e-5


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(3, 19, 16)).astype(np.float32)


def random_params(module: nn.Module, x: np.ndarray, seed: int = 1) -> dict:
    """Draws params of a module as NumPy arrays, without zeros or ones."""
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: (0.3 * rng.normal(size=a.shape)).astype(np.float32), params)


def put(target: torch.nn.Module, params: dict) -> None:
    """Copies params of a Dense or a LayerNorm into a PyTorch module."""
    weight = params["kernel"].T if "kernel" in params else params["scale"]
    with torch.no_grad():
        target.weight.copy_(torch.tensor(weight).reshape(target.weight.shape))
        if target.bias is not None:
            target.bias.copy_(torch.tensor(params["bias"]))
        else:
            params["bias"][:] = 0.0


def put_convolution(
    target: torch.nn.Module, params: dict, taps: np.ndarray, middle_norm: torch.nn.LayerNorm
) -> None:
    put(target.layer_norm, params["norm"])
    put(target.pointwise_conv1, params["up"])
    put(middle_norm, params["middle_norm"])
    put(target.pointwise_conv2, params["down"])
    with torch.no_grad():
        target.depthwise_conv.weight.copy_(torch.tensor(taps.T[:, None]))


def commuting(rng: np.random.Generator) -> np.ndarray:
    """Draws a [16, 16] kernel that commutes with rotary: a complex number per pair (a, a + 4)."""
    kernel = np.zeros((16, 16), np.float32)
    for head in (0, 8):
        for a in range(head, head + 4):
            real, imaginary = rng.normal(size=2)
            kernel[a, a] = kernel[a + 4, a + 4] = real
            kernel[a, a + 4], kernel[a + 4, a] = imaginary, -imaginary
    return kernel


def test_blocks_equal_wav2vec2_berts(x):
    config = Wav2Vec2BertConfig(
        **SIZES,
        num_hidden_layers=2,
        position_embeddings_type="rotary",
        conv_depthwise_kernel_size=CAUSAL_TAPS,
        layer_norm_eps=EPSILON,
        attn_implementation="eager",
    )
    # The same weights in both.
    ours = conformer.Conformer(CONFIG)
    params = random_params(ours, x)
    theirs = torch.nn.ModuleList(
        modeling_wav2vec2_bert.Wav2Vec2BertEncoderLayer(config) for _ in range(2)
    ).eval()
    rng = np.random.default_rng(2)
    for index, layer in enumerate(theirs):
        block = params[f"block_{index}"]
        for norm, feed_forward, part in (
            (layer.ffn1_layer_norm, layer.ffn1, block["first"]),
            (layer.ffn2_layer_norm, layer.ffn2, block["second"]),
        ):
            put(norm, part["norm"])
            put(feed_forward.intermediate_dense, part["up"])
            put(feed_forward.output_dense, part["down"])
        attention = block["attention"]
        for name in ("query", "key"):
            attention[name] = {"kernel": commuting(rng), "bias": np.zeros(16, np.float32)}
        put(layer.self_attn_layer_norm, attention["norm"])
        put(layer.self_attn.linear_q, attention["query"])
        put(layer.self_attn.linear_k, attention["key"])
        put(layer.self_attn.linear_v, attention["value"])
        put(layer.self_attn.linear_out, attention["out"])
        convolution = block["convolution"]
        convolution["depthwise"][CAUSAL_TAPS:] = 0.0
        put_convolution(
            layer.conv_module,
            convolution,
            convolution["depthwise"][:CAUSAL_TAPS],
            layer.conv_module.depthwise_layer_norm,
        )
        put(layer.final_layer_norm, block["norm"])

    # The output of every block.
    turns = modeling_wav2vec2_bert.Wav2Vec2BertRotaryPositionalEmbedding(config)
    expected = torch.tensor(x)
    for index, layer in enumerate(theirs):
        with torch.no_grad():
            expected = layer(expected, relative_position_embeddings=turns(expected))
        expected = expected[0] if isinstance(expected, tuple) else expected
        got = jax.jit(ours.apply, static_argnames="layers")({"params": params}, x, layers=index + 1)
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_rotary_attention_equals_llamas(x):
    ours = conformer.SelfAttention(CONFIG)
    params = random_params(ours, x)
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_bias=True,
        attn_implementation="eager",
    )
    theirs = modeling_llama.LlamaAttention(config, layer_idx=0).eval()
    norm = torch.nn.LayerNorm(16, eps=EPSILON)
    for target, name in (
        (norm, "norm"),
        (theirs.q_proj, "query"),
        (theirs.k_proj, "key"),
        (theirs.v_proj, "value"),
        (theirs.o_proj, "out"),
    ):
        put(target, params[name])
    with torch.no_grad():
        inside = norm(torch.tensor(x))
        turns = modeling_llama.LlamaRotaryEmbedding(config)(inside, torch.arange(19)[None])
        expected = theirs(inside, position_embeddings=turns, attention_mask=None)[0].numpy()
    np.testing.assert_allclose(jax.jit(ours.apply)({"params": params}, x), expected, atol=1e-5)


class LayerNormOverChannels(torch.nn.LayerNorm):
    """A LayerNorm for [B, D, S], in place of a BatchNorm1d."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_symmetric_convolution_equals_wav2vec2_conformers(x):
    ours = conformer.Convolution(CONFIG)
    params = random_params(ours, x)
    config = Wav2Vec2ConformerConfig(**SIZES, conv_depthwise_kernel_size=9)
    theirs = modeling_wav2vec2_conformer.Wav2Vec2ConformerConvolutionModule(config).eval()
    theirs.layer_norm.eps = EPSILON
    theirs.batch_norm = LayerNormOverChannels(16, eps=EPSILON)
    put_convolution(theirs, params, params["depthwise"], theirs.batch_norm)
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(
        jax.jit(ours.apply)({"params": params}, jnp.asarray(x)), expected, atol=1e-5
    )
