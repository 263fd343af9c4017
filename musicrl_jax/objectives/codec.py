"""Trains SoundStream to reconstruct clips: multi-scale spectral loss, waveform loss, commitment.

Letters: B clips, N samples.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from musicrl_jax.losses import codec
from musicrl_jax.models import rvq, soundstream
from musicrl_jax.objectives.objective import Batch, Metrics, Objective


@dataclasses.dataclass(frozen=True)
class CodecObjective(Objective):
    """The codec's reconstruction loss; batches {'audio': f32 [B, N]}, N a multiple of the codec's stride.

    Attributes:
      windows: samples of each scale of the spectral loss; the paper's, 64 to 2048.
      waveform_weight: of the L1 distance of waveforms, not in the paper, where discriminators do its work: spectra
        alone say nothing about phase.
      commitment_weight: of the commitment loss, a mean over levels and dimensions.
    """

    model: soundstream.SoundStreamConfig
    windows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    waveform_weight: float = 1000.0
    commitment_weight: float = 100.0

    def init(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """'params', started as a linear transform codec, and the collection 'codebooks', random until the
        first training step starts them by k-means."""
        variables = soundstream.SoundStream(self.model).init(key, batch["audio"], key)
        return variables | {"params": soundstream.linear_start(self.model, variables["params"], key)}

    def loss(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """The weighted sum under quantizer dropout, and the moved codebooks.

        Metrics: loss; spectral_l1, spectral_log, waveform_l1 and commitment before their weights; perplexity, the mean
        over levels of the effective number of codes in use in this batch.
        """
        module = soundstream.SoundStream(self.model)
        output, new_state = module.apply({"params": params, **state}, batch["audio"], key, mutable=["codebooks"])
        spectral_loss, metrics = codec.reconstruction(
            batch["audio"], output.wav, self.model.sample_rate_hz, self.windows
        )
        waveform_l1 = jnp.mean(jnp.abs(batch["audio"] - output.wav))
        loss = spectral_loss + self.waveform_weight * waveform_l1 + self.commitment_weight * output.commitment
        metrics |= {
            "loss": loss,
            "waveform_l1": waveform_l1,
            "commitment": output.commitment,
            "perplexity": jnp.mean(rvq.perplexity(output.codes, self.model.codes)),
        }
        return loss, (new_state, metrics)

    def evaluate(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Metrics:
        """Distances of clips decoded from all levels: loss (spectral and waveform), mel_distance (mean absolute
        difference of natural log-mels, 80 bands, window 1024), si_sdr in dB (median over clips), perplexity."""
        module = soundstream.SoundStream(self.model)
        variables, wav = {"params": params, **state}, batch["audio"]
        codes = module.apply(variables, wav, method="encode")
        decoded = module.apply(variables, codes, method="decode")
        spectral_loss, _ = codec.reconstruction(wav, decoded, self.model.sample_rate_hz, self.windows)
        return {
            "loss": spectral_loss + self.waveform_weight * jnp.mean(jnp.abs(wav - decoded)),
            "mel_distance": codec.mel_distance(wav, decoded, self.model.sample_rate_hz),
            "si_sdr": jnp.median(codec.si_sdr(wav, decoded)),
            "perplexity": jnp.mean(rvq.perplexity(codes, self.model.codes)),
        }
