"""Compares systems on held-out prompts by rewards, simulated listeners, KL, diversity and distance.

The result is a summary, the scores of every clip and a page to listen to.

Legend: P prompts, S clips (seeds) of a prompt, R raters, L listeners, B clips of a batch, T tokens
of a clip, N samples, F frames of the features, D their width, M measurements.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from musicrl_jax.arena import figures
from musicrl_jax.arena.audience import Audience
from musicrl_jax.arena.bench import Bench, EvaluationConfig, Features, Total
from musicrl_jax.arena.figures import OPINION, Arrays
from musicrl_jax.arena.listeners import MEASUREMENTS
from musicrl_jax.arena.monitor import RULE
from musicrl_jax.core import checkpoint, extras, hosts, lock
from musicrl_jax.core.files import (
    cached,
    json_from,
    provide_caches,
    read_json,
    set_aside,
    write_json,
)
from musicrl_jax.core.statistics import printed
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.rl.rewards import LoadedMixture, Mixture
from musicrl_jax.run import read_seconds
from musicrl_jax.systems import folder
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.system import Tree

TOTAL = "reward"  # the mixture's name among the scores
SUMMARY, SCORES, PLAYED = "summary.json", "scores.npz", "played"
Sides = list[tuple[int, dict[str, np.ndarray]]]  # (number of a prompt, clip f32 [N] by side)


@dataclasses.dataclass(frozen=True)
class PageConfig:
    """Settings of the page, beside the comparison.

    Attributes:
      run_dir: folder of the whole run, for its name and the times of its stages; by default the
        evaluation's own.
      training: folders of supervised stages, whose losses are plotted.
      notes: paragraphs at the end.
      shown: number of prompts with clips on the page, the first ones.
      worst: number of further prompts, those whose reward fell most.
    """

    run_dir: str = dataclasses.field(default="", metadata=checkpoint.NO_IDENTITY)
    training: tuple[str, ...] = dataclasses.field(default=(), metadata=checkpoint.NO_IDENTITY)
    notes: tuple[str, ...] = ()
    shown: int = 8
    worst: int = 4

    def __post_init__(self) -> None:
        if min(self.shown, self.worst) < 0:
            raise ValueError(
                f"PageConfig: shown={self.shown} and worst={self.worst} must be 0 or more"
            )


@lock.holds("model_dir")
def evaluate(
    model_dir: str,
    systems: Mapping[str, str],
    rewards: Mixture,
    prompts: Prompts,
    clips: Clips,
    features: Features,
    config: EvaluationConfig,
    audience: Audience | None = None,
    page: PageConfig = PageConfig(),
) -> dict[str, Any]:
    """Compares systems on the same held-out prompts; writes and returns a summary.

    As in MusicRL (section 5), raters give the clips of a prompt 1 to 5 points; a policy wins a pair
    if its clip has more, and its win rate is wins / (wins + losses). The raters are *simulated
    listeners*. Other figures are the rewards, the KL to the base in all, by token of a frame and by
    second, diversity (mean distance between the features of two clips) and the Frechet distance
    between the features of generated and of real clips. Nothing was trained on the last two.

    Args:
      model_dir: folder of summary, scores and page. They stay if models and settings are the same.
      systems: folder of each system by its name. The first is the base; all have its frozen parts.
      rewards: the terms to measure, and the mixture that best-of-n maximises.
      prompts: the first ones of the 'test' split are used; none of them was trained on.
      clips: real clips; the 'test' split is used for the Frechet distance and rated.
      features: for diversity and the Frechet distance.
      config: settings of the comparison.
      audience: the listeners; None leaves out all figures that need them.
      page: what else the page shows.

    Returns:
      The summary, as `report.comparison.write_comparison` reads it.
    """
    # Check everything before any work.
    extras.check("the page", "report", "jinja2", "matplotlib")
    provide_caches()
    loaded = _load(systems, config, audience)
    base, *finetuned = systems
    mixture, encoder = rewards.load(), features.load()
    mixture.check_models(loaded[base])
    best_name = f"best of {config.best_of}"
    policies = {name: system.hashes["policy"] for name, system in loaded.items()}
    parts = _frozen_hashes(loaded[base]) | {"features": encoder.hash, **mixture.hashes}
    if reserved := sorted({*parts, "real", "real clips", best_name} & policies.keys()):
        raise ValueError(f"evaluate.systems: {reserved[0]!r} names something else: choose another")
    identity = {
        "hashes": policies | parts,
        "systems": list(systems),  # the first is the base
        "settings": checkpoint.describe(config),
        "data": checkpoint.describe([rewards, features, prompts, clips, audience, page]),
    }
    directory = Path(model_dir)
    if summary := _finished(directory, identity):
        return summary

    # Clips and measurements of every system, and of real clips.
    texts = prompts.unique("test")[: config.count]
    if len(texts) < 2:
        raise ValueError(f"prompts: {len(texts)} held-out prompts, and an interval needs two")
    if len(texts) < config.count:
        print(f"only {len(texts)} held-out prompts exist, not {config.count}")
    listeners = None if audience is None else audience.load()
    bench = Bench(loaded[base], mixture, features, encoder, listeners, texts, config)
    print(f"{directory}: {len(texts)} prompts, {config.seeds} clips each by {', '.join(systems)}")

    def play(name: str, policy: Tree, *best: Any) -> Arrays:
        return cached(directory / PLAYED, name, identity, lambda: bench.play(name, policy, *best))

    with jax.set_mesh(bench.mesh):
        results = {name: play(name, system.policy) for name, system in loaded.items()}
        total = _total(mixture, results)
        if config.best_of > 1:
            draws = range(1, config.best_of + 1)  # 0 is the number of the base's own clips
            results[best_name] = play(best_name, loaded[base].policy, draws, total)
        for result in results.values():
            result[TOTAL] = total(result)
        real, real_measured = bench.measure_real(clips)
        runs = {name: systems[name] for name in finetuned}
        sides = _sides(bench, results, loaded, runs, page)

    # The figures; the first host writes them.
    names = [TOTAL, *mixture.names]
    summary = {
        "policies": list(results),
        **figures.automatic_metrics(results, names, finetuned, real, config.seed),
        "watched": {name: _alarm(loaded[name], systems[name]) for name in finetuned},
        "rule": RULE,
        "token_names": loaded[base].system.token_names,
        "seeds": config.seeds,
        "seed": config.seed,
        "page": str(directory / "page.html"),
        "checkpoint": str([*systems.values()][-1]),
        "identity": identity,
    }
    if listeners is not None:
        panel, raters = listeners.panel, config.raters
        summary |= figures.opinions(panel, results, real_measured, raters, config.seed)
    hosts.wait_for_all("evaluate")  # until then one of them may read the folder of clips
    hosts.first_alone(_write)(directory, summary, results, bench, sides, runs, clips, page)
    _print(summary)
    return summary


def _load(
    systems: Mapping[str, str], config: EvaluationConfig, audience: Audience | None
) -> dict[str, LoadedSystem]:
    """Loads the systems; ValueError if they, or the audience, do not fit together."""
    if len(systems) + (config.best_of > 1) < 2:
        raise ValueError(f"evaluate.systems has {len(systems)}: nothing to compare; name another")
    # Systems must differ in their policy alone.
    loaded = {name: folder.load(place) for name, place in systems.items()}
    base = next(iter(loaded.values()))
    base.system.length(config.clip_seconds)
    expected = {"kind": base.kind, **_frozen_hashes(base)}
    for name, system in loaded.items():
        parts = {"kind": system.kind, **_frozen_hashes(system)}
        if different := sorted(part for part in expected if parts.get(part) != expected[part]):
            raise ValueError(
                f"evaluate.systems[{name!r}] has another {different[0]} than the first system: "
                "compare policies with the same frozen parts"
            )

    # Listeners must be enough, and hear at the system's sample rate.
    if audience is not None:
        if config.raters > audience.panel.size:
            raise ValueError(
                f"EvaluationConfig.raters={config.raters} must be at most the panel's size, "
                f"{audience.panel.size}"
            )
        audience.check(base.system.sample_rate_hz)
    return loaded


def _frozen_hashes(system: LoadedSystem) -> dict[str, str]:
    return {part: value for part, value in system.hashes.items() if part != "policy"}


# --- results ---


def _finished(directory: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the summary of an evaluation of the same models and settings; None without one."""
    path = directory / SUMMARY
    if not hosts.first_decides(lambda: _summary(path).get("identity") == identity):
        return None
    summary = _summary(path)
    print(f"{directory}: evaluated already")
    if hosts.first():  # an evaluation that was killed just before its end may have left clips
        shutil.rmtree(directory / PLAYED, ignore_errors=True)
    _print(summary)
    return summary


def _total(mixture: LoadedMixture, results: Mapping[str, Arrays]) -> Total:
    """Returns the reward of clips, in units of the clips of the first system.

    Raises ValueError if a term leaves its range, or cannot be normalised.
    """
    base = next(iter(results.values()))
    units = mixture.units({name: base[name].ravel() for name in mixture.names})
    for result in results.values():
        mixture.check(result)
    return lambda result: np.asarray(
        mixture.total({name: result[name] for name in mixture.names}, units)
    )


def _sides(
    bench: Bench,
    results: Mapping[str, Arrays],
    loaded: Mapping[str, LoadedSystem],
    runs: Mapping[str, str],
    page: PageConfig,
) -> tuple[Sides, Sides]:
    """Returns the clips on the page: of the first prompts, and of those whose reward fell most."""
    # The smallest gain over the base among the other entries, for each prompt.
    base, *others = (result[TOTAL][:, 0] for result in results.values())
    gains = np.min(others, axis=0) - base

    # Clips of the comparison; of each prompt those of the first seed.
    first = list(range(min(page.shown, len(gains))))
    worst = [int(row) for row in np.argsort(gains, kind="stable")[: page.worst] if gains[row] < 0]
    clips: dict[int, dict[str, np.ndarray]] = {row: {} for row in (*first, *worst)}
    for row, sides in clips.items():
        for name, result in results.items():
            sides[name] = result["heard"][row].astype(np.float32) / 32767

    # Clips of the last policy of a run that returned an earlier one.
    for name, place in runs.items():
        if checkpoint.has_model(last := Path(place) / folder.LAST):
            variables = checkpoint.load_model(last, type(loaded[name].config)).variables
            wavs = bench.first_clips(loaded[name].system.restored(variables), clips)
            for row, wav in wavs.items():
                clips[row][f"{name}, last"] = wav
    return [(row, clips[row]) for row in first], [(row, clips[row]) for row in worst]


def _write(
    directory: Path,
    summary: Mapping[str, Any],
    results: Mapping[str, Arrays],
    bench: Bench,
    sides: tuple[Sides, Sides],
    runs: Mapping[str, str],
    clips: Clips,
    page: PageConfig,
) -> None:
    """Writes scores, page and summary, and removes the clips of interrupted evaluations."""
    from musicrl_jax.report.comparison import Sounds, write_comparison  # an extra

    # Scores of every clip.
    scores: dict[str, Arrays] = {}
    arrays = {}
    for system, result in results.items():
        names = [name for name in (*summary["rewards"], OPINION) if name in result]
        scores[system] = {name: result[name] for name in names}
        for name in (*names, "measured", "ratings", "kl"):
            if name in result:
                arrays[f"{system}/{name}"] = result[name]
    arrays |= {"prompts": np.array(bench.prompts), "measurements": np.array(MEASUREMENTS)}
    directory.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(directory / SCORES, **arrays)

    # The page.
    notes = list(page.notes)
    for name, licence in clips.licences().items():
        notes.append(f"Real clips are of {name}: {licence} None is on this page.")
    run_dir = page.run_dir or str(directory)
    write_comparison(
        directory / "page.html",
        summary,
        Sounds(bench.prompts, *sides, scores, bench.system.sample_rate_hz),
        run_dir,
        runs,
        page.training,
        read_seconds(run_dir),
        notes,
    )
    write_json(directory / SUMMARY, summary)  # last: with it the evaluation is done
    shutil.rmtree(directory / PLAYED)


def _alarm(system: LoadedSystem, place: str) -> dict[str, Any] | None:
    """Returns how often a run's held-out judge looked and which step it kept; None without one."""
    raw, where = system.assets.get(checkpoint.ANCHOR, b"{}"), f"{checkpoint.ANCHOR} of {place}"
    kind = {"watched?": (dict, type(None))}
    return json_from(raw, where, kind, "restore a copy, or finetune it again").get("watched")


def _summary(path: Path) -> dict[str, Any]:
    """Returns the summary of an earlier evaluation, {} if there is none.

    A damaged file is set aside and made again.
    """
    if not os.path.lexists(path):
        return {}
    try:
        kind = {"rewards": {str: {str: dict}}, "kl": {str: dict}, "page": str, "identity": dict}
        pair = {"first": str, "second": str, "win_rate": dict}
        return read_json(path, {**kind, "pairs?": [pair]})
    except (ValueError, OSError) as error:
        set_aside(path, str(error).removeprefix(f"{path} "))
        return {}


def _print(summary: dict[str, Any]) -> None:
    """Prints the rewards, the win rates and the KL."""
    for term, by_system in summary["rewards"].items():
        for system, figure in by_system.items():
            print(f"{term:>16} {system:>12}  {printed(figure, 4, sign='+')}")
    for pair in summary.get("pairs", ()):
        rate = f"win rate {printed(pair['win_rate'], 1, 100)}"
        if "win" in pair:
            votes = " / ".join(f"{100 * pair[side]:.1f}" for side in ("win", "tie", "loss"))
            rate = f"win / tie / loss {votes}, {rate} %"
        print(f"{pair['first']:>16} {'- ' + pair['second']:>12}  {rate} by simulated listeners")
    kls = ", ".join(f"{name} {printed(kl, 2)}" for name, kl in summary["kl"].items())
    print(f"KL to the base in nats a clip: {kls}; page: {summary['page']}")
