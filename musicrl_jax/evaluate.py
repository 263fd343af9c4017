"""The judge: policies side by side on prompts that nothing was trained on. Rewards, what simulated listeners prefer,
how far each policy went, and a page to listen to.

Legend: P prompts, S clips (seeds) a prompt, R raters, B clips of a batch, N samples, F frames, K codes in a frame,
D width of the semantic features, M measurements.
"""

import dataclasses
import functools
import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from musicrl_jax.arena.audience import Audience, Hearing
from musicrl_jax.arena.listeners import MEASUREMENTS
from musicrl_jax.arena.monitor import RULE
from musicrl_jax.core import checkpoint, extras, hosts, lock
from musicrl_jax.core.files import kept, provide_caches, read_json, set_aside, write_json
from musicrl_jax.core.keys import row_keys, step_key
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.statistics import (
    LEAST_INTERVAL,
    frechet_distance,
    mean_interval,
    mean_pairwise_distance,
    printed,
    ratio_interval,
    too_small,
)
from musicrl_jax.inputs import pieces
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.losses.policy_gradient import full_kl
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder
from musicrl_jax.models.tokens import FRAMES_PER_SECOND
from musicrl_jax.rl import rollout as rollouts
from musicrl_jax.rl.rewards import Mixture
from musicrl_jax.rl.sample import Sampling, log_probs
from musicrl_jax.run import read_seconds

LEAST_SPREAD = 1e-3  # of a feature over real clips; one that never moves is not blown up
TOTAL, OPINION = "reward", "opinion"  # the mixture's name among the scores, and that of the raters' mean
SUMMARY, SCORES, PLAYED = "summary.json", "scores.npz", "played"
# The kind of what a finetuned policy says of its held-out judge.
WATCHED = {"watched?": (dict, type(None))}
Found = dict[str, np.ndarray]


@lock.holds("model_dir")
def evaluate(
    model_dir: str,
    run_dir: str,
    policies: Mapping[str, str],
    fine: str,
    codec: str,
    mulan: str,
    semantic: str,
    rewards: Mixture,
    prompts: Prompts,
    clips: Clips,
    training: tuple[str, ...],
    notes: tuple[str, ...],
    clip_seconds: float,
    audience: Audience | None = None,
    raters: int = 3,
    best_of: int = 1,
    temperature: float = 0.99,
    top_k: int | None = None,
    count: int = 64,
    seeds: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    shown: int = 8,
    worst: int = 4,
) -> dict[str, Any]:
    """Compares policies on the same held-out prompts; writes summary, scores and page, and returns the summary.

    As in MusicRL (section 5), every rater gives the clips of a prompt 1 to 5 points; a policy wins a pair where its
    clip has more, and its win rate is wins / (wins + losses). The raters are *simulated listeners*: `audience`'s.
    Beside them and the rewards stand figures that nothing was trained on: the KL to the base, as a whole, by code of a
    frame and by second; diversity, the mean distance between the semantic features of two clips; the Frechet distance
    between those of generated and of real held-out clips, frame by frame.

    Args:
      model_dir: where summary, scores and page go; left alone where they are there, for the same models and settings.
      run_dir: the folder of the whole run, for its name and its stages' times.
      policies: the folder of each policy by its name; the first is the base.
      fine, codec, mulan, semantic: folders of the other models.
      rewards: the terms to measure, and the mixture that best-of-n chooses by.
      prompts: the first `count` of the 'test' split are used; none of them was trained on.
      clips: real clips, 'test' split, for the Frechet distance and as what the raters compare with.
      training: folders whose metrics are drawn on the page.
      notes: honest words for the page.
      clip_seconds, temperature, top_k: as in training.
      audience: who judges; None leaves out all that needs listeners.
      raters: R, listeners that rate each prompt's clips, different ones for every prompt and seed.
      best_of: if above 1, a further entry: of so many clips of the base the one with the highest reward.
      count: P, held-out prompts, or all where there are fewer.
      seeds: S, clips a prompt and policy.
      batch_size: clips at a time.
      seed: of the sampling and the raters; streams of their own, apart from training's.
      shown, worst: prompts on the page: the first ones, and those that lost most.

    Returns:
      What `report.comparison.write_comparison` says of its summary.
    """
    extras.check("the page", "report", "jinja2", "matplotlib")
    provide_caches()
    from musicrl_jax.report.comparison import write_comparison  # drawing is an extra; training hosts go without

    if len(policies) < 2 and best_of < 2:
        raise ValueError(f"evaluate.policies has {len(policies)}: nothing to compare the first with; name another")
    if audience is not None and not 1 <= raters <= audience.panel.size:
        raise ValueError(f"evaluate.raters={raters} must be from 1 to the panel's size, {audience.panel.size}")
    if min(count, seeds, batch_size) < 1:
        raise ValueError(f"evaluate: count={count}, seeds={seeds} and batch_size={batch_size} must be 1 or more")
    directory = Path(model_dir)
    base = next(iter(policies))
    loaded = {name: rollouts.load(folder, fine, codec, mulan) for name, folder in policies.items()}
    if audience is not None:
        audience.check(loaded[base].studio.sample_rate_hz)
    mixture = rewards.load()
    mixture.check_models(loaded[base])
    listener = checkpoint.load_model(semantic, SemanticConfig)
    others = {name: value for name, value in loaded[base].hashes.items() if name != "policy"}
    hashes = {**others, "semantic": listener.hash, **mixture.hashes}
    if taken := sorted({*hashes, "real", "real clips", f"best of {best_of}"} & set(policies)):
        raise ValueError(f"evaluate.policies: {taken[0]!r} is the name of something else on the page; choose another")
    identity = {
        "hashes": {**{name: found.hashes["policy"] for name, found in loaded.items()}, **hashes},
        "policies": list(policies),  # the first is the base
        "settings": [clip_seconds, temperature, top_k, count, seeds, seed, shown, worst, raters, best_of],
        "data": checkpoint.describe([rewards, prompts, clips, audience, notes]),
    }
    done = directory / SUMMARY
    if (summary := _summary(done)).get("identity") == identity:
        print(f"{directory}: evaluated already")
        shutil.rmtree(directory / PLAYED, ignore_errors=True)  # of a run that was killed just before its end
        _print(summary)
        return summary

    asked = prompts.unique("test")[:count]
    if len(asked) < 2:
        raise ValueError(f"prompts: {len(asked)} held-out prompts that training did not see; an interval needs more")
    if len(asked) < count:
        print(f"only {len(asked)} held-out prompts exist, not {count}")
        count = len(asked)
    hearing = None if audience is None else audience.load()
    bench = _Bench(
        loaded[base],
        mixture,
        listener,
        hearing,
        tuple(asked),
        pieces.encode(loaded[base].vocabulary, asked, prompts.text_length),
        loaded[base].studio.frames(clip_seconds),
        Sampling(temperature, top_k),
        seeds,
        batch_size,
        seed,
    )
    directory.mkdir(parents=True, exist_ok=True)
    print(f"{directory}: {count} prompts, {seeds} clips of each by {', '.join(policies)}")

    def play(name: str, *how: Any) -> Found:
        return kept(directory / PLAYED, name, identity, lambda: bench.play(name, *how))

    results = {name: play(name, found.policy) for name, found in loaded.items()}
    units = mixture.units({name: x.ravel() for name, x in _terms(mixture, results[base]).items()})
    for result in results.values():
        mixture.check(_terms(mixture, result))
        result[TOTAL] = np.asarray(mixture.total(_terms(mixture, result), units))
    if best_of > 1:
        results[f"best of {best_of}"] = play(f"best of {best_of}", loaded[base].policy, best_of, units)
    real, real_wavs, real_prompts = _real(clips, listener, batch_size, count if hearing is not None else 0)

    names = [TOTAL, *mixture.models]
    went = {name: folder for name, folder in policies.items() if name != base}
    summary = {
        "policies": list(results),
        **_figures(results, names, base, list(went), real, seed),
        "watched": {name: _watched(folder) for name, folder in went.items()},
        "rule": RULE,
        "seeds": seeds,
        "seed": seed,
        "page": str(directory / "page.html"),
        "checkpoint": str(list(policies.values())[-1]),
        "identity": identity,
    }
    if hearing is not None:
        summary |= _opinions(hearing, results, hearing.measure(real_wavs, real_prompts), raters, seed)

    gains = np.min(
        [results[name][TOTAL][:, 0] - results[base][TOTAL][:, 0] for name in results if name != base], axis=0
    )
    best = list(range(min(shown, count)))
    lost = [int(row) for row in np.argsort(gains, kind="stable")[:worst] if gains[row] < 0]
    heard = {row: {name: _float(result["heard"][row]) for name, result in results.items()} for row in {*best, *lost}}
    for name, folder in went.items():  # the last weights of a run that kept earlier ones
        if checkpoint.has_model(last := Path(folder) / rollouts.LAST):
            policy = checkpoint.load_model(last, MusicLMConfig).variables["params"]
            for row, clips_of in heard.items():
                clips_of[f"{name}, last"] = bench.clip(policy, row)

    scores = {which: {n: r[n] for n in (*names, OPINION) if n in r} for which, r in results.items()}
    licences = clips.licences()
    further = ("measured", "ratings", "kl")
    np.savez_compressed(
        directory / SCORES,
        prompts=np.array(asked),
        measurements=np.array(MEASUREMENTS),
        **{f"{which}/{n}": x for which, each in scores.items() for n, x in each.items()},
        **{f"{which}/{n}": r[n] for which, r in results.items() for n in further if n in r},
    )
    write_comparison(
        directory / "page.html",
        summary,
        asked,
        [(row, heard[row]) for row in best],
        [(row, heard[row]) for row in lost],
        scores,
        bench.base.studio.sample_rate_hz,
        run_dir,
        went,
        training,
        read_seconds(run_dir),
        (*notes, *(f"Real clips are of {name}: {licence} None is on this page." for name, licence in licences.items())),
    )
    write_json(done, summary)
    shutil.rmtree(directory / PLAYED)
    _print(summary)
    return summary


@dataclasses.dataclass(frozen=True, eq=False)
class _Bench:
    """Where every policy plays the same prompts with the same noise, and all is measured on what it played.

    Attributes:
      base: the models; its policy is what KL is measured to.
      mixture: the rewards, loaded.
      listener: the semantic encoder.
      hearing: what simulated listeners hear; None leaves their measurements out.
      asked: P prompts.
      text: int32 [P, L], their pieces.
      frames: F.
      sampling: of the policies.
      seeds: S.
      batch_size: B.
      seed: of the sampling.
    """

    base: rollouts.Loaded
    mixture: Any
    listener: checkpoint.Model
    hearing: Hearing | None
    asked: tuple[str, ...]
    text: np.ndarray
    frames: int
    sampling: Sampling
    seeds: int
    batch_size: int
    seed: int

    def play(self, name: str, policy: Any, draws: int = 1, units: dict[str, Any] | None = None) -> Found:
        """All prompts, all seeds, of `draws` clips each the one with the highest reward.

        Returns:
          Arrays [P, S, ...]; of 'heard', int16 [P, N], and 'features', [P, F, D], the first seed's alone.
        """
        count, batch_size, rows = len(self.asked), self.batch_size, self._rows()
        found = []
        for first in Progress(range(0, len(rows), batch_size), name, len(rows) // batch_size):
            best = None
            for draw in range(draws):
                part = self._batch(policy, first, draw if draws == 1 else 1 + draw)  # best-of-n has clips of its own
                if draws > 1:
                    part[TOTAL] = np.asarray(self.mixture.total(_terms(self.mixture, part), units))
                    part = part if best is None else _better(best, part)
                best = part
            wav = best.pop("wav")
            if self.hearing is not None:
                here = rows[first : first + batch_size]
                best["measured"] = self.hearing.measure(wav, [self.asked[row] for row in here])
            best["heard"] = np.rint(np.clip(wav, -1, 1) * 32767).astype(np.int16)
            if first >= count:  # pictures of one clip a prompt are enough
                del best["heard"], best["features"]
            found.append(best)
        joined = {key: np.concatenate([part[key] for part in found if key in part]) for key in found[0]}
        once = {key: joined.pop(key)[:count] for key in ("heard", "features")}
        clips = self.seeds * count
        shaped = {key: x[:clips].reshape(self.seeds, count, *x.shape[1:]) for key, x in joined.items()}
        return {key: x.swapaxes(0, 1) for key, x in shaped.items()} | once

    def clip(self, policy: Any, row: int) -> np.ndarray:
        """f32 [N]: what the policy plays for a prompt with the first seed."""
        first = row // self.batch_size * self.batch_size
        return self._batch(policy, first, 0)["wav"][row - first]

    def _rows(self) -> np.ndarray:
        """The prompt of each clip, seed by seed; the last batch is filled up."""
        rows = np.tile(np.arange(len(self.asked)), self.seeds)
        return np.pad(rows, (0, -len(rows) % self.batch_size))

    def _batch(self, policy: Any, first: int, draw: int) -> Found:
        here = self._rows()[first : first + self.batch_size]
        keys = row_keys(step_key(self.seed, draw, stream=4), self.batch_size, first)
        weights = (policy, self.base.policy, self.base.frozen, self.mixture.variables, self.listener.variables)
        return jax.device_get(self._measure(*weights, self.text[here], keys))

    @functools.partial(jax.jit, static_argnums=0)
    def _measure(
        self, policy: Any, anchor: Any, frozen: Any, scorers: Any, ears: Any, text: jax.Array, keys: jax.Array
    ) -> dict[str, jax.Array]:
        """One batch of rollouts with all that is measured on them."""
        studio, sampling = self.base.studio, self.sampling
        rollout = studio.rollout(policy, frozen, text, keys, self.frames, sampling)
        ours = log_probs(studio.musiclm, policy, rollout.tokens, rollout.mulan, sampling, rollout.allowed)
        theirs = log_probs(studio.musiclm, anchor, rollout.tokens, rollout.mulan, sampling, rollout.allowed)
        kl = full_kl(ours, theirs)  # [B, F, K]
        by_second = jnp.pad(kl.sum(axis=2), ((0, 0), (0, -self.frames % FRAMES_PER_SECOND)))
        return {
            "wav": rollout.wav,
            **self.mixture.score(scorers, rollout),
            "kl": kl.sum(axis=(1, 2)),
            "kl_by_level": kl.sum(axis=1),
            "kl_by_second": by_second.reshape(len(kl), -1, FRAMES_PER_SECOND).sum(axis=2),
            "features": SemanticEncoder(self.listener.config).apply(ears, rollout.wav, method="features"),
        }


def _figures(
    results: dict[str, Found], names: list[str], base: str, went: list[str], real: np.ndarray, seed: int
) -> dict[str, Any]:
    """What was measured without listeners: means over seeds first, then intervals over prompts."""
    per_prompt = {name: {which: result[name].mean(axis=1) for which, result in results.items()} for name in names}
    # Semantic features, each dimension in units of its spread over real clips.
    centre, spread = real.mean(axis=(0, 1)), np.maximum(real.std(axis=(0, 1)), LEAST_SPREAD)
    felt = {name: result["features"] for name, result in results.items()} | {"real": real}
    felt = {name: (features - centre) / spread for name, features in felt.items()}  # [clips, F, D]
    few = too_small(len(next(iter(results.values()))["kl"]), LEAST_INTERVAL)  # prompts

    def unless_few(figures: dict[str, float]) -> dict[str, Any]:
        return {name: {"too_small": few} for name in figures} if few else figures

    return {
        "rewards": {n: {which: mean_interval(x, seed) for which, x in each.items()} for n, each in per_prompt.items()},
        "gains": {
            n: {which: mean_interval(x - each[base], seed) for which, x in each.items() if which != base}
            for n, each in per_prompt.items()
        },
        "kl": {name: mean_interval(results[name]["kl"].mean(axis=1), seed) for name in went},
        **{
            by: {} if few else {name: results[name][by].mean(axis=(0, 1)).tolist() for name in went}
            for by in ("kl_by_level", "kl_by_second")
        },
        "diversity": unless_few(
            {name: mean_pairwise_distance(features.mean(axis=1)) for name, features in felt.items()}
        ),
        "frechet": unless_few(
            {name: frechet_distance(*(np.concatenate(felt[which]) for which in (name, "real"))) for name in results}
        ),
    }


def _float(wav: np.ndarray) -> np.ndarray:
    return wav.astype(np.float32) / 32767


def _terms(mixture: Any, found: Found) -> Found:
    return {name: found[name] for name in mixture.models}


def _better(one: Found, other: Found) -> Found:
    """Clip by clip the one with the higher reward."""
    wins = other[TOTAL] > one[TOTAL]
    return {key: np.where(wins.reshape(-1, *[1] * (x.ndim - 1)), other[key], x) for key, x in one.items()}


def _watched(folder: str) -> dict[str, Any] | None:
    """How often a held-out judge looked at a run, and which step was kept for its alarm, if any; None without one."""
    told = checkpoint.load_model(folder, MusicLMConfig).json_asset(checkpoint.ANCHOR, WATCHED, default={})
    return told.get("watched")


def _opinions(hearing: Hearing, results: dict[str, Found], real: np.ndarray, raters: int, seed: int) -> dict[str, Any]:
    """What the panel says of all clips, and of real ones; puts ratings [P, S, R] and opinion [P, S] into results."""
    panel = hearing.panel
    rng = np.random.default_rng([seed, 7])
    measured = {name: result["measured"] for name, result in results.items()}
    shape = next(iter(measured.values())).shape[:2]
    who = np.stack([rng.permutation(panel.size)[:raters] for _ in range(shape[0] * shape[1])]).reshape(*shape, raters)
    asks = np.arange(shape[0])[:, None, None] + np.zeros_like(who)  # which prompt each rating is of
    for result in results.values():
        worth = panel.utilities(result["measured"].reshape(-1, real.shape[1])).reshape(-1, *shape)  # [L, P, S]
        result["ratings"] = panel.rate(np.take_along_axis(np.moveaxis(worth, 0, 2), who, axis=2), rng)
        result[OPINION] = result["ratings"].mean(axis=2)
    flat = (asks.ravel(), who.ravel())
    pairs, same, decided = [], 0, 0
    for first, second in itertools.combinations(reversed(results), 2):
        gap = results[first]["ratings"] - results[second]["ratings"]
        win, loss = gap > 0, gap < 0
        means = gap.mean(axis=(1, 2))  # a prompt's ratings belong together
        pair = {
            "first": first,
            "second": second,
            "win_rate": ratio_interval(win.ravel(), (win | loss).ravel(), *flat),
        }
        if "too_small" not in pair["win_rate"]:
            pair |= {
                "win": float(win.mean()),
                "tie": float((gap == 0).mean()),
                "loss": float(loss.mean()),
                "wilcoxon_p": float(scipy.stats.wilcoxon(means).pvalue) if np.any(means) else 1.0,
            }
        pairs.append(pair)
        sides = np.sign(gap)
        for one, other in itertools.combinations(range(raters), 2):
            both = (sides[..., one] != 0) & (sides[..., other] != 0)
            decided, same = decided + both.sum(), same + (both & (sides[..., one] == sides[..., other])).sum()
    listeners = np.tile(np.arange(panel.size), (len(real), 1))
    rated = panel.rate(panel.utilities(real).T, rng)  # every listener, each real clip
    clips = np.arange(len(real))[:, None] + np.zeros_like(listeners)
    return {
        "panel": {
            "name": panel.name,
            "listeners": panel.size,
            "raters": raters,
            "agreement": too_small(shape[0], LEAST_INTERVAL) or (float(same / decided) if decided else None),
            "measurements": [name for name in MEASUREMENTS if panel.weights.get(name)],
        },
        "mos": {
            name: ratio_interval(result["ratings"].ravel(), np.ones(who.size), *flat)
            for name, result in results.items()
        },
        "pairs": pairs,
        "real": {
            "clips": len(real),
            "mos": ratio_interval(rated.ravel(), np.ones(rated.size), clips.ravel(), listeners.ravel()),
            "measurements": dict(zip(MEASUREMENTS, real.mean(axis=0).tolist(), strict=True)),
        },
        "measurements": {
            name: dict(zip(MEASUREMENTS, each.mean(axis=(0, 1)).tolist(), strict=True))
            for name, each in measured.items()
        },
    }


def _summary(path: Path) -> dict[str, Any]:
    """Returns what an earlier evaluation wrote, {} if there is none; a damaged file is set aside and made again."""
    if not os.path.lexists(path):
        return {}
    try:
        figures = {"rewards": {str: {str: dict}}, "kl": {str: dict}, "page": str, "identity": dict}
        return read_json(path, {**figures, "pairs?": [{"first": str, "second": str, "win_rate": dict}]})
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


def _real(
    clips: Clips, listener: checkpoint.Model, batch_size: int, count: int
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Semantic features of the real test clips, [clips, F, D]; the first `count` of them, f32 [count, N], and their
    captions."""
    features = jax.jit(lambda v, wav: SemanticEncoder(listener.config).apply(v, wav, method="features"))
    found, wavs, asked = [], [], []
    clips = dataclasses.replace(clips, with_captions=True)
    for batch in clips.batches("test", batch_size, seed=0, epochs=1):
        hosts.stop_point()
        missing = batch_size - len(batch["audio"])
        wav = jnp.pad(batch["audio"], ((0, missing), (0, 0)))
        found.append(np.asarray(features(listener.variables, wav))[: batch_size - missing])
        if len(wavs) < count:
            wavs += list(batch["audio"])
            asked += list(batch["caption"])
    return np.concatenate(found), np.asarray(wavs[:count]), asked[:count]
