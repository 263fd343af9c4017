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

CLIP_SECONDS, TEMPERATURE = 4.0, 0.99  # of a checkpoint, which has none of its own
SETTINGS = "clips.json"  # beside the clips of a file of prompts: what they were made with


def generate(
    checkpoint: str,
    prompt: str | list[str] = "",
    prompts_file: str = "",
    out: str = "generated",
    clip_seconds: float | None = None,
    temperature: float | None = None,
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
      clip_seconds: length, a multiple of 40 ms, 4 s by default; with a bundle any up to that of its clips, which is
        the default.
      temperature, top_k: of the policy; see `rl.sample.Sampling`. By default 0.99 and none, or what the bundle was
        exported with, whose top_k cannot be changed.
      seed: of the sampling.
      fine, codec, mulan: folders of the other models; by default those beside the checkpoint, as in a run's folder.

    Raises:
      ValueError: where a prompt is empty, the models do not belong together or give samples that are not finite, or
        `out` holds clips that were made with other settings or, for a file of prompts, no one knows how.
      FileNotFoundError: where a checkpoint or the file is missing.
      OSError: where a clip cannot be written.
    """
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
    player = _of_bundle if bundle.is_one(checkpoint) else _of_checkpoint
    draw, text, rate, settings = player(checkpoint, prompts, clip_seconds, temperature, top_k, seed, fine, codec, mulan)
    if not out.endswith(".wav"):
        _continue(Path(out), settings, paths, write=bool(prompts_file))
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


# (draws, pieces [n, L], Hz, what clips are made with)
Player = tuple[Callable[[np.ndarray], np.ndarray], np.ndarray, int, dict[str, Any]]


def _of_checkpoint(
    checkpoint: str,
    prompts: list[str],
    clip_seconds: float | None,
    temperature: float | None,
    top_k: int | None,
    seed: int,
    fine: str | None,
    codec: str | None,
    mulan: str | None,
) -> Player:
    seconds = CLIP_SECONDS if clip_seconds is None else clip_seconds
    sampling = Sampling(TEMPERATURE if temperature is None else temperature, top_k)
    beside = Path(checkpoint).parent
    loaded = rollouts.load(
        checkpoint, fine or str(beside / "fine"), codec or str(beside / "codec"), mulan or str(beside / "mulan")
    )
    text = pieces.encode(loaded.vocabulary, prompts, loaded.studio.mulan.config.text_length)
    frames = loaded.studio.frames(seconds)

    @jax.jit
    def draw(policy: Any, frozen: Any, text: jax.Array, keys: jax.Array) -> jax.Array:
        return loaded.studio.rollout(policy, frozen, text, keys, frames, sampling).wav

    def play(text: np.ndarray) -> np.ndarray:
        return np.asarray(draw(loaded.policy, loaded.frozen, text, row_keys(step_key(seed, 0), 1))[0])

    made_by = checkpoints.content_hash(loaded.hashes)
    settings = {"model": made_by, "seconds": seconds, "seed": seed, "sampling": [sampling.temperature, top_k]}
    return play, text, loaded.studio.sample_rate_hz, settings


def _of_bundle(
    folder: str,
    prompts: list[str],
    clip_seconds: float | None,
    temperature: float | None,
    top_k: int | None,
    seed: int,
    *others: str | None,
) -> Player:
    if any(others):
        raise ValueError("generate: a bundle has its own fine, codec and mulan: leave them out")
    read = bundle.Bundle(folder)
    about = read.about
    if top_k not in (None, about["top_k"]):
        raise ValueError(f"top_k={top_k}: the bundle was exported with {about['top_k']}, which it keeps")
    sampling = Sampling(about["temperature"] if temperature is None else temperature, about["top_k"])
    seconds = about["clip_seconds"] if clip_seconds is None else clip_seconds
    if not 0 < seconds <= about["clip_seconds"]:
        raise ValueError(f"clip_seconds={seconds} must be above 0 and at most the bundle's {about['clip_seconds']}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: a bundle's is from 0 to 2**32 - 1")
    rate = about["sample_rate_hz"]

    def play(text: np.ndarray) -> np.ndarray:
        wav = read.draw(text, [seed], temperatures=[float(sampling.temperature)]).wav
        return np.asarray(wav[0])[: round(seconds * rate)]

    settings = {"model": about["sha256"], "seconds": seconds, "seed": seed}
    return play, read.encode(prompts), rate, {**settings, "sampling": [sampling.temperature, sampling.top_k]}


def _continue(folder: Path, settings: dict[str, Any], paths: list[Path], write: bool) -> None:
    """ValueError where clips of a file of prompts are there that were made with other settings, or, if it is for such a
    file, clips of which no one knows with what."""
    file = folder / SETTINGS
    if file.exists():
        found = json.loads(read_text(file))
        if found != settings:
            other = next(name for name in settings if found.get(name) != settings[name])
            raise ValueError(
                f"{folder} holds clips made with {other} {found.get(other)}, not {settings[other]}: give another out"
            )
    elif write:
        if there := [path for path in paths if path.exists()]:
            raise ValueError(f"{there[0]} is there, and no {SETTINGS} says how it was made: give another out")
        write_json(file, settings)


def _path(out: str, prompt: str, single: bool) -> Path:
    """`out` itself where it is a file for one clip, else a file in it named after the prompt."""
    if out.endswith(".wav"):
        if not single:
            raise ValueError(f"out={out!r} is one file, but there are several prompts: give a folder")
        return Path(out)
    words = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")[:60]
    return Path(out) / f"{words}_{hashlib.sha256(prompt.encode()).hexdigest()[:8]}.wav"
