"""Pairs of clips -> votes: a policy plays each prompt twice, and simulated listeners choose.

Legend: P pairs.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from musicrl_jax.arena.audience import Audience
from musicrl_jax.arena.listeners import Panel
from musicrl_jax.core import checkpoint, lock
from musicrl_jax.core.files import kept, read_json, set_aside, write_json
from musicrl_jax.core.keys import row_keys, step_key
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.statistics import LEAST_INTERVAL, too_small
from musicrl_jax.inputs import pieces, tokens, votes
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.models.tokens import deinterleave
from musicrl_jax.rl import rollout as rollouts
from musicrl_jax.rl.rollout import Rollout
from musicrl_jax.rl.sample import Sampling

PLAYED = "played"
SPLITS = ("train", "validation")


@lock.holds("votes_dir")
def collect(
    votes_dir: str,
    policy: str,
    fine: str,
    codec: str,
    mulan: str,
    prompts: Prompts,
    audience: Audience,
    pairs: int,
    clip_seconds: float,
    validation_share: float = 0.1,
    votes_per_pair: int = 1,
    temperature: float = 0.99,
    top_k: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Writes the tokens of P pairs of clips and the votes on them; killed, it goes on where it was.

    Every vote is of *simulated listeners*, and says so. How often two of them agree on these pairs, and how often one's
    choice can be foretold at most, is printed and stands in `votes_dir`/agreement.json; the agreement of MusicRL's
    people was about 60 %. A folder with votes of others, people above all, is refused.

    Args:
      votes_dir: where tokens and votes go.
      policy, fine, codec, mulan: folders of the checkpoints that turn a prompt into sound.
      prompts: what is asked for; validation prompts for the validation pairs. They come again where there are too few.
      audience: who votes.
      pairs: P, of both splits together.
      clip_seconds: length of the clips.
      validation_share: of the pairs.
      votes_per_pair: different listeners that vote on a pair.
      temperature, top_k: of the policy.
      batch_size: pairs at a time; changes nothing in the result.
      seed: of sampling, of who votes on what, and of their noise.

    Raises:
      ValueError: where a setting is out of range, the models do not belong together, or `votes_dir` holds other votes.
    """
    if batch_size < 1:
        raise ValueError(f"collect.batch_size={batch_size} must be 1 or more")
    if not 0 < validation_share < 1 or pairs * min(validation_share, 1 - validation_share) < 1:
        raise ValueError(f"collect.validation_share={validation_share} of pairs={pairs} leaves a split without any")
    panel = audience.panel
    if not 1 <= votes_per_pair <= panel.size:
        raise ValueError(f"collect.votes_per_pair={votes_per_pair} must be from 1 to the panel's size, {panel.size}")
    sampling = Sampling(temperature, top_k)
    loaded = rollouts.load(policy, fine, codec, mulan)
    studio, frames = loaded.studio, loaded.studio.frames(clip_seconds)
    audience.check(studio.sample_rate_hz)
    speaks = studio.musiclm.config
    layout = {
        "acoustic_levels": studio.soundstream.config.levels,
        "acoustic_codes": speaks.layout.acoustic_codes,
        "semantic_codes": speaks.layout.semantic_codes,
        "mulan_levels": speaks.mulan_levels,
        "mulan_codes": speaks.mulan_codes,
    }
    models = rollouts.lineage(loaded)
    data = checkpoint.describe(
        {
            "hashes": loaded.hashes,
            "prompts": prompts,
            "audience": audience,
            "settings": [pairs, clip_seconds, validation_share, votes_per_pair, temperature, top_k, seed],
        }
    )
    _refuse_others(votes_dir, panel, models, layout, data)
    counts = {"validation": round(pairs * validation_share)}
    counts["train"] = pairs - counts["validation"]
    wanting = [name for name in SPLITS if not tokens.complete(votes_dir, name, models, layout, data)]
    if not wanting:
        print(f"{votes_dir}: collected already")
        shutil.rmtree(Path(votes_dir) / PLAYED, ignore_errors=True)  # of a run that was killed just before its end
        return

    hearing = audience.load()

    @jax.jit
    def draw(policy: Any, frozen: Any, text: jax.Array, keys: jax.Array) -> Rollout:
        return studio.rollout(policy, frozen, text, keys, frames, sampling)

    def played(split: str, asked: list[str]) -> dict[str, np.ndarray]:
        """What became of a split's prompts: tokens and measurements of clips 2 i and 2 i + 1, [2 P, ...]."""
        text = pieces.encode(loaded.vocabulary, asked, prompts.text_length)

        def play(first: int) -> dict[str, np.ndarray]:
            chosen = np.arange(first, first + batch_size) % len(asked)  # the last batch is filled up
            keys = row_keys(step_key(seed, SPLITS.index(split), stream=5), 2 * batch_size, 2 * first)
            found = jax.device_get(draw(loaded.policy, loaded.frozen, np.repeat(text[chosen], 2, axis=0), keys))
            semantic, _ = deinterleave(found.tokens)
            asks = [asked[row] for row in chosen for _ in "ab"]
            heard = hearing.measure(found.wav, asks)
            return {"semantic": semantic, "acoustic": found.acoustic, "mulan": found.mulan, "heard": heard}

        starts = range(0, len(asked), batch_size)
        parts = [
            kept(Path(votes_dir) / PLAYED, f"{split}-{first}+{batch_size}", data, lambda first=first: play(first))
            for first in Progress(starts, f"collect {split}", len(starts))
        ]
        return {name: np.concatenate([part[name] for part in parts])[: 2 * len(asked)] for name in parts[0]}

    figures = Path(votes_dir) / votes.FIGURES
    found = _figures_there(figures)
    for split in wanting:
        unique = prompts.unique(split)
        if not unique:
            raise ValueError(f"prompts: split {split!r} has none")
        asked = [unique[i % len(unique)] for i in range(counts[split])]
        clips = played(split, asked)
        examples = (
            {
                **{name: clips[name][row] for name in ("semantic", "acoustic", "mulan")},
                "id": f"{split}-{row // 2:06d}-{'ab'[row % 2]}",
                "caption": asked[row // 2],
            }
            for row in range(2 * len(asked))
        )
        # Votes come first: the manifest that `write_tokens` ends with makes a split whole.
        cast, agreement, ceiling = _votes(panel, clips["heard"], asked, split, votes_per_pair, seed)
        few = too_small(counts[split], LEAST_INTERVAL)
        found["agreement"][split], found["ceiling"][split] = (few, few) if few else (agreement, ceiling)
        others = [vote for vote in _votes_there(votes_dir) if not vote.a.startswith(f"{split}-")]
        Path(votes_dir).mkdir(parents=True, exist_ok=True)
        votes.write_votes(votes_dir, [*others, *cast])
        about = {"panel": panel.name, "simulated listeners": True, "listeners": panel.size, "people": 0}
        write_json(figures, {**about, **found})
        tokens.write_tokens(votes_dir, split, examples, models, layout, data)
        abstained = np.mean([vote.vote == votes.ABSTAINED for vote in cast])
        shares = f"{abstained:.0%} abstentions; two listeners agree on {agreement:.1%} of the pairs, and {ceiling:.1%} "
        shares = f"shares of them: {few}" if few else f"{shares}of the choices can be foretold"
        print(
            f"{split}: {len(cast)} votes of simulated listeners ({panel.name}) on {counts[split]} pairs, {shares}"
        )
        if not few and not 0.6 <= agreement <= 0.7:
            print(f"{split}: people agreed on 60 to 70 %; a panel with another noise comes nearer")
    shutil.rmtree(Path(votes_dir) / PLAYED)


def _votes(
    panel: Panel, measured: np.ndarray, asked: list[str], split: str, votes_per_pair: int, seed: int
) -> tuple[list[votes.Vote], float, float]:
    """Votes on pairs (2 i, 2 i + 1) of the measured clips; how often two listeners would agree, and the ceiling."""
    utilities = panel.utilities(measured)  # [L, 2 P]
    a, b = utilities[:, ::2], utilities[:, 1::2]
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    cast = []
    for pair, prompt in enumerate(asked):
        for listener in rng.choice(panel.size, votes_per_pair, replace=False):
            choice = str(panel.choose(a[listener, pair], b[listener, pair], rng))
            ids = (f"{split}-{pair:06d}-{side}" for side in "ab")
            who = f"{votes.SIMULATED} {listener} of the {panel.name}"
            cast.append(votes.Vote(0, prompt, *ids, choice, who, [True, True]))
    return cast, panel.agreement(a, b), panel.ceiling(a, b)


def _refuse_others(
    votes_dir: str, panel: Panel, models: dict[str, str], layout: dict[str, int], data: dict[str, Any]
) -> None:
    """Raises ValueError if there are votes on other clips, or by others, or tokens that nobody voted on.

    Votes cannot be had again, as tokens can.
    """
    others = sorted({vote.listener for vote in _votes_there(votes_dir) if not votes.is_of(vote.listener, panel.name)})
    if others:
        votes.set_figures_aside(votes_dir, others)
        raise ValueError(
            f"votes_dir: {votes_dir}/{votes.VOTES} has votes of {others[0]!r}, who is not of the {panel.name}, and "
            "collecting would replace them: name another folder, or leave these votes as they are with --skip=votes"
        )
    if not (Path(votes_dir) / tokens.MANIFEST).exists():
        return
    if not (Path(votes_dir) / votes.VOTES).exists():
        raise ValueError(
            f"votes_dir: {votes_dir} holds tokens and no {votes.VOTES}: it is a folder of `musicrl encode`, or its "
            "votes are lost; name another folder, or restore them"
        )
    found = tokens.read_manifest(votes_dir)
    was = {**found["models"], **found["layout"], **found["data"]}
    for name, now in json.loads(json.dumps({**models, **layout, **data})).items():
        if was.get(name) != now:
            raise ValueError(
                f"votes_dir: {votes_dir} was collected with other {name}: name another folder, or leave these votes "
                "as they are with --skip=votes"
            )


def _figures_there(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the agreement and the ceiling of the splits that are done; a damaged file is set aside.

    Figures of a split that was done before are then missing, and are not worth collecting it again.
    """
    found: dict[str, dict[str, Any]] = {"agreement": {}, "ceiling": {}}
    if os.path.lexists(path):
        try:
            there = read_json(path, {name: {str: (float, str)} for name in found})
            return {name: there[name] for name in found}
        except (ValueError, OSError) as error:
            set_aside(path, str(error).removeprefix(f"{path} "))
    return found


def _votes_there(votes_dir: str) -> list[votes.Vote]:
    return votes.read_votes(votes_dir) if (Path(votes_dir) / votes.VOTES).exists() else []
