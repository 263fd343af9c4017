"""From prompts to waveforms on the device: MuLan tokens, the policy's tokens, SoundStorm's fine levels, the codec.

Legend: B clips, L text pieces, E MuLan's width, M MuLan levels, F frames, K codes in a frame, T codec frames, Q codec
levels, N samples.
"""

import dataclasses
import json
from typing import Any

import flax.struct
import jax

from musicrl_jax.core import checkpoint
from musicrl_jax.core.tokens import FRAMES_PER_SECOND, deinterleave
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig, fill_fine
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.transformer import LANES
from musicrl_jax.rl.sample import Given, Sampling, sample

LAST = "last"  # a finetuned policy's folder for the last weights, where earlier ones were kept


@flax.struct.dataclass
class Rollout:
    """Everything that a prompt became; stays on the device.

    Attributes:
      text: int32 [B, L], the prompt's pieces.
      embedding: f32 [B, E], MuLan's embedding of the prompt, of length 1.
      mulan: int32 [B, M], the same as tokens: what the policy is conditioned on.
      tokens: int32 [B, F, K], what the policy drew.
      log_probs: f32 [B, F, K], of the tokens, under the distribution that they were drawn from.
      allowed: bool [B, F, K, V], the codes that could have been drawn; None where all could.
      acoustic: int32 [B, T, Q], all codec levels.
      wav: f32 [B, N].
    """

    text: jax.Array
    embedding: jax.Array
    mulan: jax.Array
    tokens: jax.Array
    log_probs: jax.Array
    allowed: jax.Array | None
    acoustic: jax.Array
    wav: jax.Array


@dataclasses.dataclass(frozen=True)
class Studio:
    """The modules between a prompt and its waveform, without weights."""

    musiclm: MusicLM
    soundstorm: SoundStorm
    soundstream: SoundStream
    mulan: MuLan

    @property
    def sample_rate_hz(self) -> int:
        """Of the waveforms."""
        return self.soundstream.config.sample_rate_hz

    def frames(self, clip_seconds: float) -> int:
        """F of a clip; ValueError where it holds no whole number of frames."""
        frames = round(clip_seconds * FRAMES_PER_SECOND)
        if frames < 1 or abs(frames / FRAMES_PER_SECOND - clip_seconds) > 1e-6:
            raise ValueError(f"clip_seconds={clip_seconds} must be a multiple of {1 / FRAMES_PER_SECOND} s")
        return frames

    def rollout(
        self,
        policy: Any,
        frozen: dict[str, Any],
        text: jax.Array,
        keys: jax.Array,
        frames: int,
        sampling: Sampling,
        given: Given | None = None,
    ) -> Rollout:
        """Draws a clip for each prompt.

        Args:
          policy: MusicLM's weights.
          frozen: variables of 'soundstorm', 'soundstream' and 'mulan'.
          text: int32 [B, L].
          keys: [B], one a row; a row's clip depends on its prompt and key alone.
          frames: F.
          sampling: the policy's distribution.
          given: how the clips begin, if they are to go on from something.
        """
        embedding = self.mulan.apply(frozen["mulan"], text, method="embed_text")
        mulan = self.mulan.apply(frozen["mulan"], embedding, method="quantize")
        keys = jax.vmap(jax.random.split)(keys)  # [B, 2]: what the policy does must not show in the noise of the rest
        drawn = sample(self.musiclm, policy, mulan, keys[:, 0], frames, sampling, given)
        _, coarse = deinterleave(drawn.tokens)
        acoustic = fill_fine(self.soundstorm, frozen["soundstorm"], coarse, keys[:, 1])
        wav = self.soundstream.apply(frozen["soundstream"], acoustic, method="decode")
        return Rollout(text, embedding, mulan, *drawn, acoustic, wav)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A studio, the weights for it and what came with them.

    Attributes:
      studio: the modules.
      policy: MusicLM's weights.
      frozen: variables of the other three.
      vocabulary: the content of the vocabulary that MuLan reads text with.
      hashes: each model's content hash, by name.
      lineage: the content of tokens.json, which says whose tokens the policy was trained on.
    """

    studio: Studio
    policy: Any
    frozen: dict[str, Any]
    vocabulary: bytes
    hashes: dict[str, str]
    lineage: bytes


def load(policy: str, fine: str, codec: str, mulan: str) -> Loaded:
    """Reads four checkpoint folders; ValueError, naming the field, where they do not fit or do not belong together."""
    models = {
        "policy": checkpoint.load_model(policy, MusicLMConfig),
        "soundstorm": checkpoint.load_model(fine, SoundStormConfig),
        "soundstream": checkpoint.load_model(codec, SoundStreamConfig),
        "mulan": checkpoint.load_model(mulan, MuLanConfig),
    }
    music, storm, stream, joint = (model.config for model in models.values())
    for name, found, wanted, folder in (
        ("layout.acoustic_codes", music.layout.acoustic_codes, stream.codes, policy),
        ("mulan_levels", music.mulan_levels, joint.levels, policy),
        ("mulan_codes", music.mulan_codes, joint.codes, policy),
        ("levels", storm.levels, stream.levels, fine),
        ("codes", storm.codes, stream.codes, fine),
        ("coarse_levels", storm.coarse_levels, music.layout.coarse_levels, fine),
    ):
        if found != wanted:
            raise ValueError(
                f"{folder}: {name} is {found}, but the models it works with have {wanted}; train it for them"
            )
    for name, folder in (("policy", policy), ("soundstorm", fine)):
        written_by = json.loads(models[name].assets[checkpoint.LINEAGE])
        for other, model in (("codec", models["soundstream"]), ("mulan", models["mulan"])):
            if written_by[other] != model.hash:
                raise ValueError(
                    f"{folder} was trained on tokens of {other} {written_by[other][:12]}, not of {model.hash[:12]}: "
                    f"give the folder of that {other}, or encode and train again"
                )
    return Loaded(
        Studio(
            MusicLM(music, lanes=LANES.get(jax.default_backend(), 1)),
            SoundStorm(storm),
            SoundStream(stream),
            MuLan(joint),
        ),
        models["policy"].variables["params"],
        {name: models[name].variables for name in ("soundstorm", "soundstream", "mulan")},
        models["mulan"].assets["vocabulary"],
        {name: model.hash for name, model in models.items()},
        models["policy"].assets[checkpoint.LINEAGE],
    )


def lineage(loaded: Loaded) -> dict[str, str]:
    """The hash of each model whose tokens the policy speaks, by name."""
    return json.loads(loaded.lineage)
