"""An example system: a bigram model of bytes, each of which plays a sine of 20 ms.

`bigram.gin` finetunes it with `musicrl train_rl` and compares it by `musicrl evaluate`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import gin
from musicrl_jax.core import checkpoint
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.losses.policy_gradient import token_log_probs
from musicrl_jax.systems import folder
from musicrl_jax.systems.system import MusicSystem, SampledTokens


@dataclasses.dataclass(frozen=True)
class BigramConfig:
    """The pitch of byte 0."""

    lowest_hz: float = 100.0


@folder.register("bigram")
@dataclasses.dataclass(frozen=True)
class Bigram(MusicSystem):
    """Logits of a byte given the previous one; the first byte follows the prompt's last."""

    PARTS: ClassVar = {"policy": BigramConfig}
    sample_rate_hz, frame_seconds, frame_tokens = 16_000, 0.02, 1
    config: BigramConfig

    @classmethod
    def from_models(cls, models):
        return cls(models["policy"].config)

    def init(self, key):
        return {"after": 0.1 * jax.random.normal(key, (256, 256)), "often": jnp.zeros(256)}

    def read(self, prompts):
        return {"byte": np.array([prompt.encode()[-1] for prompt in prompts], np.int32)}

    def condition(self, frozen, text):
        return text["byte"]

    def logits(self, policy, before):
        return policy["after"][before] + jnp.broadcast_to(policy["often"], (*before.shape, 256))

    def sample(self, policy, condition, keys, length, sampling, beginning=None):
        def sample_byte(before, place):
            logits = self.logits(policy, before)
            allowed = sampling.allowed(logits)
            scores = sampling.log_distribution(logits, allowed)
            place_keys = jax.vmap(lambda key: jax.random.fold_in(key, place))(keys)
            byte = jax.vmap(jax.random.categorical)(place_keys, scores).astype(jnp.int32)
            sampled = SampledTokens(byte, token_log_probs(scores, byte), allowed)
            if beginning is not None:
                byte = jnp.where(place < beginning.length, beginning.tokens[:, place], byte)
            return byte, sampled.replace(tokens=byte)

        _, sampled = jax.lax.scan(sample_byte, condition, jnp.arange(length, dtype=jnp.int32))
        return jax.tree.map(lambda x: x.swapaxes(0, 1), sampled)

    def distributions(self, policy, condition, sampled, sampling):
        before = jnp.concatenate([condition[:, None], sampled.tokens[:, :-1]], axis=1)
        return sampling.log_distribution(self.logits(policy, before), sampled.allowed)

    def decode(self, frozen, codes):
        hz = self.config.lowest_hz * 2.0 ** (codes / 64)
        time = jnp.arange(320, dtype=jnp.float32) / self.sample_rate_hz
        wav = jnp.sin(2 * jnp.pi * hz[:, :, None] * time[None, None])
        return 0.5 * wav.reshape(len(codes), 1, -1)


@gin.configurable
def bigram(directory):
    """Returns the folder of a base of random weights, which it writes if there is none."""
    if not checkpoint.has_model(directory):
        config = BigramConfig()
        policy = jax.device_get(Bigram(config).init(jax.random.key(0)))
        checkpoint.save_model(directory, config, {"params": policy})
        folder.write(directory, "bigram", {"policy": directory})
    return directory


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Low:
    """A reward: the share of bytes below 64, the lowest octave."""

    name = "low"
    low, high, licence = 0.0, 1.0, "CC0"

    def load(self, read=checkpoint.load_model):
        return checkpoint.Model(None, {}, "none", {})

    def windows(self, model):
        return "the whole clip"

    def lineage(self, model):
        return {}

    def read(self, model, prompts):
        return {}

    def score(self, model, variables, rollout, text):
        return (rollout.sampled.tokens < 64).mean(axis=1, dtype=jnp.float32)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Features for Frechet distances: magnitudes of eight bands in 20 ms."""

    def load(self, read=checkpoint.load_model):
        return checkpoint.Model(None, {}, "none", {})

    def features(self, model, variables, wav):
        frames = jnp.abs(jnp.fft.rfft(wav.reshape(len(wav), -1, 320)))[..., :160]
        return frames.reshape(*frames.shape[:2], 8, 20).mean(axis=-1)


@gin.configurable
@dataclasses.dataclass(frozen=True)
class Sweeps(Clips):
    """Real clips to compare with: eight rising sines of one second."""

    datasets: Mapping[str, float] = dataclasses.field(default_factory=dict)
    data_dir: str = ""
    sample_rate_hz: int = 16_000

    def batches(self, split, batch_size, seed, epochs=None):
        hz, time = 100.0 * 2 ** (np.arange(8) / 4), np.arange(16_000) / 16_000
        wav = 0.5 * np.sin(2 * np.pi * hz[:, None] * time)
        yield {
            "audio": wav.astype(np.float32),
            "caption": np.array([f"a sine of {each:.0f} Hz" for each in hz], object),
            "id": np.array([f"sine {number}" for number in range(8)], object),
        }
