"""Trains SoundStream to reconstruct clips, against discriminators or without.

Letters: B clips, N samples, Q codec levels.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import sharding
from musicrl_jax.losses import codec
from musicrl_jax.models import rvq, soundstream
from musicrl_jax.models.discriminators import Discriminators, DiscriminatorsConfig
from musicrl_jax.objectives.objective import Batch, Metrics, Objective

Judgement = tuple[jax.Array, Metrics, dict[str, jax.Array]]

FRAMES_PER_CODE = 64  # that the codebooks are fitted to at the end


@dataclasses.dataclass(frozen=True)
class CodecObjective(Objective):
    """Reconstruction, adversarial and commitment losses; batches {'audio': f32 [B, N]}, N a multiple of the stride.

    The losses on the decoded clip are weighed by the norm of their gradients by it (`codec.balanced`), so each weight
    is a share of the pull on the codec, whatever a loss's units. Codec and discriminators move in the same step, each
    by its own loss. The discriminators are no part of the finished model.

    Attributes:
      windows: samples of each scale of the spectral loss; the paper's, 64 to 2048.
      discriminators: which there are; None trains by reconstruction and commitment alone.
      spectral_weight, waveform_weight, adversarial_weight, feature_weight: shares. The waveform's L1 distance is
        EnCodec's, not SoundStream's; spectra alone say nothing about phase. The defaults are EnCodec's.
      commitment_weight: of the commitment loss, whose gradient is not balanced: the others' has the norm 1.
    """

    model: soundstream.SoundStreamConfig
    windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    discriminators: DiscriminatorsConfig | None = None
    spectral_weight: float = 1.0
    waveform_weight: float = 0.1
    adversarial_weight: float = 3.0
    feature_weight: float = 3.0
    commitment_weight: float = 1.0

    def check(self, batch: Batch) -> None:
        """Raises ValueError if the training set has fewer codec frames than a codebook has codes."""
        frames = self.data.count("train") * (batch["audio"].shape[1] // self.model.stride)
        if frames < self.model.codes:
            raise ValueError(
                f"SoundStreamConfig.codes = {self.model.codes}, but the training clips have {frames} codec frames: "
                "lower it, or give more audio"
            )

    def init(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """Draws 'params' of the codec, started as a linear transform codec, and of the discriminators; 'codebooks',
        random until the first training step starts them by k-means; 'balance', the norms of gradients.
        """
        codec_key, start_key, judge_key = jax.random.split(key, 3)
        variables = soundstream.SoundStream(self.model).init(codec_key, batch["audio"], codec_key)
        params = soundstream.linear_start(self.model, variables["params"], start_key)
        if self.discriminators is not None:
            judges = Discriminators(self.discriminators)
            params = params | {"discriminators": judges.init(judge_key, batch["audio"])["params"]}
        norms = dict.fromkeys(self._weights(), jnp.zeros(()))
        return variables | {"params": params, "balance": norms}

    def loss(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """A loss whose gradient is the balanced one, and the moved codebooks and norms.

        Metrics: loss, the weighted sum of spectral and waveform; spectral, waveform, commitment and, with
        discriminators, adversarial, feature and discriminator before their weights; perplexity, the mean over levels
        of the effective number of codes in use in this batch.
        """
        state, params, wav = dict(state), dict(params), batch["audio"]
        norms, judges = state.pop("balance"), params.pop("discriminators", {})
        module = soundstream.SoundStream(self.model)
        output, new_state = module.apply(
            {"params": params, **state}, wav, key, mutable=["codebooks"]
        )
        decoded = jax.lax.stop_gradient(output.wav)

        metrics, pulls = {}, {}
        metrics["spectral"], pulls["spectral"] = jax.value_and_grad(self._spectral, argnums=1)(
            wav, decoded
        )
        metrics["waveform"], pulls["waveform"] = jax.value_and_grad(_waveform, argnums=1)(
            wav, decoded
        )
        judgement = jnp.zeros(())
        if self.discriminators is not None:
            judgement, seen, adverse = self._judged(judges, wav, decoded)
            metrics |= seen | {"discriminator": judgement}
            pulls |= adverse
        pull, norms = codec.balanced(pulls, self._weights(), norms)

        pulled = jnp.sum(jax.lax.stop_gradient(pull) * output.wav)
        loss = pulled + self.commitment_weight * output.commitment + judgement
        metrics |= {
            "loss": self.spectral_weight * metrics["spectral"]
            + self.waveform_weight * metrics["waveform"],
            "commitment": output.commitment,
            "perplexity": jnp.mean(rvq.perplexity(output.codes, self.model.codes)),
        }
        return loss, ({**state, **new_state, "balance": norms}, metrics)

    def _weights(self) -> dict[str, float]:
        weights = {"spectral": self.spectral_weight, "waveform": self.waveform_weight}
        if self.discriminators is not None:
            weights |= {"adversarial": self.adversarial_weight, "feature": self.feature_weight}
        return weights

    def _spectral(self, wav: jax.Array, decoded: jax.Array) -> jax.Array:
        return codec.reconstruction(wav, decoded, self.model.sample_rate_hz, self.windows)

    def _judged(self, judges: Any, wav: jax.Array, decoded: jax.Array) -> Judgement:
        """The discriminators' loss; the codec's losses under them; the gradients of these by `decoded`."""
        module = Discriminators(self.discriminators)
        held = jax.lax.stop_gradient(judges)
        real = module.apply({"params": held}, wav)
        layers, back = jax.vjp(lambda decoded: module.apply({"params": held}, decoded), decoded)
        adversarial, adversarial_pull = jax.value_and_grad(codec.generator_hinge)(layers)
        feature, feature_pull = jax.value_and_grad(codec.feature_distance, argnums=1)(real, layers)
        pulls = {"adversarial": back(adversarial_pull)[0], "feature": back(feature_pull)[0]}
        loss = codec.discriminator_hinge(
            module.apply({"params": judges}, wav), module.apply({"params": judges}, decoded)
        )
        return loss, {"adversarial": adversarial, "feature": feature}, pulls

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """Distances of clips decoded from all levels: mel_distance (mean absolute difference of natural log-mels,
        80 bands, window 1024), stft_distance, si_sdr in dB (median over clips); perplexity, as in training: the
        effective number of codes in a batch of B T vectors says little of codebooks that are larger than that.
        """
        module = soundstream.SoundStream(self.model)
        variables, wav = {"params": params, **state}, batch["audio"]
        codes = module.apply(variables, wav, method=soundstream.SoundStream.encode)
        decoded = module.apply(variables, codes, method=soundstream.SoundStream.decode)
        return {
            "mel_distance": codec.mel_distance(wav, decoded, self.model.sample_rate_hz),
            "stft_distance": codec.stft_distance(wav, decoded),
            "si_sdr": jnp.median(codec.si_sdr(wav, decoded)),
            "perplexity": jnp.mean(rvq.perplexity(codes, self.model.codes)),
        }

    def finish(
        self,
        variables: dict[str, Any],
        frozen: Any,
        batches: Callable[[], Iterator[dict[str, np.ndarray]]],
    ) -> dict[str, Any]:
        """The codec alone; where codebooks are moving averages, fitted anew by k-means to the trained encoder's
        vectors of training clips, 64 a code: moving averages lag behind an encoder that moves.
        """
        params = {
            name: value for name, value in variables["params"].items() if name != "discriminators"
        }
        if self.model.code_width is not None:
            return {"params": params}
        variables = {"params": params, "codebooks": variables["codebooks"]}
        module = soundstream.SoundStream(self.model)
        vectors = jax.jit(
            lambda variables, wav: module.apply(
                variables, wav, method=soundstream.SoundStream.vectors
            )
        )
        parts, found = [], 0
        for batch in batches():
            parts.append(
                sharding.fetch(vectors(variables, batch["audio"])).reshape(-1, self.model.embed)
            )
            found += len(parts[-1])
            if found >= FRAMES_PER_CODE * self.model.codes:
                break
        points = jnp.asarray(np.concatenate(parts))
        state = variables["codebooks"]["rvq"]
        fitted = rvq.fit(
            jax.random.key(0), points, self.model.levels, self.model.codes, state["codebooks"]
        )
        return variables | {"codebooks": {"rvq": state | {"codebooks": fitted}}}


def _waveform(wav: jax.Array, decoded: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(wav - decoded))
