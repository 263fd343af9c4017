"""Prompts -> wav files, by a checkpoint or by a bundle."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile

from musicrl_jax.core import checkpoint as checkpoints
from musicrl_jax.core.files import read_text, write_json
from musicrl_jax.core.keys import row_keys, step_key
from musicrl_jax.core.progress import Progress
from musicrl_jax.inputs import pieces
from musicrl_jax.rl import rollout as rollouts
from musicrl_jax.rl.sample import Sampling
from musicrl_jax.serving import bundle

SETTINGS = "clips.json"  # beside the clips of a file of prompts: what they were made with


def generate(
    checkpoint: str,
    prompt: str | list[str] = "",
    prompts_file: str = "",
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
      checkpoint: folder of a policy, base or finetuned, or of a bundle.
      prompt: what the music should be like, in any script; or several. A long one is cut to MuLan's text_length.
      prompts_file: in place of `prompt`, a text file with one a line; clips that are there already are not made again.
      out: a .wav file for one prompt, or a folder.
      clip_seconds: length, a multiple of 40 ms; with a bundle, any up to that of its clips.
      temperature, top_k: of the policy; see `rl.sample.Sampling`. A bundle's top_k is what it was exported with.
      seed: of the sampling.
      fine, codec, mulan: folders of the other models; by default those beside the checkpoint, as in a run's folder.

    Raises:
      ValueError: where a prompt is empty, the models do not belong together or give samples that are not finite, or
        `out` holds clips of a file of prompts that were made with other settings.
      FileNotFoundError: where a checkpoint or the file is missing.
      OSError: where a clip cannot be written.
    """
    sampling = Sampling(temperature, top_k)
    if bool(prompt) == bool(prompts_file):
        raise ValueError("generate: give either prompt or prompts_file")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if prompts_file:
        lines = map(str.strip, read_text(prompts_file).splitlines())
        prompts = list(dict.fromkeys(line for line in lines if line))
        if not prompts:
            raise ValueError(f"generate.prompts_file={prompts_file!r} has no prompt in it: write one a line")
        if out.endswith(".wav"):
            raise ValueError(f"out={out!r} is one file, but a file of prompts is asked for: give a folder")
    paths = [_path(out, words, single=len(prompts) == 1) for words in prompts]
    of_bundle = bundle.is_one(checkpoint)
    player = _of_bundle if of_bundle else _of_checkpoint
    draw, text, rate, made_by = player(checkpoint, prompts, clip_seconds, sampling, seed, fine, codec, mulan)
    if prompts_file:
        _continue(
            Path(out), {"model": made_by, "seconds": clip_seconds, "seed": seed, "sampling": [temperature, top_k]}
        )
    wanted = [row for row, path in enumerate(paths) if not (prompts_file and path.exists())]
    if len(wanted) < len(paths):
        print(f"{out}: {len(paths) - len(wanted)} of {len(paths)} clips are there already", flush=True)
    for row in Progress(wanted, "generate", len(wanted)):
        wav, path = draw(text[row : row + 1]), paths[row]
        if not np.isfinite(wav).all():
            raise ValueError(
                f"the clip for {prompts[row]!r} has samples that are not finite: the codec of {checkpoint} is broken; "
                "train it again, with a lower Optimiser.learning_rate"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")  # whoever is killed leaves no half of a clip
        try:
            soundfile.write(partial, np.clip(wav, -1, 1), rate, format="WAV")
            partial.replace(path)
        except soundfile.LibsndfileError as error:
            raise OSError(f"cannot write {path}: {error}; free some space or choose another out") from error
        print(path)
    return paths


Player = tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, int, str]  # (draws, pieces [n, L], Hz, the model's hash)


def _of_checkpoint(
    checkpoint: str,
    prompts: list[str],
    clip_seconds: float,
    sampling: Sampling,
    seed: int,
    fine: str | None,
    codec: str | None,
    mulan: str | None,
) -> Player:
    beside = Path(checkpoint).parent
    loaded = rollouts.load(
        checkpoint, fine or str(beside / "fine"), codec or str(beside / "codec"), mulan or str(beside / "mulan")
    )
    text = pieces.encode(loaded.vocabulary, prompts, loaded.studio.mulan.config.text_length)
    frames = loaded.studio.frames(clip_seconds)

    @jax.jit
    def draw(policy: Any, frozen: Any, text: jax.Array, keys: jax.Array) -> jax.Array:
        return loaded.studio.rollout(policy, frozen, text, keys, frames, sampling).wav

    def play(text: np.ndarray) -> np.ndarray:
        return np.asarray(draw(loaded.policy, loaded.frozen, text, row_keys(step_key(seed, 0), 1))[0])

    return play, text, loaded.studio.sample_rate_hz, checkpoints.content_hash(loaded.hashes)


def _of_bundle(
    folder: str, prompts: list[str], clip_seconds: float, sampling: Sampling, seed: int, *others: str | None
) -> Player:
    if any(others):
        raise ValueError("generate: a bundle has its own fine, codec and mulan: leave them out")
    read = bundle.Bundle(folder)
    if sampling.top_k not in (None, read.about["top_k"]):
        raise ValueError(f"top_k={sampling.top_k}: the bundle was exported with {read.about['top_k']}, which it keeps")
    if not 0 < clip_seconds <= read.about["clip_seconds"]:
        raise ValueError(
            f"clip_seconds={clip_seconds} must be above 0 and at most the bundle's {read.about['clip_seconds']}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: a bundle's is from 0 to 2**32 - 1")
    rate = read.about["sample_rate_hz"]

    def play(text: np.ndarray) -> np.ndarray:
        wav = read.draw(text, [seed], temperatures=[float(sampling.temperature)]).wav
        return np.asarray(wav[0])[: round(clip_seconds * rate)]

    return play, read.encode(prompts), rate, read.about["sha256"]


def _continue(folder: Path, settings: dict[str, Any]) -> None:
    """ValueError where the clips in the folder were made with others."""
    file = folder / SETTINGS
    if file.exists() and (found := json.loads(read_text(file))) != settings:
        other = next(name for name in settings if found.get(name) != settings[name])
        raise ValueError(
            f"{folder} holds clips made with {other} {found.get(other)}, not {settings[other]}: give another out"
        )
    write_json(file, settings)


def _path(out: str, prompt: str, single: bool) -> Path:
    """`out` itself where it is a file for one clip, else a file in it named after the prompt."""
    if out.endswith(".wav"):
        if not single:
            raise ValueError(f"out={out!r} is one file, but there are several prompts: give a folder")
        return Path(out)
    words = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")[:60]
    return Path(out) / f"{words}_{hashlib.sha256(prompt.encode()).hexdigest()[:8]}.wav"
