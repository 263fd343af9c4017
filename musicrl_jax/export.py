"""Exports a system as a bundle: a folder that turns prompts into audio without this package.

`serving/bundle.py`, which is part of every bundle, describes what is in one.

Legend: B clips, S tokens of a clip, F frames, K tokens of a frame, L text pieces.
"""

import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.backend import clear_backends

from musicrl_jax.core import audio, checkpoint, hosts, lock, manifest, tensors
from musicrl_jax.core.files import json_from
from musicrl_jax.inputs import pieces
from musicrl_jax.rl.rewards import LoadedMixture, Mixture
from musicrl_jax.serving import bundle
from musicrl_jax.serving.bundle import GOLDEN, VOCABULARY, WEIGHTS
from musicrl_jax.serving.functions import Functions, Golden, named
from musicrl_jax.systems import folder as folders
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.system import MusicSystem, Sampling

PROMPTS = "upbeat jazz with a walking bass", "a slow sad piano piece"
DEFAULT_SAMPLING = Sampling()
CHUNKS = bundle.FIRST_CHUNK, bundle.NEXT_CHUNK  # functions that earlier versions do not read
SHARD_BYTES = 2 << 30  # most bytes of a file of weights, unless it holds one larger array
COPIED_MODULES = bundle.__file__, audio.__file__, manifest.__file__, pieces.__file__
# Runs the program that its first argument names; modules in the second argument cannot be imported.
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
    """Writes a bundle, whole or not at all, and verifies it without this package.

    Args:
      system: folder of a system, base or finetuned.
      out: the bundle's folder, which must not exist yet.
      clip_seconds: length of the bundle's clips, in whole frames. Default and maximum is the length
        that the policy was trained on. Users of the bundle get longer pieces as several windows.
      rewards: scores the clips, to choose the best of several. They are not normalised. A term that
        reads prompts must read them as the system does.
      sampling: of the policy; its temperature is the bundle's default.
      dtype: 'bfloat16' halves the weights of the token models and computes in it. Text encoder,
        decoder and rewards stay in float32.
      platforms: cpu, cuda or tpu, this machine's among them. Each gets functions of its own.
      prompts: of the golden clips, which are drawn again to verify the bundle.
      licence: of the weights, in words for the card.
      chips: number of chips that share the policy's heads, inner layers and vocabularies. The other
        models are replicated. The bundle is verified on as many devices here.

    Raises:
      ValueError: a setting is out of range, models do not belong together, a bundle cannot read
        prompts as the system or a reward does, or the bundle does not draw the golden clips.
      FileNotFoundError: a model is missing.
      FileExistsError: `out` exists.
      OSError: the disk is too full.
    """
    # Check everything before any work.
    here = bundle.PLATFORMS[jax.default_backend()]
    _check(Path(out), platforms, here, chips)
    loaded = folders.load(system)
    seconds = _seconds(clip_seconds, loaded.clip_seconds, system)
    frames = loaded.system.length(seconds) // loaded.system.frame_tokens
    mixture = None if rewards is None else _mixture(rewards, loaded)
    text_name, text = _text(loaded.system, mixture, [*prompts, prompts[0]])

    # The functions to export, and placeholders for the weights that they take.
    sizes = text_name, frames, sampling.top_k
    functions = Functions.of(loaded, mixture, dtype, chips, *sizes)
    stored, arguments = _stored(functions.trees)
    partial = Path(out).with_name(Path(out).name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest.check_space(partial, stored)

    # Golden clips, exported functions, weights, vocabulary and the modules that read them.
    golden = functions.draw_golden(text, sampling.temperature, system)
    tensors.save(partial / GOLDEN, golden.arrays)
    versions = _write_functions(partial, functions, golden, platforms)
    streams = {name: versions.pop(name) for name in CHUNKS if name in versions}
    _write_weights(partial / WEIGHTS, stored)
    (partial / VOCABULARY).write_bytes(loaded.system.vocabulary)
    for file in COPIED_MODULES:
        shutil.copy(file, partial)

    # Card and manifest. The bundle is moved to its place once it draws the golden clips again.
    description = {
        **_describe(loaded, mixture, sampling, system),
        "platforms": list(platforms),
        "functions": versions,
        "stream_functions": streams,
        "arguments": arguments,
        "outputs": list(golden.outputs),
        "chips": chips,
        "dtype": dtype,
        "clip_seconds": seconds,
        "frames": frames,
        "text_length": text.shape[1],
        "golden": {"prompts": list(prompts), "platform": here},
        "licence": licence,
    }
    size = _seal(partial, description, system)
    _verify(partial, here)
    partial.rename(out)
    print(f"{out}: {size / 1e6:.0f} MB, verified on {here}", flush=True)


# --- checks ---


def _check(out: Path, platforms: Sequence[str], here: str, chips: int) -> None:
    """Raises ValueError or FileExistsError if a setting is out of range."""
    if unknown := sorted(set(platforms) - set(bundle.PLATFORMS.values())):
        raise ValueError(f"export.platforms: {unknown[0]!r} is none of cpu, cuda, tpu")
    if here not in platforms:
        raise ValueError(
            f"export.platforms={tuple(platforms)} lacks {here}, on which the bundle is verified"
        )
    # On several chips a bundle can only be verified on as many.
    devices = jax.local_device_count()
    if not 1 <= chips <= devices:
        raise ValueError(
            f"export.chips={chips}: jax has {devices} devices here, and the bundle is verified on "
            f"that many chips; on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{max(chips, 1)}"
        )
    if out.exists():
        raise FileExistsError(f"export.out='{out}' is there already: remove it, or give another")


def _seconds(clip_seconds: float | None, trained: float | None, system: str) -> float:
    """Returns the length of a bundle's clips; ValueError if it is unknown or out of range."""
    if clip_seconds is None and trained is None:
        raise ValueError(
            f"{system} does not record the length of the clips that it was trained on: give "
            "export.clip_seconds"
        )
    if clip_seconds is None:
        return trained
    if not isinstance(clip_seconds, int | float) or not 0 < clip_seconds < math.inf:
        raise ValueError(f"export.clip_seconds={clip_seconds!r} must be a number above 0")
    if trained is not None and clip_seconds > trained:
        raise ValueError(
            f"export.clip_seconds={clip_seconds:g} is more than the {trained:g} s that {system} "
            "was trained on: give at most that; users of the bundle can still ask for longer "
            "pieces, which are drawn in windows"
        )
    return clip_seconds


def _mixture(rewards: Mixture, loaded: LoadedSystem) -> LoadedMixture:
    """Reads the rewards; ValueError if they do not fit the system or are normalised."""
    if rewards.normalise:
        raise ValueError("export.rewards: Mixture.normalise=True is not exported: set it to False")
    mixture = rewards.load()
    mixture.check_models(loaded)
    return mixture


def _text(
    system: MusicSystem, mixture: LoadedMixture | None, prompts: Sequence[str]
) -> tuple[str, np.ndarray]:
    """Returns the system's name for text pieces, and the pieces of prompts, int32 [B, L].

    A bundle reads prompts once, by one vocabulary. Raises ValueError if the system or a reward
    reads them in another way, or if a prompt is empty.
    """
    # The system's way.
    text = system.read(prompts)
    name, array = next(iter(text.items()))
    vocabulary, length = system.vocabulary, array.shape[-1]
    is_pieces = len(text) == 1 and vocabulary
    if not is_pieces or not np.array_equal(pieces.encode(vocabulary, prompts, length), array):
        raise ValueError(
            f"export.system: {type(system).__name__} does not read prompts as pieces of a "
            "vocabulary, and a bundle cannot do it otherwise: use the system's own folder"
        )

    # The prompts as the rewards read them, {} for a term that reads none. They must be equal.
    for term, read in ({} if mixture is None else mixture.read(prompts)).items():
        if read and not (read.keys() == text.keys() and np.array_equal(read[name], array)):
            raise ValueError(
                f"export.rewards: {term} reads prompts in another way than the system, and a "
                "bundle reads them once: give it the system's text model, or leave it out"
            )
    return name, array


# --- files ---


def _write_functions(
    folder: Path, functions: Functions, golden: Golden, platforms: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Writes the functions and returns the version of each one's calling convention."""
    versions: dict[str, dict[str, Any]] = {}
    for platform in platforms:
        hosts.stop_point()
        streams = functions.exported_stream(platform, golden)
        for name, exported in chain(functions.exported(platform, golden), streams):
            file = folder / "functions" / platform / f"{name}.stablehlo"
            file.parent.mkdir(parents=True, exist_ok=True)
            size = file.write_bytes(exported.serialize())
            print(f"{folder.stem}: {name} for {platform}, {size / 1e6:.1f} MB", flush=True)
            version = exported.calling_convention_version
            versions.setdefault(name, {})[platform] = {"calling_convention": version}
    return versions


def _stored(trees: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, dict[str, str]]]:
    """Returns the arrays of all functions, equal ones once, by name.

    The second value has, for each function, the stored name of each of its weights.
    """
    stored: dict[str, np.ndarray] = {}
    names_by_hash: dict[str, str] = {}
    arguments: dict[str, dict[str, str]] = {}
    for function, tree in trees.items():
        # Rewards may share a model, such as MuLan, with the system.
        arguments[function] = {}
        for name, leaf in named(tree).items():
            array = np.asarray(leaf)
            stored_name = names_by_hash.setdefault(
                checkpoint.content_hash(array), f"{function}/{name}"
            )
            stored[stored_name] = array
            arguments[function][name] = stored_name
    return stored, arguments


def _write_weights(folder: Path, stored: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays into files of at most SHARD_BYTES."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in stored.items():
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + array.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = array
    folder.mkdir()
    for number, shard in enumerate(shards):
        tensors.save(folder / f"{number:05d}.safetensors", shard)


def _describe(
    loaded: LoadedSystem, mixture: LoadedMixture | None, sampling: Sampling, folder: str
) -> dict[str, Any]:
    """Returns the manifest's part on versions, system and rewards."""
    learned = loaded.assets.get(checkpoint.ANCHOR, b"{}")
    return {
        "format": bundle.FORMAT,
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
        "finetuned": json_from(learned, f"{checkpoint.ANCHOR} of {folder}"),
    }


def _seal(folder: Path, description: Mapping[str, Any], system: str) -> int:
    """Writes the card, the run's config and, last, the manifest; returns the bundle's bytes."""
    card = _card(description, Path(system).resolve().name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if config := _gin_of(system):
        shutil.copy(config, folder / "config.gin")
    # A folder without a manifest is no bundle, so it comes last.
    files = manifest.described_files(folder)
    sealed = manifest.sealed({**description, "files": files})
    manifest.write_on_disk(folder / manifest.MANIFEST, sealed)
    return sum(size for size, _ in files.values())


def _gin_of(folder: str) -> Path | None:
    """Returns the config of the run that made the system, if there is one.

    It is copied and never read: gin runs code.
    """
    run = Path(folder).resolve().parent
    files = [run / name for name in ("operative_config.gin", "config.gin")]
    return next((file for file in files if file.is_file()), None)


def _card(description: Mapping[str, Any], name: str) -> str:
    """Returns the bundle's README.md."""
    # The parts that depend on the system.
    rewards = ""
    for term, reward in description["rewards"].items():
        low, high = reward["range"]
        rewards += (
            f"* {term}: {reward['windows']}; range {low} to {high}, weight {reward['weight']:g}; "
            f"licence of its model: {reward['licence']}\n"
        )
    rewards = rewards or "none\n"
    learned = description["finetuned"]
    history = "a base policy, not finetuned"
    if learned:
        terms = learned["rewards"].items()
        by = ", ".join(f"{term} (weight {reward['weight']:g})" for term, reward in terms)
        history = f"finetuned on {by}; anchored to {learned['anchor'][:12]}"
    chips = description["chips"]
    sharing = f"\nThe policy is split among {chips} chips, and needs as many.\n"
    models = "".join(f"* {part}: `{hash_[:12]}`\n" for part, hash_ in description["models"].items())
    layout = "".join(f"; {kind}: {size}" for kind, size in description["layout"].items())

    # The page.
    return f"""# {name}, a text-to-music model

Exported by musicrl-jax {description["version"]} with jax {description["jax"]}, for \
{", ".join(description["platforms"])}.
It turns a prompt into a clip of {description["clip_seconds"]:g} s at \
{description["sample_rate_hz"]} Hz. Weights: {description["dtype"]}. Policy: {history}.

    python bundle.py "upbeat jazz with a walking bass" --out=clip.wav
    python bundle.py --check
{sharing if chips > 1 else ""}
These need {", ".join(bundle.NEEDED[:-1])} and {bundle.NEEDED[-1]}, and none of musicrl-jax.
Over HTTP: `musicrl serve --bundle=THIS_FOLDER`.

**A bundle is a program**: `bundle.py`, the modules beside it and the compiled functions run with
the rights of whoever starts them. Run it if you trust its maker. The hashes show damage, not who
made it.

Licence of the weights: {description["licence"] or "not stated by whoever exported them"}.

Models, by the hash of their content:

{models}
Rewards that can rank candidates:

{rewards}
A frame of {1000 * description["frame_seconds"]:g} ms is {description["places"]} tokens{layout}.
`manifest.json` has all of this and the sha256 of every file. `config.gin`, if there is one, is the
config of the run that trained the policy. Nothing here reads it.
**A gin file is a program too**: its imports and references run code when `musicrl` reads it,
also with `--dry_run`. Read one from elsewhere before you use it.
"""


# --- verification ---


def _verify(folder: Path, platform: str) -> None:
    """Draws the golden clips in a new process that can import only the packages on the card.

    Raises ValueError if the clips differ from those that the system drew.
    """
    if platform != "cpu":
        clear_backends()  # an accelerator belongs to one process; its arrays here are lost
    # JSON, since arguments of a process are text.
    program = str((folder / "bundle.py").absolute())
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, program, json.dumps(_not_needed()), "--check"],
        env={**os.environ, "JAX_PLATFORMS": platform, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(
            f"{folder} does not draw what the system does: {done.stderr.strip()[-2000:]}"
        )
    # The process may have run on another platform than it was told to.
    report = json.loads(done.stdout)
    if report["clips"] < 1 or not report["here"].startswith(f"{platform}, "):
        raise ValueError(f"{folder} was not verified on {platform}: {done.stdout.strip()}")
    print(f"{folder.name}: {done.stdout.strip()}", flush=True)


def _not_needed() -> list[str]:
    """Returns this package and all installed modules but those that a bundle imports."""

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    # The packages that a bundle needs, and their requirements.
    needed, waiting = set(), [canonical(name) for name in bundle.NEEDED]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        with suppress(importlib.metadata.PackageNotFoundError):  # of another platform or Python
            for requirement in importlib.metadata.requires(name) or ():
                # JAX's extras are its support of a GPU or TPU.
                if name.startswith("jax") or "extra ==" not in requirement:
                    waiting.append(canonical(re.match(r"[\w.-]+", requirement)[0]))

    # A module may belong to several packages.
    modules = importlib.metadata.packages_distributions().items()
    hidden = [module for module, names in modules if needed.isdisjoint(map(canonical, names))]
    return ["musicrl_jax", *sorted(hidden)]
