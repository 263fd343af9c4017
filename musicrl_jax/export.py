"""A checkpoint -> a bundle: all that is between a prompt and its waveform, without this repository's model code.

What is in it is said in `serving/bundle.py`, which is in it too.

Legend: B clips, L text pieces, F frames, K codes in a frame, M MuLan levels, E MuLan's width, N samples.
"""

import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.extend.backend import clear_backends
from jax.sharding import Mesh

from musicrl_jax.core import audio, checkpoint, hosts, lock, manifest, memory, sharding, tensors
from musicrl_jax.core.files import read_json
from musicrl_jax.core.precision import in_dtype
from musicrl_jax.inputs import pieces
from musicrl_jax.models.musiclm import MusicLM
from musicrl_jax.models.tokens import FRAMES_PER_SECOND
from musicrl_jax.models.transformer import LANES
from musicrl_jax.rl import rollout as rollouts
from musicrl_jax.rl.rewards import LoadedMixture, Mixture
from musicrl_jax.rl.rollout import Loaded, Rollout, Studio
from musicrl_jax.rl.sample import Given, Sampling
from musicrl_jax.serving import bundle
from musicrl_jax.serving.bundle import DRAW, FORMAT, GOLDEN, SCORE, VOCABULARY, WEIGHTS, Clips

PROMPTS = "upbeat jazz with a walking bass", "a slow sad piano piece"
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


@lock.holds("out", beside=True)
def export(
    checkpoint: str,
    out: str,
    clip_seconds: float | None = None,
    rewards: Mixture | None = None,
    temperature: float = 0.99,
    top_k: int | None = None,
    dtype: str = "float32",
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    prompts: Sequence[str] = PROMPTS,
    licence: str = "",
    fine: str | None = None,
    codec: str | None = None,
    mulan: str | None = None,
    chips: int = 1,
) -> None:
    """Writes a bundle, whole or not at all, and draws its golden clips again in a process without this package.

    A function takes any number of clips; all have one length, of which a shorter clip is the beginning.

    Args:
      checkpoint: folder of a policy, base or finetuned.
      out: the bundle's folder, which must not be there yet.
      clip_seconds: length of the clips that it draws, a multiple of 40 ms, by default and at most that of the clips
        that the policy was trained on. Longer pieces are drawn from several of them when a bundle is used.
      rewards: scores the clips, so that the best of several can be taken; terms as they are, not normalised.
      temperature, top_k: of the policy; the first is what a bundle does if not told otherwise.
      dtype: 'bfloat16' halves the weights of policy and SoundStorm and computes in it; codec, MuLan and rewards stay
        in float32.
      platforms: what the functions are written for, of cpu, cuda and tpu; this machine's among them.
      prompts: of the golden clips.
      licence: that the weights stand under, in words for the card.
      fine, codec, mulan: folders of the other models; by default those beside the checkpoint, as in a run's folder.
      chips: that draw each clip together; each holds its part of the policy's heads, inner layers and vocabularies,
        and the other models whole. A bundle for several runs on that many; it is verified here, on as many devices.

    Raises:
      ValueError: where a setting is out of range, models do not belong together, or the bundle does not draw the
        golden clips.
      FileNotFoundError, FileExistsError: where a checkpoint is missing, or `out` is there.
      OSError: where there is no room for it.
    """
    in_dtype({}, dtype)  # refuses another
    here = bundle.PLATFORMS[jax.default_backend()]
    if unknown := sorted(set(platforms) - set(bundle.PLATFORMS.values())):
        raise ValueError(f"export.platforms: {unknown[0]!r} is none of cpu, cuda, tpu")
    if here not in platforms:
        raise ValueError(f"export.platforms={tuple(platforms)} lacks {here}, on which the bundle is verified here")
    if not 1 <= chips <= jax.device_count():
        raise ValueError(
            f"export.chips={chips}: jax has {jax.device_count()} devices here, and a bundle is verified on as many as "
            f"it is for; on a CPU XLA_FLAGS=--xla_force_host_platform_device_count={max(chips, 1)} shows so many"
        )
    folder = Path(out)
    if folder.exists():
        raise FileExistsError(f"export.out={out!r} is there already: remove it, or give another folder")
    loaded = rollouts.load(checkpoint, fine, codec, mulan)
    clip_seconds = _seconds(clip_seconds, loaded.clip_seconds, checkpoint)
    frames = loaded.studio.frames(clip_seconds)
    mixture = None if rewards is None else rewards.load()
    if mixture is not None:
        mixture.check_models(loaded)
        if rewards.normalise:  # in units of clips of a base, which no one has drawn here
            raise ValueError(
                "export.rewards: Mixture.normalise=True is not exported: give weights for terms as they are"
            )
    sampling = Sampling(temperature, top_k)
    pieces.encode(loaded.vocabulary, prompts, loaded.studio.mulan.config.text_length)  # refuses what says nothing

    frozen = {**loaded.frozen, "soundstorm": in_dtype(loaded.frozen["soundstorm"], dtype)}
    trees = {DRAW: (in_dtype(loaded.policy, dtype), frozen)}
    if mixture is not None:
        trees[SCORE] = mixture.variables
    layouts = _laid_out(loaded, trees, chips)
    stored, arguments = _stored(trees)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest.check_space(partial, stored)
    functions: dict[str, dict[str, Any]] = {name: {} for name in trees}
    for platform in platforms:
        hosts.stop_point()
        for name, exported in _functions(loaded, mixture, trees, layouts, frames, top_k, platform):
            file = partial / "functions" / platform / f"{name}.stablehlo"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(exported.serialize())
            functions[name][platform] = {"calling_convention": exported.calling_convention_version}
            print(f"{folder.name}: {name} for {platform}, {file.stat().st_size / 1e6:.1f} MB", flush=True)
    (partial / WEIGHTS).mkdir()
    for number, shard in enumerate(_shards(stored)):
        tensors.save(partial / WEIGHTS / f"{number:05d}.safetensors", shard)
    (partial / VOCABULARY).write_bytes(loaded.vocabulary)
    for file in READ_BY_BUNDLES:
        shutil.copy(file, partial)

    golden = _golden(loaded, mixture, trees, layouts, prompts, frames, sampling)
    if not all(np.isfinite(array).all() for array in golden.values()):
        raise ValueError(f"{checkpoint} draws clips that are not finite, or their rewards are not: train it again")
    tensors.save(partial / GOLDEN, golden)

    about = {
        "format": FORMAT,
        "version": importlib.metadata.version("musicrl-jax"),
        "jax": jax.__version__,
        "platforms": list(platforms),
        "functions": functions,
        "arguments": arguments,
        "chips": chips,
        "dtype": dtype,
        "sample_rate_hz": loaded.studio.sample_rate_hz,
        "clip_seconds": clip_seconds,
        "frames": frames,
        "places": _places(loaded),
        "layout": _layout(loaded),
        "text_length": loaded.studio.mulan.config.text_length,
        "temperature": sampling.temperature,
        "top_k": top_k,
        "golden": {"prompts": list(prompts), "platform": here},
        "models": loaded.hashes,
        "lineage": rollouts.lineage(loaded),
        "licence": licence,
        "rewards": {} if mixture is None else mixture.describe(),
        "finetuned": _finetuned(checkpoint),
    }
    (partial / "README.md").write_text(_card(about, Path(checkpoint).resolve()), encoding="utf-8")
    if config := _gin_of(checkpoint):
        shutil.copy(config, partial / "config.gin")
    files = manifest.described_files(partial)
    manifest.write_on_disk(partial / manifest.MANIFEST, manifest.sealed({**about, "files": files}))
    _verified(partial, here)
    partial.rename(folder)
    print(f"{folder}: {sum(size for size, _ in files.values()) / 1e6:.0f} MB, drawn again as it should", flush=True)


def _seconds(clip_seconds: float | None, trained: float | None, checkpoint: str) -> float:
    """Returns the length of a bundle's clips; ValueError where it is none, or more than what was trained on."""
    if clip_seconds is None:
        if trained is None:
            raise ValueError(
                f"{checkpoint} does not record the length of the clips that it was trained on: give export.clip_seconds"
            )
        return trained
    if not isinstance(clip_seconds, int | float) or not 0 < clip_seconds < math.inf:
        raise ValueError(f"export.clip_seconds={clip_seconds!r} must be a number of seconds above 0")
    if trained is not None and clip_seconds > trained:
        raise ValueError(
            f"export.clip_seconds={clip_seconds:g} is more than the {trained:g} s that {checkpoint} was trained on: "
            "give at most that; whoever uses the bundle can have longer pieces, drawn in windows"
        )
    return clip_seconds


def _draw(studio: Studio, top_k: int | None) -> Any:
    """(policy, frozen, text i32 [B, L], seeds u32 [B], candidates u32 [B], temperatures f32 [B], given) -> Clips."""

    def draw(
        policy: Any,
        frozen: Any,
        text: jax.Array,
        seeds: jax.Array,
        candidates: jax.Array,
        temperatures: jax.Array,
        given: Given,
    ) -> Clips:
        played = studio.numbered(policy, frozen, text, seeds, candidates, temperatures, given, top_k)
        return Clips(played.tokens, played.acoustic, played.mulan, played.embedding, played.wav)

    return draw


def _score(mixture: LoadedMixture) -> Any:
    """(the rewards' weights, Clips) -> each term and 'total', f32 [B]."""

    def score(scorers: Any, clips: Clips) -> dict[str, jax.Array]:
        rollout = Rollout(None, clips.embedding, clips.mulan, clips.tokens, None, None, clips.acoustic, clips.wav)
        terms = mixture.score(scorers, rollout)
        return {**terms, "total": mixture.total(terms, {name: (0.0, 1.0) for name in terms})}

    return score


def _golden(
    loaded: Loaded,
    mixture: LoadedMixture | None,
    trees: Mapping[str, Any],
    layouts: Mapping[str, Any],
    prompts: Sequence[str],
    frames: int,
    sampling: Sampling,
) -> dict[str, np.ndarray]:
    """The golden clips by the model code: one a prompt, and of the first once more, on from half a clip of zeros."""
    text = pieces.encode(loaded.vocabulary, [*prompts, prompts[0]], loaded.studio.mulan.config.text_length)
    rows, whole = len(text), layouts[SCORE]
    seeds = jnp.arange(rows, dtype=jnp.uint32)
    known = jnp.zeros(rows, jnp.int32).at[-1].set(frames // 2)
    given = Given(jnp.zeros((rows, frames, _places(loaded)), jnp.int32), known)
    asked = text, seeds, jnp.zeros_like(seeds), jnp.full(rows, sampling.temperature, jnp.float32), given
    draw = _draw(loaded.studio, sampling.top_k)
    drawing = jax.jit(draw, in_shardings=(*layouts[DRAW], *[whole] * 5), out_shardings=whole)
    program = drawing.lower(*trees[DRAW], *asked).compile()
    memory.check(program, "export.clip_seconds", frames / FRAMES_PER_SECOND)
    clips = drawing(*trees[DRAW], *asked)
    kept = {"text": text, "seeds": seeds, "given_frames": known}
    kept |= {name: getattr(clips, name) for name in ("tokens", "acoustic", "wav")}
    if mixture is not None:
        kept |= jax.jit(_score(mixture))(trees[SCORE], clips)
    return {name: np.asarray(array) for name, array in kept.items()}


def _functions(
    loaded: Loaded,
    mixture: LoadedMixture | None,
    trees: Mapping[str, Any],
    layouts: Mapping[str, Any],
    frames: int,
    top_k: int | None,
    platform: str,
) -> Iterator[tuple[str, jax_export.Exported]]:
    """What a bundle has for a platform: functions of weights by name and of any number of rows."""
    studio, config = loaded.studio, loaded.studio.musiclm.config
    studio = Studio(MusicLM(config, lanes=LANES.get(platform, 1)), studio.soundstorm, studio.soundstream, studio.mulan)
    (rows,) = jax_export.symbolic_shape("b")

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    def weights(name: str) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in _named(trees[name])}

    def exported(name: str, function: Any, *arguments: Any) -> jax_export.Exported:
        layout = dict(zip(weights(name), jax.tree.leaves(jax.tree.broadcast(layouts[name], trees[name])), strict=True))
        whole = layouts[SCORE]
        compiled = jax.jit(function, in_shardings=(layout, *[whole] * len(arguments)), out_shardings=whole)
        return jax_export.export(compiled, platforms=[platform])(weights(name), *arguments)

    draw = _draw(studio, top_k)

    def play(weights: Mapping[str, jax.Array], *given: jax.Array) -> tuple[jax.Array, ...]:
        policy, frozen = _tree(trees[DRAW], weights)
        *asked, tokens, known = given
        return tuple(draw(policy, frozen, *asked, Given(tokens, known)))

    tokens = array(frames, _places(loaded))
    asked = (
        array(studio.mulan.config.text_length),
        array(dtype=jnp.uint32),
        array(dtype=jnp.uint32),
        array(dtype=jnp.float32),
        tokens,
        array(),
    )
    found = exported(DRAW, play, *asked)
    yield DRAW, found
    if mixture is None:
        return

    def score(weights: Mapping[str, jax.Array], *drawn: jax.Array) -> dict[str, jax.Array]:
        return _score(mixture)(_tree(trees[SCORE], weights), Clips(*drawn))

    drawn = (jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in found.out_avals)
    yield SCORE, exported(SCORE, score, *drawn)


def _laid_out(loaded: Loaded, trees: Mapping[str, Any], chips: int) -> dict[str, Any]:
    """How each function's weights lie on so many chips: the policy by the names of its axes, all else whole."""
    mesh = Mesh(np.array(jax.devices()[:chips]), ("tensor",))
    whole = sharding.replicated(mesh)
    config, policy = loaded.studio.musiclm.config, trees[DRAW][0]
    nothing = jnp.zeros((1, 1, config.layout.depth), jnp.int32), jnp.zeros((1, config.mulan_levels), jnp.int32)
    create, key = MusicLM(config).init, jax.random.key(0)
    split = sharding.laid_out(mesh, create, key, *nothing, rules=sharding.DRAWING_RULES)[1]["params"]
    for (name, array), (_, layout) in zip(_named(policy), _named(split), strict=True):
        for axis, name_of_mesh in enumerate(layout.spec):
            if name_of_mesh and array.shape[axis] % chips:
                raise ValueError(
                    f"export.chips={chips} cannot share the policy's {name} of shape {array.shape}: choose chips that "
                    f"divide {array.shape[axis]}"
                )
    return {DRAW: (split, jax.tree.map(lambda _: whole, trees[DRAW][1])), SCORE: whole}


def _places(loaded: Loaded) -> int:
    return loaded.studio.musiclm.config.layout.depth


def _layout(loaded: Loaded) -> dict[str, int]:
    layout = loaded.studio.musiclm.config.layout
    return {
        "semantic_codes": layout.semantic_codes,
        "acoustic_codes": layout.acoustic_codes,
        "coarse_levels": layout.coarse_levels,
        "codec_levels": loaded.studio.soundstream.config.levels,
    }


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves by their path, such as '0/trunk/bridge'."""
    return [
        ("/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _tree(like: Any, named: Mapping[str, Any]) -> Any:
    """The inverse of `_named`."""
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name, _ in _named(like)])


def _stored(trees: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, dict[str, str]]]:
    """(arrays by name, each once; of each function, its argument's names to those)."""
    stored: dict[str, np.ndarray] = {}
    known: dict[str, str] = {}
    arguments: dict[str, dict[str, str]] = {}
    for function, tree in trees.items():
        arguments[function] = {}
        for name, leaf in _named(tree):
            array = np.asarray(leaf)
            kept = known.setdefault(checkpoint.content_hash(array), f"{function}/{name}")
            stored[kept] = array
            arguments[function][name] = kept
    return stored, arguments


def _shards(stored: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays in files of at most SHARD_BYTES."""
    shard: dict[str, np.ndarray] = {}
    for name, array in stored.items():
        if shard and sum(x.nbytes for x in shard.values()) + array.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = array
    yield shard


def _finetuned(folder: str) -> dict[str, Any]:
    """What a finetuned policy says of its anchor and its rewards; {} of a base."""
    file = Path(folder) / checkpoint.MODEL / checkpoint.ANCHOR
    return read_json(file) if file.exists() else {}


def _gin_of(folder: str) -> Path | None:
    """The config of the run that made the checkpoint, if it is there. It is copied and never read: gin runs code."""
    run = Path(folder).resolve().parent
    return next((file for name in ("operative_config.gin", "config.gin") if (file := run / name).is_file()), None)


def _verified(folder: Path, platform: str) -> None:
    """Draws the golden clips in a fresh process that can import nothing but what the card names.

    Raises ValueError where the clips differ from those that the checkpoint drew.
    """
    if platform != "cpu":  # an accelerator belongs to one process: what this one has there is gone from here on
        clear_backends()
    command = [sys.executable, "-c", WITHOUT, str((folder / "bundle.py").absolute()), json.dumps(_not_needed())]
    environment = {**os.environ, "JAX_PLATFORMS": platform, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*command, "--check"], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{folder} does not draw what the checkpoint does: {done.stderr.strip()[-2000:]}")
    found = json.loads(done.stdout)
    if found["clips"] < 1 or not found["here"].startswith(f"{platform}, "):
        raise ValueError(f"{folder} was not verified on {platform}: {done.stdout.strip()}")
    print(f"{folder.name}: {done.stdout.strip()}", flush=True)


def _not_needed() -> list[str]:
    """Returns this package and all installed modules but those that a bundle needs, and that these need."""
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
    spelt = {module: {re.sub(r"[-_.]+", "-", name).lower() for name in names} for module, names in modules.items()}
    return ["musicrl_jax", *sorted(module for module, names in spelt.items() if not names & needed)]


def _card(about: Mapping[str, Any], source: Path) -> str:
    """The bundle's README.md."""
    rewards = "\n".join(
        f"* {name}: {told['windows']}; range {told['range'][0]} to {told['range'][1]}, weight {told['weight']:g}; "
        f"licence of its model: {told['licence']}"
        for name, told in about["rewards"].items()
    )
    learned = about["finetuned"]
    history = "a base policy, not finetuned"
    if learned:
        by = ", ".join(f"{name} (weight {told['weight']:g})" for name, told in learned["rewards"].items())
        history = f"finetuned on {by}; anchored to {learned['anchor'][:12]}"
    chips = about["chips"]
    sharing = "" if chips == 1 else f"\nThe policy is split among {chips} chips, and needs as many.\n"
    models = "\n".join(f"* {name}: `{found[:12]}`" for name, found in about["models"].items())
    layout = about["layout"]
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

A frame of 40 ms is {about["places"]} codes: one semantic code of {layout["semantic_codes"]}, and two codec frames of
{layout["coarse_levels"]} coarse codes of {layout["acoustic_codes"]} each; of {layout["codec_levels"]}.
`manifest.json` has all of this and the sha256 of every file. `config.gin`, if there, is what the run that trained the
policy was asked for. Nothing here reads it. **A gin file is a program too**: its imports and references run code when
`musicrl` reads it, also with `--dry_run`. Read one from elsewhere before you use it.
"""
