"""The figures of a comparison of systems: automatic metrics, and the ratings of a panel.

Legend: P prompts, S clips (seeds) a prompt, R raters, L listeners, F frames of the features, D
their width, M measurements.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from musicrl_jax.arena.listeners import MEASUREMENTS, Panel
from musicrl_jax.core.statistics import (
    LEAST_INTERVAL,
    frechet_distance,
    mean_interval,
    mean_pairwise_distance,
    ratio_interval,
    too_small,
)

OPINION = "opinion"  # name of the mean rating among the scores
LEAST_SPREAD = 1e-3  # of a feature over real clips, so that constant features are not amplified
Arrays = dict[str, np.ndarray]


def automatic_metrics(
    results: Mapping[str, Arrays],
    names: Sequence[str],
    finetuned: Sequence[str],
    real: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Returns rewards, gains, KLs, diversity and Frechet distances, with intervals over prompts.

    Args:
      results: arrays of each system, the base first: the scores, 'kl', 'kl_by_level' and
        'kl_by_second' [P, S, ...], and 'features' [P, F, D].
      names: names of the scores.
      finetuned: names of the systems whose KL to the base is reported.
      real: features of real clips, [clips, F, D].
      seed: seed of the bootstrap.
    """
    # Scores, and their gains over the base: means over seeds.
    base, rewards, gains = next(iter(results)), {}, {}
    for name in names:
        means = {system: result[name].mean(axis=1) for system, result in results.items()}
        rewards[name] = {system: mean_interval(x, seed) for system, x in means.items()}
        base_mean = means.pop(base)
        gains[name] = {system: mean_interval(x - base_mean, seed) for system, x in means.items()}

    # Features, each dimension in units of its spread over real clips: [clips, F, D].
    centre, spread = real.mean(axis=(0, 1)), np.maximum(real.std(axis=(0, 1)), LEAST_SPREAD)
    features = {name: result["features"] for name, result in results.items()} | {"real": real}
    features = {name: (each - centre) / spread for name, each in features.items()}
    frames = {name: np.concatenate(each) for name, each in features.items()}
    diversity = {name: mean_pairwise_distance(each.mean(axis=1)) for name, each in features.items()}
    frechet = {name: frechet_distance(frames[name], frames["real"]) for name in results}

    # Figures of too few prompts are replaced by words.
    few = too_small(len(results[base]["kl"]), LEAST_INTERVAL)
    if few:
        diversity = {name: {"too_small": few} for name in diversity}
        frechet = {name: {"too_small": few} for name in frechet}
    kl = {}
    for by in ("kl_by_level", "kl_by_second"):
        means = {name: results[name][by].mean(axis=(0, 1)).tolist() for name in finetuned}
        kl[by] = {} if few else means
    return {
        "rewards": rewards,
        "gains": gains,
        "kl": {name: mean_interval(results[name]["kl"].mean(axis=1), seed) for name in finetuned},
        **kl,
        "diversity": diversity,
        "frechet": frechet,
    }


def opinions(
    panel: Panel, results: Mapping[str, Arrays], real: np.ndarray, raters: int, seed: int
) -> dict[str, Any]:
    """Returns a panel's ratings of all clips.

    Args:
      panel: the listeners.
      results: arrays of each system. 'measured' [P, S, M] is read; 'ratings' [P, S, R] and OPINION
        [P, S] are added.
      real: measurements of real clips, [clips, M].
      raters: R, listeners that rate a clip.
      seed: seed of the ratings.
    """
    # The raters of a prompt and seed rate the clips of all systems.
    rng = np.random.default_rng([seed, 7])
    shape = next(iter(results.values()))["measured"].shape[:2]
    clips = shape[0] * shape[1]
    chosen = np.stack([rng.permutation(panel.size)[:raters] for _ in range(clips)])
    chosen = chosen.reshape(*shape, raters)
    for result in results.values():
        utilities = panel.utilities(result["measured"].reshape(clips, -1)).reshape(-1, *shape)
        utilities = np.moveaxis(utilities, 0, 2)  # [P, S, L]
        result["ratings"] = panel.rate(np.take_along_axis(utilities, chosen, axis=2), rng)
        result[OPINION] = result["ratings"].mean(axis=2)

    # Mean ratings, and preferences between pairs of systems.
    rows = np.arange(shape[0])[:, None, None] + np.zeros_like(chosen)  # a rating's prompt
    places = (rows.ravel(), chosen.ravel())
    ratings = {name: result["ratings"] for name, result in results.items()}
    mos = {
        name: ratio_interval(each.ravel(), np.ones(each.size), *places)
        for name, each in ratings.items()
    }
    pairs, agreement = _pairs(ratings, places)

    # Real clips, which every listener rates.
    rated = panel.rate(panel.utilities(real).T, rng)  # [clips, L]
    rows, columns = (index.ravel() for index in np.indices(rated.shape))
    return {
        "panel": {
            "name": panel.name,
            "listeners": panel.size,
            "raters": raters,
            "agreement": too_small(shape[0], LEAST_INTERVAL) or agreement,
            "measurements": [name for name in MEASUREMENTS if panel.weights.get(name)],
        },
        "mos": mos,
        "pairs": pairs,
        "real": {
            "clips": len(real),
            "mos": ratio_interval(rated.ravel(), np.ones(rated.size), rows, columns),
            "measurements": _by_measurement(real.mean(axis=0)),
        },
        "measurements": {
            name: _by_measurement(result["measured"].mean(axis=(0, 1)))
            for name, result in results.items()
        },
    }


def _by_measurement(values: np.ndarray) -> dict[str, float]:
    """Returns values [M] by name."""
    return dict(zip(MEASUREMENTS, values.tolist(), strict=True))


def _pairs(
    ratings: Mapping[str, np.ndarray], places: tuple[np.ndarray, np.ndarray]
) -> tuple[list[dict[str, Any]], float | None]:
    """Returns the figures of each pair of systems, and how often two raters with a choice agree.

    Args:
      ratings: [P, S, R] by system.
      places: prompt and rater of each rating.
    """
    # The first of a pair is the later system.
    pairs, same, decided = [], 0, 0
    for first, second in itertools.combinations(reversed(ratings), 2):
        # The win rate is among ratings that differ.
        gap = ratings[first] - ratings[second]
        win, loss = gap > 0, gap < 0
        rate = ratio_interval(win.ravel(), (win | loss).ravel(), *places)
        pair = {"first": first, "second": second, "win_rate": rate}
        if "too_small" not in rate:
            means = gap.mean(axis=(1, 2))  # a prompt's ratings belong together
            pair |= {
                "win": float(win.mean()),
                "tie": float((gap == 0).mean()),
                "loss": float(loss.mean()),
                "wilcoxon_p": float(scipy.stats.wilcoxon(means).pvalue) if np.any(means) else 1.0,
            }
        pairs.append(pair)

        # Agreement of all pairs of raters.
        sides = np.sign(gap)
        for one, other in itertools.combinations(range(gap.shape[2]), 2):
            both = (sides[..., one] != 0) & (sides[..., other] != 0)
            same += (both & (sides[..., one] == sides[..., other])).sum()
            decided += both.sum()
    return pairs, float(same / decided) if decided else None
