r"""Measures MuLan's retrieval on held-out pieces, against a ridge regression and chance.

    python tests/benchmarks/mulan.py --mulan runs/demo/mulan --pretrained runs/pretrained \
        --data_dir runs/data --dataset score_clips/demo

All test captions are ranked for each test clip, and all clips for each caption. Prints R@1, R@10
and the median rank with 95 % bootstrap intervals over pieces, and MuLan's gain over the ridge,
paired. The ridge predicts MiniLM's mean embedding of the caption, minus the mean over captions,
from musicnn's pooled features and penultimate layer, standardised. Its penalty is the one of 11
with the best R@10 on the validation split. Equal captions are never ranked against each other.

Below are the loss over the whole split, beside ln(clips), which is chance; how often the tokens of
a caption and of its clip agree, and the cosine of their quantized embeddings; and the same for
captions of other clips.

It takes about eight minutes on one CPU core for 6,600 clips of 5 s, and two minutes if `--mulan`
has the outputs of its towers from training.
"""

import argparse
import math
from pathlib import Path

import jax
import numpy as np
from scipy.special import logsumexp

from musicrl_jax.core import checkpoint
from musicrl_jax.core.statistics import LEAST_INTERVAL, LEAST_RANKED, printed, too_small
from musicrl_jax.inputs import pieces, pretrained
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.models import bert, mulan, musicnn, rvq
from musicrl_jax.objectives.mulan_projections import PretrainedTowers, TowerOutputs

MINILM = bert.BertConfig(layers=6, heads=12, embed=384, mlp=1536, positions=512, pieces=30_522)
PENALTIES = 10.0 ** np.arange(0, 5.5, 0.5)
BATCH = 20
RESAMPLES = 2000


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mulan", required=True, help="folder of the trained MuLan")
    parser.add_argument("--pretrained", required=True, help="folder that `musicrl fetch` filled")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--dataset", required=True, help="clips whose attributes say their piece")
    flags = parser.parse_args()
    # Embeddings of MuLan, and the predictions of the ridge.
    model = checkpoint.load_model(flags.mulan, mulan.MuLanConfig)
    clips = Clips(
        {flags.dataset: 1.0}, flags.data_dir, model.config.sample_rate_hz, with_captions=True
    )
    audio, text, captions, names = embedded(model, clips)
    known = clips.attributes("test")
    places = np.unique([known[name]["piece"] for name in names], return_inverse=True)[1]
    same = np.array(captions)[:, None] == np.array(captions)[None, :]
    predicted, targets, penalty = ridge(flags, clips)
    cosines = {"MuLan": audio @ text.T, "ridge": unit(predicted) @ unit(targets).T}
    print(
        f"{len(captions)} test clips of {places.max() + 1} pieces; the ridge's penalty is "
        f"{penalty:g}"
    )
    # Ranks in both directions.
    print(f"{'':26}{'R@1':>25}{'R@10':>25}{'median rank':>25}")
    for direction in ("clip -> caption", "caption -> clip"):
        rankings = {}
        for name, cosine in cosines.items():
            rankings[name] = ranks(cosine if direction.startswith("clip") else cosine.T, same)
            print(
                f"{direction:18}{name:8}"
                + "".join(f"{interval(m, [rankings[name]], places):>25}" for m in MEASURES)
            )
        both = [rankings["MuLan"], rankings["ridge"]]
        print(f"{'':18}{'gain':8}" + "".join(f"{interval(m, both, places):>25}" for m in MEASURES))
    size = len(captions)
    if few := too_small(size, LEAST_RANKED):
        print(f"{'chance':26}{few:>25}")
        return
    print(f"{'chance':26}{1 / size:>25.3f}{10 / size:>25.3f}{(size + 1) / 2:>25.1f}")

    # The loss over the whole split.
    temperature = float(
        mulan.MuLan(model.config).apply(model.variables, method=mulan.MuLan.temperature)
    )
    logits = np.where(same & ~np.eye(size, dtype=bool), -np.inf, cosines["MuLan"] / temperature)
    own = np.diag(logits)
    loss = (logsumexp(logits, axis=0) - own + logsumexp(logits, axis=1) - own).mean() / 2
    print(
        f"\nloss over the split {loss:.3f}, ln({size}) = {math.log(size):.3f}; "
        f"temperature {temperature:.3f}"
    )
    print_quantizer(model, audio, text)


MEASURES = {
    "R@1": lambda rank: np.mean(rank < 1),
    "R@10": lambda rank: np.mean(rank < 10),
    "median rank": lambda rank: np.median(rank) + 1,
}


def embedded(
    model: checkpoint.Model, clips: Clips
) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Embeds the test split with the whole model.

    Returns (audio embeddings [P, E], text embeddings [P, E], captions, ids).
    """
    module = mulan.MuLan(model.config)
    use = jax.jit(module.apply, static_argnames="method")
    audio, text, captions, names = [], [], [], []
    for batch in clips.batches("test", BATCH, seed=0, epochs=1):
        count = len(batch["audio"])
        ids = pieces.encode(
            model.assets["vocabulary"], list(batch["caption"]), model.config.text_length
        )
        wav, ids = (np.pad(part, ((0, BATCH - count), (0, 0))) for part in (batch["audio"], ids))
        audio.append(np.asarray(use(model.variables, wav, method=mulan.MuLan.embed_audio))[:count])
        text.append(np.asarray(use(model.variables, ids, method=mulan.MuLan.embed_text))[:count])
        captions += list(batch["caption"])
        names += list(batch["id"])
    return np.concatenate(audio), np.concatenate(text), captions, names


def ridge(flags: argparse.Namespace, clips: Clips) -> tuple[np.ndarray, np.ndarray, float]:
    """Fits the ridge regression.

    Returns (predicted text embeddings [P, D] of the test clips, those of their captions, penalty).
    """
    folder = Path(flags.pretrained)
    weights = str(folder / "musicnn/model.safetensors"), str(folder / "minilm/model.safetensors")
    vocabulary = str(folder / "minilm/tokenizer.json")
    seconds = clips.samples() / clips.sample_rate_hz
    config = mulan.MuLanConfig(clips.sample_rate_hz, seconds, musicnn.MusicnnConfig(), MINILM)
    read = Clips(
        clips.datasets, clips.data_dir, clips.sample_rate_hz, vocabulary=vocabulary, text_length=48
    )
    outputs = TowerOutputs(
        read, PretrainedTowers(config, *weights), str(Path(flags.mulan) / "heard")
    )
    tensors, _ = pretrained.read(weights[0])
    x, y = {}, {}
    for split in ("train", "validation", "test"):
        arrays = outputs.read(flags.dataset, split)
        pooled = arrays["audio"].mean(axis=1)
        x[split] = np.concatenate([pooled, penultimate(tensors, pooled)], axis=1)
        y[split] = unit(arrays["text"])
        if split == "validation":
            equal = (arrays["pieces"][:, None] == arrays["pieces"][None]).all(axis=-1)
    centre, spread, mean = (
        x["train"].mean(axis=0),
        x["train"].std(axis=0) + 1e-3,
        y["train"].mean(axis=0),
    )
    x = {split: (value - centre) / spread for split, value in x.items()}
    gram, target = x["train"].T @ x["train"], x["train"].T @ (y["train"] - mean)
    best = (-1.0, 0.0, target)
    for penalty in PENALTIES:
        map_ = np.linalg.solve(gram + penalty * np.eye(len(gram)), target)
        cosine = unit(x["validation"] @ map_) @ unit(y["validation"] - mean).T
        recall = np.mean([MEASURES["R@10"](ranks(c, equal)) for c in (cosine, cosine.T)])
        best = max(best, (recall, penalty, map_), key=lambda choice: choice[0])
    return x["test"] @ best[2], y["test"] - mean, best[1]


def penultimate(tensors: dict[str, np.ndarray], pooled: np.ndarray) -> np.ndarray:
    """Returns the 200 activations before musicnn's last layer, [P, 200], from pooled features."""
    x = np.maximum(pooled @ tensors["dense/kernel"] + tensors["dense/bias"], 0)
    gamma, beta, mean, variance = (
        tensors[f"batch_normalization_10/{part}"]
        for part in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    return (x - mean) / np.sqrt(variance + musicnn.TF_EPSILON) * gamma + beta


def unit(x: np.ndarray) -> np.ndarray:
    """Scales rows [P, D] to length 1."""
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def ranks(cosine: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Returns the rank of each row's own column, f64 [P]; 0 is the nearest.

    An equally near column counts one half. Columns with the same caption do not count.
    """
    own = np.diag(cosine)[:, None]
    return np.sum((cosine > own) & ~same, axis=1) + np.sum((cosine == own) & ~same, axis=1) / 2


def interval(measure: str, rankings: list[np.ndarray], places: np.ndarray) -> str:
    """Returns a measure of ranks with its 95 % interval over pieces.

    Of two rankings it is the difference, first minus second.
    """

    def value(rows: np.ndarray) -> float:
        values = [MEASURES[measure](rank[rows]) for rank in rankings]
        return values[0] - values[1] if len(values) > 1 else values[0]

    if few := too_small(len(places), LEAST_RANKED) or too_small(places.max() + 1, LEAST_INTERVAL):
        return few
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(places == place) for place in range(places.max() + 1)]
    draws = []
    for _ in range(RESAMPLES):
        draws.append(
            value(
                np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
            )
        )
    low, high = np.percentile(draws, [2.5, 97.5])
    digits = 1 if measure == "median rank" else 3
    sign = "+" if len(rankings) > 1 else ""
    return printed(
        {"mean": value(np.arange(len(places))), "low": low, "high": high}, digits, sign=sign
    )


def print_quantizer(model: checkpoint.Model, audio: np.ndarray, text: np.ndarray) -> None:
    """Prints how often tokens of captions and clips agree, and what the tokens keep."""
    quantize = jax.jit(
        lambda v, e: mulan.MuLan(model.config).apply(v, e, method=mulan.MuLan.quantize)
    )
    codes = [np.asarray(quantize(model.variables, part)) for part in (audio, text)]
    books = model.variables["rvq"]["codebooks"]
    quantized = [unit(np.asarray(rvq.dequantize(books, code))) for code in codes]
    print(f"\nquantizer, {model.config.levels} levels of {model.config.codes} codes")
    used = [len(np.unique(codes[0][:, level])) for level in range(codes[0].shape[1])]
    print(f"  codes in use by the test clips, level by level: {used}")
    print(
        "  cosine of an embedding and its tokens: "
        f"clips {np.mean(np.sum(audio * quantized[0], 1)):.3f}, "
        f"captions {np.mean(np.sum(text * quantized[1], 1)):.3f}"
    )
    other = np.roll(np.arange(len(audio)), 1)
    for name, rows in (("own caption", np.arange(len(audio))), ("another's", other)):
        agree = " ".join(f"{share:.2f}" for share in np.mean(codes[0] == codes[1][rows], axis=0))
        cosine = np.mean(np.sum(quantized[0] * quantized[1][rows], axis=1))
        print(
            f"  {name:12} cosine of quantized embeddings {cosine:.3f}; "
            f"tokens that agree, by level: {agree}"
        )


if __name__ == "__main__":
    main()
