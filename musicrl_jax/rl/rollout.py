"""From prompts to waveforms on the device: MuLan tokens, the policy's tokens, SoundStorm's fine levels, the codec.

Legend: B clips, L text pieces, E MuLan's width, M MuLan levels, F frames, K codes in a frame, T codec frames, Q codec
levels, N samples.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.struct
import jax

from musicrl_jax.core import checkpoint
from musicrl_jax.core.keys import step_key
from musicrl_jax.core.manifest import unsealed
from musicrl_jax.core.run_checkpoints import CHECKPOINTS, RUN
from musicrl_jax.models.tokens import FRAMES_PER_SECOND, deinterleave
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig, fill_fine
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.transformer import LANES
from musicrl_jax.rl.sample import Drawn, Given, Sampling, sample

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
        """Draws a clip for each prompt: `read`, `draw`, `fill` and `sound`, one after the other.

        Args:
          policy: MusicLM's weights.
          frozen: variables of 'soundstorm', 'soundstream' and 'mulan'.
          text: int32 [B, L].
          keys: [B], one a row; a row's clip depends on its prompt and key alone.
          frames: F.
          sampling: the policy's distribution.
          given: how the clips begin, if they are to go on from something.
        """
        embedding, mulan = self.read(frozen["mulan"], text)
        drawn = self.draw(policy, mulan, keys, frames, sampling, given)
        acoustic = self.fill(frozen["soundstorm"], drawn.tokens, keys)
        wav = self.sound(frozen["soundstream"], acoustic)
        return Rollout(text, embedding, mulan, *drawn, acoustic, wav)

    def numbered(
        self,
        policy: Any,
        frozen: dict[str, Any],
        text: jax.Array,
        seeds: jax.Array,
        candidates: jax.Array,
        temperatures: jax.Array,
        given: Given,
        top_k: int | None = None,
    ) -> Rollout:
        """Draws clips by their numbers, as generate, bundles and the service have them.

        Args:
          policy, frozen, text, top_k: as in `rollout` and its `Sampling`.
          seeds, candidates: uint32 [B]; clips of one prompt and seed differ by the candidate's number.
          temperatures: f32 [B].
          given: how the clips begin; its tokens have the length of the clips.
        """

        def key(seed: jax.Array, candidate: jax.Array) -> jax.Array:
            return jax.random.fold_in(step_key(seed, 0), candidate)

        keys, sampling = jax.vmap(key)(seeds, candidates), Sampling(temperatures[:, None], top_k)
        return self.rollout(policy, frozen, text, keys, given.tokens.shape[1], sampling, given)

    def read(self, variables: Any, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """MuLan's variables, text int32 [B, L] -> (its embedding f32 [B, E], the same as tokens int32 [B, M])."""
        embedding = self.mulan.apply(variables, text, method="embed_text")
        return embedding, self.mulan.apply(variables, embedding, method="quantize")

    def draw(
        self,
        policy: Any,
        mulan: jax.Array,
        keys: jax.Array,
        frames: int,
        sampling: Sampling,
        given: Given | None = None,
    ) -> Drawn:
        """The policy's tokens, from MuLan's; the rest as in `rollout`."""
        return sample(self.musiclm, policy, mulan, _keys(keys)[:, 0], frames, sampling, given)

    def fill(self, variables: Any, tokens: jax.Array, keys: jax.Array) -> jax.Array:
        """SoundStorm's variables, the policy's tokens [B, F, K], keys as in `rollout` -> all codec levels [B, T, Q]."""
        return fill_fine(self.soundstorm, variables, deinterleave(tokens)[1], _keys(keys)[:, 1])

    def sound(self, variables: Any, acoustic: jax.Array) -> jax.Array:
        """SoundStream's variables, all codec levels [B, T, Q] -> waveforms f32 [B, N]."""
        return self.soundstream.apply(variables, acoustic, method="decode")


def _keys(keys: jax.Array) -> jax.Array:
    """A row's key [B] -> the policy's and that of the rest [B, 2]: what the one does must not show in the other."""
    return jax.vmap(jax.random.split)(keys)


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
      clip_seconds: length of the clips that the policy was trained on; None where an older version did not record it.
    """

    studio: Studio
    policy: Any
    frozen: dict[str, Any]
    vocabulary: bytes
    hashes: dict[str, str]
    lineage: bytes
    clip_seconds: float | None = None


def load(policy: str, fine: str | None = None, codec: str | None = None, mulan: str | None = None) -> Loaded:
    """Reads four checkpoint folders; those that are not named stand beside the policy's.

    Raises:
      ValueError: by name of the field, where they do not fit or do not belong together.
      FileNotFoundError: where one is missing.
    """
    fine, codec, mulan = (
        folder or checkpoint.beside(policy, name)
        for name, folder in (("fine", fine), ("codec", codec), ("mulan", mulan))
    )
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
    if "vocabulary" not in models["mulan"].assets:
        raise ValueError(f"{mulan} has no vocabulary in its model's folder: restore a copy, or train it again")
    for name, folder in (("policy", policy), ("soundstorm", fine)):
        written_by = models[name].json_asset(checkpoint.LINEAGE, {"codec": str, "mulan": str})
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
        _trained_seconds(policy, models["policy"]),
    )


def _trained_seconds(policy: str, model: checkpoint.Model) -> float | None:
    """Returns the length of the clips that a policy was trained on; None where nothing in its folder records it."""
    if checkpoint.CLIP in model.assets:
        return float(model.json_asset(checkpoint.CLIP, {"seconds": float})["seconds"])
    run = Path(policy) / CHECKPOINTS / RUN  # an older finetuning recorded it in the identity of its run alone
    try:
        return float(unsealed(run, "if there")["clip_seconds"])
    except (ValueError, KeyError, TypeError):
        return None


def lineage(loaded: Loaded) -> dict[str, str]:
    """The hash of each model whose tokens the policy speaks, by name."""
    return json.loads(loaded.lineage)
