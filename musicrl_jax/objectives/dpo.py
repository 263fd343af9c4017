"""Direct preference optimisation (2305.18290): finetunes the policy on votes, without reward or RL.

A baseline for MusicRL-U, with the same votes and the same KL-regularised objective. It learns only
from clips that the base sampled.

Legend: B pairs of clips, F frames, K codes in a frame.
"""

import dataclasses
import json
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from musicrl_jax.core import checkpoint
from musicrl_jax.core.statistics import LEAST_INTERVAL
from musicrl_jax.inputs.votes import Votes
from musicrl_jax.losses.policy_gradient import token_log_probs
from musicrl_jax.losses.preference import bradley_terry, dpo_margin
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.objectives.objective import Batch, Loss, Variables
from musicrl_jax.objectives.preference import load_policy
from musicrl_jax.objectives.token_objective import TokenObjective, policy_tokens
from musicrl_jax.systems import folder


@dataclasses.dataclass(frozen=True)
class DPOObjective(TokenObjective):
    """Nats per vote under the reward that the policy implies.

    Attributes:
      policy: folder of the base, a policy or a system with one: the start and the anchor.
      kl_strength: a in J = (1 - a) E[R] - a KL, as in `train_rl`; DPO's beta is a / (1 - a).
      temperature: temperature at which the clips were sampled. A top-k is not supported, since
        votes do not record which codes it allowed.
    """

    model: MusicLMConfig
    data: Votes
    policy: str = dataclasses.field(metadata=folder.POLICY)
    kl_strength: float
    temperature: float = 0.99

    LEAST_EXAMPLES: ClassVar = {"accuracy": LEAST_INTERVAL}

    def __post_init__(self) -> None:
        if not 0 < self.kl_strength < 1:
            raise ValueError(
                f"DPOObjective.kl_strength = {self.kl_strength} must lie between 0 and 1"
            )

    def check(self, batch: Batch) -> None:
        """Raises ValueError if the clips' tokens are of another layout."""
        self.check_policy(self.model)

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns random variables of MusicLM."""
        return MusicLM(self.model).init(key, policy_tokens(batch, self.model)[:, 0], batch["mulan"])

    def frozen(self, read: checkpoint.Reader = checkpoint.load_model) -> Any:
        """Returns the anchor's weights."""
        return load_policy(self.policy, self.model, read)

    def start(self, params: Any) -> Any:
        """Returns the base's weights."""
        return load_policy(self.policy, self.model)

    def loss(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        """Returns the Bradley-Terry loss of the implied rewards.

        The metric `log_ratio` is the mean log policy / anchor of the clips, in nats a clip.
        """
        # Both clips of a pair have one prompt.
        tokens = policy_tokens(batch, self.model)  # [B, 2, F, K]
        flat, mulan = tokens.reshape(-1, *tokens.shape[2:]), jnp.repeat(batch["mulan"], 2, axis=0)

        def clip_log_probs(weights: Any) -> jax.Array:
            # Returns f32 [B, 2], at the temperature of sampling.
            logits = MusicLM(self.model).apply({"params": weights}, flat, mulan)
            total = 0.0
            for place, each in enumerate(logits):
                scores = jax.nn.log_softmax(each / self.temperature, axis=-1)
                total += token_log_probs(scores, flat[:, :, place]).sum(axis=1)
            return total.reshape(-1, 2)

        # The policy's implied reward is beta log(policy / anchor).
        policy, anchor = clip_log_probs(params), clip_log_probs(frozen)
        beta = self.kl_strength / (1 - self.kl_strength)
        loss, metrics = bradley_terry(dpo_margin(policy, anchor, beta), batch["vote"])
        return loss, (state, {**metrics, "log_ratio": (policy - anchor).mean()})

    def assets(self) -> dict[str, bytes]:
        """Returns the tokens' assets, and anchor.json with the base's hash."""
        anchor = {"anchor": folder.policy_hash(self.policy)}
        return super().assets() | {checkpoint.ANCHOR: json.dumps(anchor).encode()}
