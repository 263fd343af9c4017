"""The figures of a comparison: what was measured of systems' clips, and what a panel prefers.

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

OPINION = "opinion"  # the raters' mean among the scores
LEAST_SPREAD = 1e-3  # of a feature over real clips; one that never moves is not blown up
Arrays = dict[str, np.ndarray]


def measured(
    results: Mapping[str, Arrays],
    names: Sequence[str],
    finetuned: Sequence[str],
    real: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Returns what was measured without listeners: of means over seeds, intervals over prompts.

    Args:
      results: of each system, the base first: the named scores, 'kl', 'kl_by_level' and
        'kl_by_second' [P, S, ...], and 'features' [P, F, D].
      names: of the scores.
      finetuned: names of systems whose distance to the base is told.
      real: features of real clips, [clips, F, D].
      seed: of the resampling.
    """
    base, rewards, gains = next(iter(results)), {}, {}
    for name in names:
        means = {which: result[name].mean(axis=1) for which, result in results.items()}
        rewards[name] = {which: mean_interval(x, seed) for which, x in means.items()}
        gains[name] = {
            which: mean_interval(x - means[base], seed)
            for which, x in means.items()
            if which != base
        }

    # Features, each dimension in units of its spread over real clips: [clips, F, D].
    centre, spread = real.mean(axis=(0, 1)), np.maximum(real.std(axis=(0, 1)), LEAST_SPREAD)
    features = {name: result["features"] for name, result in results.items()} | {"real": real}
    features = {name: (each - centre) / spread for name, each in features.items()}
    frames = {name: np.concatenate(each) for name, each in features.items()}
    diversity = {name: mean_pairwise_distance(each.mean(axis=1)) for name, each in features.items()}
    frechet = {name: frechet_distance(frames[name], frames["real"]) for name in results}

    # Of few prompts there are words in place of figures.
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
    """Returns what a panel says of all clips, and of real ones by their measurements [clips, M].

    Reads 'measured' [P, S, M] of the results; puts 'ratings' [P, S, R] and OPINION [P, S] there.
    """
    # Every clip is rated by the raters of its prompt and seed.
    rng = np.random.default_rng([seed, 7])
    measured = {name: result["measured"] for name, result in results.items()}
    shape = next(iter(measured.values())).shape[:2]
    clips = shape[0] * shape[1]
    chosen = np.stack([rng.permutation(panel.size)[:raters] for _ in range(clips)])
    chosen = chosen.reshape(*shape, raters)
    for result in results.values():
        utilities = panel.utilities(result["measured"].reshape(clips, -1)).reshape(-1, *shape)
        utilities = np.moveaxis(utilities, 0, 2)  # [P, S, L]
        result["ratings"] = panel.rate(np.take_along_axis(utilities, chosen, axis=2), rng)
        result[OPINION] = result["ratings"].mean(axis=2)
    rows = np.arange(shape[0])[:, None, None] + np.zeros_like(chosen)  # a rating's prompt
    places = (rows.ravel(), chosen.ravel())
    ratings = {name: result["ratings"] for name, result in results.items()}
    mos = {
        name: ratio_interval(each.ravel(), np.ones(each.size), *places)
        for name, each in ratings.items()
    }
    pairs, agreement = _pairs(ratings, places)

    # Every listener rates each real clip.
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
            name: _by_measurement(each.mean(axis=(0, 1))) for name, each in measured.items()
        },
    }


def _by_measurement(values: np.ndarray) -> dict[str, float]:
    return dict(zip(MEASUREMENTS, values.tolist(), strict=True))


def _pairs(
    ratings: Mapping[str, np.ndarray], places: tuple[np.ndarray, np.ndarray]
) -> tuple[list[dict[str, Any]], float | None]:
    """Returns the pairs of systems, and how often two raters who both choose agree.

    Args:
      ratings: [P, S, R] by system.
      places: prompt and rater of each rating.
    """
    pairs, same, decided = [], 0, 0
    for first, second in itertools.combinations(reversed(ratings), 2):
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
        sides = np.sign(gap)
        for one, other in itertools.combinations(range(gap.shape[2]), 2):
            both = (sides[..., one] != 0) & (sides[..., other] != 0)
            same += (both & (sides[..., one] == sides[..., other])).sum()
            decided += both.sum()
    return pairs, float(same / decided) if decided else None
