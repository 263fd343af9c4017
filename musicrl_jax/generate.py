"""Prompts -> wav files."""

import hashlib
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile

from musicrl_jax.core.keys import row_keys, step_key
from musicrl_jax.core.progress import Progress
from musicrl_jax.inputs import pieces
from musicrl_jax.rl import rollout as rollouts
from musicrl_jax.rl.sample import Sampling


def generate(
    prompt: str | list[str],
    checkpoint: str,
    out: str = "generated",
    clip_seconds: float = 4.0,
    temperature: float = 0.99,
    top_k: int | None = None,
    seed: int = 0,
    fine: str | None = None,
    codec: str | None = None,
    mulan: str | None = None,
) -> list[Path]:
    """Writes one clip a prompt and returns the paths.

    The same prompt and seed give the same clip, whatever else is asked for.

    Args:
      prompt: what the music should be like, in any script; or several. A long one is cut to MuLan's text_length.
      checkpoint: folder of a policy, base or finetuned.
      out: a .wav file for one prompt, or a folder.
      clip_seconds: length, a multiple of 40 ms.
      temperature, top_k: of the policy; see `rl.sample.Sampling`.
      seed: of the sampling.
      fine, codec, mulan: folders of the other models; by default those beside the checkpoint, as in a run's folder.

    Raises:
      ValueError: where a prompt is empty, the models do not belong together or give samples that are not finite.
      FileNotFoundError: where a checkpoint is missing.
      OSError: where a clip cannot be written.
    """
    sampling = Sampling(temperature, top_k)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    paths = [_path(out, words, single=len(prompts) == 1) for words in prompts]
    beside = Path(checkpoint).parent
    loaded = rollouts.load(
        checkpoint, fine or str(beside / "fine"), codec or str(beside / "codec"), mulan or str(beside / "mulan")
    )
    text = pieces.encode(loaded.vocabulary, prompts, loaded.studio.mulan.config.text_length)
    frames = loaded.studio.frames(clip_seconds)

    @jax.jit
    def draw(policy: Any, frozen: Any, text: jax.Array, keys: jax.Array) -> jax.Array:
        return loaded.studio.rollout(policy, frozen, text, keys, frames, sampling).wav

    for row, path in enumerate(Progress(paths, "generate", len(paths))):
        wav = np.asarray(draw(loaded.policy, loaded.frozen, text[row : row + 1], row_keys(step_key(seed, 0), 1))[0])
        if not np.isfinite(wav).all():
            raise ValueError(
                f"the clip for {prompts[row]!r} has samples that are not finite: the codec of {checkpoint} is broken; "
                "train it again, with a lower Optimiser.learning_rate"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            soundfile.write(path, np.clip(wav, -1, 1), loaded.studio.sample_rate_hz)
        except soundfile.LibsndfileError as error:
            raise OSError(f"cannot write {path}: {error}; free some space or choose another out") from error
        print(path)
    return paths


def _path(out: str, prompt: str, single: bool) -> Path:
    """`out` itself where it is a file for one clip, else a file in it named after the prompt."""
    if out.endswith(".wav"):
        if not single:
            raise ValueError(f"out={out!r} is one file, but there are several prompts: give a folder")
        return Path(out)
    words = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")[:60]
    return Path(out) / f"{words}_{hashlib.sha256(prompt.encode()).hexdigest()[:8]}.wav"
