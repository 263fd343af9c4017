r"""Measures how well preference models predict votes on held-out pairs.

    python tests/benchmarks/preference.py --run runs/demo --data_dir runs/data \
        --dataset score_clips/demo --ablations scratch no_text crop_1_2 crop_1_4 crop_3_20

Each row is a model, or text adherence or acoustic quality alone. Its columns are: accuracy over the
votes that are no ties, with a 95 % bootstrap interval over prompts; the expected calibration error
of the predicted probability, in ten bins of equal size; Bradley-Terry's loss, which is ln 2 = 0.693
nats without knowledge; and accuracy by the instrument family of the prompt. The scale of a single
reward is fitted to training votes first.

Below are how often two voters agree on a pair, and the highest possible accuracy given who the
voters are, if `musicrl collect` recorded it. A model that was trained on crops gets one random crop
of each clip.

It takes two minutes on two CPU cores for 300 pairs of 5 s and six models.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from scipy.special import expit

from musicrl_jax.core import checkpoint
from musicrl_jax.core.files import read_json
from musicrl_jax.core.statistics import LEAST_INTERVAL, mean_interval, printed, too_small
from musicrl_jax.inputs import pieces, tokens
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.inputs.votes import CHOICES, Votes
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.rewards import PreferenceConfig, Quality, QualityConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.objectives.preference import PreferenceObjective

BATCH = 10
FITTED_ON = 300  # pairs of the training split, for the factor of a single reward
CROPS = {"crop_1_2": 0.5, "crop_1_4": 0.25, "crop_3_20": 0.15}  # as in gin/ablations/


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of a split, and the votes on them.

    Attributes:
      clips: 'semantic' i32 [P, 2, F], 'acoustic' i32 [P, 2, T, Q], 'mulan' i32 [P, M].
      prompts: [P].
      pair, share: [V], which pair each vote is on and what share of it the first clip gets.
    """

    clips: dict[str, np.ndarray]
    prompts: list[str]
    pair: np.ndarray
    share: np.ndarray


def read_pairs(votes: Votes, split: str, limit: int | None = None) -> Pairs:
    """Reads the first `limit` pairs that have a vote; all if it is None."""
    records = {record["id"].decode(): record for record in tokens.read(votes.directory, split)[0]}
    cast = votes.votes(split)
    places = {
        key: place
        for place, key in enumerate(list(dict.fromkeys((vote.a, vote.b) for vote in cast))[:limit])
    }
    cast = [vote for vote in cast if (vote.a, vote.b) in places]
    clips = {
        name: np.stack([[records[a][name], records[b][name]] for a, b in places])
        for name in ("semantic", "acoustic")
    }
    clips["mulan"] = np.stack([records[a]["mulan"] for a, _ in places])
    pair = np.array([places[vote.a, vote.b] for vote in cast])
    return Pairs(
        clips,
        [records[a]["caption"].decode() for a, _ in places],
        pair,
        np.array([CHOICES[vote.vote] for vote in cast]),
    )


def in_batches(function: Callable, pairs: Pairs) -> np.ndarray:
    """Computes function(batch of pairs, rows, number of the batch), [B], over all pairs.

    The last batch is filled up with the first pairs.
    """
    count, results = len(pairs.prompts), []
    for number, first in enumerate(range(0, count, BATCH)):
        rows = np.arange(first, first + BATCH) % count
        results.append(
            np.asarray(
                function({name: part[rows] for name, part in pairs.clips.items()}, rows, number)
            )
        )
    return np.concatenate(results)[:count]


def model_margin(folder: Path, votes: Votes, crop: float) -> Callable[[Pairs], np.ndarray]:
    """Returns a function from pairs to the margins of a preference model, [P]."""
    model = checkpoint.load_model(folder, PreferenceConfig)
    objective = PreferenceObjective(model.config, votes, crop=crop)
    margin = jax.jit(objective.margin)
    params = model.variables["params"]
    return lambda pairs: in_batches(
        lambda batch, _, number: margin(params, batch, jax.random.key(number)), pairs
    )


def calibration_error(chances: np.ndarray, outcomes: np.ndarray, bins: int = 10) -> float:
    """Returns the expected calibration error.

    It is the distance between the mean chance and the mean outcome, averaged over bins of equal
    size. Values with the same chance are in one bin.

    Args:
      chances: f64 [n], predicted.
      outcomes: f64 [n], in [0, 1].
      bins: number of bins.
    """
    _, place = np.unique(chances, return_inverse=True)
    ranks = np.cumsum(np.bincount(place)) - np.bincount(place)  # of the first value at each level
    bin_of = (ranks * bins // len(chances))[place]
    return float(
        sum(abs(np.sum((chances - outcomes)[bin_of == b])) for b in range(bins)) / len(chances)
    )


def reward_margins(run: Path) -> Callable[[Pairs], dict[str, np.ndarray]]:
    """Returns a function from pairs to how much better the first clip is by single rewards, [P].

    The rewards are text adherence and acoustic quality of the decoded clips.
    """
    codec = checkpoint.load_model(run / "codec", SoundStreamConfig)
    mulan = checkpoint.load_model(run / "mulan", MuLanConfig)
    quality = checkpoint.load_model(run / "quality", QualityConfig)

    @jax.jit
    def score(
        codec_v: dict, mulan_v: dict, quality_v: dict, acoustic: jax.Array, text: jax.Array
    ) -> jax.Array:
        acoustic = acoustic.reshape(-1, *acoustic.shape[2:])
        wav = SoundStream(codec.config).apply(codec_v, acoustic, method=SoundStream.decode)
        audio = MuLan(mulan.config).apply(mulan_v, wav, method=MuLan.embed_windows)
        text_embedding = jnp.repeat(
            MuLan(mulan.config).apply(mulan_v, text, method=MuLan.embed_text), 2, axis=0
        )
        adherence = jnp.sum(audio * text_embedding[:, None], axis=-1).mean(axis=1)
        mos = (Quality(quality.config).apply(quality_v, wav) - 1) / 4
        return jnp.stack([each[::2] - each[1::2] for each in (adherence, mos)], axis=1)

    def margins(pairs: Pairs) -> dict[str, np.ndarray]:
        text = pieces.encode(mulan.assets["vocabulary"], pairs.prompts, mulan.config.text_length)
        weights = codec.variables, mulan.variables, quality.variables
        pair_margins = in_batches(
            lambda batch, rows, _: score(*weights, batch["acoustic"], text[rows]), pairs
        )
        return {
            "text adherence alone": pair_margins[:, 0],
            "acoustic quality alone": pair_margins[:, 1],
        }

    return margins


def loss(margin: np.ndarray, share: np.ndarray) -> float:
    """Returns Bradley-Terry's loss in nats a vote."""
    return float(np.mean(np.logaddexp(0, -margin) * share + np.logaddexp(0, margin) * (1 - share)))


def row(name: str, margin: np.ndarray, pairs: Pairs, families: np.ndarray, shown: list[str]) -> str:
    """Returns a row of the table."""
    felt = margin[pairs.pair]
    decided = pairs.share != 0.5
    right = 0.5 * (1 + np.sign(felt) * np.sign(pairs.share - 0.5))[decided]
    prompts = np.unique(pairs.prompts, return_inverse=True)[1][pairs.pair][decided]
    figure = mean_interval(right, clusters=prompts)
    few = figure.get("too_small")
    cells = [
        printed(figure),
        few or f"{calibration_error(expit(felt), pairs.share):.3f}",
        few or f"{loss(felt, pairs.share):.3f}",
    ]
    for family in shown:
        its = families[pairs.pair][decided] == family
        its_prompts = len(np.unique(prompts[its]))
        cells.append(too_small(its_prompts, LEAST_INTERVAL) or f"{right[its].mean():.2f}")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--dataset", required=True, help="clips whose captions are the prompts")
    parser.add_argument(
        "--ablations", nargs="*", default=[], help="names of gin/ablations/ that were trained"
    )
    flags = parser.parse_args()
    votes = Votes(str(flags.run / "votes"))
    pairs, fitted = read_pairs(votes, "validation"), read_pairs(votes, "train", FITTED_ON)
    clips = Clips({flags.dataset: 1.0}, flags.data_dir, 16_000)
    known: dict[str, str] = {}
    for split in clips.splits():
        true = zip(clips.captions(split), clips.attributes(split).values(), strict=True)
        known |= {caption: attributes.get("family") or "unknown" for caption, attributes in true}
    families = np.array([known.get(prompt, "unknown") for prompt in pairs.prompts])
    names, counts = np.unique(families[pairs.pair], return_counts=True)
    shown = list(names[np.argsort(-counts)][:5])

    print(
        f"{len(pairs.pair)} votes on {len(pairs.prompts)} held-out pairs, "
        f"{len(set(pairs.prompts))} prompts"
    )
    print(f"| | accuracy | ECE | loss, nats a vote | {' | '.join(shown)} |")
    print("|---" * (4 + len(shown)) + "|")
    for name in ("", *flags.ablations):
        folder = flags.run / ("preference" + f"_{name}" * bool(name))
        margin = model_margin(folder, votes, CROPS.get(name, 1.0))(pairs)
        print(row(name or "preference model", margin, pairs, families, shown), flush=True)
    score = reward_margins(flags.run)
    ours, theirs = score(pairs), score(fitted)
    for name, margin in ours.items():
        fit = scipy.optimize.minimize_scalar(
            lambda k, m=theirs[name]: loss(k * m[fitted.pair], fitted.share)
        )
        print(row(name, fit.x * margin if fit.x > 0 else margin, pairs, families, shown))

    # How often voters agree, from pairs with several votes.
    by_pair = [pairs.share[pairs.pair == pair] for pair in range(len(pairs.prompts))]
    both = [
        (a, b)
        for cast in by_pair
        for i, a in enumerate(cast)
        for b in cast[:i]
        if 0.5 not in (a, b)
    ]
    if few := too_small(len(both), LEAST_INTERVAL):
        print(f"\nhow often two voters on one pair agree: {few}")
    else:
        print(
            f"\ntwo voters on one pair agree: {np.mean([a == b for a, b in both]):.3f} "
            f"of {len(both)}"
        )
    figures = flags.run / "votes/agreement.json"
    if figures.exists():
        agreement = read_json(figures, {"panel": str, "ceiling": {"validation": (float, str)}})
        ceiling = agreement["ceiling"]["validation"]
        words = ceiling if isinstance(ceiling, str) else f"{ceiling:.3f}"
        print(
            "highest possible accuracy without knowing who votes (simulated listeners of the "
            f"{agreement['panel']}): {words}"
        )


if __name__ == "__main__":
    main()
