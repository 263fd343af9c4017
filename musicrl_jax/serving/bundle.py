"""A bundle: everything between a prompt and its waveform as compiled-to-be functions, weights and words, in one folder.

`musicrl export` writes it. This file stands in every bundle, beside the three that it runs, and needs no other code:

    python BUNDLE/bundle.py "upbeat jazz with a walking bass" --out=clip.wav     plays a prompt
    python BUNDLE/bundle.py --check                                              draws the golden clips again

with flatbuffers, jax, numpy, safetensors, sentencepiece, soundfile and tokenizers. A manifest holds the sha256 of every
file. It shows damage, not who made the bundle: a bundle is a program, to be run by those who trust its maker.

Legend: B clips, L text pieces, F frames of a clip, K tokens in a frame, C channels, N samples.
"""

# ruff: noqa: E402  in a bundle, nothing is imported before it is clear from where

import os
import sys

if not __package__:  # in a bundle, where a file beside this one must not pass for a library
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
    """Yields modules that stand beside this file, run from bytes whose sha256 the manifest has.

    Raises ImportError, before any of them is run, where a file is missing or another, or a library is.
    """
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
        # The bytes that were hashed are run, and no other ones: neither the file, read again, nor a cached .pyc.
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
# The first format does not name the outputs of the draw function.
FIRST_FORMAT, FIRST_OUTPUTS = (
    "musicrl-bundle 1",
    ["tokens", "acoustic", "mulan", "embedding", "wav"],
)
DRAW, SCORE = "draw", "score"
VOCABULARY, GOLDEN, WEIGHTS = "vocabulary", "golden.safetensors", "weights"
PLATFORMS = {
    "cpu": "cpu",
    "gpu": "cuda",
    "cuda": "cuda",
    "tpu": "tpu",
}  # of a jax backend, a function's folder
LARGEST_SEED = 2**32 - 1
WAV_ERROR = 1e-4  # that the golden clips' samples may be off, of a full scale of 1
SCORE_ERROR = 1e-3  # that their rewards may be off, of themselves or of 1

GOLDEN_ARRAYS = {"text", "seeds", "given_frames", "tokens", "wav"}  # and codes, and the rewards
# The kind of a manifest: what is read of it here and by the service.
ABOUT = {
    "version": str,
    "jax": str,
    "platforms": [str],
    "functions": {str: {str: {"calling_convention": int}}},
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
    """What was drawn."""

    tokens: Any  # int32 [B, F, K]
    wav: Any  # f32 [B, N]; [B, C, N] if C is above 1
    others: dict[
        str, Any
    ]  # the draw function's other outputs [B, ...], by name: codes and what rewards read


class Bundle:
    """A bundle that was read and found whole, its weights on the device, its functions compiled when first called.

    Attributes:
      about: the manifest: sample_rate_hz, clip_seconds, frames, places, text_length, rewards, lineage and more; and
        the manifest's own sha256.
      platform: 'cpu', 'cuda' or 'tpu'.
    """

    def __init__(self, folder: str | Path, devices: Sequence[Any] | None = None):
        """Reads `folder`, for `devices` or all; ValueError, by name of file, where one is not what was exported, or
        where this jax, or these devices, cannot run it; FileNotFoundError where there is none.
        """
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise FileNotFoundError(f"no bundle in {folder}: `musicrl export` writes one")
        self.about = _described(self.folder)
        devices = devices or jax.devices()
        self.platform = PLATFORMS[devices[0].platform]
        if self.platform not in self.about["platforms"]:
            raise ValueError(
                f"{folder} has functions for {', '.join(self.about['platforms'])}, and jax runs on {self.platform} "
                f"here: export it again with platforms that name that, or set JAX_PLATFORMS"
            )
        chips = self.about["chips"]
        if len(devices) < chips:
            raise ValueError(
                f"{folder} was exported for {chips} chips that draw together, and jax has {len(devices)} here: export "
                "it again with fewer, or run it where there are as many"
            )
        self._text = (self.folder / VOCABULARY).read_bytes()
        exported = {
            name: self._function(name) for name in (DRAW, SCORE) if name in self.about["functions"]
        }
        mesh = Mesh(np.array(devices[:chips]), ("tensor",))
        layouts = {
            name: jax.tree.unflatten(found.in_tree, found.in_shardings_jax(mesh))[0][0]
            for name, found in exported.items()
        }
        self.weights = self._weights(layouts)
        self._functions = {name: jax.jit(found.call) for name, found in exported.items()}

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts as pieces, int32 [B, L]; ValueError where one says nothing."""
        return pieces.encode(self._text, prompts, self.about["text_length"])

    def draw(
        self,
        text: np.ndarray,
        seeds: Sequence[int],
        candidates: Sequence[int] | None = None,
        temperatures: Sequence[float] | None = None,
        given: np.ndarray | None = None,
        given_frames: Sequence[int] | None = None,
    ) -> Clips:
        """Draws clips; a clip depends on its own row of the arguments alone.

        Args:
          text: int32 [B, L], from `encode`.
          seeds: of each clip, from 0 to 2**32 - 1.
          candidates: clips of one prompt and seed differ by this number; 0 is the one that `musicrl generate` makes.
          temperatures: of the policy, above 0; `about["temperature"]` by default.
          given: int32 [B, F, K], how clips begin, and
          given_frames: so many frames of it.

        Raises:
          ValueError: where a seed or another number is not a whole one or out of its range.
        """
        rows, frames = len(text), self.about["frames"]
        temperatures = np.asarray(
            [self.about["temperature"]] * rows if temperatures is None else temperatures
        )
        if not (np.isfinite(temperatures).all() and (temperatures > 0).all()):
            raise ValueError(f"temperatures={temperatures.tolist()} must be above 0 and finite")
        arrays = self._functions[DRAW](
            self.weights[DRAW],
            whole("text", text, 2**31 - 1).astype(np.int32),
            whole("seed", seeds).astype(np.uint32),
            whole("candidate", [0] * rows if candidates is None else candidates).astype(np.uint32),
            temperatures.astype(np.float32),
            np.zeros((rows, frames, self.about["places"]), np.int32)
            if given is None
            else whole("given", given, 2**31 - 1).astype(np.int32),
            whole(
                "given_frames", [0] * rows if given_frames is None else given_frames, frames
            ).astype(np.int32),
        )
        named = dict(zip(self.about["outputs"], arrays, strict=True))
        return Clips(named.pop("tokens"), named.pop("wav"), named)

    def score(self, clips: Clips) -> dict[str, Any]:
        """Each reward that was exported, f32 [B], and as 'total' their weighted sum; {} where none was."""
        if SCORE not in self._functions:
            return {}
        named = {**clips.others, "tokens": clips.tokens, "wav": clips.wav}
        return self._functions[SCORE](
            self.weights[SCORE], *(named[name] for name in self.about["outputs"])
        )

    def _function(self, name: str) -> export.Exported:
        file = f"functions/{self.platform}/{name}.stablehlo"
        version = self.about["functions"][name][self.platform]["calling_convention"]
        low = export.minimum_supported_calling_convention_version
        high = export.maximum_supported_calling_convention_version
        written = f"{file} was written by jax {self.about['jax']}"
        if not low <= version <= high:
            raise ValueError(
                f"{written} with calling convention {version}, and jax {jax.__version__} reads {low} to {high}: "
                f"{'upgrade jax' if version > high else 'install an older jax'}, or export the checkpoint again here"
            )
        try:
            found = export.deserialize(bytearray((self.folder / file).read_bytes()))
            found.mlir_module()  # which is not read until then; a newer jax writes what an older one cannot read
            return found
        except ModuleNotFoundError as error:
            raise ValueError(
                f"reading a bundle needs {error.name}: pip install {error.name}"
            ) from error
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{written}, and jax {jax.__version__} cannot read it ({error}): install jax {self.about['jax']} or "
                "newer, or export the checkpoint again here"
            ) from error

    def _weights(self, layouts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, jax.Array]]:
        """By function, by name, as they are to lie; an array that several read alike is there once."""
        arguments = self.about["arguments"]
        wanted = {
            stored: layouts[f][name]
            for f, names in arguments.items()
            for name, stored in names.items()
        }
        there = {}
        for file in sorted((self.folder / WEIGHTS).glob("*.safetensors")):
            try:
                with safetensors.safe_open(file, framework="numpy") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        there[name] = jax.device_put(tensors.get_tensor(name), wanted[name])
            except (safetensors.SafetensorError, KeyError) as error:
                raise ValueError(
                    f"{file} is not what {MANIFEST} describes ({error}): export it again"
                ) from error
        if missing := sorted(set(wanted) - set(there)):
            raise ValueError(f"{self.folder}/{WEIGHTS} lacks {missing[0]}: copy or export it again")
        return {
            function: {
                name: jax.device_put(there[stored], layouts[function][name])
                for name, stored in names.items()
            }
            for function, names in arguments.items()
        }

    def check(self) -> dict[str, float]:
        """Draws the golden clips again and compares: the shares of `tokens` and of codes that are equal, that of
        `clips` of which all are, and the largest error of a sample of those, and of a reward.

        On the platform that they were drawn on all must be equal; elsewhere one rounding can change a code, and all
        that follows it. The last of them goes on from half a clip of zeros.
        """
        try:
            golden = safetensors.numpy.load_file(self.folder / GOLDEN)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{self.folder / GOLDEN} cannot be read ({error}): export it again"
            ) from error
        if missing := sorted(GOLDEN_ARRAYS - set(golden)):
            raise ValueError(f"{self.folder / GOLDEN} lacks {missing[0]}: export it again")
        prompts = self.about["golden"]["prompts"]
        text = self.encode([*prompts, prompts[0]])
        if not np.array_equal(text, golden["text"]):
            raise ValueError(
                "the golden prompts have other pieces than when they were exported: mend the tokenizer"
            )
        clips = self.draw(text, golden["seeds"], given_frames=golden["given_frames"])
        exact = {
            "tokens": clips.tokens,
            **{name: x for name, x in clips.others.items() if name in golden},
        }
        exact.pop("text", None)  # an argument
        shares = {name: np.asarray(array) == golden[name] for name, array in exact.items()}
        whole = np.all(
            [equal.reshape(len(text), -1).all(axis=1) for equal in shares.values()], axis=0
        )
        wav_error = np.abs(np.asarray(clips.wav) - golden["wav"])[whole].max(initial=0.0)
        scores = {
            name: (np.asarray(score)[whole], golden[name][whole])
            for name, score in self.score(clips).items()
        }
        off = [
            np.abs(found - wanted) / np.maximum(1.0, np.abs(wanted))
            for found, wanted in scores.values()
        ]
        return {
            **{name: float(equal.mean()) for name, equal in {**shares, "clips": whole}.items()},
            "wav_error": float(wav_error),
            "score_error": float(np.max(off, initial=0.0)),
        }


def whole(name: str, numbers: Any, most: int = LARGEST_SEED) -> np.ndarray:
    """Returns whole numbers, one or many, as an array; ValueError where one is not whole, below 0 or above `most`."""
    array = np.asarray(numbers)
    if not array.size:
        return array
    wrong = array if array.dtype.kind not in "iu" else array[(array < 0) | (array > most)]
    if wrong.size:
        raise ValueError(f"{name}={wrong.flat[0]} must be a whole number from 0 to {most}")
    return array


def is_one(folder: str | Path) -> bool:
    """Whether a folder is a bundle, whole or not."""
    return (Path(folder) / "bundle.py").exists()


def _described(folder: Path) -> dict[str, Any]:
    """The manifest; ValueError where it, or a file that it names, is not what was written."""
    try:
        about = manifest.unsealed(folder / MANIFEST)
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: {error}; copy or export it again") from error
    if about.get("format") == FIRST_FORMAT:
        about["outputs"] = FIRST_OUTPUTS
    elif about.get("format") != FORMAT:
        raise ValueError(
            f"{folder}/{MANIFEST} is of format {about.get('format')!r}, not {FORMAT!r}: export it again"
        )
    try:
        manifest.check_kind(about, ABOUT)
    except ValueError as error:
        raise ValueError(f"{folder}/{MANIFEST}: {error}; copy or export it again") from error
    for name in about["functions"]:
        if missing := sorted(set(about["platforms"]) - set(about["functions"][name])):
            raise ValueError(
                f"{folder}/{MANIFEST} has no function {name!r} for {missing[0]}: export it again"
            )
    if not (DRAW in about["functions"] and set(about["functions"]) <= set(about["arguments"])):
        raise ValueError(
            f"{folder}/{MANIFEST} lacks {DRAW!r} or the arguments of a function: export it again"
        )
    if wrong := manifest.damage(folder, about["files"], more=False):
        raise ValueError(f"{folder} is damaged: {wrong}; copy or export it again")
    return {**about, "sha256": hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command at the head of this file; the exit status."""
    parser = argparse.ArgumentParser(description="Plays a bundle of musicrl-jax.")
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--out", default="clip.wav", help="a file that ends in .wav, .flac or .ogg")
    parser.add_argument("--seed", type=int, default=0, help="a whole number from 0 to 2**32 - 1")
    parser.add_argument("--check", action="store_true", help="draws the golden clips again")
    asked = parser.parse_args(arguments)
    if bool(asked.prompt) == asked.check:
        parser.error("give a prompt, or --check")
    try:
        form = audio.audio_format(asked.out)
        seed = int(whole("seed", asked.seed))
        bundle = Bundle(Path(__file__).resolve().parent)
        if asked.check:
            return _checked(bundle)
        wav = np.asarray(bundle.draw(bundle.encode([asked.prompt]), [seed]).wav[0])
        tags = audio.provenance_tags(asked.prompt, seed=seed, model=bundle.about["sha256"])
        Path(asked.out).write_bytes(
            audio.encode(np.clip(wav, -1, 1), bundle.about["sample_rate_hz"], form, tags)
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(asked.out)
    return 0


def _checked(bundle: Bundle) -> int:
    found: Mapping[str, Any] = bundle.check()
    here = f"{bundle.platform}, jax {jax.__version__}"
    there = f"{bundle.about['golden']['platform']}, jax {bundle.about['jax']}"
    print(json.dumps({**found, "here": here, "exported_on": there}))
    for name, most in (("wav_error", WAV_ERROR), ("score_error", SCORE_ERROR)):
        if not found[name] <= most:  # nor where it is not a number
            print(f"{name} is {found[name]:.2g}, more than {most:g}", file=sys.stderr)
            return 1
    if found["clips"] < 1 and bundle.platform == bundle.about["golden"]["platform"]:
        shares = {
            name: share
            for name, share in found.items()
            if name == "tokens" or name in bundle.about["outputs"]
        }
        differ = " and ".join(
            f"{1 - share:.2%} of the golden {name}" for name, share in shares.items()
        )
        print(f"{differ} differ", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
