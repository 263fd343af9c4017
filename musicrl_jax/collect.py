"""Collects votes: a system plays each prompt twice, and simulated listeners choose a clip.

Legend: P pairs of clips, where clips 2 i and 2 i + 1 are pair i; L listeners.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from musicrl_jax.arena.audience import Audience, LoadedAudience
from musicrl_jax.arena.listeners import Panel
from musicrl_jax.core import checkpoint, hosts, lock, sharding
from musicrl_jax.core.files import cached, read_json, set_aside, write_json
from musicrl_jax.core.keys import Stream
from musicrl_jax.core.progress import Progress
from musicrl_jax.core.statistics import LEAST_INTERVAL, too_small
from musicrl_jax.inputs import tokens, votes
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.systems import folder
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import Player
from musicrl_jax.systems.system import Sampling

PLAYED = "played"  # folder of finished batches, until their votes are written
MEASURED = "measured"  # name of the listeners' measurements in a batch
SPLITS = ("train", "validation")
PEOPLE = (0.6, 0.7)  # share of pairs on which two people agree
Batches = list[dict[str, np.ndarray]]  # arrays of two clips for each text, the last batch too full


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """The pairs of clips to play, and their number of votes.

    Attributes:
      pairs: P, both splits together.
      clip_seconds: length of the clips, whole frames of the system.
      validation_share: share of the pairs for validation, above 0 and below 1.
      votes_per_pair: number of listeners that vote on a pair, 1 or more.
      sampling: the distribution of the policy.
      batch_size: pairs in a batch, rounded up to a multiple of the devices; does not change the
        result.
      seed: seed of sampling, of the choice of listeners, and of their noise.
    """

    pairs: int
    clip_seconds: float
    validation_share: float = 0.1
    votes_per_pair: int = 1
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    batch_size: int = dataclasses.field(default=16, metadata=checkpoint.NO_IDENTITY)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("votes_per_pair", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"CollectConfig.{name}={getattr(self, name)} must be 1 or more")
        share = self.validation_share
        if not 0 < share < 1 or self.pairs * min(share, 1 - share) < 1:
            raise ValueError(
                f"CollectConfig.validation_share={share} of pairs={self.pairs} leaves a split "
                "without any: choose another share, or more pairs"
            )

    @property
    def counts(self) -> dict[str, int]:
        """Number of pairs in each split."""
        validation = round(self.pairs * self.validation_share)
        return {"train": self.pairs - validation, "validation": validation}


@lock.holds("votes_dir")
def collect(
    votes_dir: str, system: str, prompts: Prompts, audience: Audience, config: CollectConfig
) -> None:
    """Writes tokens of P pairs of clips, and votes on them; resumes after a kill.

    All votes are marked as votes of *simulated listeners*. `votes_dir`/agreement.json has the share
    of pairs on which two listeners agree, and the highest share of choices that a model can
    predict. (MusicRL's people agreed on about 60 %.)

    Args:
      votes_dir: folder for tokens and votes.
      system: folder of the system that plays.
      prompts: prompts of both splits; they are repeated if there are fewer than pairs.
      audience: the listeners.
      config: settings of pairs and votes.

    Raises:
      ValueError: if a setting is out of range, models do not belong together, or `votes_dir` has
        votes of others, above all of people.
    """
    # Check everything before any work.
    if config.votes_per_pair > audience.panel.size:
        raise ValueError(
            f"CollectConfig.votes_per_pair={config.votes_per_pair} must be from 1 to the panel's "
            f"size, {audience.panel.size}"
        )
    loaded = folder.load(system)
    loaded.system.length(config.clip_seconds)
    audience.check(loaded.system.sample_rate_hz)
    models = {**loaded.system.data_models(loaded.hashes), **loaded.lineage}
    data = {"hashes": loaded.hashes, "prompts": prompts, "audience": audience, "settings": config}
    collection = _Collection(
        votes_dir,
        audience.panel,
        config,
        models,
        loaded.system.data_layout(),
        checkpoint.describe(data),
    )
    hosts.first_alone(collection.refuse_others)()
    missing = {}
    for split in SPLITS:
        if not hosts.first_decides(lambda split=split: collection.complete(split)):
            missing[split] = _texts(prompts, split, config.counts[split])

    # All hosts sample and measure; the first one writes.
    if missing:
        mesh = sharding.make_mesh()
        with jax.set_mesh(mesh):
            stage = _Stage(loaded, audience.load(), config, mesh)
            for split, texts in missing.items():
                batches = stage.play(split, texts, collection)
                hosts.first_alone(collection.write)(split, texts, batches)
    else:
        print(f"{votes_dir}: collected already")

    # Remove the batches, also those of a killed run. No host reads them any more.
    hosts.wait_for_all("collected")
    if hosts.first():
        shutil.rmtree(Path(votes_dir) / PLAYED, ignore_errors=True)


def _texts(prompts: Prompts, split: str, count: int) -> list[str]:
    """Returns `count` prompts of a split; raises ValueError if it has none."""
    unique = prompts.unique(split)
    if not unique:
        raise ValueError(f"prompts: split {split!r} has none: name a set or file that has")
    return [unique[number % len(unique)] for number in range(count)]


# --- the clips ---


class _Stage:
    """Samples clips on all devices; each host measures the clips of its own devices."""

    def __init__(
        self, loaded: LoadedSystem, audience: LoadedAudience, config: CollectConfig, mesh: Mesh
    ):
        # Batches have whole pairs, even if the number of devices is odd.
        rows = sharding.round_up_rows(mesh, 2 * config.batch_size)
        rows = sharding.round_up_rows(mesh, rows + rows % 2)
        system, seconds = loaded.system, config.clip_seconds
        self._player = Player(system, mesh, rows, seconds, config.sampling)
        self._weights = self._player.place(loaded.policy, loaded.frozen)
        by_row = sharding.batch_sharding(mesh)
        self._features = jax.jit(system.features, out_shardings=by_row)
        self._audience, self._seed, self._mesh = audience, config.seed, mesh

    def play(self, split: str, texts: list[str], collection: "_Collection") -> Batches:
        """Samples the pairs of a split and measures them; loads batches of an interrupted run."""
        pairs = self._player.rows // 2
        starts, batches = range(0, len(texts), pairs), []
        folder = Path(collection.votes_dir) / PLAYED
        for first in Progress(starts, f"collect {split}", len(starts)):
            chosen = [texts[i % len(texts)] for i in range(first, first + pairs)]
            play_batch = partial(self._play_batch, split, first, chosen)
            batches.append(cached(folder, f"{split}-{first}+{pairs}", collection.data, play_batch))
        return batches

    def _play_batch(self, split: str, first: int, texts: list[str]) -> dict[str, np.ndarray]:
        """Returns the tokens and measurements of the pairs `first`, `first` + 1, ... of a split."""
        # Sample, with keys by the split and the number of the clip.
        step, rows = SPLITS.index(split), self._player.rows
        twice = [text for text in texts for _ in "ab"]
        rollout = self._player.draw(self._weights, twice, self._seed, step, Stream.VOTES, 2 * first)

        # Measure the clips of this host, and gather the measurements of all hosts.
        own = [twice[row] for row in sharding.own_rows(self._mesh, rows)]
        measured = self._audience.measure(sharding.local_rows(rollout.mono), own)
        features = sharding.fetch(self._features(rollout))
        return {**features, MEASURED: sharding.gather_rows(self._mesh, measured, rows)}


# --- the folder of votes ---


@dataclasses.dataclass(frozen=True)
class _Collection:
    """A folder of votes, with everything that the votes depend on.

    Attributes:
      votes_dir: the folder.
      panel: the listeners.
      config: settings of pairs and votes.
      models: hashes of the models, for the manifest; see `inputs.tokens`.
      layout: sizes of the tokens, for the manifest.
      data: the system, prompts, audience and settings, for the manifest.
    """

    votes_dir: str
    panel: Panel
    config: CollectConfig
    models: dict[str, str]
    layout: dict[str, int]
    data: dict[str, Any]

    def complete(self, split: str) -> bool:
        """Tells whether the folder has all tokens of a split, by these models and settings."""
        return tokens.complete(self.votes_dir, split, self.models, self.layout, self.data)

    def refuse_others(self) -> None:
        """Raises ValueError if the folder has other votes, or tokens without votes.

        Unlike tokens, votes cannot be made again.
        """
        # Votes of other listeners.
        listeners = {vote.listener for vote in self._read_votes()}
        others = sorted(name for name in listeners if not votes.is_of(name, self.panel.name))
        if others:
            votes.set_figures_aside(self.votes_dir, others)
            raise ValueError(
                f"votes_dir: {self.votes_dir}/{votes.VOTES} has votes of {others[0]!r}, who is not "
                f"of the {self.panel.name}, and collecting would replace them: name another "
                "folder, or leave these votes as they are with --skip=votes"
            )

        # Tokens without votes.
        if not (Path(self.votes_dir) / tokens.MANIFEST).exists():
            return
        if not (Path(self.votes_dir) / votes.VOTES).exists():
            raise ValueError(
                f"votes_dir: {self.votes_dir} holds tokens and no {votes.VOTES}: it is a folder of "
                "`musicrl encode`, or its votes are lost; name another folder, or restore them"
            )

        # Votes on other pairs.
        manifest = tokens.read_manifest(self.votes_dir)
        before = {**manifest["models"], **manifest["layout"], **manifest["data"]}
        now = json.loads(json.dumps({**self.models, **self.layout, **self.data}))
        for name in now:
            if before.get(name) != now[name]:
                raise ValueError(
                    f"votes_dir: {self.votes_dir} was collected with other {name}: name another "
                    "folder, or leave these votes as they are with --skip=votes"
                )

    def write(self, split: str, texts: list[str], batches: Batches) -> None:
        """Lets the panel vote on a split's pairs; writes votes, figures and tokens.

        Args:
          split: name of the split.
          texts: P prompts.
          batches: output of `_Stage.play`.
        """
        # Votes and figures. They come first, since the tokens' manifest marks a split as complete.
        measured = np.concatenate([batch[MEASURED] for batch in batches])[: 2 * len(texts)]
        cast, agreement, ceiling = self._vote(split, texts, measured)
        too_few = too_small(len(texts), LEAST_INTERVAL)
        path = Path(self.votes_dir) / votes.FIGURES
        figures = _read_figures(path)
        figures["agreement"][split] = too_few or agreement
        figures["ceiling"][split] = too_few or ceiling
        others = [vote for vote in self._read_votes() if not vote.a.startswith(f"{split}-")]
        votes.write_votes(self.votes_dir, [*others, *cast])
        signature = {
            "panel": self.panel.name,
            "simulated listeners": True,
            "listeners": self.panel.size,
            "people": 0,
        }
        write_json(path, {**signature, **figures})

        # Write the tokens of the pairs.
        examples = _examples(split, texts, batches)
        tokens.write_tokens(self.votes_dir, split, examples, self.models, self.layout, self.data)

        # A summary for the terminal.
        abstained = np.mean([vote.vote == votes.ABSTAINED for vote in cast])
        shares = f"shares of them: {too_few}"
        if not too_few:
            shares = (
                f"{abstained:.0%} abstentions; two listeners agree on {agreement:.1%} of the "
                f"pairs, and {ceiling:.1%} of the choices can be predicted"
            )
        print(
            f"{split}: {len(cast)} votes of simulated listeners ({self.panel.name}) on "
            f"{len(texts)} pairs, {shares}"
        )
        if not too_few and not PEOPLE[0] <= agreement <= PEOPLE[1]:
            print(
                f"{split}: people agreed on {PEOPLE[0]:.0%} to {PEOPLE[1]:.0%}; a panel with "
                "another noise comes nearer to that"
            )

    def _vote(
        self, split: str, texts: list[str], measured: np.ndarray
    ) -> tuple[list[votes.Vote], float, float]:
        """Returns votes, the agreement of two listeners, and the highest predictable share.

        Args:
          split: name of the split.
          texts: P prompts.
          measured: measurements of 2 P clips.
        """
        # The utility of both clips of each pair for each listener.
        utilities = self.panel.utilities(measured)  # [L, 2 P]
        a, b = utilities[:, ::2], utilities[:, 1::2]

        # Random listeners vote on each pair.
        rng = np.random.default_rng([self.config.seed, SPLITS.index(split)])
        cast = []
        for pair, text in enumerate(texts):
            for listener in rng.choice(self.panel.size, self.config.votes_per_pair, replace=False):
                choice = str(self.panel.choose(a[listener, pair], b[listener, pair], rng))
                ids = (f"{split}-{pair:06d}-{side}" for side in "ab")
                name = f"{votes.SIMULATED} {listener} of the {self.panel.name}"
                cast.append(votes.Vote(0, text, *ids, choice, name, [True, True]))
        return cast, self.panel.agreement(a, b), self.panel.ceiling(a, b)

    def _read_votes(self) -> list[votes.Vote]:
        """Returns the votes in the folder."""
        exists = (Path(self.votes_dir) / votes.VOTES).exists()
        return votes.read_votes(self.votes_dir) if exists else []


# --- helpers ---


def _examples(split: str, texts: list[str], batches: Batches) -> Iterator[dict[str, Any]]:
    """Yields the tokens, id and caption of the clips of P texts."""
    rows = len(batches[0][MEASURED])
    for number in range(2 * len(texts)):
        batch, pair = batches[number // rows], number // 2
        clip = {name: array[number % rows] for name, array in batch.items() if name != MEASURED}
        yield {**clip, "id": f"{split}-{pair:06d}-{'ab'[number % 2]}", "caption": texts[pair]}


def _read_figures(path: Path) -> dict[str, dict[str, Any]]:
    """Returns agreement and ceiling of the finished splits; sets a damaged file aside.

    Figures of finished splits are then lost, since it is not worth while to collect these again.
    """
    figures: dict[str, dict[str, Any]] = {"agreement": {}, "ceiling": {}}
    if os.path.lexists(path):
        try:
            content = read_json(path, {name: {str: (float, str)} for name in figures})
            return {name: content[name] for name in figures}
        except (ValueError, OSError) as error:
            set_aside(path, str(error).removeprefix(f"{path} "))
    return figures
