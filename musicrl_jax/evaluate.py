"""Base and finetuned policy on held-out prompts: rewards with intervals, untrained measures, a page to listen to.

Legend: B clips, D width of the semantic features.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import checkpoint
from musicrl_jax.core.files import write_json
from musicrl_jax.core.keys import row_keys, step_key
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.statistics import frechet_distance, mean_interval, mean_pairwise_distance
from musicrl_jax.inputs import pieces
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.losses.policy_gradient import full_kl
from musicrl_jax.models.semantic import SemanticConfig, SemanticEncoder
from musicrl_jax.rl import rollout as rollouts
from musicrl_jax.rl.rewards import Mixture
from musicrl_jax.rl.sample import Sampling, log_probs
from musicrl_jax.run import read_seconds

LEAST_SPREAD = 1e-3  # of a feature over real clips; one that never moves is not blown up
TOTAL = "reward"  # the mixture's name among the scores


def evaluate(
    model_dir: str,
    run_dir: str,
    base: str,
    finetuned: str,
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
    temperature: float = 0.99,
    top_k: int | None = None,
    count: int = 64,
    seeds: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    shown: int = 8,
    worst: int = 4,
) -> dict[str, Any]:
    """Compares two policies on the same held-out prompts and seeds; writes summary and page, and returns the summary.

    Beside the rewards stand three figures that were not trained on: the KL to the base; diversity, the mean distance
    between the semantic features of two clips; and the Frechet distance between those of generated and of real held-out
    clips, frame by frame. The semantic model takes no part in the reward.

    Args:
      model_dir: where summary and page go; left alone where they are there, for the same models and settings.
      run_dir: the folder of the whole run, for its name and its stages' times.
      base, finetuned: folders of the two policies.
      fine, codec, mulan, semantic: folders of the other models.
      rewards: the mixture that was trained on.
      prompts: the first `count` of the 'test' split are used; none of them was trained on.
      clips: real clips, 'test' split, for the Frechet distance.
      training: folders whose metrics are drawn on the page.
      notes: honest words for the page.
      clip_seconds, temperature, top_k: as in training.
      count: held-out prompts, or all where there are fewer.
      seeds: clips a prompt and policy.
      batch_size: clips at a time.
      seed: of the sampling; a stream of its own, apart from training's.
      shown, worst: clips on the page: the first prompts, and those that lost most.

    Returns:
      reward_base, reward_finetuned, reward_gain, each {mean, low, high}; the same for each term; kl, diversity,
      frechet; page, checkpoint.
    """
    if missing := [name for name in ("jinja2", "matplotlib", "pyloudnorm") if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(f"the page needs {', '.join(missing)}: pip install 'musicrl-jax[report]'")
    from musicrl_jax.report.comparison import write_comparison  # drawing is an extra; training hosts go without

    directory, sampling = Path(model_dir), Sampling(temperature, top_k)
    before = rollouts.load(base, fine, codec, mulan)
    after = rollouts.load(finetuned, fine, codec, mulan)
    mixture = rewards.load()
    listener = checkpoint.load_model(semantic, SemanticConfig)
    identity = {
        "hashes": {**before.hashes, "finetuned": after.hashes["policy"], "semantic": listener.hash, **mixture.hashes},
        "settings": [clip_seconds, temperature, top_k, count, seeds, seed, shown, worst],
        "data": checkpoint.describe([rewards, prompts, clips, notes]),
    }
    done = directory / "summary.json"
    if done.exists() and (summary := json.loads(done.read_text()))["identity"] == identity:
        print(f"{directory}: evaluated already")
        _print(summary)
        return summary

    asked = prompts.unique("test")[:count]
    if len(asked) < 2:
        raise ValueError(f"prompts: {len(asked)} held-out prompts that training did not see; an interval needs more")
    if len(asked) < count:
        print(f"only {len(asked)} held-out prompts exist, not {count}")
        count = len(asked)
    text = pieces.encode(before.vocabulary, asked, prompts.text_length)
    studio, frames = before.studio, before.studio.frames(clip_seconds)

    @jax.jit
    def measure(policy, anchor, frozen, scorers, listener_variables, text, keys):
        """One batch of rollouts with all that is measured on them."""
        rollout = studio.rollout(policy, frozen, text, keys, frames, sampling)
        total, terms = mixture.score(scorers, rollout)
        ours = log_probs(studio.musiclm, policy, rollout.tokens, rollout.mulan, sampling, rollout.allowed)
        theirs = log_probs(studio.musiclm, anchor, rollout.tokens, rollout.mulan, sampling, rollout.allowed)
        features = SemanticEncoder(listener.config).apply(listener_variables, rollout.wav, method="features")
        kl = full_kl(ours, theirs).sum(axis=(1, 2))
        return {"wav": rollout.wav, TOTAL: total, **terms, "kl": kl, "features": features}

    def collect(name: str, policy: Any) -> dict[str, np.ndarray]:
        """All prompts, all seeds: arrays [prompts, seeds, ...]."""
        rows = np.tile(np.arange(count), seeds)
        padded = np.pad(rows, (0, -len(rows) % batch_size))
        found = []
        for first in Progress(range(0, len(padded), batch_size), name, len(padded) // batch_size):
            keys = row_keys(step_key(seed, 0, stream=4), batch_size, first)
            chosen = text[padded[first : first + batch_size]]
            found.append(
                jax.device_get(
                    measure(policy, before.policy, before.frozen, mixture.variables, listener.variables, chosen, keys)
                )
            )
        joined = {key: np.concatenate([part[key] for part in found])[: len(rows)] for key in found[0]}
        return {key: value.reshape(seeds, count, *value.shape[1:]).swapaxes(0, 1) for key, value in joined.items()}

    results = {"base": collect("base", before.policy), "finetuned": collect("finetuned", after.policy)}
    for result in results.values():
        mixture.check({term.name: result[term.name] for term in mixture.mixture.terms})
    # Semantic features, each dimension in units of its spread over real clips.
    real = _real_features(clips, listener, batch_size)
    centre, spread = real.mean(axis=(0, 1)), np.maximum(real.std(axis=(0, 1)), LEAST_SPREAD)
    heard = {which: result["features"][:, 0] for which, result in results.items()} | {"real": real}
    heard = {which: (features - centre) / spread for which, features in heard.items()}  # [clips, F, D]

    # Figures: means over seeds first, then intervals over prompts.
    names = [TOTAL, *(term.name for term in mixture.mixture.terms)]
    scores = {}
    for name in names:
        per_prompt = {which: result[name].mean(axis=1) for which, result in results.items()}
        scores[name] = {
            **{which: mean_interval(values, seed) for which, values in per_prompt.items()},
            "gain": mean_interval(per_prompt["finetuned"] - per_prompt["base"], seed),
        }
    summary = {
        **{f"reward_{which}": scores[TOTAL][which] for which in ("base", "finetuned", "gain")},
        "terms": {name: scores[name] for name in names[1:]},
        "kl": mean_interval(results["finetuned"]["kl"].mean(axis=1), seed),
        "diversity": {which: mean_pairwise_distance(features.mean(axis=1)) for which, features in heard.items()},
        "frechet": {
            which: frechet_distance(*(np.concatenate(features) for features in (heard[which], heard["real"])))
            for which in ("base", "finetuned")
        },
        "page": str(directory / "page.html"),
        "checkpoint": str(finetuned),
        "identity": identity,
    }
    write_comparison(
        directory / "page.html",
        summary,
        asked,
        results,
        studio.sample_rate_hz,
        run_dir,
        finetuned,
        training,
        read_seconds(run_dir),
        (shown, worst),
        notes,
    )
    write_json(done, summary)
    _print(summary)
    return summary


def _print(summary: dict[str, Any]) -> None:
    for which in ("base", "finetuned", "gain"):
        numbers = summary[f"reward_{which}"]
        print(f"reward {which:>9}  {numbers['mean']:+.4f}  [{numbers['low']:+.4f}, {numbers['high']:+.4f}]")
    print(f"KL {summary['kl']['mean']:.2f} nats a clip; page: {summary['page']}; checkpoint: {summary['checkpoint']}")


def _real_features(clips: Clips, listener: checkpoint.Model, batch_size: int) -> np.ndarray:
    """Semantic features of the real test clips, [clips, F, D]."""
    features = jax.jit(lambda v, wav: SemanticEncoder(listener.config).apply(v, wav, method="features"))
    found = []
    for batch in clips.batches("test", batch_size, seed=0, epochs=1):
        missing = batch_size - len(batch["audio"])
        wav = jnp.pad(batch["audio"], ((0, missing), (0, 0)))
        found.append(np.asarray(features(listener.variables, wav))[: batch_size - missing])
    return np.concatenate(found)
