"""A rollout's functions, one a network, on a mesh: the clips are those of the rollout as one program on one device."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from musicrl_jax.core import sharding
from musicrl_jax.core.keys import row_keys, step_key
from musicrl_jax.core.precision import LAYERS
from musicrl_jax.losses.optimiser import Optimiser
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.models.bert import BertConfig
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.layers import stacked
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.transformer import TransformerConfig
from musicrl_jax.rl import steps as step_functions
from musicrl_jax.rl.rollout import Studio
from musicrl_jax.rl.sample import Sampling
from musicrl_jax.rl.steps import build

BATCH, FRAMES, LENGTH = 8, 3, 4
STUDIO = Studio(
    MusicLM(
        MusicLMConfig(TransformerConfig(1, 16, 2, 32), TransformerConfig(1, 16, 2, 16), TokenLayout(6, 6, 2), 2, 4)
    ),
    SoundStorm(SoundStormConfig(ConformerConfig(2, 2, 16, 16), levels=4, coarse_levels=2, codes=6)),
    SoundStream(SoundStreamConfig(strides=(5, 6, 16), channels=2, embed=8, levels=4, codes=6)),
    MuLan(
        MuLanConfig(
            window_seconds=0.1,
            audio=ResNetConfig(8, (4,), 1),
            text=BertConfig(2, 2, 8, 16, LENGTH, 10),
            text_length=LENGTH,
            embed=8,
            levels=2,
            codes=4,
        )
    ),
)


def weights(init):
    """Random ones of the shapes that `init` makes."""
    shapes = meta.unbox(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32), x.dtype), shapes)


@pytest.fixture(scope="module")
def given():
    """(policy, frozen, text, keys)."""
    wav, codes = jnp.zeros((1, 4_800)), jnp.zeros((1, 2, 4), jnp.int32)
    text = jnp.asarray(np.random.default_rng(1).integers(1, 10, (BATCH, LENGTH)), jnp.int32)
    tokens = jnp.zeros((1, FRAMES, STUDIO.musiclm.config.layout.depth), jnp.int32)
    policy = weights(lambda key: STUDIO.musiclm.init(key, tokens, jnp.zeros((1, 2), jnp.int32)))["params"]
    frozen = {
        "mulan": weights(lambda key: STUDIO.mulan.init(key, wav, text[:1])),
        "soundstream": weights(lambda key: STUDIO.soundstream.init(key, wav, key)),
        "soundstorm": weights(lambda key: STUDIO.soundstorm.init(key, codes, codes > 0, 2)),
    }
    return policy, frozen, text, row_keys(step_key(0, 0, 3), BATCH)


@pytest.mark.parametrize("looped", [(), ("cpu",)], ids=["layers_in_a_row", "layers_in_a_loop"])
def test_function_by_function_on_a_mesh_the_clips_are_those_of_one_program(given, looped, monkeypatch):
    """With frozen networks' layers in a loop too, as on TPUs."""
    monkeypatch.setattr(step_functions, "LOOPED", looped)
    policy, frozen, text, keys = given
    sampling = Sampling(0.9)
    whole = jax.jit(lambda *given: STUDIO.rollout(*given, FRAMES, sampling))(*given)
    mesh = sharding.make_mesh(2, 2)
    learner, steps = build(
        types.SimpleNamespace(studio=STUDIO),
        None,  # no rewards here
        mesh,
        steps=1,
        batch_size=BATCH,
        clip_seconds=FRAMES / 25,
        kl_strength=0.1,
        policy_optimiser=Optimiser(1e-3),
        value_optimiser=Optimiser(1e-3),
        gradient=PolicyGradient(),
        updates=1,
        kl_target=None,
        temperature=0.9,
        top_k=None,
        microbatches=1,
        remat=False,
        dtype="float32",
    )
    assert learner.sampling == sampling
    by_row = sharding.batch_sharding(mesh)
    placed = (
        jax.device_put(stacked(policy), steps.shardings.policy),
        sharding.put(frozen, sharding.spread(mesh, frozen)),
    )
    rows = jax.device_put((text, keys), by_row)
    with jax.set_mesh(mesh):
        policy, frozen = steps.gather(*placed)
        networks = frozen["soundstorm"]["params"]["Conformer_0"], frozen["mulan"]["params"]["towers"]["text"]
        assert [LAYERS in network for network in networks] == [bool(looped)] * 2
        parts = steps.rollout(policy, frozen, *rows)
    assert jax.tree.all(jax.tree.map(lambda x: x.sharding.is_equivalent_to(by_row, x.ndim), parts))
    for name in ("text", "mulan", "tokens", "acoustic"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), name)
    for name in ("embedding", "log_probs", "wav"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-5, err_msg=name)
    assert len(np.unique(whole.tokens)) > 3 and np.ptp(whole.wav) > 0  # there is something to be told apart
