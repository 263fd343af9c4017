"""Prompts -> files of sound, by a checkpoint or by a bundle, which behave alike and as the service does.

Legend: L text pieces, F frames of a clip, K codes in a frame, N samples.
"""

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from musicrl_jax.core import audio, lock, memory
from musicrl_jax.core import checkpoint as checkpoints
from musicrl_jax.core.files import read_text
from musicrl_jax.core.progress import Progress
from musicrl_jax.inputs import pieces
from musicrl_jax.rl import rollout as rollouts
from musicrl_jax.rl.sample import Given, Sampling
from musicrl_jax.serving import batcher, bundle
from musicrl_jax.serving.composition import NEXT_WINDOW, Piece, window_count

UNRECORDED_SECONDS = 5.0  # of clips of a checkpoint that does not record what it was trained on; the demo's
TEMPERATURE = 0.99  # of a checkpoint, which has none of its own
ROWS = 8  # candidates that are drawn at a time, at most
LOUDNESS_LUFS = -16.0  # of the files; about as loud as streamed music


@lock.holds("out", beside=True, when="prompts_file")
def generate(
    checkpoint: str,
    prompt: str | list[str] = "",
    prompts_file: str = "",
    out: str = "generated",
    clip_seconds: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    candidates: int = 1,
    format: str = "",
    loudness_lufs: float | None = LOUDNESS_LUFS,
    fine: str | None = None,
    codec: str | None = None,
    mulan: str | None = None,
) -> list[Path]:
    """Writes one file a prompt and returns the paths.

    The same prompt, seed and settings give the same clip, whatever else is asked for. In a folder a file is named after
    prompt, seed and the number of the candidate. A clip that is there already, made with the same settings, is not
    made again, so that an interrupted command goes on. How a clip was made stands in the file's `comment`, as JSON, and
    the prompt in its `title`.

    Args:
      checkpoint: folder of a policy, base or finetuned, or of a bundle.
      prompt: what the music should be like, in any script; or several. A long one is cut to MuLan's text_length.
      prompts_file: in place of `prompt`, a text file with one a line.
      out: a folder, or for one prompt a file that ends in .wav, .flac or .ogg, which is written anew.
      clip_seconds: length, by default that of the clips that the model was trained on or the bundle exported for. A
        shorter clip is the beginning of a whole one; a longer one is drawn in windows of whole ones.
      temperature, top_k: of the policy; see `rl.sample.Sampling`. By default 0.99 and none, or what the bundle was
        exported with, whose top_k cannot be changed.
      seed: of the sampling, from 0 to 2**32 - 1.
      candidates: clips to choose the one of the best reward from; more than 1 needs a bundle with rewards.
      format: of the files in a folder: 'wav', 'flac' or 'ogg'; by default 'wav'.
      loudness_lufs: integrated loudness of the files (ITU-R BS.1770-4), less where a peak would clip; None leaves the
        samples as they are. Silence stays silence.
      fine, codec, mulan: folders of the other models; by default those beside the checkpoint, as in a run's folder.

    Raises:
      ValueError: where a prompt is empty, a setting is out of range, the models do not belong together or give samples
        that are not finite, or `out` holds clips of the same prompts and seed that were made with other settings.
      FileNotFoundError: where a checkpoint or the file is missing.
      ModuleNotFoundError: where what measures loudness is not installed.
      OSError: where a clip cannot be written.
    """
    # What is wanted, checked before any model is read.
    prompts = _prompts(prompt, prompts_file)
    folder, file, form = _target(out, format, single=len(prompts) == 1 and not prompts_file)
    seed, candidates = _whole("seed", seed), _whole("candidates", candidates, NEXT_WINDOW - 1)
    if candidates < 1:
        raise ValueError(f"candidates={candidates} must be 1 or more")
    _check_loudness(loudness_lufs)

    # The model, and what is drawn with it.
    read = _bundle if bundle.is_one(checkpoint) else _Checkpoint
    player = read(checkpoint, top_k, fine, codec, mulan)
    about = player.about
    if candidates > 1 and not about["rewards"]:
        raise ValueError(
            f"candidates={candidates}: {checkpoint} has no rewards to choose by: `musicrl export` it with rewards, and "
            "give the bundle"
        )
    seconds = _seconds(clip_seconds, about)
    sampling = Sampling(about["temperature"] if temperature is None else temperature, about["top_k"])
    text = player.encode(prompts)
    settings = {
        "model": about["sha256"],
        "seed": seed,
        "seconds": seconds,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "candidates": candidates,
        "loudness_lufs": loudness_lufs,
    }

    # What is there already, and the rest.
    paths = {} if file else dict(_made(folder, prompts, form, settings))
    if paths:
        print(f"{out}: {len(paths)} of {len(prompts)} clips are there already", flush=True)
    missing = [row for row in range(len(prompts)) if row not in paths]
    for row in Progress(missing, "generate", len(missing)):
        piece = Piece(about, text[row], seed, seconds, sampling.temperature, candidates)
        wav, candidate = _drawn(player, piece, prompts[row], checkpoint)
        paths[row] = file or folder / f"{_stem(prompts[row], seed)}_{candidate}.{form}"
        if loudness_lufs is not None:
            wav = _levelled(wav, about["sample_rate_hz"], loudness_lufs, paths[row])
        tags = audio.made_from(prompts[row], **settings, candidate=candidate)
        _write(paths[row], audio.encoded(np.clip(wav, -1, 1), about["sample_rate_hz"], form, tags))
        print(paths[row])
    return [paths[row] for row in range(len(prompts))]


class _Checkpoint:
    """A checkpoint that draws clips as a bundle does: with the same `about`, `encode`, `draw` and `score`."""

    def __init__(self, folder: str, top_k: int | None, *others: str | None):
        """Reads a policy's folder and `others`, those of fine, codec and mulan."""
        self._loaded = loaded = rollouts.load(folder, *others)
        seconds = loaded.clip_seconds
        if seconds is None:
            seconds = UNRECORDED_SECONDS
            print(f"{folder} does not record the length of the clips that it was trained on: {seconds:g} s is assumed")
        self.about: dict[str, Any] = {
            "clip_seconds": seconds,
            "frames": loaded.studio.frames(seconds),
            "places": loaded.studio.musiclm.config.layout.depth,
            "sample_rate_hz": loaded.studio.sample_rate_hz,
            "temperature": TEMPERATURE,
            "top_k": top_k,
            "rewards": {},
            "sha256": checkpoints.content_hash(loaded.hashes),
        }
        self._program: Any = None

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns prompts as pieces, int32 [B, L]; ValueError where one says nothing."""
        return pieces.encode(self._loaded.vocabulary, prompts, self._loaded.studio.mulan.config.text_length)

    def draw(self, *numbers: Any) -> bundle.Clips:
        """Draws clips from all arguments of `Bundle.draw`; ValueError where they do not fit into memory."""
        types = (np.int32, np.uint32, np.uint32, np.float32, np.int32, np.int32)
        *rows, tokens, frames = (jnp.asarray(np.asarray(x, of)) for x, of in zip(numbers, types, strict=True))
        arguments = self._loaded.policy, self._loaded.frozen, *rows, Given(tokens, frames)
        if self._program is None:
            draw = jax.jit(self._loaded.studio.numbered, static_argnums=7)
            self._program = draw.lower(*arguments, self.about["top_k"]).compile()
            memory.check(self._program, "clip_seconds", self.about["clip_seconds"])
        drawn = self._program(*arguments)
        return bundle.Clips(drawn.tokens, drawn.acoustic, drawn.mulan, drawn.embedding, drawn.wav)

    def score(self, clips: bundle.Clips) -> dict[str, Any]:
        """Returns {}: a checkpoint has no rewards."""
        return {}


def _bundle(folder: str, top_k: int | None, *others: str | None) -> bundle.Bundle:
    """Reads a bundle; ValueError where it is asked to be another than it is."""
    if any(others):
        raise ValueError("generate: a bundle has its own fine, codec and mulan: leave them out")
    player = bundle.Bundle(folder)
    if top_k not in (None, player.about["top_k"]):
        raise ValueError(f"top_k={top_k}: the bundle was exported with {player.about['top_k']}, which it keeps")
    return player


def _prompts(prompt: str | Sequence[str], prompts_file: str) -> list[str]:
    """Returns the prompts, each once; ValueError where there are none, or two places to take them from."""
    if bool(prompt) == bool(prompts_file):
        raise ValueError("generate: give either prompt or prompts_file")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if prompts_file:
        prompts = [line.strip() for line in read_text(prompts_file).splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"generate.prompts_file={prompts_file!r} has no prompt in it: write one a line")
    if other := [each for each in prompts if not isinstance(each, str)]:
        raise ValueError(f"generate.prompt: {other[0]!r} is no text: put it in quotation marks")
    return list(dict.fromkeys(prompts))


def _target(out: str, format: str, single: bool) -> tuple[Path, Path | None, str]:
    """Returns (the folder, the file where `out` is one, the format); ValueError where `out` is neither."""
    if format and format not in audio.SUBTYPES:
        raise ValueError(f"format={format!r} is none of {', '.join(audio.SUBTYPES)}")
    path = Path(out)
    if path.is_dir() or out.endswith("/") or not path.suffix:
        if path.exists() and not path.is_dir():
            raise ValueError(f"out={out!r} is a file: give a folder, or a file that ends in .wav, .flac or .ogg")
        return path, None, format or "wav"
    try:
        form = audio.form_of(out)
    except ValueError as error:
        raise ValueError(f"{error}, or for a new folder a name that ends in /") from None
    if format not in ("", form):
        raise ValueError(f"out={out!r} is no {format} file: give one of them")
    if not single:
        raise ValueError(f"out={out!r} is one file, but there are several prompts: give a folder")
    return path.parent, path, form


def _whole(name: str, number: Any, most: int = bundle.LARGEST_SEED) -> int:
    """Returns one whole number from 0 to `most`; ValueError where it is something else."""
    if np.ndim(number):
        raise ValueError(f"{name}={number!r} must be one whole number")
    return int(bundle.whole(name, number, most))


def _check_loudness(loudness_lufs: float | None) -> None:
    """Raises ValueError where the loudness is out of range, ModuleNotFoundError where nothing can measure it."""
    if loudness_lufs is None:
        return
    if not isinstance(loudness_lufs, int | float) or not -70 < loudness_lufs <= 0:
        raise ValueError(f"loudness_lufs={loudness_lufs!r} must be above -70 and at most 0, or None")
    if importlib.util.find_spec("pyloudnorm") is None:
        raise ModuleNotFoundError(
            f"pyloudnorm brings files to {loudness_lufs:g} LUFS and is not installed: pip install pyloudnorm, or give "
            "--loudness_lufs=None"
        )


def _seconds(clip_seconds: float | None, about: dict[str, Any]) -> float:
    """Returns the length of the clips, and says so where it takes several windows."""
    whole = about["clip_seconds"]
    if clip_seconds is None:
        return whole
    least, most = whole / about["frames"], whole / 2 * NEXT_WINDOW
    number = isinstance(clip_seconds, int | float) and math.isfinite(clip_seconds)
    if not number or not least <= clip_seconds <= most:
        raise ValueError(f"clip_seconds={clip_seconds!r} must be from {least:g}, one frame, to {most:g}")
    if (windows := window_count(clip_seconds, about)) > 1:
        print(
            f"clip_seconds={clip_seconds:g} is more than the {whole:g} s of the model's clips: drawn in {windows} "
            "windows, each on from half of the one before",
            flush=True,
        )
    return clip_seconds


def _stem(prompt: str, seed: int) -> str:
    """Returns what the name of a prompt's file begins with; its words take at most 120 bytes."""
    words = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")[:60].encode()[:120].decode(errors="ignore")
    return f"{words}_{hashlib.sha256(prompt.encode()).hexdigest()[:8]}_seed{seed}"


def _made(folder: Path, prompts: list[str], form: str, settings: dict[str, Any]) -> Iterator[tuple[int, Path]]:
    """Yields (row, path) of the clips that are there, with these settings; ValueError where one has others."""
    for row, prompt in enumerate(prompts):
        for path in sorted(folder.glob(f"{_stem(prompt, settings['seed'])}_*.{form}")):
            try:
                with soundfile.SoundFile(path) as file:
                    made = dict(json.loads(file.comment))
            except (soundfile.LibsndfileError, ValueError, TypeError) as error:
                raise ValueError(f"{path} is there and does not say how it was made: give another out") from error
            if other := [name for name, value in settings.items() if made.get(name) != value]:
                raise ValueError(
                    f"{path} was made with {other[0]} {made.get(other[0])}, not {settings[other[0]]}: give another out"
                )
            yield row, path


def _drawn(player: bundle.Bundle | _Checkpoint, piece: Piece, prompt: str, checkpoint: str) -> tuple[np.ndarray, int]:
    """Returns the best candidate of a piece, f32 [N], and its number."""
    while rows := piece.rows():
        size, drawn = min(len(rows), ROWS), []
        for start in range(0, len(rows), size):
            drawn += batcher.draw(player, rows[start : start + size], size)
        if any(isinstance(each, FloatingPointError) for each in drawn):
            raise ValueError(
                f"the clip for {prompt!r} has samples, or a reward, that are not finite: the codec of {checkpoint} is "
                "broken; train it again, with a lower Optimiser.learning_rate"
            )
        piece.add(drawn)
    wav, candidate, _ = piece.best()
    return wav, candidate


def _levelled(wav: np.ndarray, rate: int, target: float, path: Path) -> np.ndarray:
    """Returns the clip at the loudness that was asked for, and says so where that could not be."""
    from musicrl_jax.report import loudness  # pyloudnorm, which takes a while to import

    level = loudness.levelled(wav, rate, target)
    if level.silent:
        print(f"{path.name} is silent, and stays as it is", flush=True)
    elif (reached := level.loudness + level.gain_db) < target - 0.05:
        reason = "its peaks would clip" if level.gain_db < loudness.MOST_GAIN_DB else "its noise would be music"
        print(f"{path.name} is at {reached:.1f} {level.unit}, not {target:g}: louder, {reason}", flush=True)
    return level.wav


def _write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all; OSError, with what to do, where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}; free some space or choose another out") from error
