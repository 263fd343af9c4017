r"""Probes semantic tokens for musical attributes, against averaged mels.

    python tests/benchmarks/semantic.py --semantic runs/demo/semantic --data_dir runs/data \
        --dataset score_clips/demo

Prints, for each representation of a clip, how well a linear model predicts the instrument
(accuracy), the tempo (R2 of the logarithm of the beats per minute) and the mode (area under the ROC
curve, since one clip in seven is minor; only clips of known mode). It also prints the gain of
tokens over averaged mels, alone and with their deviation and mean step. Brackets have 95 %
bootstrap intervals over pieces.

The column 'held out' is over the validation and test splits, whose pieces neither probe nor encoder
was trained on. The column 'across' is cross-validated over the pieces of the training split, which
the encoder was trained on, without these attributes. It has many times the clips.

Columns are standardised. The probe is a ridge regression of the tempo, or of an indicator for each
class. Its penalty is chosen by cross-validation over the pieces of the training split, once for
both columns.

A representation of tokens is a function of the clip's tokens and their centroids: 'bag' is the
square root of each token's frequency, 'repetitions' the share of frames t with the same token at
t + k, k = 1..64, and 'centroids' the mean, deviation and mean absolute step of the centroids.
Continuous features, which token models do not get, and a constant are shown beside them.

It takes about 20 minutes on one CPU core for 6,600 clips of 5 s.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from musicrl_jax.core import checkpoint
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.statistics import LEAST_INTERVAL, printed, too_small
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.models import kmeans
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder

BATCH = 50
LAGS = 64
PENALTIES = np.logspace(0, 5, 6)
FOLDS = 4
RESAMPLES = 500
MELS, MOMENTS = "mels: mean", "mels: mean, deviation, step"
TASKS = {"instrument": accuracy_score, "tempo": r2_score, "mode": roc_auc_score}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--semantic", required=True, help="folder of the trained semantic encoder")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument(
        "--dataset",
        required=True,
        help="clips whose attributes say instrument, mode, tempo and piece",
    )
    flags = parser.parse_args()
    # Representations of the clips.
    model = checkpoint.load_model(flags.semantic, SemanticConfig)
    data = Clips(
        {flags.dataset: 1.0}, flags.data_dir, model.config.sample_rate_hz, with_captions=True
    )
    train, train_attributes = read(data, ["train"], model)
    held_out, attributes = read(data, ["validation", "test"], model)
    print(f"{len(train_attributes)} clips to train probes, {len(attributes)} to test them")
    fit = kmeans.Fit(**{name: model.variables["kmeans"][name] for name in kmeans.Fit._fields})
    print(
        "tokens of the training clips: ",
        "  ".join(f"{name} {float(x):.4g}" for name, x in fit.usage().items()),
    )

    # Probe each attribute.
    for task, score in TASKS.items():
        truth, chosen = answers(task, train_attributes)
        truth_held_out, chosen_held_out = answers(task, attributes)
        pieces = np.array([clip["piece"] for clip in train_attributes])[chosen]
        pieces_held_out = np.array([clip["piece"] for clip in attributes])[chosen_held_out]
        if few := too_small(len(np.unique(pieces)), LEAST_INTERVAL):
            print(f"\n{task}: pieces to train probes {few}")
            continue
        print(
            f"\n{task}, {score.__name__}; held out: {len(truth_held_out)} clips; "
            f"across: {len(truth)} clips"
        )
        # Each representation alone.
        guesses_by_name = {}
        for name in train:
            guesses = probe(
                task, train[name][chosen], truth, pieces, held_out[name][chosen_held_out]
            )
            guesses_by_name[name] = guesses
            row = [interval(score, truth_held_out, [guesses[0]], pieces_held_out)]
            row.append(interval(score, truth, [guesses[1]], pieces))
            print(f"  {name:28}{train[name].shape[1]:6} columns  {'   '.join(row)}", flush=True)
        # Tokens against averaged mels.
        for name in (name for name in guesses_by_name if name.startswith("tokens")):
            for peer in (MELS, MOMENTS):
                row = [
                    interval(
                        score,
                        truth_held_out,
                        [guesses_by_name[name][0], guesses_by_name[peer][0]],
                        pieces_held_out,
                    )
                ]
                row.append(
                    interval(
                        score, truth, [guesses_by_name[name][1], guesses_by_name[peer][1]], pieces
                    )
                )
                print(f"  {name:28} less {peer:28} {'   '.join(row)}", flush=True)


def read(
    data: Clips, splits: list[str], model: checkpoint.Model
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Returns each representation of the clips, [clips, columns], and their attributes."""
    module = SemanticEncoder(model.config)

    @jax.jit
    def summary(variables: dict[str, Any], wav: jax.Array) -> dict[str, jax.Array]:
        mels = module.apply(variables, wav, method=SemanticEncoder.log_mels)  # [B, S, M]
        features = module.apply(variables, wav, method=SemanticEncoder.features)  # [B, F, D]
        tokens = module.apply(variables, wav, method=SemanticEncoder.tokens)  # [B, F]
        bag = jnp.sqrt(
            jax.vmap(lambda t: jnp.bincount(t, length=model.config.codes))(tokens).astype(
                jnp.float32
            )
        )
        lags = [
            (tokens[:, k:] == tokens[:, :-k]).astype(jnp.float32).mean(1)
            for k in range(1, min(LAGS + 1, tokens.shape[1]))
        ]
        centroids = moments(variables["kmeans"]["centroids"][tokens])
        return {
            "constant": jnp.zeros((len(wav), 1)),
            MELS: mels.mean(1),
            "mels: mean, deviation": moments(mels)[:, : 2 * mels.shape[-1]],
            MOMENTS: moments(mels),
            "tokens: bag": bag,
            "tokens: bag, repetitions": jnp.concatenate([bag, jnp.stack(lags, 1)], 1),
            "tokens: centroids, mean": centroids[:, : features.shape[-1]],
            "tokens: centroids": centroids,
            "tokens: centroids, repetitions": jnp.concatenate([centroids, jnp.stack(lags, 1)], 1),
            "features: mean": features.mean(1),
            "features: mean, deviation, step": moments(features),
        }

    # Read the clips batch by batch.
    parts, attributes = [], []
    for split in splits:
        known = data.attributes(split)
        batches = data.batches(split, BATCH, seed=0, epochs=1)
        for batch in Progress(batches, f"read {split}", -(-data.count(split) // BATCH)):
            parts.append(jax.device_get(summary(model.variables, batch["audio"])))
            attributes += [known[name] for name in batch["id"]]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, attributes


def moments(x: jax.Array) -> jax.Array:
    """Returns mean, standard deviation and mean absolute step over time: [B, S, D] -> [B, 3 D]."""
    return jnp.concatenate([x.mean(1), x.std(1), jnp.abs(jnp.diff(x, axis=1)).mean(1)], 1)


def answers(task: str, attributes: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the true values of a task, the rows of the clips for which they are known)."""
    if task == "tempo":
        return np.log2([clip["tempo_bpm"] for clip in attributes]), np.arange(len(attributes))
    chosen = np.array([at for at, clip in enumerate(attributes) if clip[task]])
    values = np.array([attributes[at][task] for at in chosen])
    return (values == "minor" if task == "mode" else values), chosen


def probe(
    task: str, x: np.ndarray, truth: np.ndarray, pieces: np.ndarray, held_out: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fits a linear model of a task.

    Returns its predictions (for the held-out clips, cross-validated for the clips of x): classes,
    scores or values.
    """
    model: BaseEstimator = Ridge()
    if task != "tempo":
        model = RidgeClassifier(class_weight="balanced" if task == "mode" else None)
    scoring = {"instrument": "accuracy", "mode": "roc_auc", "tempo": "r2"}[task]
    steps = Pipeline([("standardised", StandardScaler()), ("ridge", model)])
    search = GridSearchCV(steps, {"ridge__alpha": PENALTIES}, scoring=scoring, cv=GroupKFold(FOLDS))
    best = search.fit(x, truth, groups=pieces).best_estimator_
    method = "decision_function" if task == "mode" else "predict"
    across = cross_val_predict(best, x, truth, groups=pieces, cv=GroupKFold(FOLDS), method=method)
    return getattr(best, method)(held_out), across


def interval(score, truth: np.ndarray, guesses: list[np.ndarray], pieces: np.ndarray) -> str:
    """Returns a score of predictions with its 95 % interval over pieces.

    Of two predictions it is the difference, first minus second.
    """

    def value(rows: np.ndarray) -> float:
        scores = [score(truth[rows], guess[rows]) for guess in guesses]
        return scores[0] - sum(scores[1:])

    rng = np.random.default_rng(0)
    _, index = np.unique(pieces, return_inverse=True)
    if few := too_small(index.max() + 1, LEAST_INTERVAL):
        return few
    members = [np.flatnonzero(index == piece) for piece in range(index.max() + 1)]
    draws = []
    while len(draws) < RESAMPLES:
        rows = np.concatenate(
            [members[piece] for piece in rng.integers(len(members), size=len(members))]
        )
        if len(np.unique(truth[rows])) > 1:
            draws.append(value(rows))
    low, high = np.percentile(draws, [2.5, 97.5])
    return printed({"mean": value(np.arange(len(truth))), "low": low, "high": high}, sign="+")


if __name__ == "__main__":
    main()
