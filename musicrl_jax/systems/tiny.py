"""The dummy system of the tests: a bigram model of a few codes, decoded to one sine per token.

Its parts are 'policy' and 'decoder'. The policy is conditioned on a class: a hash of the prompt.

Legend: B clips, S tokens of a clip, V codes, P classes of prompts, C channels, W samples of a
token.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.losses.policy_gradient import token_log_probs
from musicrl_jax.systems import folder
from musicrl_jax.systems.sampling import Beginning, SampledTokens, Sampling
from musicrl_jax.systems.system import MusicSystem, Text, Tree

FIRST_HZ = 200.0  # of code 0; each next code is 100 Hz higher: whole periods in a token


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """Sizes, the same for policy and decoder.

    Attributes:
      codes: V.
      classes: P.
      channels: C.
      learns_values: whether the system has a value function.
    """

    codes: int = 6
    classes: int = 4
    channels: int = 1
    learns_values: bool = True


@dataclasses.dataclass(frozen=True)
class TinySystem(MusicSystem):
    """Samples each token given the one before it and the prompt's class."""

    PARTS: ClassVar[Mapping[str, type]] = {"policy": TinyConfig, "decoder": TinyConfig}
    PLAYING: ClassVar[tuple[str, ...]] = ("policy", "decoder")
    ENCODING: ClassVar[tuple[str, ...]] = ("decoder",)
    USES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "condition": (),
        "codes": (),
        "decode": ("decoder",),
    }
    sample_rate_hz: ClassVar[int] = 16_000
    frame_seconds: ClassVar[float] = 0.04
    frame_tokens: ClassVar[int] = 2

    config: TinyConfig

    @property
    def channels(self) -> int:
        """Number of channels, C."""
        return self.config.channels

    @classmethod
    def from_models(cls, models: Mapping[str, checkpoint.Model]) -> "TinySystem":
        """Builds the system; raises ValueError if the sizes of the parts differ."""
        configs = {name: model.config for name, model in models.items()}
        first = next(iter(configs.values()))
        for name, config in configs.items():
            if config != first:
                raise ValueError(f"the part {name} has {config}, not {first}: make it for that")
        return cls(first)

    def data_layout(self) -> dict[str, int]:
        """Returns the number of codes."""
        return {"codes": self.config.codes}

    # --- text ---

    def read(self, prompts: Sequence[str]) -> Text:
        """Hashes prompts to classes, {'class': int32 [B]}."""
        classes = []
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError(f"prompt {prompt!r} is empty: say what the music should be like")
            digest = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
            classes.append(int.from_bytes(digest) % self.config.classes)
        return {"class": np.array(classes, np.int32)}

    def condition(self, frozen: Mapping[str, Tree], text: Text) -> jax.Array:
        """Returns the classes, int32 [B]."""
        return text["class"]

    # --- tokens ---

    def init(self, key: jax.Array) -> Tree:
        """Samples logits of a code given the code before it, and given the class."""
        keys, (codes, classes) = jax.random.split(key), (self.config.codes, self.config.classes)
        after = 0.3 * jax.random.normal(keys[0], (codes, codes))
        prompt = 0.3 * jax.random.normal(keys[1], (classes, codes))
        return {
            "after": sharding.named(after, ("embed", "vocab")),
            "prompt": sharding.named(prompt, ("embed", "vocab")),
        }

    def _logits(self, policy: Tree, condition: jax.Array, before: jax.Array) -> jax.Array:
        """Returns logits f32 [..., V] given previous tokens int32 [...] and classes."""
        logits = policy["after"][before] + policy["prompt"][condition]
        return logits.astype(jnp.float32)

    def sample(
        self,
        policy: Tree,
        condition: jax.Array,
        keys: jax.Array,
        length: int,
        sampling: Sampling,
        beginning: Beginning | None = None,
    ) -> SampledTokens:
        """Samples token by token, with a key that depends on row and place."""

        def sample_token(before: jax.Array, place: jax.Array) -> tuple[jax.Array, SampledTokens]:
            # A token from the distribution that `sampling` makes of the logits.
            logits = self._logits(policy, condition, before)
            allowed = sampling.allowed(logits)
            scores = sampling.log_distribution(logits, allowed)
            place_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, place)
            token = jax.vmap(jax.random.categorical)(place_keys, scores).astype(jnp.int32)
            sampled = SampledTokens(token, token_log_probs(scores, token), allowed)

            # Within the beginning, the given token replaces it; the log-prob stays.
            if beginning is not None:
                frames = beginning.length // self.frame_tokens
                continues = place // self.frame_tokens >= frames
                token = jnp.where(continues, token, beginning.tokens[:, place])
            return token, sampled.replace(tokens=token)

        start = jnp.zeros(len(condition), jnp.int32)
        _, sampled = jax.lax.scan(sample_token, start, jnp.arange(length, dtype=jnp.int32))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), sampled)

    def distributions(
        self, policy: Tree, condition: jax.Array, sampled: SampledTokens, sampling: Sampling
    ) -> jax.Array:
        """Returns the log-distributions of all tokens at once, f32 [B, S, V]."""
        logits = self._logits(policy, condition[:, None], _before(sampled.tokens))
        return sampling.log_distribution(logits, sampled.allowed)

    # --- values ---

    def init_values(self, key: jax.Array) -> Tree:
        """Returns values of 0 after each code, and an offset of 0."""
        if not self.config.learns_values:
            return super().init_values(key)
        after = sharding.named(jnp.zeros(self.config.codes), ("vocab",))
        return {"after": after, "offset": jnp.zeros(())}

    def values(self, values: Tree, condition: jax.Array, tokens: jax.Array) -> jax.Array:
        """Returns the value given the previous token, f32 [B, S]."""
        return values["after"][_before(tokens)] + values["offset"]

    # --- sound ---

    def codes(self, frozen: Mapping[str, Tree], tokens: jax.Array, keys: jax.Array) -> Tree:
        """Returns the tokens, and a random phase f32 [B] in [0, 1) for each clip."""
        return {"tokens": tokens, "phase": jax.vmap(jax.random.uniform)(keys)}

    def _waves(self, frozen: Mapping[str, Tree], phase: jax.Array) -> jax.Array:
        """Returns the sine of each code at n phases in periods: f32 [n] -> f32 [n, V, W]."""
        samples = round(self.sample_rate_hz * self.frame_seconds / self.frame_tokens)
        time = jnp.arange(samples, dtype=jnp.float32) / self.sample_rate_hz
        hz = frozen["decoder"]["params"]["hz"]
        periods = (hz[:, None] * time[None, :])[None] + phase[:, None, None]
        return jnp.sin(2 * jnp.pi * periods)

    def decode(self, frozen: Mapping[str, Tree], codes: Tree) -> jax.Array:
        """Returns sines, f32 [B, C, N]; each channel is softer than the previous one."""
        waves = self._waves(frozen, codes["phase"])  # [B, V, W]
        wav = 0.5 * jax.vmap(lambda waves, tokens: waves[tokens].ravel())(waves, codes["tokens"])
        gains = 1 / jnp.arange(1, self.channels + 1, dtype=jnp.float32)
        return wav[:, None] * gains[None, :, None]

    def encode(self, frozen: Mapping[str, Tree], wav: jax.Array) -> dict[str, jax.Array]:
        """Returns the loudest code of each window, {'tokens': int32 [B, S]}; -1 if not finite."""
        # The power of each code's sine in each window, whatever its phase.
        quadrature = self._waves(frozen, jnp.array([0.0, 0.25]))  # sines and cosines, [2, V, W]
        windows = wav.reshape(len(wav), -1, quadrature.shape[-1])
        power = jnp.square(jnp.einsum("bsw,qvw->bsqv", windows, quadrature)).sum(axis=2)

        # Clips that are not finite have no tokens.
        finite = jnp.isfinite(wav).all(axis=1, keepdims=True)
        return {"tokens": jnp.where(finite, power.argmax(axis=-1), -1).astype(jnp.int32)}


# --- helpers ---


def _before(tokens: jax.Array) -> jax.Array:
    """Returns the previous token of each token, int32 [B, S]; 0 for the first."""
    return jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))


def write(directory: str | Path, config: TinyConfig = TinyConfig(), seed: int = 0) -> str:
    """Writes a system with random weights: a folder for each part, and a system.json."""
    hz = FIRST_HZ + 100.0 * np.arange(config.codes, dtype=np.float32)
    key = jax.random.key(seed)
    variables = {
        "policy": {"params": sharding.fetch(meta.unbox(TinySystem(config).init(key)))},
        "decoder": {"params": {"hz": hz}},
    }
    parts = {name: str(Path(directory) / name) for name in variables}
    for name, part in parts.items():
        checkpoint.save_model(part, config, variables[name])
    folder.write(directory, "tiny", parts)
    return str(directory)
