"""Plays a bundle: a folder of functions, weights and a vocabulary, from a prompt to a waveform.

`musicrl export` writes bundles. This file is copied into each, with three modules that it runs, and
needs no other code of musicrl-jax:

    python BUNDLE/bundle.py "upbeat jazz with a walking bass" --out=clip.wav     plays a prompt
    python BUNDLE/bundle.py --check                                   draws the golden clips again

It needs flatbuffers, jax, numpy, safetensors, sentencepiece, soundfile and tokenizers. A manifest
has the sha256 of every file. It shows damage, but not who made the bundle. A bundle is a program:
run it only if you trust its maker.

Legend: B clips, L text pieces, F frames of a clip, K tokens in a frame, C channels, N samples.
"""

# ruff: noqa: E402  in a bundle, sys.path is set before anything is imported

import os
import sys

if not __package__:  # in a bundle: a file beside this one must not replace a library
    HERE = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != HERE]

import argparse
import hashlib
import importlib.util
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
NEEDED = "flatbuffers", "jax", "numpy", "safetensors", "sentencepiece", "soundfile", "tokenizers"


def _neighbours(*names: str) -> Iterator[types.ModuleType]:
    """Yields modules beside this file, after comparing their sha256 with the manifest.

    Raises ImportError, before any of them runs, if a library or file is missing, or a file changed.
    """
    # What is missing or changed.
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ImportError(f"a bundle needs {', '.join(missing)}: pip install {' '.join(missing)}")
    folder, sources = Path(HERE), {}
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name in names:
            sources[name] = (folder / f"{name}.py").read_bytes()
            if hashlib.sha256(sources[name]).hexdigest() != files[f"{name}.py"][1]:
                raise ValueError(f"{name}.py does not have the sha256 that {MANIFEST} names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImportError(f"{folder} is damaged: {error}; copy or export it again") from error
    for name, source in sources.items():
        module = types.ModuleType(name)
        # Runs the bytes that were hashed, not the file again or a cached .pyc.
        exec(compile(source, str(folder / f"{name}.py"), "exec"), module.__dict__)
        yield module


if __package__:
    from musicrl_jax.core import audio, manifest
    from musicrl_jax.inputs import pieces
else:
    try:
        audio, manifest, pieces = _neighbours("audio", "manifest", "pieces")
    except ImportError as error:
        raise error if __name__ != "__main__" else SystemExit(str(error)) from error

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax import export
from jax.sharding import Mesh

FORMAT = "musicrl-bundle 2"
# Manifests of the first format do not name the outputs of the draw function.
FIRST_FORMAT = "musicrl-bundle 1"
FIRST_OUTPUTS = ["tokens", "acoustic", "mulan", "embedding", "wav"]
DRAW, SCORE = "draw", "score"
FIRST_CHUNK, NEXT_CHUNK = "first_chunk", "next_chunk"  # of a stream, with the weights of DRAW
VOCABULARY, GOLDEN, WEIGHTS = "vocabulary", "golden.safetensors", "weights"
# Folders of functions by jax backend.
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}
LARGEST_SEED = 2**32 - 1
# Largest errors of golden clips: of a sample, full scale being 1; of a reward, relative if above 1.
WAV_ERROR, SCORE_ERROR = 1e-4, 1e-3

GOLDEN_ARRAYS = {"text", "seeds", "given_frames", "tokens", "wav"}  # codes and rewards are optional
# Types of the manifest's fields that are read here and by the service.
FIELDS = {
    "version": str,
    "jax": str,
    "platforms": [str],
    "functions": {str: {str: {"calling_convention": int}}},
    "stream_functions?": {str: {str: {"calling_convention": int}}},
    "arguments": {str: {str: str}},
    "outputs": [str],
    "chips": int,
    "sample_rate_hz": int,
    "clip_seconds": float,
    "frames": int,
    "places": int,
    "text_length": int,
    "temperature": float,
    "golden": {"prompts": [str], "platform": str},
    "top_k": (int, type(None)),
    "rewards": dict,
    "models": {str: str},
    "licence": str,
    "files": manifest.FILES,
}


class Clips(NamedTuple):
    """A batch of clips.

    Attributes:
      tokens: int32 [B, F, K].
      wav: f32 [B, N], or [B, C, N] if C is above 1.
      others: the draw function's other outputs [B, ...] by name: codes, and inputs of rewards.
    """

    tokens: Any
    wav: Any
    others: dict[str, Any]


class Bundle:
    """A bundle whose files are whole. Weights are on the device; a function compiles when called.

    Attributes:
      manifest: sample_rate_hz, clip_seconds, frames, places, text_length, rewards and more, and the
        manifest's own sha256.
      platform: 'cpu', 'cuda' or 'tpu'.
    """

    def __init__(self, folder: str | Path, devices: Sequence[Any] | None = None):
        """Reads `folder` for `devices`, by default all.

        Raises:
          FileNotFoundError: there is no bundle.
          ValueError: a file, which is named, changed, or this jax or these devices cannot run it.
        """
        # The manifest, and whether it fits these devices.
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise FileNotFoundError(f"no bundle in {folder}: `musicrl export` writes one")
        self.manifest = _read_manifest(self.folder)
        devices = devices or jax.devices()
        self.platform = PLATFORMS[devices[0].platform]
        if self.platform not in self.manifest["platforms"]:
            raise ValueError(
                f"{folder} has functions for {', '.join(self.manifest['platforms'])}, and jax runs "
                f"on {self.platform} here: export it for {self.platform}, or set JAX_PLATFORMS"
            )
        chips = self.manifest["chips"]
        if len(devices) < chips:
            raise ValueError(
                f"{folder} was exported for {chips} chips that draw together, and jax has "
                f"{len(devices)} here: export it again for fewer chips, or run it on {chips}"
            )

        # The vocabulary, the functions, and the weights, sharded as the functions take them.
        self._vocabulary = (self.folder / VOCABULARY).read_bytes()
        mesh = Mesh(np.array(devices[:chips]), ("tensor",))
        self._functions, shardings = {}, {}
        for name in (DRAW, SCORE, FIRST_CHUNK, NEXT_CHUNK):
            if name in self._versions:
                exported = self._read_function(name)
                self._functions[name] = jax.jit(exported.call)
                in_shardings = exported.in_shardings_jax(mesh)
                shardings[name] = jax.tree.unflatten(exported.in_tree, in_shardings)[0][0]
        self.weights = self._read_weights(shardings)

    @property
    def streams(self) -> bool:
        """Whether it has the functions of a stream."""
        return FIRST_CHUNK in self._versions

    @property
    def _versions(self) -> dict[str, dict[str, dict[str, int]]]:
        """The calling convention of each function, by name and platform."""
        return {**self.manifest["functions"], **self.manifest.get("stream_functions", {})}

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns prompts as pieces, int32 [B, L]; raises ValueError if one is empty."""
        return pieces.encode(self._vocabulary, prompts, self.manifest["text_length"])

    def draw(
        self,
        text: np.ndarray,
        seeds: Sequence[int],
        candidates: Sequence[int] | None = None,
        temperatures: Sequence[float] | None = None,
        beginnings: np.ndarray | None = None,
        beginning_frames: Sequence[int] | None = None,
    ) -> Clips:
        """Draws clips; each depends only on its own row of the arguments.

        Args:
          text: int32 [B, L], from `encode`.
          seeds: of each clip, from 0 to 2**32 - 1.
          candidates: number that tells apart clips of one prompt and seed; `musicrl generate` makes
            number 0 first.
          temperatures: of the policy, above 0; by default the manifest's.
          beginnings: int32 [B, F, K], tokens that clips begin with.
          beginning_frames: number of frames of `beginnings` to use, by default 0.

        Raises:
          ValueError: a seed or another number is not whole or out of its range.
        """
        # Defaults.
        rows, frames = len(text), self.manifest["frames"]
        candidates = [0] * rows if candidates is None else candidates
        beginning_frames = [0] * rows if beginning_frames is None else beginning_frames
        if beginnings is None:
            beginnings = np.zeros((rows, frames, self.manifest["places"]), np.int32)
        if temperatures is None:
            temperatures = [self.manifest["temperature"]] * rows

        # Run the draw function; the manifest has the names of its outputs.
        arrays = self._functions[DRAW](
            self.weights[DRAW],
            whole("text", text, 2**31 - 1).astype(np.int32),
            whole("seed", seeds).astype(np.uint32),
            whole("candidate", candidates).astype(np.uint32),
            _temperatures(temperatures),
            whole("beginnings", beginnings, 2**31 - 1).astype(np.int32),
            whole("beginning_frames", beginning_frames, frames).astype(np.int32),
        )
        outputs = dict(zip(self.manifest["outputs"], arrays, strict=True))
        return Clips(outputs.pop("tokens"), outputs.pop("wav"), outputs)

    def stream(
        self, text: np.ndarray, seed: int, temperature: float | None = None
    ) -> Iterator[Clips]:
        """Draws a clip chunk by chunk: its tokens as `draw` does, its sound in windows.

        Args:
          text: int32 [L], a row of `encode`.
          seed: of the clip; its candidate is number 0.
          temperature: of the policy, above 0; by default the manifest's.

        Returns:
          An iterator over the chunks, each with B = 1: the next frames of the clip.

        Raises:
          ValueError: the bundle cannot stream, or a number is out of its range.
        """
        if not self.streams:
            raise ValueError(f"{self.folder} cannot stream: export its system again")
        # The arguments of `draw`, for one row.
        temperature = self.manifest["temperature"] if temperature is None else temperature
        seeds = whole("seed", [seed]).astype(np.uint32)
        row = seeds, np.zeros(1, np.uint32), _temperatures([temperature])
        return self._chunks(whole("text", text[None], 2**31 - 1).astype(np.int32), row)

    def _chunks(self, text: np.ndarray, row: Sequence[np.ndarray]) -> Iterator[Clips]:
        """Yields the chunks of `stream`. `row` is seeds, candidates and temperatures, [1] each."""
        weights, first = self.weights[DRAW], 0
        tokens, wav, state = self._functions[FIRST_CHUNK](weights, text, *row)
        while True:
            # The device may draw another clip before the next chunk.
            yield Clips(np.asarray(tokens), np.asarray(wav), {})
            first += tokens.shape[1]
            if first == self.manifest["frames"]:
                return
            position = np.int32(first)
            tokens, wav, state = self._functions[NEXT_CHUNK](weights, state, position, *row)

    def score(self, clips: Clips) -> dict[str, Any]:
        """Returns each exported reward, f32 [B], and their weighted sum 'total'; {} without any."""
        if SCORE not in self._functions:
            return {}
        outputs = {**clips.others, "tokens": clips.tokens, "wav": clips.wav}
        arrays = [outputs[name] for name in self.manifest["outputs"]]
        return self._functions[SCORE](self.weights[SCORE], *arrays)

    def _read_function(self, name: str) -> export.Exported:
        """Reads a function; raises ValueError if this jax cannot."""
        file = f"functions/{self.platform}/{name}.stablehlo"
        version = self._versions[name][self.platform]["calling_convention"]
        low = export.minimum_supported_calling_convention_version
        high = export.maximum_supported_calling_convention_version
        written = f"{file} was written by jax {self.manifest['jax']}"
        if not low <= version <= high:
            remedy = "upgrade jax" if version > high else "install an older jax"
            raise ValueError(
                f"{written} with calling convention {version}, and jax {jax.__version__} reads "
                f"{low} to {high}: {remedy}, or export the checkpoint again here"
            )
        try:
            exported = export.deserialize(bytearray((self.folder / file).read_bytes()))
            exported.mlir_module()  # parsed only now; an older jax cannot read a newer jax's module
            return exported
        except ModuleNotFoundError as error:
            raise ValueError(
                f"reading a bundle needs {error.name}: pip install {error.name}"
            ) from error
        except Exception as error:  # jax.export raises no narrower class
            raise ValueError(
                f"{written}, and jax {jax.__version__} cannot read it ({error}): install jax "
                f"{self.manifest['jax']} or newer, or export the checkpoint again here"
            ) from error

    def _read_weights(self, shardings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict]:
        """Reads the weights of each function by name; functions share an array of one sharding."""
        # The sharding that each stored array is read with.
        arguments, stored_shardings, arrays = self.manifest["arguments"], {}, {}
        for function, names in arguments.items():
            for name, stored in names.items():
                stored_shardings[stored] = shardings[function][name]

        # The arrays.
        for file in sorted((self.folder / WEIGHTS).glob("*.safetensors")):
            try:
                with safetensors.safe_open(file, framework="numpy") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        tensor = tensors.get_tensor(name)
                        arrays[name] = jax.device_put(tensor, stored_shardings[name])
            except (safetensors.SafetensorError, KeyError) as error:
                raise ValueError(
                    f"{file} is not what {MANIFEST} describes ({error}): export it again"
                ) from error
        if missing := sorted(set(stored_shardings) - set(arrays)):
            raise ValueError(f"{self.folder}/{WEIGHTS} lacks {missing[0]}: copy or export it again")

        # By function; one that shards an array in another way has a copy.
        weights: dict[str, dict] = {function: {} for function in arguments}
        for function, names in arguments.items():
            for name, stored in names.items():
                sharding = shardings[function][name]
                weights[function][name] = jax.device_put(arrays[stored], sharding)
        return weights

    def check(self) -> dict[str, float]:
        """Draws the golden clips again, and compares them.

        On the platform of the export all must be equal. On another, one rounding can change a code
        and all that follow it. The last clip continues half a clip of zeros.

        Returns:
          The shares of equal tokens and of equal codes by name; as 'clips' that of clips of which
          all are equal; and among those clips the largest errors 'wav_error' and 'score_error'.
        """
        # The golden clips, and the same ones drawn now.
        try:
            golden = safetensors.numpy.load_file(self.folder / GOLDEN)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{self.folder / GOLDEN} cannot be read ({error}): export it again"
            ) from error
        if missing := sorted(GOLDEN_ARRAYS - set(golden)):
            raise ValueError(f"{self.folder / GOLDEN} lacks {missing[0]}: export it again")
        prompts = self.manifest["golden"]["prompts"]
        text = self.encode([*prompts, prompts[0]])
        if not np.array_equal(text, golden["text"]):
            raise ValueError(
                "the golden prompts have other pieces than at their export: repair the tokenizer"
            )
        clips = self.draw(text, golden["seeds"], beginning_frames=golden["given_frames"])

        # Tokens and codes must equal the stored ones. `text` is an input, so it is not compared.
        equal = {"tokens": np.asarray(clips.tokens) == golden["tokens"]}
        for name, array in clips.others.items():
            if name in golden and name != "text":
                equal[name] = np.asarray(array) == golden[name]
        rows = [each.reshape(len(text), -1).all(axis=1) for each in equal.values()]
        equal["clips"] = np.all(rows, axis=0)

        # Samples and rewards of equal clips may have rounding errors.
        same = equal["clips"]
        wav_error = np.abs(np.asarray(clips.wav) - golden["wav"])[same].max(initial=0.0)
        score_errors = []
        for name, score in self.score(clips).items():
            expected = golden[name][same]
            error = np.abs(np.asarray(score)[same] - expected)
            score_errors.append(error / np.maximum(1.0, np.abs(expected)))
        return {
            **{name: float(each.mean()) for name, each in equal.items()},
            "wav_error": float(wav_error),
            "score_error": float(np.max(score_errors, initial=0.0)),
        }


def _temperatures(numbers: Any) -> np.ndarray:
    """Returns temperatures as f32; raises ValueError if one is not above 0 and finite."""
    temperatures = np.asarray(numbers)
    if not (np.isfinite(temperatures).all() and (temperatures > 0).all()):
        raise ValueError(f"temperatures={temperatures.tolist()} must be above 0 and finite")
    return temperatures.astype(np.float32)


def whole(name: str, numbers: Any, most: int = LARGEST_SEED) -> np.ndarray:
    """Returns an integer array; raises ValueError if a number is no integer from 0 to `most`."""
    array = np.asarray(numbers)
    if not array.size:
        return array
    wrong = array if array.dtype.kind not in "iu" else array[(array < 0) | (array > most)]
    if wrong.size:
        raise ValueError(f"{name}={wrong.flat[0]} must be a whole number from 0 to {most}")
    return array


def is_one(folder: str | Path) -> bool:
    """Returns whether a folder is a bundle, whole or damaged."""
    return (Path(folder) / "bundle.py").exists()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest; raises ValueError if it, or a file that it names, changed."""
    file = folder / MANIFEST
    # The manifest itself: its seal, its format and the types of its fields.
    try:
        fields = manifest.unsealed(file)
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: {error}; copy or export it again") from error
    if fields.get("format") == FIRST_FORMAT:
        fields["outputs"] = FIRST_OUTPUTS
    elif fields.get("format") != FORMAT:
        raise ValueError(
            f"{file} is of format {fields.get('format')!r}, not {FORMAT!r}: export it again"
        )
    try:
        manifest.check_kind(fields, FIELDS)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; copy or export it again") from error

    # The functions and files that it names.
    functions = fields["functions"]
    for name, versions in {**functions, **fields.get("stream_functions", {})}.items():
        if missing := sorted(set(fields["platforms"]) - set(versions)):
            raise ValueError(f"{file} has no function {name!r} for {missing[0]}: export it again")
    if not (DRAW in functions and set(functions) <= set(fields["arguments"])):
        raise ValueError(f"{file} lacks {DRAW!r} or the arguments of a function: export it again")
    if damage := manifest.damage(folder, fields["files"], more=False):
        raise ValueError(f"{folder} is damaged: {damage}; copy or export it again")
    return {**fields, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command of this module's docstring; returns the exit status."""
    # The command line.
    parser = argparse.ArgumentParser(description="Plays a bundle of musicrl-jax.")
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--out", default="clip.wav", help="a file that ends in .wav, .flac or .ogg")
    parser.add_argument("--seed", type=int, default=0, help="a whole number from 0 to 2**32 - 1")
    parser.add_argument("--check", action="store_true", help="draws the golden clips again")
    options = parser.parse_args(arguments)
    if bool(options.prompt) == options.check:
        parser.error("give a prompt, or --check")
    try:
        form = audio.audio_format(options.out)
        seed = int(whole("seed", options.seed))
        bundle = Bundle(Path(__file__).resolve().parent)
        if options.check:
            return _print_check(bundle)

        # One clip.
        wav = np.asarray(bundle.draw(bundle.encode([options.prompt]), [seed]).wav[0])
        tags = audio.provenance_tags(options.prompt, seed=seed, model=bundle.manifest["sha256"])
        rate = bundle.manifest["sample_rate_hz"]
        Path(options.out).write_bytes(audio.encode(np.clip(wav, -1, 1), rate, form, tags))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(options.out)
    return 0


def _print_check(bundle: Bundle) -> int:
    """Checks a bundle and prints the result; returns the exit status."""
    result, golden = bundle.check(), bundle.manifest["golden"]
    here = f"{bundle.platform}, jax {jax.__version__}"
    there = f"{golden['platform']}, jax {bundle.manifest['jax']}"
    print(json.dumps({**result, "here": here, "exported_on": there}))
    for name, most in (("wav_error", WAV_ERROR), ("score_error", SCORE_ERROR)):
        if not result[name] <= most:  # this refuses NaN too
            print(f"{name} is {result[name]:.2g}, more than {most:g}", file=sys.stderr)
            return 1
    if result["clips"] < 1 and bundle.platform == golden["platform"]:
        differences = []
        for name in result:
            if name in bundle.manifest["outputs"]:
                differences.append(f"{1 - result[name]:.2%} of the golden {name}")
        print(f"{' and '.join(differences)} differ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
