"""Generates audio files from prompts, with a system or with a bundle; both give the same clips.

Legend: B clips, F frames of a clip, K tokens of a frame, C channels, N samples.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import soundfile

from musicrl_jax.core import audio, hosts, lock
from musicrl_jax.core.files import read_text
from musicrl_jax.core.progress import Progress
from musicrl_jax.serving import batcher, bundle
from musicrl_jax.serving import stream as streams
from musicrl_jax.serving.composition import NEXT_WINDOW, Piece, window_count
from musicrl_jax.serving.system_player import ROWS, SystemPlayer
from musicrl_jax.systems.system import Sampling

LOUDNESS_LUFS = -16.0  # of the files; about as loud as streamed music
STDOUT = "-"  # as `out` of a stream
EVERY = "*"  # the name in `out` that stands for a folder of such files


@dataclasses.dataclass(frozen=True)
class _Request:
    """Arguments of `generate`, checked; of `out`, the folder or file, and the format."""

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
    stream: bool = False,
) -> list[Path] | None:
    """Writes one file for each prompt and returns the paths; with a bundle, on the first host only.

    A clip depends only on its prompt, its seed and the settings. Another number of devices gives
    the same tokens, and samples equal up to rounding. In a folder, the name of a file has the
    prompt, the seed and the number of the candidate. A clip that exists with the same settings is
    not made again, so an interrupted command goes on. The file's `title` has the prompt and its
    `comment` the settings, as JSON.

    Args:
      system: folder of a system, base or finetuned, or of a bundle.
      prompt: one or several descriptions of the music, in any script. A long one may be cut.
      prompts_file: in place of `prompt`, a text file with one a line.
      out: a folder for wav files; or a folder and an ending, as 'clips/*.flac'; or, for one prompt,
        a file, which is overwritten. Endings are .wav, .flac and .ogg.
      clip_seconds: length. Default is the length that the model was trained on, or that the bundle
        was exported for. A shorter clip is the beginning of a whole one; a longer one is drawn in
        several windows.
      temperature: of the sampling, by default 0.99 or the bundle's.
      top_k: see `systems.system.Sampling`; by default none. A bundle's own cannot be changed.
      seed: of the sampling, from 0 to 2**32 - 1.
      candidates: clips to choose from by reward; more than 1 needs a bundle with rewards.
      loudness_lufs: integrated loudness of the files (ITU-R BS.1770-4), lower if peaks would clip;
        None leaves the samples as they are. Silence stays silent.
      stream: whether to write the clip of one prompt while it is drawn: to a file that ends in
        .wav, or with --out=- to standard output, for a player. Its tokens are those of the whole
        clip. Its fine codes are decoded in windows, so samples differ. Needs loudness_lufs=None.

    Raises:
      ValueError: a prompt is empty, a setting is out of range, the models do not belong together or
        give samples that are not finite, or `out` has clips of the same prompts and seed that were
        made with other settings.
      FileNotFoundError: a model or the file is missing.
      OSError: a clip cannot be written.
    """
    # Check everything before any work.
    prompts = _prompts(prompt, prompts_file)
    if stream:
        _check_stream(out, prompts, prompts_file, loudness_lufs)
    target = _target(out, single=len(prompts) == 1 and not prompts_file)
    seed = _whole("seed", seed, bundle.LARGEST_SEED)
    candidates = _whole("candidates", candidates, NEXT_WINDOW - 1)
    if candidates < 1:
        raise ValueError(f"candidates={candidates} must be 1 or more")
    is_number = isinstance(loudness_lufs, int | float)
    if loudness_lufs is not None and not (is_number and -70 < loudness_lufs <= 0):
        raise ValueError(
            f"loudness_lufs={loudness_lufs!r} must be above -70 and at most 0, or None"
        )
    settings = clip_seconds, temperature, top_k, seed, candidates, loudness_lufs
    request = _Request(prompts, *target, *settings)
    if stream:
        return _stream(system, request)

    # A bundle uses the devices of one host. A command with a file of prompts takes long, so that it
    # may be started twice.
    make = hosts.first_alone(_make) if bundle.is_one(system) else _make
    with contextlib.ExitStack() as stack:
        if prompts_file:
            stack.enter_context(lock.locked(request.folder.parent, request.folder.name))
        return make(system, request)


def _make(system: str, request: _Request) -> list[Path]:
    """Makes the clips that are missing, and returns the paths of all."""
    # The model and the settings that a clip depends on.
    player, rows = _player(system, request.top_k)
    model = player.manifest
    if request.candidates > 1 and not model["rewards"]:
        raise ValueError(
            f"candidates={request.candidates}: {system} has no rewards to choose by: `musicrl "
            "export` it with rewards, and give the bundle"
        )
    seconds = _seconds(request.clip_seconds, model)
    if (windows := window_count(seconds, model)) > 1:
        print(
            f"clip_seconds={seconds:g} is more than the {model['clip_seconds']:g} s of the model's "
            f"clips: drawn in {windows} windows, each of which continues half of the one before",
            flush=True,
        )
    temperature = model["temperature"] if request.temperature is None else request.temperature
    sampling = Sampling(temperature, model["top_k"])
    texts = dict(zip(request.prompts, player.encode(request.prompts), strict=True))
    settings = {
        "model": model["sha256"],
        "seed": request.seed,
        "seconds": seconds,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "candidates": request.candidates,
        "loudness_lufs": request.loudness_lufs,
    }

    # Existing clips. All hosts look before one of them writes, as they draw each batch together.
    paths = {} if request.file else dict(_existing(request, settings))
    if paths:
        count = f"{len(paths)} of {len(texts)}"
        print(f"{request.folder}: {count} clips are there already", flush=True)
    missing = [prompt for prompt in request.prompts if prompt not in paths]

    # The other clips, as many prompts at a time as fill a batch.
    size = max(1, rows // request.candidates)
    batches = [missing[start : start + size] for start in range(0, len(missing), size)]
    row = request.seed, seconds, sampling.temperature, request.candidates
    for batch in Progress(batches, "generate", len(batches)):
        pieces = {prompt: Piece(model, texts[prompt], *row) for prompt in batch}
        _draw(player, rows, pieces, system)
        clips = []
        for prompt, piece in pieces.items():
            wav, candidate, _ = piece.best()
            name = f"{_stem(prompt, request.seed)}_{candidate}.{request.form}"
            paths[prompt] = request.file or request.folder / name
            tags = audio.provenance_tags(prompt, **settings, candidate=candidate)
            clips.append((paths[prompt], wav, tags))
        hosts.first_alone(_save)(clips, request, model["sample_rate_hz"])
    return [paths[prompt] for prompt in request.prompts]


# --- streams ---


def _check_stream(
    out: str, prompts: list[str], prompts_file: str, loudness_lufs: float | None
) -> None:
    """Raises ValueError if the arguments of `generate` do not fit a stream."""
    # One file, which is sound before its end.
    if len(prompts) > 1 or prompts_file:
        raise ValueError("stream=True writes one clip: give one prompt, and no prompts_file")
    if out != STDOUT and (Path(out).suffix.lower() != ".wav" or Path(out).stem == EVERY):
        raise ValueError(
            f"out={out!r}: a stream is one wav file: give a name that ends in .wav, or {STDOUT} "
            "for standard output"
        )
    if loudness_lufs is not None:
        raise ValueError(
            f"loudness_lufs={loudness_lufs:g}: a stream has no loudness before its end: give "
            "--loudness_lufs=None, which leaves the samples as they are"
        )
    if jax.process_count() > 1:
        raise ValueError("stream=True draws one clip on one host: start it on one host alone")


def _stream(system: str, request: _Request) -> list[Path]:
    """Writes a clip while it is drawn, and returns its path; [] for standard output."""
    # Messages must not be among the samples.
    to_stdout, output = request.file is None, sys.stdout
    with contextlib.redirect_stdout(sys.stderr if to_stdout else output):
        player, _ = _player(system, request.top_k)
        model = player.manifest
        seconds = _seconds(request.clip_seconds, model)
        temperature = model["temperature"] if request.temperature is None else request.temperature
        if why := streams.refusal(player, seconds, request.candidates, request.form):
            raise ValueError(f"stream=True: {why}")
        # The file says how it was made, and that it is a stream.
        (prompt,) = request.prompts
        tags = audio.provenance_tags(
            prompt,
            model=model["sha256"],
            seed=request.seed,
            seconds=seconds,
            temperature=temperature,
            top_k=model["top_k"],
            stream=True,
        )
        row = player.encode([prompt])[0], request.seed, seconds, temperature
        parts = streams.parts(player, *row, tags)

        # The parts, each as soon as it is drawn. Half a file is no clip.
        if to_stdout:
            _write_parts(output.buffer, parts, STDOUT)
            return []
        try:
            request.folder.mkdir(parents=True, exist_ok=True)
            with request.file.open("wb") as file:
                _write_parts(file, parts, str(request.file))
        except BaseException:
            request.file.unlink(missing_ok=True)
            raise
        print(request.file)
    return [request.file]


def _write_parts(file: BinaryIO, parts: Iterator[bytes], name: str) -> None:
    """Writes parts at once; OSError, with a remedy, if one cannot be written."""
    try:
        for part in parts:
            file.write(part)
            file.flush()
    except FloatingPointError as error:
        raise ValueError(f"the clip {error}") from error
    except OSError as error:
        raise OSError(
            f"cannot write {name}: {error.strerror}; keep its reader open, free some space or "
            "choose another out"
        ) from error


# --- models ---


def _player(system: str, top_k: int | None) -> tuple[bundle.Bundle | SystemPlayer, int]:
    """Reads a system or a bundle, and returns it with the number of rows that it draws at a time.

    Raises ValueError if `top_k` differs from a bundle's.
    """
    if not bundle.is_one(system):
        player = SystemPlayer(system, top_k)
        return player, player.rows
    exported = bundle.Bundle(system)
    if top_k not in (None, exported.manifest["top_k"]):
        raise ValueError(
            f"top_k={top_k}: the bundle was exported with "
            f"{exported.manifest['top_k']}, which it keeps"
        )
    return exported, ROWS[jax.default_backend()]


def _draw(
    player: bundle.Bundle | SystemPlayer, rows: int, pieces: dict[str, Piece], system: str
) -> None:
    """Draws all windows of pieces of one length together.

    Args:
      player: draws them.
      rows: that it draws at a time.
      pieces: by their prompts.
      system: its folder, for ValueError if samples or rewards of a piece are not finite.
    """
    # Each window needs the one before it.
    while window := list(chain.from_iterable(piece.rows() for piece in pieces.values())):
        results = []
        for start in range(0, len(window), rows):
            results += batcher.draw(player, window[start : start + rows], rows)

        # The rows of each piece, in the order of the pieces.
        candidates = len(window) // len(pieces)
        for prompt, piece in pieces.items():
            own, results = results[:candidates], results[candidates:]
            if any(isinstance(result, FloatingPointError) for result in own):
                raise ValueError(
                    f"the clip for {prompt!r} has samples, or a reward, that are not finite: the "
                    f"decoder of {system} is broken; train it again, with a lower "
                    "Optimiser.learning_rate"
                )
            piece.add(own)


# --- arguments ---


def _prompts(prompt: str | Sequence[str], prompts_file: str) -> list[str]:
    """Returns the prompts, each once; ValueError if there are none, or from two places."""
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
    """Parses `out` as (folder, file or None, format); ValueError if it is no folder or sound."""
    # A folder.
    path = Path(out)
    if path.is_dir() or out.endswith("/") or not path.suffix:
        if path.exists() and not path.is_dir():
            raise ValueError(
                f"out={out!r} is a file: give a folder, or a file that ends in .wav, .flac or .ogg"
            )
        return path, None, "wav"

    # A file, or a folder and an ending.
    try:
        form = audio.audio_format(out)
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


def _whole(name: str, number: Any, most: int) -> int:
    """Returns a whole number from 0 to `most`; ValueError if it is something else."""
    if np.ndim(number):
        raise ValueError(f"{name}={number!r} must be one whole number")
    return int(bundle.whole(name, number, most))


def _seconds(clip_seconds: float | None, model: dict[str, Any]) -> float:
    """Returns the length of the clips; ValueError if it is out of range."""
    whole = model["clip_seconds"]
    if clip_seconds is None:
        return whole
    least, most = whole / model["frames"], whole / 2 * NEXT_WINDOW
    if not isinstance(clip_seconds, int | float) or not least <= clip_seconds <= most:
        raise ValueError(
            f"clip_seconds={clip_seconds!r} must be from {least:g}, one frame, to {most:g}"
        )
    return clip_seconds


# --- files ---


def _stem(prompt: str, seed: int) -> str:
    """Returns the beginning of a file's name; the prompt's words take at most 120 bytes of it."""
    words = re.sub(r"[^\w]+", "_", prompt.lower()).strip("_")[:60]
    words = words.encode()[:120].decode(errors="ignore")
    return f"{words}_{hashlib.sha256(prompt.encode()).hexdigest()[:8]}_seed{seed}"


def _existing(request: _Request, settings: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yields (prompt, path) of existing clips; ValueError if they have other settings."""
    for prompt in request.prompts:
        for path in sorted(request.folder.glob(f"{_stem(prompt, request.seed)}_*.{request.form}")):
            # Other programs' files have no settings, or a comment that is not JSON.
            try:
                with soundfile.SoundFile(path) as file:
                    recorded = dict(json.loads(file.comment))
            except (soundfile.LibsndfileError, ValueError, TypeError) as error:
                raise ValueError(
                    f"{path} is there and does not say how it was made: give another out"
                ) from error
            if other := [name for name, value in settings.items() if recorded.get(name) != value]:
                raise ValueError(
                    f"{path} was made with {other[0]} {recorded.get(other[0])}, not "
                    f"{settings[other[0]]}: give another out"
                )
            yield prompt, path


def _save(
    clips: Sequence[tuple[Path, np.ndarray, dict[str, str]]], request: _Request, rate: int
) -> None:
    """Writes clips (path, f32 [N] or [C, N], tags), and prints their paths."""
    for path, wav, tags in clips:
        if request.loudness_lufs is not None:
            wav = _levelled(wav, rate, request.loudness_lufs, path)
        _write(path, audio.encode(np.clip(wav, -1, 1), rate, request.form, tags))
        print(path)


def _levelled(wav: np.ndarray, rate: int, target: float, path: Path) -> np.ndarray:
    """Returns a clip, f32 [N] or [C, N], at a loudness; prints why if it is lower."""
    from musicrl_jax.report import loudness  # slow to import

    level = loudness.levelled(wav.T, rate, target)
    reached = level.loudness + level.gain_db
    if level.silent:
        print(f"{path.name} is silent, and stays as it is", flush=True)
    elif reached < target - 0.05:
        clips = level.gain_db < loudness.MOST_GAIN_DB
        reason = "its peaks would clip" if clips else "its noise would be music"
        reached = f"{reached:.1f} {level.unit}, not {target:g}"
        print(f"{path.name} is at {reached}: louder, {reason}", flush=True)
    return level.wav.T


def _write(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all; OSError, with a remedy, if it cannot be written."""
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
