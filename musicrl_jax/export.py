"""A system -> a bundle: all between a prompt and its waveform, without this repository's code.

What is in it is said in `serving/bundle.py`, which is in it too.

Legend: B clips, S tokens of a clip, F frames, K tokens in a frame, L text pieces.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.extend.backend import clear_backends
from jax.sharding import Mesh

from musicrl_jax.core import audio, checkpoint, hosts, lock, manifest, sharding, tensors
from musicrl_jax.core.files import read_json
from musicrl_jax.core.precision import in_dtype
from musicrl_jax.inputs import pieces
from musicrl_jax.rl.rewards import LoadedMixture, Mixture
from musicrl_jax.serving import bundle
from musicrl_jax.serving.bundle import DRAW, FORMAT, GOLDEN, SCORE, VOCABULARY, WEIGHTS
from musicrl_jax.systems import folder as folders
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import keys_by_seed, roll_out
from musicrl_jax.systems.system import (
    Beginning,
    MusicSystem,
    Rollout,
    SampledTokens,
    Sampling,
    Tree,
    Weights,
)

PROMPTS = "upbeat jazz with a walking bass", "a slow sad piano piece"
DEFAULT_SAMPLING = Sampling()
BACKENDS = {"cuda": "gpu"}  # what JAX calls a platform, where a bundle's folder has another name
SHARD_BYTES = 2 << 30  # of a file of weights, at most, but for one larger array
READ_BY_BUNDLES = bundle.__file__, audio.__file__, manifest.__file__, pieces.__file__
# A program that runs another, its first argument, without the modules that the second names.
WITHOUT = """
import json, runpy, sys
_, program, hidden, *rest = sys.argv
sys.modules.update(dict.fromkeys(json.loads(hidden)))
sys.argv = [program, *rest]
runpy.run_path(program, run_name="__main__")
"""


@hosts.first_alone
@lock.holds("out", beside=True)
def export(
    system: str,
    out: str,
    clip_seconds: float | None = None,
    rewards: Mixture | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    dtype: str = "float32",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    prompts: Sequence[str] = PROMPTS,
    licence: str = "",
    chips: int = 1,
) -> None:
    """Writes a bundle, whole or not at all, and draws its golden clips again without this package.

    A function takes any number of clips; all have one length, of which a shorter clip is the
    beginning.

    Args:
      system: folder of a system, base or finetuned.
      out: the bundle's folder, which must not be there yet.
      clip_seconds: length of the clips that it draws, whole frames; by default and at most that of
        the clips that the policy was trained on. Longer pieces are drawn from several of them when
        a bundle is used.
      rewards: scores the clips, so that the best of several can be taken; terms as they are, not
        normalised. A term that reads prompts must read them as the system does.
      sampling: of the policy; its temperature is what a bundle does if not told otherwise.
      dtype: 'bfloat16' halves the weights of the token models and computes in it; text encoder,
        decoder and rewards stay in float32.
      platforms: of the functions: cpu, cuda or tpu; this machine's is among them.
      prompts: of the golden clips.
      licence: that the weights stand under, in words for the card.
      chips: that draw each clip together; each holds its part of the policy's heads, inner layers
        and vocabularies, and the other models whole. A bundle for several runs on that many; it is
        verified here, on as many devices.

    Raises:
      ValueError: a setting is out of range, models do not belong together, a bundle cannot hold how
        the system or a reward reads prompts, or the bundle does not draw the golden clips.
      FileNotFoundError: a model is missing.
      FileExistsError: `out` is there.
      OSError: there is no room for it.
    """
    # Everything is checked before any work.
    here = bundle.PLATFORMS[jax.default_backend()]
    _check(Path(out), dtype, platforms, here, chips)
    loaded = folders.load(system)
    seconds = _seconds(clip_seconds, loaded.clip_seconds, system)
    frames = loaded.system.length(seconds) // loaded.system.frame_tokens
    mixture = None if rewards is None else _mixture(rewards, loaded)
    text_name, text = _text(loaded.system, mixture, [*prompts, prompts[0]])

    # The weights, the same for all platforms, and room for them.
    plain = loaded.system.tuned("cpu")
    weights = Weights(in_dtype(loaded.policy, dtype), loaded.frozen)
    trees: dict[str, Tree] = {DRAW: plain.compute_copy(weights, dtype)}
    if mixture is not None:
        trees[SCORE] = mixture.variables
    layouts = _layouts(plain, trees[DRAW], dtype, chips)
    sizes = sampling.top_k, frames, text_name
    functions = _Functions(loaded.system, mixture, trees, layouts, *sizes)
    stored, arguments = _stored(trees)
    partial_out = Path(out).with_name(Path(out).name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    partial_out.mkdir(parents=True)
    manifest.check_space(partial_out, stored)

    # The files: golden clips, functions, weights, words and what reads them.
    golden, rollout = functions.golden(text, sampling.temperature, system)
    tensors.save(partial_out / GOLDEN, golden)
    written = {name: {} for name in trees}
    for platform in platforms:
        hosts.stop_point()
        for name, exported in functions.exported(platform, rollout, text.shape[1]):
            version = _write_function(partial_out, platform, name, exported)
            written[name][platform] = {"calling_convention": version}
    _write_weights(partial_out, stored)
    (partial_out / VOCABULARY).write_bytes(loaded.system.vocabulary)
    for file in READ_BY_BUNDLES:
        shutil.copy(file, partial_out)

    # The card and the manifest; then the bundle is drawn again, and moved to its place.
    about = {
        **_describe(loaded, mixture, sampling),
        "platforms": list(platforms),
        "functions": written,
        "arguments": arguments,
        "outputs": list(functions.outputs(rollout, text)),
        "chips": chips,
        "dtype": dtype,
        "clip_seconds": seconds,
        "frames": frames,
        "text_length": text.shape[1],
        "golden": {"prompts": list(prompts), "platform": here},
        "licence": licence,
    }
    size = _seal(partial_out, about, system)
    _verified(partial_out, here)
    partial_out.rename(out)
    print(f"{out}: {size / 1e6:.0f} MB, drawn again as it should", flush=True)


def _check(out: Path, dtype: str, platforms: Sequence[str], here: str, chips: int) -> None:
    """Raises ValueError or FileExistsError, by name, if a setting is out of range."""
    in_dtype({}, dtype)  # raises for any other dtype
    if unknown := sorted(set(platforms) - set(bundle.PLATFORMS.values())):
        raise ValueError(f"export.platforms: {unknown[0]!r} is none of cpu, cuda, tpu")
    if here not in platforms:
        raise ValueError(
            f"export.platforms={tuple(platforms)} lacks {here}, on which the bundle is verified"
        )
    if not 1 <= chips <= jax.local_device_count():
        raise ValueError(
            f"export.chips={chips}: jax has {jax.local_device_count()} devices here, and a bundle "
            "is verified on as many as it is for; on a CPU "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={max(chips, 1)} shows so many"
        )
    if out.exists():
        raise FileExistsError(
            f"export.out={str(out)!r} is there already: remove it, or give another folder"
        )


def _seconds(clip_seconds: float | None, trained: float | None, system: str) -> float:
    """Returns the length of a bundle's clips; ValueError if it is none or above the trained one."""
    if clip_seconds is None:
        if trained is None:
            raise ValueError(
                f"{system} does not record the length of the clips that it was trained on: give "
                "export.clip_seconds"
            )
        return trained
    if not isinstance(clip_seconds, int | float) or not 0 < clip_seconds < math.inf:
        raise ValueError(f"export.clip_seconds={clip_seconds!r} must be a number above 0")
    if trained is not None and clip_seconds > trained:
        raise ValueError(
            f"export.clip_seconds={clip_seconds:g} is more than the {trained:g} s that {system} "
            "was trained on: give at most that; whoever uses the bundle can have longer pieces, "
            "drawn in windows"
        )
    return clip_seconds


def _mixture(rewards: Mixture, loaded: LoadedSystem) -> LoadedMixture:
    """Reads the rewards; ValueError if they do not fit or are in units of a base's clips."""
    mixture = rewards.load()
    mixture.check_models(loaded)
    if rewards.normalise:
        raise ValueError(
            "export.rewards: Mixture.normalise=True is not exported: give weights for terms as "
            "they are"
        )
    return mixture


def _text(
    system: MusicSystem, mixture: LoadedMixture | None, prompts: Sequence[str]
) -> tuple[str, np.ndarray]:
    """Returns the system's name for pieces, and those of prompts, int32 [B, L].

    A bundle reads prompts once, by a vocabulary. Raises ValueError if the system, or a reward that
    reads prompts, does it in another way, and if a prompt says nothing.
    """
    text = system.read(prompts)
    name, array = next(iter(text.items()))
    vocabulary, length = system.vocabulary, array.shape[-1]
    if not (
        len(text) == 1
        and vocabulary
        and np.array_equal(pieces.encode(vocabulary, prompts, length), array)
    ):
        raise ValueError(
            f"export.system: {type(system).__name__} does not read prompts as pieces of a "
            "vocabulary, and a bundle cannot do it otherwise: use the system's own folder"
        )
    for term, read in ({} if mixture is None else mixture.read(prompts)).items():
        if read and not (read.keys() == text.keys() and np.array_equal(read[name], array)):
            raise ValueError(
                f"export.rewards: {term} reads prompts in another way than the system, whose way "
                "alone a bundle holds: give it the text model of the system, or leave it out"
            )
    return name, array


@dataclasses.dataclass(frozen=True)
class _Functions:
    """The functions of a bundle.

    Attributes:
      system: whose clips are drawn.
      mixture: the rewards, if clips are scored.
      trees: weights of each function, by its name.
      layouts: how they are sharded.
      top_k: of the policy's sampling.
      frames: F.
      text_name: the system's name for pieces.
    """

    system: MusicSystem
    mixture: LoadedMixture | None
    trees: Mapping[str, Tree]
    layouts: Mapping[str, Tree]
    top_k: int | None
    frames: int
    text_name: str

    def draw(
        self,
        platform: str,
        weights: Weights,
        text: jax.Array,
        seeds: jax.Array,
        candidates: jax.Array,
        temperatures: jax.Array,
        tokens: jax.Array,
        given_frames: jax.Array,
    ) -> Rollout:
        """Draws clips; the arguments behind the weights are those of `Bundle.draw`."""
        system = self.system.tuned(BACKENDS.get(platform, platform))
        length = self.frames * system.frame_tokens
        beginning = Beginning(tokens.reshape(-1, length), given_frames * system.frame_tokens)
        keys = keys_by_seed(seeds, candidates)
        sampling = Sampling(temperatures[:, None], self.top_k)
        return roll_out(system, weights, {self.text_name: text}, keys, length, sampling, beginning)

    def outputs(self, rollout: Rollout, text: jax.Array) -> dict[str, jax.Array]:
        """Returns what the draw function puts out, by name and in order."""
        tokens, wav = rollout.sampled.tokens, rollout.wav
        return {
            "text": text,
            "tokens": tokens.reshape(-1, self.frames, self.system.frame_tokens),
            "wav": wav[:, 0] if wav.shape[1] == 1 else wav,
            **dict(_named({"condition": rollout.condition, "codes": rollout.codes})),
        }

    def score(
        self, like: Rollout, scorers: Mapping[str, Tree], outputs: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Returns each term and 'total', f32 [B].

        Args:
          like: a rollout, of which the structure of condition and codes is taken.
          scorers: the rewards' weights.
          outputs: as the method of that name returns them.
        """
        inner = _tree({"condition": like.condition, "codes": like.codes}, outputs)
        tokens = outputs["tokens"].reshape(-1, self.frames * self.system.frame_tokens)
        wav = outputs["wav"]
        rollout = Rollout(
            inner["condition"],
            SampledTokens(tokens, None, None),
            inner["codes"],
            wav[:, None] if wav.ndim == 2 else wav,
        )
        texts = {name: {self.text_name: outputs["text"]} for name in self.mixture.names}
        terms = self.mixture.score(scorers, rollout, texts)
        return {**terms, "total": self.mixture.total(terms, dict.fromkeys(terms, (0.0, 1.0)))}

    def golden(
        self, text: np.ndarray, temperature: float, folder: str
    ) -> tuple[dict[str, np.ndarray], Rollout]:
        """Draws the golden clips by the model code; the last goes on from half a clip of zeros.

        Returns what a bundle keeps of them, and their rollout. Raises ValueError, by the system's
        folder, if they or their rewards are not finite.
        """
        rows, whole = len(text), self.layouts[SCORE]
        seeds = jnp.arange(rows, dtype=jnp.uint32)
        given_frames = jnp.zeros(rows, jnp.int32).at[-1].set(self.frames // 2)
        tokens = jnp.zeros((rows, self.frames, self.system.frame_tokens), jnp.int32)
        temperatures = jnp.full(rows, temperature, jnp.float32)
        numbers = text, seeds, jnp.zeros_like(seeds), temperatures, tokens, given_frames
        draw = jax.jit(
            partial(self.draw, jax.default_backend()),
            in_shardings=(self.layouts[DRAW], *[whole] * len(numbers)),
            out_shardings=whole,
        )
        rollout = draw(self.trees[DRAW], *numbers)
        outputs = self.outputs(rollout, text)
        golden = {"text": text, "seeds": seeds, "given_frames": given_frames}
        for name, array in outputs.items():
            exact = name.startswith("codes") and array.dtype.kind in "iu"
            if exact or name in ("tokens", "wav"):
                golden[name] = array
        if self.mixture is not None:
            golden |= jax.jit(partial(self.score, rollout))(self.trees[SCORE], outputs)
        golden = {name: np.asarray(array) for name, array in golden.items()}
        if not all(np.isfinite(array).all() for array in golden.values()):
            raise ValueError(
                f"{folder} draws clips that are not finite, or their rewards are not: train it "
                "again"
            )
        return golden, rollout

    def exported(
        self, platform: str, like: Rollout, text_length: int
    ) -> Iterator[tuple[str, jax_export.Exported]]:
        """Yields the functions for a platform: of weights by name and of any number of rows."""
        (rows,) = jax_export.symbolic_shape("b")

        def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, *shape), dtype)

        def play(weights: Mapping[str, jax.Array], *numbers: jax.Array) -> tuple[jax.Array, ...]:
            rollout = self.draw(platform, _tree(self.trees[DRAW], weights), *numbers)
            return tuple(self.outputs(rollout, numbers[0]).values())

        def score(weights: Mapping[str, jax.Array], *clips: jax.Array) -> dict[str, jax.Array]:
            names = self.outputs(like, clips[0])
            outputs = dict(zip(names, clips, strict=True))
            return self.score(like, _tree(self.trees[SCORE], weights), outputs)

        numbers = (
            array(jnp.int32, text_length),
            array(jnp.uint32),
            array(jnp.uint32),
            array(jnp.float32),
            array(jnp.int32, self.frames, self.system.frame_tokens),
            array(jnp.int32),
        )
        draw = self._exported(DRAW, platform, play, numbers)
        yield DRAW, draw
        if self.mixture is not None:
            clips = tuple(array(each.dtype, *each.shape[1:]) for each in draw.out_avals)
            yield SCORE, self._exported(SCORE, platform, score, clips)

    def _exported(
        self,
        name: str,
        platform: str,
        function: Callable,
        arguments: Sequence[jax.ShapeDtypeStruct],
    ) -> jax_export.Exported:
        tree, whole = self.trees[name], self.layouts[SCORE]
        weights = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in _named(tree)}
        leaves = jax.tree.leaves(jax.tree.broadcast(self.layouts[name], tree))
        layout = dict(zip(weights, leaves, strict=True))
        shardings = (layout, *[whole] * len(arguments))
        compiled = jax.jit(function, in_shardings=shardings, out_shardings=whole)
        return jax_export.export(compiled, platforms=[platform])(weights, *arguments)


def _layouts(system: MusicSystem, weights: Weights, dtype: str, chips: int) -> dict[str, Tree]:
    """Returns how each function's weights are sharded: the policy by its axes, all else whole."""
    mesh = Mesh(np.array(jax.local_devices()[:chips]), ("tensor",))
    whole = sharding.replicated(mesh)

    def policy(key: jax.Array) -> Tree:
        return system.compute_copy(Weights(system.init(key), {}), dtype).policy

    key, rules = jax.random.key(0), sharding.SAMPLING_RULES
    split = sharding.shapes_and_shardings(mesh, policy, key, rules=rules)[1]
    for (name, array), (_, layout) in zip(_named(weights.policy), _named(split), strict=True):
        for axis, mesh_axis in enumerate(layout.spec):
            if mesh_axis and array.shape[axis] % chips:
                raise ValueError(
                    f"export.chips={chips} cannot share the policy's {name} of shape "
                    f"{array.shape}: choose chips that divide {array.shape[axis]}"
                )
    return {DRAW: Weights(split, jax.tree.map(lambda _: whole, weights.frozen)), SCORE: whole}


def _named(tree: Tree) -> list[tuple[str, Any]]:
    """Returns the leaves by their path, such as 'policy/trunk/bridge'."""
    named = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        named.append((jax.tree_util.keystr(path, simple=True, separator="/"), leaf))
    return named


def _tree(like: Tree, named: Mapping[str, Any]) -> Tree:
    """Returns the inverse of `_named`."""
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name, _ in _named(like)])


def _write_function(folder: Path, platform: str, name: str, exported: jax_export.Exported) -> int:
    """Writes a function and returns the version of its calling convention."""
    file = folder / "functions" / platform / f"{name}.stablehlo"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(exported.serialize())
    size = file.stat().st_size / 1e6
    print(f"{folder.stem}: {name} for {platform}, {size:.1f} MB", flush=True)
    return exported.calling_convention_version


def _describe(
    loaded: LoadedSystem, mixture: LoadedMixture | None, sampling: Sampling
) -> dict[str, Any]:
    """Returns what a manifest says of the system, the rewards and the versions."""
    anchor = Path(loaded.folders["policy"]) / checkpoint.MODEL / checkpoint.ANCHOR
    return {
        "format": FORMAT,
        "version": importlib.metadata.version("musicrl-jax"),
        "jax": jax.__version__,
        "kind": loaded.kind,
        "sample_rate_hz": loaded.system.sample_rate_hz,
        "channels": loaded.system.channels,
        "frame_seconds": loaded.system.frame_seconds,
        "places": loaded.system.frame_tokens,
        "layout": loaded.system.data_layout(),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "models": loaded.hashes,
        "lineage": loaded.lineage,
        "rewards": {} if mixture is None else mixture.describe(),
        "finetuned": read_json(anchor) if anchor.exists() else {},
    }


def _seal(folder: Path, about: Mapping[str, Any], system: str) -> int:
    """Writes the card, the run's config and, last, the manifest; returns the bytes of all."""
    (folder / "README.md").write_text(_card(about, Path(system).resolve()), encoding="utf-8")
    if config := _gin_of(system):
        shutil.copy(config, folder / "config.gin")
    files = manifest.described_files(folder)
    manifest.write_on_disk(folder / manifest.MANIFEST, manifest.sealed({**about, "files": files}))
    return sum(size for size, _ in files.values())


def _stored(trees: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, dict[str, str]]]:
    """Returns arrays by name, each once, and of each function its weights' names to those."""
    stored: dict[str, np.ndarray] = {}
    known: dict[str, str] = {}
    arguments: dict[str, dict[str, str]] = {}
    for function, tree in trees.items():
        arguments[function] = {}
        for name, leaf in _named(tree):
            array = np.asarray(leaf)
            once = known.setdefault(checkpoint.content_hash(array), f"{function}/{name}")
            stored[once] = array
            arguments[function][name] = once
    return stored, arguments


def _write_weights(folder: Path, stored: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays into files of at most SHARD_BYTES."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in stored.items():
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + array.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = array
    (folder / WEIGHTS).mkdir()
    for number, shard in enumerate(shards):
        tensors.save(folder / WEIGHTS / f"{number:05d}.safetensors", shard)


def _gin_of(folder: str) -> Path | None:
    """Returns the config of the run that made the system, if it is there.

    It is copied and never read: gin runs code.
    """
    run = Path(folder).resolve().parent
    return next(
        (file for name in ("operative_config.gin", "config.gin") if (file := run / name).is_file()),
        None,
    )


def _verified(folder: Path, platform: str) -> None:
    """Draws the golden clips in a fresh process that can import nothing but what the card names.

    Raises ValueError if the clips differ from those that the system drew.
    """
    if (
        platform != "cpu"
    ):  # an accelerator belongs to one process: what this one has there is gone from here on
        clear_backends()
    command = [
        sys.executable,
        "-c",
        WITHOUT,
        str((folder / "bundle.py").absolute()),
        json.dumps(_not_needed()),
    ]
    environment = {**os.environ, "JAX_PLATFORMS": platform, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "--check"], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(
            f"{folder} does not draw what the system does: {done.stderr.strip()[-2000:]}"
        )
    report = json.loads(done.stdout)
    if report["clips"] < 1 or not report["here"].startswith(f"{platform}, "):
        raise ValueError(f"{folder} was not verified on {platform}: {done.stdout.strip()}")
    print(f"{folder.name}: {done.stdout.strip()}", flush=True)


def _not_needed() -> list[str]:
    """Returns this package and all installed modules but those that a bundle needs, or these do."""
    requirements = importlib.metadata.requires
    needed, waiting = set(), list(bundle.NEEDED)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in needed:
            continue
        needed.add(name)
        with suppress(importlib.metadata.PackageNotFoundError):  # of another system or Python
            for requirement in requirements(name) or ():
                # What else jax's extras bring is its support of a GPU or TPU.
                if name.startswith("jax") or "extra ==" not in requirement:
                    waiting.append(re.match(r"[\w.-]+", requirement)[0])
    modules = importlib.metadata.packages_distributions()
    spelt = {
        module: {re.sub(r"[-_.]+", "-", name).lower() for name in names}
        for module, names in modules.items()
    }
    return ["musicrl_jax", *sorted(module for module, names in spelt.items() if not names & needed)]


def _card(about: Mapping[str, Any], source: Path) -> str:
    """Returns the bundle's README.md."""
    rewards = "\n".join(
        f"* {name}: {term['windows']}; range {term['range'][0]} to {term['range'][1]}, weight "
        f"{term['weight']:g}; licence of its model: {term['licence']}"
        for name, term in about["rewards"].items()
    )
    learned = about["finetuned"]
    history = "a base policy, not finetuned"
    if learned:
        terms = learned["rewards"].items()
        by = ", ".join(f"{name} (weight {term['weight']:g})" for name, term in terms)
        history = f"finetuned on {by}; anchored to {learned['anchor'][:12]}"
    chips = about["chips"]
    sharing = (
        "" if chips == 1 else f"\nThe policy is split among {chips} chips, and needs as many.\n"
    )
    models = "\n".join(f"* {name}: `{hash_[:12]}`" for name, hash_ in about["models"].items())
    layout = "".join(f"; {name}: {size}" for name, size in about["layout"].items())
    return f"""# {source.name}, a text-to-music model

Exported by musicrl-jax {about["version"]} with jax {about["jax"]} for {", ".join(about["platforms"])}: a prompt ->
a clip of {about["clip_seconds"]:g} s at {about["sample_rate_hz"]} Hz, weights in {about["dtype"]}. Policy: {history}.

    python bundle.py "upbeat jazz with a walking bass" --out=clip.wav
    python bundle.py --check
{sharing}
These need {", ".join(bundle.NEEDED[:-1])} and {bundle.NEEDED[-1]}, and none of musicrl-jax. Over HTTP:
`musicrl serve --bundle=THIS_FOLDER`.

**A bundle is a program**: `bundle.py`, the modules beside it and the compiled functions run with the rights of whoever
starts them. Run it if you trust its maker. The hashes show damage on the way, not who made it.

Licence of the weights: {about["licence"] or "not stated by whoever exported them"}.

Models, by the hash of their content:

{models}

Rewards that it can rank candidates by:

{rewards or "none"}

A frame of {1000 * about["frame_seconds"]:g} ms is {about["places"]} tokens{layout}.
`manifest.json` has all of this and the sha256 of every file. `config.gin`, if there, is what the run that trained the
policy was asked for. Nothing here reads it. **A gin file is a program too**: its imports and references run code when
`musicrl` reads it, also with `--dry_run`. Read one from elsewhere before you use it.
"""
