"""The judge: systems side by side on prompts that nothing was trained on.

It measures rewards, what simulated listeners prefer and how far each policy went, and writes a page
to listen to.

Legend: P prompts, S clips (seeds) a prompt, R raters, L listeners, B clips of a batch, T tokens of
a clip, K tokens in a frame, N samples, F frames of the features, D their width, M measurements.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from musicrl_jax.arena import figures
from musicrl_jax.arena.audience import Audience, LoadedAudience
from musicrl_jax.arena.figures import OPINION, Arrays
from musicrl_jax.arena.listeners import MEASUREMENTS
from musicrl_jax.arena.monitor import RULE
from musicrl_jax.core import checkpoint, extras, hosts, lock, sharding
from musicrl_jax.core.files import (
    cached,
    json_from,
    provide_caches,
    read_json,
    set_aside,
    write_json,
)
from musicrl_jax.core.keys import Stream
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.statistics import printed
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.rl.rewards import LoadedMixture, Mixture
from musicrl_jax.run import read_seconds
from musicrl_jax.systems import folder
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import LITTLE_EFFORT, Player, Units
from musicrl_jax.systems.system import MusicSystem, Rollout, Sampling, Tree, Weights

TOTAL = "reward"  # the mixture's name among the scores
SUMMARY, SCORES, PLAYED = "summary.json", "scores.npz", "played"
# The kind of what a finetuned policy records of its held-out judge.
WATCHED = {"watched?": (dict, type(None))}
Sides = list[tuple[int, dict[str, np.ndarray]]]  # (number of a prompt, clip f32 [N] by side)


class Features(Protocol):
    """Features by which sets of clips are compared; a frozen dataclass."""

    def load(self) -> checkpoint.Model:
        """Returns the model that finds them."""

    def features(self, model: Any, variables: Tree, wav: jax.Array) -> jax.Array:
        """Returns f32 [B, F, D] of f32 [B, N]; `model` is the config. Traced under jit."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is compared.

    Attributes:
      clip_seconds: length of the clips, as in training.
      sampling: the distribution of the policies, as in training.
      count: P, held-out prompts, or all if there are fewer.
      seeds: S, clips a prompt and system.
      batch_size: B, clips at a time, rounded up to a multiple of the devices.
      seed: of the sampling and the raters; streams of their own, apart from training's.
      raters: R, listeners that rate each prompt's clips, others for every prompt and seed.
      best_of: if above 1, a further entry: of so many clips of the base the one with the highest
        reward.
    """

    clip_seconds: float
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    count: int = 64
    seeds: int = 1
    batch_size: int = dataclasses.field(default=32, metadata=checkpoint.NO_IDENTITY)
    seed: int = 0
    raters: int = 3
    best_of: int = 1

    def __post_init__(self) -> None:
        for name in ("count", "seeds", "batch_size", "raters", "best_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"EvaluationConfig.{name}={getattr(self, name)} must be 1 or more")
        if self.seed < 0:
            raise ValueError(f"EvaluationConfig.seed={self.seed} must be 0 or more")


@dataclasses.dataclass(frozen=True)
class PageConfig:
    """What stands on the page beside the comparison.

    Attributes:
      run_dir: folder of the whole run, for its name and its stages' times; by default the
        evaluation's own.
      training: folders of the supervised stages whose metrics are drawn.
      notes: honest words.
      shown: prompts on the page, the first ones.
      worst: further prompts on the page, those that lost most.
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

    As in MusicRL (section 5), every rater gives the clips of a prompt 1 to 5 points; a policy wins
    a pair if its clip has more, and its win rate is wins / (wins + losses). The raters are
    *simulated listeners*: `audience`'s. Beside them and the rewards stand figures that nothing was
    trained on: the KL to the base, as a whole, by token of a frame and by second; diversity, the
    mean distance between the features of two clips; the Frechet distance between those of generated
    and of real held-out clips, frame by frame.

    Args:
      model_dir: where summary, scores and page go; left alone if they are there, for the same
        models and settings.
      systems: folder of each system by its name; the first is the base, and the others have its
        frozen parts.
      rewards: the terms to measure, and the mixture that best-of-n chooses by.
      prompts: the first ones of the 'test' split are used; none of them was trained on.
      clips: real clips, 'test' split, for the Frechet distance and for the raters.
      features: features of clips for diversity and the Frechet distance.
      config: what is compared.
      audience: who judges; None leaves out all that needs listeners.
      page: what else stands on the page.

    Returns:
      The summary, as `report.comparison.write_comparison` reads it.
    """
    # Everything is checked before any work.
    extras.check("the page", "report", "jinja2", "matplotlib")
    provide_caches()
    directory = Path(model_dir)
    loaded = _load(systems, config, audience)
    base, *finetuned = systems
    mixture, encoder = rewards.load(), features.load()
    mixture.check_models(loaded[base])
    best_name = f"best of {config.best_of}"
    hashes = {"features": encoder.hash, **mixture.hashes}
    identity = {
        "hashes": _hashes(loaded, hashes, {"real", "real clips", best_name}),
        "systems": list(systems),  # the first is the base
        "settings": checkpoint.describe(config),
        "data": checkpoint.describe([rewards, features, prompts, clips, audience, page]),
    }
    path = directory / SUMMARY
    if hosts.first_decides(lambda: _summary(path).get("identity") == identity):
        summary = _summary(path)
        print(f"{directory}: evaluated already")
        if hosts.first():  # a run that was killed just before its end left them
            shutil.rmtree(directory / PLAYED, ignore_errors=True)
        _print(summary)
        return summary

    # Every system plays; real clips stand beside them.
    texts = _held_out(prompts, config.count)
    hearing = None if audience is None else audience.load()
    bench = _Bench(loaded[base], mixture, features, encoder, hearing, texts, config)
    print(f"{directory}: {len(texts)} prompts, {config.seeds} clips each by {', '.join(systems)}")

    def play(name: str, policy: Tree, *best: Any) -> Arrays:
        return cached(directory / PLAYED, name, identity, lambda: bench.play(name, policy, *best))

    with jax.set_mesh(bench.mesh):
        results = {name: play(name, system.policy) for name, system in loaded.items()}
        units = bench.add_totals(results, base)
        if config.best_of > 1:
            results[best_name] = play(best_name, loaded[base].policy, config.best_of, units)
        real, measured = bench.real(clips)
        sides = _sides(bench, results, {name: loaded[name] for name in finetuned}, systems, page)

    # Figures; the first host writes them.
    names = [TOTAL, *mixture.names]
    summary = {
        "policies": list(results),
        **figures.automatic_metrics(results, names, finetuned, real, config.seed),
        "watched": {name: _watched(loaded[name], systems[name]) for name in finetuned},
        "rule": RULE,
        "token_names": loaded[base].system.token_names,
        "seeds": config.seeds,
        "seed": config.seed,
        "page": str(directory / "page.html"),
        "checkpoint": str([*systems.values()][-1]),
        "identity": identity,
    }
    if hearing is not None:
        summary |= figures.opinions(hearing.panel, results, measured, config.raters, config.seed)
    hosts.wait_for_all("evaluate")  # until then one of them may read what played
    runs = {name: systems[name] for name in finetuned}
    hosts.first_alone(_write)(directory, summary, results, bench, sides, runs, clips, page)
    _print(summary)
    return summary


def _load(
    systems: Mapping[str, str], config: EvaluationConfig, audience: Audience | None
) -> dict[str, LoadedSystem]:
    """Loads the systems; ValueError if they cannot be compared or heard."""
    if len(systems) + (config.best_of > 1) < 2:
        raise ValueError(
            f"evaluate.systems has {len(systems)}: nothing to compare the first with; name another"
        )
    loaded = {name: folder.load(place) for name, place in systems.items()}
    base = next(iter(loaded.values()))
    base.system.length(config.clip_seconds)
    for name, system in loaded.items():
        own, wanted = ({"kind": each.kind, **_frozen_hashes(each)} for each in (system, base))
        if different := sorted(part for part in wanted if own.get(part) != wanted[part]):
            raise ValueError(
                f"evaluate.systems[{name!r}] has another {different[0]} than the first system: "
                "compare policies with the same frozen parts"
            )
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


def _hashes(
    loaded: Mapping[str, LoadedSystem], others: Mapping[str, str], reserved: set[str]
) -> dict[str, str]:
    """Returns the hashes of policies by their system, and of all other models.

    Raises ValueError if a system has a name that stands for something else.
    """
    others = _frozen_hashes(next(iter(loaded.values()))) | others
    if taken := sorted((others.keys() | reserved) & loaded.keys()):
        raise ValueError(
            f"evaluate.systems: {taken[0]!r} names something else on the page; choose another"
        )
    return {name: system.hashes["policy"] for name, system in loaded.items()} | others


def _held_out(prompts: Prompts, count: int) -> tuple[str, ...]:
    """Returns the prompts; ValueError if there are too few for an interval."""
    texts = prompts.unique("test")[:count]
    if len(texts) < 2:
        raise ValueError(
            f"prompts: {len(texts)} held-out prompts that training did not see; an interval needs "
            "two"
        )
    if len(texts) < count:
        print(f"only {len(texts)} held-out prompts exist, not {count}")
    return tuple(texts)


class _Bench:
    """Where every policy plays the same prompts with the same noise, and all is measured.

    Attributes:
      mesh: all devices of all hosts, over which rows are sharded.
      system: the system that plays.
      prompts: P of them.
    """

    def __init__(
        self,
        base: LoadedSystem,
        mixture: LoadedMixture,
        features: Features,
        encoder: checkpoint.Model,
        hearing: LoadedAudience | None,
        prompts: Sequence[str],
        config: EvaluationConfig,
    ):
        mesh = self.mesh = sharding.make_mesh()
        platform = mesh.devices.flat[0].platform
        self.system: MusicSystem = base.system.tuned(platform)
        self.prompts, self._config = prompts, config
        self._base, self._mixture, self._hearing = base, mixture, hearing
        rows = sharding.round_up_rows(mesh, config.batch_size)
        self._player = Player(
            self.system, mesh, rows, config.clip_seconds, config.sampling, mixture=mixture
        )
        self._features = jax.jit(
            partial(features.features, encoder.config),
            out_shardings=sharding.batch_sharding(mesh),
            compiler_options=LITTLE_EFFORT.get(platform),
        )
        variables = mixture.variables, encoder.variables
        self._scorers, self._encoder = sharding.put(variables, sharding.spread(mesh, variables))
        self._anchor = self._weights(base.policy).policy

    def play(self, name: str, policy: Tree, draws: int = 1, units: Units | None = None) -> Arrays:
        """Plays all prompts with all seeds; of `draws` clips it takes that of the highest reward.

        Returns arrays [P, S, ...]; 'heard', int16 [P, N], and 'features', [P, F, D], are of the
        first seed alone: one clip a prompt is enough for them.
        """
        weights, rows = self._weights(policy), self._player.rows
        count, clips = len(self.prompts), len(self.prompts) * self._config.seeds
        parts = []
        for first in Progress(range(0, clips, rows), name, -(-clips // rows)):
            part = None
            for draw in [0] if draws == 1 else range(1, draws + 1):  # best-of-n has its own clips
                other = self._measure(weights, first, draw)
                if units is not None:
                    other[TOTAL] = self._total(other, units)
                part = other if part is None else _better(part, other)
            wav = part.pop("wav")
            if self._hearing is not None:
                part["measured"] = self._listen(wav, self._texts(first))
            part["heard"] = np.rint(np.clip(wav, -1, 1) * 32767).astype(np.int16)
            if first >= count:
                del part["heard"], part["features"]
            parts.append(part)

        # Seed by seed -> prompt by prompt.
        joined = {}
        for key in parts[0]:
            array = np.concatenate([part[key] for part in parts if key in part])
            if key in ("heard", "features"):
                joined[key] = array[:count]
            else:
                array = array[:clips].reshape(self._config.seeds, count, *array.shape[1:])
                joined[key] = array.swapaxes(0, 1)
        return joined

    def add_totals(self, results: Mapping[str, Arrays], base: str) -> Units:
        """Adds the reward to the results, and returns the units that the base's clips give."""
        names = self._mixture.names
        units = self._mixture.units({name: results[base][name].ravel() for name in names})
        for result in results.values():
            self._mixture.check({name: result[name] for name in names})
            result[TOTAL] = self._total(result, units)
        return units

    def real(self, clips: Clips) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns features of the real test clips, [clips, F, D], and measurements of the first P.

        Those are f64 [P, M]; None without listeners.
        """
        rows, count, parts, measured = self._player.rows, len(self.prompts), [], []
        captioned = dataclasses.replace(clips, with_captions=True)
        for batch in captioned.batches("test", rows, seed=0, epochs=1):
            hosts.stop_point()
            size = len(batch["audio"])
            # Clips once more fill the last batch.
            wav = np.resize(batch["audio"], (rows, batch["audio"].shape[1]))
            features = self._features(self._encoder, self._player.put(wav))
            if self._hearing is not None and len(parts) * rows < count:
                measured.append(self._listen(wav, np.resize(batch["caption"], rows))[:size])
            parts.append(sharding.fetch(features)[:size])
        return np.concatenate(parts), np.concatenate(measured)[:count] if measured else None

    def hear(self, policy: Tree, chosen: Iterable[int]) -> dict[int, np.ndarray]:
        """Draws the first clips of some prompts, f32 [N] by the prompt's number."""
        weights, rows, wavs = self._weights(policy), self._player.rows, {}
        for first in sorted({row // rows * rows for row in chosen}):
            wav = sharding.fetch(self._draw(weights, first, 0).mono)
            wavs |= {row: wav[row - first] for row in chosen if first <= row < first + rows}
        return wavs

    def _weights(self, policy: Tree) -> Weights:
        return self._player.place(policy, self._base.frozen)

    def _texts(self, first: int) -> list[str]:
        """Returns the prompts of a batch: all seed by seed, and again to fill the last batch."""
        numbers = range(first, first + self._player.rows)
        return [self.prompts[number % len(self.prompts)] for number in numbers]

    def _draw(self, weights: Weights, first: int, draw: int) -> Rollout:
        seed, texts = self._config.seed, self._texts(first)
        return self._player.draw(weights, texts, seed, draw, Stream.EVALUATION, first)

    def _measure(self, weights: Weights, first: int, draw: int) -> Arrays:
        """Draws a batch and returns the clips, [B, N], with all that is measured on the devices."""
        rollout = self._draw(weights, first, draw)
        neutral = dict.fromkeys(self._mixture.names, (0.0, 1.0))
        scores = self._player.score(self._scorers, rollout, self._texts(first), neutral)[1]
        kl = self._player.kl(weights.policy, self._anchor, rollout)
        features = self._features(self._encoder, rollout.mono)
        arrays = sharding.fetch({"wav": rollout.mono, **scores, "kl": kl, "features": features})
        return arrays | _kl_figures(arrays["kl"], self.system)

    def _listen(self, wav: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Returns what listeners hear of a batch, f64 [B, M]; each host measures its own rows."""
        own = sharding.own_rows(self.mesh, len(wav))
        measured = self._hearing.measure(wav[own], [texts[row] for row in own])
        return sharding.gather_rows(self.mesh, measured, len(wav))

    def _total(self, result: Arrays, units: Units) -> np.ndarray:
        terms = {name: result[name] for name in self._mixture.names}
        return np.asarray(self._mixture.total(terms, units))


def _kl_figures(kl: np.ndarray, system: MusicSystem) -> Arrays:
    """Returns sums of KL f32 [B, T]: a clip's, by token of a frame, by second of its start."""
    frames = kl.reshape(len(kl), -1, system.frame_tokens)
    seconds = (np.arange(frames.shape[1]) * system.frame_seconds + 1e-6).astype(int)
    by_second = [frames[:, seconds == n].sum(axis=(1, 2)) for n in range(seconds[-1] + 1)]
    return {
        "kl": kl.sum(axis=1),
        "kl_by_level": frames.sum(axis=1),
        "kl_by_second": np.stack(by_second, axis=1),
    }


def _better(one: Arrays, other: Arrays) -> Arrays:
    """Returns, clip by clip, the one with the higher reward."""
    wins = other[TOTAL] > one[TOTAL]
    return {
        key: np.where(wins.reshape(-1, *[1] * (x.ndim - 1)), other[key], x)
        for key, x in one.items()
    }


def _sides(
    bench: _Bench,
    results: Mapping[str, Arrays],
    finetuned: Mapping[str, LoadedSystem],
    systems: Mapping[str, str],
    page: PageConfig,
) -> tuple[Sides, Sides]:
    """Returns the clips on the page: of the first prompts, and of those that lost most."""
    (_, base), *others = results.items()
    gains = np.min([result[TOTAL][:, 0] - base[TOTAL][:, 0] for _, result in others], axis=0)
    first = list(range(min(page.shown, len(gains))))
    worst = [int(row) for row in np.argsort(gains, kind="stable")[: page.worst] if gains[row] < 0]
    clips = {row: {} for row in (*first, *worst)}
    for row, sides in clips.items():
        sides |= {name: r["heard"][row].astype(np.float32) / 32767 for name, r in results.items()}
    for name, system in finetuned.items():  # the last weights of a run that kept earlier ones
        if checkpoint.has_model(last := Path(systems[name]) / folder.LAST):
            policy = checkpoint.load_model(last, type(system.config)).variables
            for row, wav in bench.hear(system.system.restored(policy), clips).items():
                clips[row][f"{name}, last"] = wav
    return [(row, clips[row]) for row in first], [(row, clips[row]) for row in worst]


def _write(
    directory: Path,
    summary: Mapping[str, Any],
    results: Mapping[str, Arrays],
    bench: _Bench,
    sides: tuple[Sides, Sides],
    finetuned: Mapping[str, str],
    clips: Clips,
    page: PageConfig,
) -> None:
    """Writes scores, page and summary, and removes what was kept of the systems that played."""
    # Drawing is an extra; training hosts go without.
    from musicrl_jax.report.comparison import Sounds, write_comparison

    names = (*summary["rewards"], OPINION)
    scores = {which: {n: r[n] for n in names if n in r} for which, r in results.items()}
    arrays = {}
    for which, result in results.items():
        further = [name for name in ("measured", "ratings", "kl") if name in result]
        arrays |= {f"{which}/{name}": result[name] for name in (*scores[which], *further)}
    directory.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        directory / SCORES,
        prompts=np.array(bench.prompts),
        measurements=np.array(MEASUREMENTS),
        **arrays,
    )
    licences = [
        f"Real clips are of {name}: {licence} None is on this page."
        for name, licence in clips.licences().items()
    ]
    run_dir = page.run_dir or str(directory)
    write_comparison(
        directory / "page.html",
        summary,
        Sounds(bench.prompts, *sides, scores, bench.system.sample_rate_hz),
        run_dir,
        finetuned,
        page.training,
        read_seconds(run_dir),
        (*page.notes, *licences),
    )
    write_json(directory / SUMMARY, summary)  # with it the evaluation is done
    shutil.rmtree(directory / PLAYED)


def _watched(system: LoadedSystem, place: str) -> dict[str, Any] | None:
    """Returns how often a held-out judge looked at a run, and which step its alarm kept, if any.

    None without a judge.
    """
    raw = system.assets.get(checkpoint.ANCHOR, b"{}")
    where = f"{checkpoint.ANCHOR} of {place}"
    return json_from(raw, where, WATCHED, "restore a copy, or finetune it again").get("watched")


def _summary(path: Path) -> dict[str, Any]:
    """Returns what an earlier evaluation wrote, {} if there is none.

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
    for name, each in summary["rewards"].items():
        for which, figure in each.items():
            print(f"{name:>16} {which:>12}  {printed(figure, 4, sign='+')}")
    for pair in summary.get("pairs", ()):
        rate = f"win rate {printed(pair['win_rate'], 1, 100)}"
        if "win" in pair:
            votes = " / ".join(f"{100 * pair[side]:.1f}" for side in ("win", "tie", "loss"))
            rate = f"win / tie / loss {votes}, {rate} %"
        print(f"{pair['first']:>16} {'- ' + pair['second']:>12}  {rate} by simulated listeners")
    kls = ", ".join(f"{name} {printed(kl, 2)}" for name, kl in summary["kl"].items())
    print(f"KL to the base in nats a clip: {kls}; page: {summary['page']}")
