"""BERT against `transformers` with the same random weights, and reading a file's weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from musicrl_jax.models import bert
from musicrl_jax.models.layers import stacked

CONFIG = bert.BertConfig(layers=2, heads=3, embed=24, mlp=40, positions=16, pieces=50)
TEXT = np.array(
    [[5, 7, 9, 11, 0, 0], [1, 2, 3, 49, 5, 6], [9, 7, 5, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32
)


@pytest.fixture(scope="module")
def weights():
    params = nn.unbox(jax.jit(bert.Bert(CONFIG).init)(jax.random.key(0), TEXT))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: np.asarray(w) + 0.2 * rng.normal(size=w.shape).astype(np.float32), params
    )


@jax.jit
def apply(params, text):
    return bert.Bert(CONFIG).apply({"params": params}, text)


def test_stacked_layers_are_one_scan_with_the_same_result(weights):
    """A block is in the program once."""
    together = stacked(weights)
    assert together["layers"]["up"]["kernel"].shape == (2, 24, 40)
    np.testing.assert_allclose(apply(together, TEXT), apply(weights, TEXT), atol=1e-6)
    programs = [str(jax.make_jaxpr(lambda p: apply(p, TEXT))(tree)) for tree in (weights, together)]
    assert [program.count(" erf") for program in programs] == [2, 1]  # of gelu


def as_file(params, prefix=""):
    """Returns a file's tensors for these weights, by an independent map of names."""
    tensors = {f"{prefix}embeddings.position_ids": np.arange(16)[None]}
    for name, place in (("pieces", "word"), ("positions", "position"), ("types", "token_type")):
        tensors[f"{prefix}embeddings.{place}_embeddings.weight"] = params[name]
    norms = {"embeddings.LayerNorm": params["norm"]}
    for layer in range(CONFIG.layers):
        block, place = params[f"block_{layer}"], f"encoder.layer.{layer}"
        norms[f"{place}.attention.output.LayerNorm"] = block["attention_norm"]
        norms[f"{place}.output.LayerNorm"] = block["norm"]
        for name, inside in (
            ("query", "attention.self.query"),
            ("key", "attention.self.key"),
            ("value", "attention.self.value"),
            ("attention", "attention.output.dense"),
            ("up", "intermediate.dense"),
            ("down", "output.dense"),
        ):
            tensors[f"{prefix}{place}.{inside}.weight"] = block[name]["kernel"].T
            tensors[f"{prefix}{place}.{inside}.bias"] = block[name]["bias"]
    for place, norm in norms.items():
        tensors[f"{prefix}{place}.weight"], tensors[f"{prefix}{place}.bias"] = (
            norm["scale"],
            norm["bias"],
        )
    return tensors


def mean_of_hidden(model, text):
    """Averages the output of `transformers` over real pieces, float64 [B, D]."""
    torch = pytest.importorskip("torch")
    real = text != 0
    with torch.no_grad():
        hidden = (
            model(torch.tensor(text), attention_mask=torch.tensor(real))
            .last_hidden_state.double()
            .numpy()
        )
    return (hidden * real[:, :, None]).sum(axis=1) / real.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_equals_transformers_with_the_same_random_weights(weights, prefix):
    torch = pytest.importorskip("torch", reason="the other implementation is PyTorch's")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            max_position_embeddings=16,
        ),
        add_pooling_layer=False,
    ).eval()
    tensors = as_file(weights)
    theirs.load_state_dict(
        {name: torch.tensor(np.array(tensor)) for name, tensor in tensors.items()}, strict=False
    )
    loaded = bert.params(CONFIG, as_file(weights, prefix), "here")
    got = np.asarray(apply(loaded, TEXT))
    np.testing.assert_allclose(got[:3], mean_of_hidden(theirs, TEXT[:3]), atol=1e-5)
    np.testing.assert_array_equal(got[3], 0)  # nothing but padding


def test_all_tensors_of_a_file_are_read_and_its_sizes_returned(weights):
    tensors = as_file(weights, "bert.")
    loaded = bert.params(CONFIG, tensors, "here")
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)
    assert bert.sizes(tensors, {"num_attention_heads": 3, "hidden_act": "gelu"}, "here") == CONFIG
    wide = {
        name: np.zeros((*t.shape[:-1], 128)) if t.shape[-1] == 24 else t
        for name, t in tensors.items()
    }
    assert bert.sizes(wide, {}, "here").heads == 2  # 64 wide, where no config.json says otherwise


def test_padding_changes_nothing_and_order_does(weights):
    got = apply(weights, TEXT)
    np.testing.assert_allclose(
        apply(weights, jnp.pad(TEXT, ((0, 0), (0, 5))))[:3], got[:3], atol=1e-5
    )
    np.testing.assert_allclose(apply(weights, TEXT[:1, :4]), got[:1], atol=1e-5)
    assert np.abs(got[0] - got[2]).max() > 1e-2


@pytest.mark.parametrize(
    "missing",
    [
        "embeddings.word_embeddings.weight",
        "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.1.attention.self.key.bias",
        "embeddings.LayerNorm.weight",
    ],
)
def test_a_missing_tensor_is_named(weights, missing):
    tensors = as_file(weights)
    del tensors[missing]
    with pytest.raises(
        ValueError, match=f"x.safetensors has no tensor {missing}, which .*B(ERT|ert)"
    ):
        bert.params(bert.sizes(tensors, {}, "x.safetensors"), tensors, "x.safetensors")


def test_other_sizes_and_other_architectures_are_named(weights):
    tensors = as_file(weights)
    with pytest.raises(
        ValueError,
        match=r"intermediate.dense.weight has the shape \(40, 24\).*mlp=41.* needs \(41, 24\)",
    ):
        bert.params(dataclasses.replace(CONFIG, mlp=41), tensors, "here")
    for name, value in (
        ("hidden_act", "relu"),
        ("model_type", "roberta"),
        ("layer_norm_eps", 1e-5),
    ):
        with pytest.raises(ValueError, match=f"here: config.json says {name} = {value!r}"):
            bert.sizes(tensors, {name: value}, "here")


def test_bad_sizes_and_long_texts_are_named(weights):
    with pytest.raises(ValueError, match="embed = 768 must be a multiple of heads = 7"):
        bert.BertConfig(heads=7)
    with pytest.raises(ValueError, match=r"17 pieces.*positions = 16"):
        apply(weights, np.ones((1, 17), np.int32))
