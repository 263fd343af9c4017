"""Trains SoundStream to reconstruct clips, with or without discriminators.

Legend: B clips, N samples, T codec frames.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from musicrl_jax.losses import codec
from musicrl_jax.models import rvq
from musicrl_jax.models.discriminators import Discriminators, DiscriminatorsConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig, linear_start
from musicrl_jax.objectives.objective import (
    Batch,
    Epoch,
    Loss,
    Metrics,
    Objective,
    Variables,
    collect_points,
)

FRAMES_PER_CODE = 64  # that the codebooks are fitted to at the end


@dataclasses.dataclass(frozen=True)
class CodecObjective(Objective):
    """Reconstruction, adversarial and commitment losses.

    Batches are {'audio': f32 [B, N]}, N a multiple of the stride. Each loss of the decoded clip is
    divided by the norm of its gradient (`codec.balanced`), so that weights are comparable whatever
    a loss's units. Codec and discriminators are updated in the same step, each by its own loss. The
    finished model has no discriminators.

    Attributes:
      windows: window sizes of the spectral loss, in samples; the paper's are 64 to 2048.
      discriminators: their config; None trains by reconstruction and commitment alone.
      spectral_weight, waveform_weight, adversarial_weight, feature_weight: shares of the codec's
        gradient, by default EnCodec's. The waveform's L1 distance is EnCodec's too: spectra alone
        ignore phase.
      commitment_weight: weight of the commitment loss, whose gradient is not balanced; the balanced
        gradient has norm 1.
    """

    model: SoundStreamConfig
    windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    discriminators: DiscriminatorsConfig | None = None
    spectral_weight: float = 1.0
    waveform_weight: float = 0.1
    adversarial_weight: float = 3.0
    feature_weight: float = 3.0
    commitment_weight: float = 1.0

    def check(self, batch: Batch) -> None:
        """Raises ValueError if there are fewer training frames than a codebook has codes."""
        frames = self.data.count("train") * (batch["audio"].shape[1] // self.model.stride)
        if frames < self.model.codes:
            raise ValueError(
                f"SoundStreamConfig.codes = {self.model.codes}, but the training clips have "
                f"{frames} codec frames: lower it, or give more audio"
            )

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns 'params', 'codebooks' and 'balance'.

        The codec starts as a linear transform codec. The first training step starts the codebooks
        by k-means. 'balance' has running norms of gradients.
        """
        # The codec.
        codec_key, start_key, discriminator_key = jax.random.split(key, 3)
        variables = SoundStream(self.model).init(codec_key, batch["audio"], codec_key)
        params = linear_start(self.model, variables["params"], start_key)
        # The discriminators, as a part of 'params'.
        if self.discriminators is not None:
            module = Discriminators(self.discriminators)
            weights = module.init(discriminator_key, batch["audio"])["params"]
            params = params | {"discriminators": weights}
        norms = dict.fromkeys(self._weights(), jnp.zeros(()))
        return variables | {"params": params, "balance": norms}

    def loss(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        """Returns a loss whose gradient is the balanced one, with new codebooks and norms.

        Metrics: loss, the weighted sum of spectral and waveform; spectral, waveform, commitment
        and, with discriminators, adversarial, feature and discriminator without weights;
        perplexity, the effective number of codes in the batch, averaged over levels.
        """
        # Encode and decode.
        state, params, wav = dict(state), dict(params), batch["audio"]
        norms, discriminators = state.pop("balance"), params.pop("discriminators", {})
        output, new_state = SoundStream(self.model).apply(
            {"params": params, **state}, wav, key, mutable=["codebooks"]
        )
        decoded = jax.lax.stop_gradient(output.wav)

        # Losses of the decoded clip, their gradients by it, and the discriminators' own loss.
        metrics, gradients = {}, {}
        for name, distance in (("spectral", self._spectral), ("waveform", _waveform)):
            metrics[name], gradients[name] = jax.value_and_grad(distance, argnums=1)(wav, decoded)
        discriminator_loss = jnp.zeros(())
        if self.discriminators is not None:
            discriminator_loss, adversarial = self._adversarial(discriminators, wav, decoded)
            metrics["discriminator"] = discriminator_loss
            for name, pair in adversarial.items():
                metrics[name], gradients[name] = pair
        gradient, norms = codec.balanced(gradients, self._weights(), norms)

        # A scalar with the balanced gradient.
        balanced = jnp.sum(jax.lax.stop_gradient(gradient) * output.wav)
        loss = balanced + self.commitment_weight * output.commitment + discriminator_loss
        metrics |= {
            "loss": self.spectral_weight * metrics["spectral"]
            + self.waveform_weight * metrics["waveform"],
            "commitment": output.commitment,
            "perplexity": jnp.mean(rvq.perplexity(output.codes, self.model.codes)),
        }
        return loss, ({**state, **new_state, "balance": norms}, metrics)

    def _weights(self) -> dict[str, float]:
        """Returns the weight of each balanced loss."""
        weights = {"spectral": self.spectral_weight, "waveform": self.waveform_weight}
        if self.discriminators is not None:
            weights |= {"adversarial": self.adversarial_weight, "feature": self.feature_weight}
        return weights

    def _spectral(self, wav: jax.Array, decoded: jax.Array) -> jax.Array:
        """Returns the multi-scale spectral distance, []."""
        return codec.reconstruction(wav, decoded, self.model.sample_rate_hz, self.windows)

    def _adversarial(
        self, discriminators: Any, wav: jax.Array, decoded: jax.Array
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """Returns the discriminators' loss, and (loss, gradient by `decoded`) of the codec's."""
        apply = Discriminators(self.discriminators).apply
        # The codec's losses must not move the discriminators.
        constant = {"params": jax.lax.stop_gradient(discriminators)}
        real = apply(constant, wav)
        fake, backward = jax.vjp(lambda decoded: apply(constant, decoded), decoded)
        hinge, hinge_gradient = jax.value_and_grad(codec.generator_hinge)(fake)
        feature, feature_gradient = jax.value_and_grad(codec.feature_distance, argnums=1)(
            real, fake
        )
        losses = {
            "adversarial": (hinge, backward(hinge_gradient)[0]),
            "feature": (feature, backward(feature_gradient)[0]),
        }
        # The discriminators' own loss.
        trained = {"params": discriminators}
        return codec.discriminator_hinge(apply(trained, wav), apply(trained, decoded)), losses

    def clips(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        """Returns the clips of a batch, original and decoded from all levels, f32 [B, N]."""
        module = SoundStream(self.model)
        codes = module.apply(variables, batch["audio"], method=SoundStream.encode)
        decoded = module.apply(variables, codes, method=SoundStream.decode)
        return {"original": batch["audio"], "decoded": decoded}

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """Returns distances of clips that are decoded from all levels.

        mel_distance is the mean absolute difference of natural log-mels (80 bands, window 1024),
        si_sdr the median over clips in dB. perplexity is the effective number of codes among the
        batch's B T vectors, so it says little about codebooks larger than that.
        """
        module, wav = SoundStream(self.model), batch["audio"]
        variables = {"params": params, **state}
        codes = module.apply(variables, wav, method=SoundStream.encode)
        decoded = module.apply(variables, codes, method=SoundStream.decode)
        return {
            "mel_distance": codec.mel_distance(wav, decoded, self.model.sample_rate_hz),
            "stft_distance": codec.stft_distance(wav, decoded),
            "si_sdr": jnp.median(codec.si_sdr(wav, decoded)),
            "perplexity": jnp.mean(rvq.perplexity(codes, self.model.codes)),
        }

    def finish(self, variables: Variables, frozen: Any, batches: Epoch) -> Variables:
        """Returns the codec without discriminators, its codebooks fitted again by k-means.

        Moving averages lag behind a moving encoder, so they are fitted to the trained encoder's
        vectors of training clips, 64 a code. Learned codebooks are parameters and stay.
        """
        params = dict(variables["params"])
        params.pop("discriminators", None)
        if self.model.code_width is not None:
            return {"params": params}
        variables = {"params": params, "codebooks": variables["codebooks"]}
        # K-means starts at the moving averages.
        apply = jax.jit(SoundStream(self.model).apply, static_argnames="method")
        vectors = (
            apply(variables, batch["audio"], method=SoundStream.vectors) for batch in batches()
        )
        points = jnp.asarray(collect_points(vectors, FRAMES_PER_CODE * self.model.codes))
        state = variables["codebooks"]["rvq"]
        fitted = rvq.fit(
            jax.random.key(0), points, self.model.levels, self.model.codes, state["codebooks"]
        )
        return variables | {"codebooks": {"rvq": state | {"codebooks": fitted}}}


def _waveform(wav: jax.Array, decoded: jax.Array) -> jax.Array:
    """Returns the mean absolute difference, []."""
    return jnp.mean(jnp.abs(wav - decoded))
