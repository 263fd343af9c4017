"""Trains the preference model on votes, by the Bradley-Terry loss on pairs of clips (MusicRL 3.2).

Legend: B pairs of clips, F frames, K codes in a frame.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from musicrl_jax.core import checkpoint
from musicrl_jax.core.statistics import LEAST_INTERVAL
from musicrl_jax.inputs.votes import Votes
from musicrl_jax.losses.preference import bradley_terry
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.rewards import Preference, PreferenceConfig
from musicrl_jax.objectives.objective import Batch, Loss, Variables
from musicrl_jax.objectives.token_objective import TokenObjective, policy_tokens
from musicrl_jax.systems import folder
from musicrl_jax.systems.system import Tree


@dataclasses.dataclass(frozen=True)
class PreferenceObjective(TokenObjective):
    """Nats per vote.

    Attributes:
      policy: folder of a policy, or of a system with one, whose weights the trunk starts from. ''
        starts from random weights, from which the paper's model learned nothing.
      crop: share of a clip that is read, as a random window; 1 reads all of it.
    """

    model: PreferenceConfig
    data: Votes
    policy: str = dataclasses.field(default="", metadata=folder.POLICY)
    crop: float = 1.0

    LEAST_EXAMPLES: ClassVar = {"accuracy": LEAST_INTERVAL}

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(
                f"PreferenceObjective.crop = {self.crop} must be above 0 and at most 1"
            )

    def check(self, batch: Batch) -> None:
        """Raises ValueError if the sizes of the tokens differ from the policy's."""
        self.check_policy(self.model.policy)

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns random variables of the preference model."""
        tokens = policy_tokens(batch, self.model.policy)
        return Preference(self.model).init(key, tokens[:, 0], batch["mulan"])

    def start(self, params: Any) -> Any:
        """Returns the weights with the policy's trunk.

        Raises ValueError if the policy is of another size, FileNotFoundError if it is missing.
        """
        if not self.policy:
            return params
        return {**params, "trunk": load_policy(self.policy, self.model.policy)["trunk"]}

    def loss(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        """Returns the Bradley-Terry loss."""
        loss, metrics = bradley_terry(self.margin(params, batch, key), batch["vote"])
        return loss, (state, metrics)

    def margin(self, params: Any, batch: Batch, key: jax.Array) -> jax.Array:
        """Returns the first clip's score minus the second's, f32 [B]; `key` draws the crops."""
        tokens = policy_tokens(batch, self.model.policy)  # [B, 2, F, K]
        # Crop each clip by itself.
        pairs, _, frames, codes = tokens.shape
        tokens = tokens.reshape(2 * pairs, frames, codes)
        length = max(round(self.crop * frames), 1)
        if length < frames:
            starts = jax.random.randint(key, (2 * pairs,), 0, frames - length + 1)
            crop = partial(jax.lax.dynamic_slice_in_dim, slice_size=length)
            tokens = jax.vmap(crop)(tokens, starts)
        # Score all clips as one batch.
        mulan = jnp.repeat(batch["mulan"], 2, axis=0)
        scores = Preference(self.model).apply({"params": params}, tokens, mulan).reshape(pairs, 2)
        return scores[:, 0] - scores[:, 1]


def load_policy(
    system: str, config: MusicLMConfig, read: checkpoint.Reader = checkpoint.load_model
) -> Tree:
    """Returns the weights of a system's policy; ValueError if it is of another size."""
    model = folder.read_policy(system, read)
    stored = checkpoint.config_to_json(model.config)
    for field, value in checkpoint.config_to_json(config).items():
        if stored[field] != value:
            raise ValueError(
                f"policy {system}: {field} is {stored[field]}, and MusicLMConfig's is {value}: "
                "make them equal"
            )
    return model.variables["params"]
