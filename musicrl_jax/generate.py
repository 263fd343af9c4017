"""Prompts -> files of sound, by a system or by a bundle, which behave alike and as the service.

Legend: B clips, F frames of a clip, K tokens in a frame, C channels, N samples.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile

from musicrl_jax.core import audio, checkpoint, hosts, lock, sharding
from musicrl_jax.core.files import read_text
from musicrl_jax.core.progress import Progress
from musicrl_jax.serving import batcher, bundle
from musicrl_jax.serving.batcher import Clip
from musicrl_jax.serving.composition import NEXT_WINDOW, Piece, window_count
from musicrl_jax.systems import folder as folders
from musicrl_jax.systems.player import Player
from musicrl_jax.systems.system import Beginning, Sampling, Text

UNRECORDED_SECONDS = 5.0  # of clips, if nothing records what a policy was trained on; the demo's
TEMPERATURE = 0.99  # of a system, which has none of its own
LOUDNESS_LUFS = -16.0  # of the files; about as loud as streamed music
EVERY = "*"  # of a file's name: a folder of such files
# Rows that a device draws at a time, whatever is wanted: the order of a sum, and so a clip's bits,
# may depend on their number. A CPU takes as long for each; others take little longer for eight.
ROWS = {"cpu": 1, "gpu": 8, "tpu": 8}


@dataclasses.dataclass(frozen=True)
class _Order:
    """What is to be made: arguments of `generate`; of `out` the folder or file, and the format."""

    prompts: list[str]
    folder: Path
    file: Path | None
    form: str
    clip_seconds: float | None
    temperature: float | None
    top_k: int | None
    seed: int
    candidates: int
    loudness_lufs: float | None


def generate(
    system: str,
    prompt: str | list[str] = "",
    prompts_file: str = "",
    out: str = "generated",
    clip_seconds: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    candidates: int = 1,
    loudness_lufs: float | None = LOUDNESS_LUFS,
) -> list[Path] | None:
    """Writes one file a prompt and returns the paths; by a bundle, on the first host alone.

    The same prompt, seed and settings give the same clip, whatever else is wanted. On another number
    of devices tokens are the same too, and samples to a float's rounding. In a folder a file is
    named after prompt, seed and the number of the candidate. A clip that is there already, made
    with the same settings, is not made again, so that an interrupted command goes on. How a clip
    was made stands in the file's `comment`, as JSON, and the prompt in its `title`.

    Args:
      system: folder of a system, base or finetuned, or of a bundle.
      prompt: what the music should be like, in any script; or several. A long one may be cut.
      prompts_file: in place of `prompt`, a text file with one a line.
      out: a folder, for wav files; or a folder and an ending, as 'clips/*.flac'; or for one prompt
        a file, which is written anew. Endings are .wav, .flac and .ogg.
      clip_seconds: length, by default that of the clips that the model was trained on or the bundle
        exported for. A shorter clip is the beginning of a whole one; a longer one is drawn in
        windows of whole ones.
      temperature, top_k: of the policy; see `systems.system.Sampling`. By default 0.99 and none, or
        what the bundle was exported with, whose top_k cannot be changed.
      seed: of the sampling, from 0 to 2**32 - 1.
      candidates: clips to choose the one of the best reward from; more than 1 needs a bundle with
        rewards.
      loudness_lufs: integrated loudness of the files (ITU-R BS.1770-4), less where a peak would
        clip; None leaves the samples as they are. Silence stays silence.

    Raises:
      ValueError: a prompt is empty, a setting is out of range, the models do not belong together or
        give samples that are not finite, or `out` holds clips of the same prompts and seed that
        were made with other settings.
      FileNotFoundError: a model or the file is missing.
      ModuleNotFoundError: what measures loudness is not installed.
      OSError: a clip cannot be written.
    """
    prompts = _prompts(prompt, prompts_file)
    target = _target(out, single=len(prompts) == 1 and not prompts_file)
    seed = _whole("seed", seed)
    candidates = _whole("candidates", candidates, NEXT_WINDOW - 1)
    if candidates < 1:
        raise ValueError(f"candidates={candidates} must be 1 or more")
    _check_loudness(loudness_lufs)
    settings = clip_seconds, temperature, top_k, seed, candidates, loudness_lufs
    order = _Order(prompts, *target, *settings)
    # A bundle is for the devices of one host.
    make = hosts.first_alone(_make) if bundle.is_one(system) else _make
    with contextlib.ExitStack() as stack:
        if prompts_file:
            stack.enter_context(lock.locked(order.folder.parent, order.folder.name))
        return make(system, order)


def _make(system: str, order: _Order) -> list[Path]:
    """Draws the clips that are not there yet, and returns the paths of all."""
    # The model, and what is drawn with it.
    player, rows = _player(system, order.top_k)
    about = player.manifest
    if order.candidates > 1 and not about["rewards"]:
        raise ValueError(
            f"candidates={order.candidates}: {system} has no rewards to choose by: `musicrl "
            "export` it with rewards, and give the bundle"
        )
    seconds = _seconds(order.clip_seconds, about)
    temperature = about["temperature"] if order.temperature is None else order.temperature
    sampling = Sampling(temperature, about["top_k"])
    texts = player.encode(order.prompts)
    settings = {
        "model": about["sha256"],
        "seed": order.seed,
        "seconds": seconds,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "candidates": order.candidates,
        "loudness_lufs": order.loudness_lufs,
    }

    # What is there already. All hosts have looked before one writes: they draw each batch together.
    paths = {} if order.file else dict(_made(order, settings))
    count = len(order.prompts)
    if paths:
        print(f"{order.folder}: {len(paths)} of {count} clips are there already", flush=True)
    missing = [number for number in range(count) if number not in paths]

    # The rest, as many prompts at a time as fill a batch.
    size = max(1, rows // order.candidates)
    batches = [missing[start : start + size] for start in range(0, len(missing), size)]
    for batch in Progress(batches, "generate", len(batches)):
        pieces = []
        for number in batch:
            row = order.seed, seconds, sampling.temperature, order.candidates
            pieces.append(Piece(about, texts[number], *row))
        _draw(player, rows, pieces, [order.prompts[number] for number in batch], system)
        clips = []
        for number, piece in zip(batch, pieces, strict=True):
            wav, candidate, _ = piece.best()
            name = f"{_stem(order.prompts[number], order.seed)}_{candidate}.{order.form}"
            paths[number] = order.file or order.folder / name
            tags = audio.made_from(order.prompts[number], **settings, candidate=candidate)
            clips.append((paths[number], wav, tags))
        hosts.first_alone(_save)(clips, order, about["sample_rate_hz"])
    return [paths[number] for number in range(count)]


class _SystemPlayer:
    """A system that draws as a bundle does: with the same `manifest`, `encode`, `draw`, `score`."""

    def __init__(self, folder: str, top_k: int | None):
        """Reads the system's folder, and places its weights on all devices of all hosts."""
        loaded = folders.load(folder)
        seconds = loaded.clip_seconds
        if seconds is None:
            seconds = UNRECORDED_SECONDS
            print(
                f"{folder} does not record the length of the clips that it was trained on: "
                f"{seconds:g} s is assumed"
            )
        mesh = sharding.make_mesh()
        self.rows = mesh.size * _rows_a_device()
        sampling = Sampling(TEMPERATURE, top_k)
        self._player = Player(loaded.system, mesh, self.rows, seconds, sampling)
        with jax.set_mesh(mesh):
            self._weights = self._player.place(loaded.policy, loaded.frozen)
        self.manifest: dict[str, Any] = {
            "clip_seconds": seconds,
            "frames": loaded.system.length(seconds) // loaded.system.frame_tokens,
            "places": loaded.system.frame_tokens,
            "sample_rate_hz": loaded.system.sample_rate_hz,
            "temperature": TEMPERATURE,
            "top_k": top_k,
            "rewards": {},
            "sha256": checkpoint.content_hash(loaded.hashes),
        }

    def encode(self, prompts: Sequence[str]) -> list[Text]:
        """Reads prompts, each as a row of its own; ValueError if one says nothing."""
        text = self._player.system.read(prompts)
        return [{name: array[row] for name, array in text.items()} for row in range(len(prompts))]

    def draw(
        self,
        text: Text,
        seeds: Sequence[int],
        candidates: Sequence[int],
        temperatures: Sequence[float],
        given: np.ndarray,
        given_frames: Sequence[int],
    ) -> bundle.Clips:
        """Draws clips as `Bundle.draw` does, on all hosts."""
        places = self.manifest["places"]
        length = np.asarray(given_frames, np.int32) * places
        beginning = Beginning(given.reshape(len(given), -1).astype(np.int32), length)
        with jax.set_mesh(self._player.mesh):
            rollout = self._player.draw_by_seed(
                self._weights,
                text,
                np.asarray(seeds, np.uint32),
                np.asarray(candidates, np.uint32),
                np.asarray(temperatures, np.float32),
                beginning,
            )
            tokens, wav = sharding.fetch((rollout.sampled.tokens, rollout.wav))
        wav = wav[:, 0] if wav.shape[1] == 1 else wav
        return bundle.Clips(tokens.reshape(given.shape), wav, {})

    def score(self, clips: bundle.Clips) -> dict[str, Any]:
        """Returns {}: a system has no rewards."""
        return {}


def _rows_a_device() -> int:
    return ROWS[jax.default_backend()]


def _player(system: str, top_k: int | None) -> tuple[bundle.Bundle | _SystemPlayer, int]:
    """Reads a system or a bundle, and returns how many rows it draws at a time.

    Raises ValueError if a bundle is to have another top_k than its own.
    """
    if not bundle.is_one(system):
        player = _SystemPlayer(system, top_k)
        return player, player.rows
    exported = bundle.Bundle(system)
    if top_k not in (None, exported.manifest["top_k"]):
        raise ValueError(
            f"top_k={top_k}: the bundle was exported with {exported.manifest['top_k']}, which it keeps"
        )
    return exported, _rows_a_device()


def _draw(
    player: bundle.Bundle | _SystemPlayer,
    rows: int,
    pieces: Sequence[Piece],
    prompts: Sequence[str],
    system: str,
) -> None:
    """Draws pieces of one length together, all windows of them.

    Raises ValueError if samples or rewards of one are not finite.
    """
    while wanted := [row for piece in pieces for row in piece.rows()]:
        drawn: list[Clip | FloatingPointError] = []
        for start in range(0, len(wanted), rows):
            drawn += batcher.draw(player, wanted[start : start + rows], rows)
        candidates = len(wanted) // len(pieces)
        for number, piece in enumerate(pieces):
            window = drawn[number * candidates : (number + 1) * candidates]
            if any(isinstance(each, FloatingPointError) for each in window):
                raise ValueError(
                    f"the clip for {prompts[number]!r} has samples, or a reward, that are not "
                    f"finite: the decoder of {system} is broken; train it again, with a lower "
                    "Optimiser.learning_rate"
                )
            piece.add(window)


def _prompts(prompt: str | Sequence[str], prompts_file: str) -> list[str]:
    """Returns the prompts, each once; ValueError if there are none, or two places with some."""
    if bool(prompt) == bool(prompts_file):
        raise ValueError("generate: give either prompt or prompts_file")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if prompts_file:
        prompts = [line.strip() for line in read_text(prompts_file).splitlines() if line.strip()]
        if not prompts:
            raise ValueError(
                f"generate.prompts_file={prompts_file!r} has no prompt in it: write one a line"
            )
    if other := [each for each in prompts if not isinstance(each, str)]:
        raise ValueError(f"generate.prompt: {other[0]!r} is no text: put it in quotation marks")
    return list(dict.fromkeys(prompts))


def _target(out: str, single: bool) -> tuple[Path, Path | None, str]:
    """Returns (the folder, the file if `out` is one, the format); ValueError if it is neither."""
    path = Path(out)
    if path.is_dir() or out.endswith("/") or not path.suffix:
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"out={out!r} is a file: give a folder, or a file that ends in .wav, .flac or .ogg"
            )
        return path, None, "wav"
    try:
        form = audio.form_of(out)
    except ValueError as error:
        raise ValueError(f"{error}, or for a new folder a name that ends in /") from None
    if path.stem == EVERY:
        return path.parent, None, form
    if not single:
        raise ValueError(
            f"out={out!r} is one file, but there are several prompts: give a folder, or "
            f"{str(path.with_stem(EVERY))!r}"
        )
    return path.parent, path, form


def _whole(name: str, number: Any, most: int = bundle.LARGEST_SEED) -> int:
    """Returns one whole number from 0 to `most`; ValueError where it is something else."""
    if np.ndim(number):
        raise ValueError(f"{name}={number!r} must be one whole number")
    return int(bundle.whole(name, number, most))


def _check_loudness(loudness_lufs: float | None) -> None:
    """Raises ValueError if the loudness is out of range.

    Raises ModuleNotFoundError if what measures it is not installed.
    """
    if loudness_lufs is None:
        return
    if not isinstance(loudness_lufs, int | float) or not -70 < loudness_lufs <= 0:
        raise ValueError(
            f"loudness_lufs={loudness_lufs!r} must be above -70 and at most 0, or None"
        )
    if importlib.util.find_spec("pyloudnorm") is None:
        raise ModuleNotFoundError(
            f"pyloudnorm brings files to {loudness_lufs:g} LUFS and is not installed: pip install "
            "pyloudnorm, or give --loudness_lufs=None"
        )


def _seconds(clip_seconds: float | None, about: dict[str, Any]) -> float:
    """Returns the length of the clips, and says so where it takes several windows."""
    whole = about["clip_seconds"]
    if clip_seconds is None:
        return whole
    least, most = whole / about["frames"], whole / 2 * NEXT_WINDOW
    number = isinstance(clip_seconds, int | float) and math.isfinite(clip_seconds)
    if not number or not least <= clip_seconds <= most:
        raise ValueError(
            f"clip_seconds={clip_seconds!r} must be from {least:g}, one frame, to {most:g}"
        )
    if (windows := window_count(clip_seconds, about)) > 1:
        print(
            f"clip_seconds={clip_seconds:g} is more than the {whole:g} s of the model's clips: "
            f"drawn in {windows} windows, each on from half of the one before",
            flush=True,
        )
    return clip_seconds


def _stem(prompt: str, seed: int) -> str:
    """Returns what the name of a prompt's file begins with; its words take at most 120 bytes."""
    words = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")[:60]
    words = words.encode()[:120].decode(errors="ignore")
    return f"{words}_{hashlib.sha256(prompt.encode()).hexdigest()[:8]}_seed{seed}"


def _made(order: _Order, settings: dict[str, Any]) -> Iterator[tuple[int, Path]]:
    """Yields (number of the prompt, path) of clips that are there with these settings.

    Raises ValueError if one has others.
    """
    for number, prompt in enumerate(order.prompts):
        for path in sorted(order.folder.glob(f"{_stem(prompt, order.seed)}_*.{order.form}")):
            try:
                with soundfile.SoundFile(path) as file:
                    made = dict(json.loads(file.comment))
            except (soundfile.LibsndfileError, ValueError, TypeError) as error:
                raise ValueError(
                    f"{path} is there and does not say how it was made: give another out"
                ) from error
            if other := [name for name, value in settings.items() if made.get(name) != value]:
                raise ValueError(
                    f"{path} was made with {other[0]} {made.get(other[0])}, not "
                    f"{settings[other[0]]}: give another out"
                )
            yield number, path


def _save(
    clips: Sequence[tuple[Path, np.ndarray, dict[str, str]]], order: _Order, rate: int
) -> None:
    """Writes clips, at the loudness that was ordered, and prints their paths."""
    for path, wav, tags in clips:
        if order.loudness_lufs is not None:
            wav = _levelled(wav, rate, order.loudness_lufs, path)
        _write(path, audio.encoded(np.clip(wav, -1, 1), rate, order.form, tags))
        print(path)


def _levelled(wav: np.ndarray, rate: int, target: float, path: Path) -> np.ndarray:
    """Returns a clip, f32 [N] or [C, N], at a loudness; says so if that could not be."""
    from musicrl_jax.report import loudness  # pyloudnorm, which takes a while to import

    level = loudness.levelled(wav.T, rate, target)
    if level.silent:
        print(f"{path.name} is silent, and stays as it is", flush=True)
    elif (reached := level.loudness + level.gain_db) < target - 0.05:
        clips = level.gain_db < loudness.MOST_GAIN_DB
        reason = "its peaks would clip" if clips else "its noise would be music"
        reached = f"{reached:.1f} {level.unit}, not {target:g}"
        print(f"{path.name} is at {reached}: louder, {reason}", flush=True)
    return level.wav.T


def _write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all; OSError, with what to do, if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path}: {error.strerror}; free some space or choose another out"
        ) from error
