"""The settings of RL: an error names each wrong one."""

import dataclasses

import numpy as np
import pytest

from musicrl_jax.core import checkpoint
from musicrl_jax.losses.optimiser import Optimiser
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.rl.config import RLConfig

RIGHT = RLConfig(3, 32, 1.0, 0.02, Optimiser(1e-3), Optimiser(1e-3))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"steps": 0}, "RLConfig.steps=0 must be 1 or more"),
        ({"save_every": 0}, "RLConfig.save_every=0 must be 1 or more"),
        ({"show_every": -1}, "RLConfig.show_every=-1 must be 0 or more"),
        ({"kl_strength": -0.001}, r"RLConfig.kl_strength=-0.001 must be in \[0, 1\)"),
        ({"kl_strength": 1.0}, r"kl_strength=1.0 must be in \[0, 1\)"),
        ({"kl_strength": np.nan}, r"kl_strength=nan must be in \[0, 1\)"),
        ({"updates": 2}, "updates=2 needs PolicyGradient.surrogate='clipped'"),
        ({"kl_target_per_second": 0.0}, "kl_target_per_second=0.0 must be None, or finite"),
        ({"kl_target_per_second": np.inf}, "kl_target_per_second=inf must be None, or finite"),
        ({"kl_target_per_second": 1.0, "kl_strength": 0.0}, "kl_strength=0.0 above 0"),
        ({"dtype": "half"}, "dtype=.half. must be .float32. or .bfloat16."),
        ({"microbatches": 3}, "microbatches=3 must divide batch_size=32"),
        (
            {"gradient": PolicyGradient("group", group=5)},
            "batch_size=32 must be a multiple of PolicyGradient.group=5",
        ),
    ],
)
def test_wrong_settings_are_named(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(RIGHT, **changes)


def test_settings_without_influence_on_results_are_not_part_of_the_identity():
    """A run may continue with another mesh, other microbatches and other savings of memory."""
    without = {"microbatches", "remat", "fsdp", "tensor", "save_every", "show_every"}
    fields = {field.name for field in dataclasses.fields(RLConfig)}
    assert set(checkpoint.describe(RIGHT)) == fields - without
