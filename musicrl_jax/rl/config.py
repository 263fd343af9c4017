"""Settings of a run of RL: defaults, checks and documentation, each in one place."""

import dataclasses
import math

from musicrl_jax.core import checkpoint
from musicrl_jax.core.precision import in_dtype
from musicrl_jax.losses.optimiser import Optimiser
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.systems.system import Sampling


def _no_identity(default: int | bool) -> dataclasses.Field:
    """Returns a field without influence on results: a run may continue with another value."""
    return dataclasses.field(default=default, metadata=checkpoint.NO_IDENTITY)


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """How a policy is finetuned.

    Attributes:
      steps: number of rollouts, 1 or more.
      batch_size: clips of a rollout over all devices: prompts times `gradient.clips_per_prompt`.
      clip_seconds: length of the clips, a whole number of the system's frames.
      kl_strength: a in J = (1 - a) E[R] - a KL, in [0, 1); the KL is in nats a clip. With a KL
        target it is the initial strength.
      policy_optimiser: optimiser of the policy.
      value_optimiser: optimiser of the value function; unused without one.
      gradient: which policy gradient; by default the paper's, with the exact gradient of its KL.
      updates: updates with each rollout; more than 1 needs the clipped surrogate.
      kl_target_per_second: KL in nats a second of music that kl_strength is adapted to; None keeps
        the strength constant.
      sampling: temperature and top-k of the policy, the same in sampling and in scoring.
      microbatches: parts of a batch that are differentiated one after the other, to save memory.
      remat: recomputes activations in the backward pass, to save memory.
      dtype: 'float32' or 'bfloat16', of matrix products in the update and in frozen token models.
        Clips are sampled in float32 (a TPU's compiler still reads weights and caches as bfloat16).
        Trained weights, softmaxes, losses, rewards and the codec are in float32 too. The metric
        sampler_drift shows the effect.
      seed: seed of the order of the prompts and of sampling.
      fsdp: size of the mesh axis that shards weights and batch.
      tensor: size of the mesh axis that shards heads and inner layers.
      save_every: steps between two checkpoints.
      show_every: steps between two updates of the run's page and clips; 0 for none.
    """

    # The run.
    steps: int
    batch_size: int
    clip_seconds: float
    # The algorithm.
    kl_strength: float
    policy_optimiser: Optimiser
    value_optimiser: Optimiser
    gradient: PolicyGradient = dataclasses.field(default_factory=PolicyGradient)
    updates: int = 1
    kl_target_per_second: float | None = None
    # Sampling and computation.
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    microbatches: int = _no_identity(1)
    remat: bool = _no_identity(False)
    dtype: str = "float32"
    seed: int = 0
    fsdp: int = _no_identity(1)
    tensor: int = _no_identity(1)
    save_every: int = _no_identity(10)
    show_every: int = _no_identity(50)

    def __post_init__(self) -> None:
        # Ranges of single settings.
        for name in ("steps", "batch_size", "updates", "microbatches", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"RLConfig.{name}={getattr(self, name)} must be 1 or more")
        if self.show_every < 0:
            raise ValueError(f"RLConfig.show_every={self.show_every} must be 0 or more")
        if not 0 <= self.kl_strength < 1:
            raise ValueError(f"RLConfig.kl_strength={self.kl_strength} must be in [0, 1)")
        # Settings that need each other.
        if self.updates > 1 and self.gradient.surrogate != "clipped":
            raise ValueError(
                f"RLConfig.updates={self.updates} needs PolicyGradient.surrogate='clipped', not "
                f"{self.gradient.surrogate!r}: set that, or updates=1"
            )
        target = self.kl_target_per_second
        if target is not None and not (0 < target < math.inf and self.kl_strength > 0):
            raise ValueError(
                f"RLConfig.kl_target_per_second={target} must be None, or finite and above 0 with "
                f"kl_strength={self.kl_strength} above 0"
            )
        # Parts of a batch.
        if self.batch_size % self.gradient.clips_per_prompt:
            raise ValueError(
                f"RLConfig.batch_size={self.batch_size} must be a multiple of "
                f"PolicyGradient.group={self.gradient.group}"
            )
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"RLConfig.microbatches={self.microbatches} must divide "
                f"batch_size={self.batch_size}"
            )
        in_dtype({}, self.dtype)  # raises for any other dtype
