"""Prompts -> votes: a system plays each prompt twice, and simulated listeners choose.

Legend: P pairs, clips 2 i and 2 i + 1 are pair i; L listeners.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from musicrl_jax.arena.audience import Audience, Hearing
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

PLAYED = "played"  # folder of the batches that are done, until their votes are written
MEASURED = "measured"  # name of the measurements among a batch's arrays
SPLITS = ("train", "validation")
PEOPLE = (0.6, 0.7)  # how often people agree


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Which pairs of clips are played, and how many votes they get.

    Attributes:
      pairs: P, of both splits together.
      clip_seconds: length of the clips, whole frames of the system.
      validation_share: of the pairs, above 0 and below 1.
      votes_per_pair: different listeners that vote on a pair, 1 or more.
      sampling: the distribution of the policy.
      batch_size: pairs at a time; rounded up to a multiple of the devices, and changes nothing in
        the result.
      seed: of sampling, of who votes on what, and of the listeners' noise.
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
        """Pairs of each split."""
        validation = round(self.pairs * self.validation_share)
        return {"train": self.pairs - validation, "validation": validation}


@lock.holds("votes_dir")
def collect(
    votes_dir: str, system: str, prompts: Prompts, audience: Audience, config: CollectConfig
) -> None:
    """Writes tokens of P pairs of clips and the votes on them; killed, it goes on where it was.

    Every vote is of *simulated listeners*, and says so. How often two of them agree on these pairs,
    and how often one's choice can be foretold at most, is printed and stands in
    `votes_dir`/agreement.json; the agreement of MusicRL's people was about 60 %. A folder with
    votes of others, people above all, is refused.

    Args:
      votes_dir: where tokens and votes go.
      system: folder of the system that plays.
      prompts: what is played; validation prompts for the validation pairs. They come again if there
        are fewer than pairs.
      audience: who votes.
      config: on which pairs.

    Raises:
      ValueError: if a setting is out of range, models do not fit, or `votes_dir` holds other votes.
    """
    # Everything is checked before any work.
    if config.votes_per_pair > audience.panel.size:
        raise ValueError(
            f"CollectConfig.votes_per_pair={config.votes_per_pair} must be from 1 to the panel's "
            f"size, {audience.panel.size}"
        )
    loaded = folder.load(system)
    loaded.system.length(config.clip_seconds)
    audience.check(loaded.system.sample_rate_hz)
    collection = _Collection.of(votes_dir, loaded, prompts, audience, config)
    hosts.first_alone(collection.refuse_others)()
    wanting = [
        split for split in SPLITS if not hosts.first_decides(lambda s=split: collection.complete(s))
    ]
    # All hosts draw and measure; the first writes.
    if wanting:
        mesh = sharding.make_mesh()
        with jax.set_mesh(mesh):
            stage = _Stage(loaded, audience.load(), config, mesh)
            for split in wanting:
                unique = prompts.unique(split)
                if not unique:
                    raise ValueError(
                        f"prompts: split {split!r} has none: name a set or file that has"
                    )
                texts = [unique[i % len(unique)] for i in range(config.counts[split])]
                batches = stage.play(split, texts, collection)
                hosts.first_alone(collection.write)(split, texts, batches)
    else:
        print(f"{votes_dir}: collected already")

    # No host reads them any more; a killed run may have left them too.
    hosts.wait_for_all("collected")
    if hosts.first():
        shutil.rmtree(Path(votes_dir) / PLAYED, ignore_errors=True)


class _Stage:
    """Where clips are drawn on all devices, and measured by the hosts that hold them."""

    def __init__(self, loaded: LoadedSystem, hearing: Hearing, config: CollectConfig, mesh: Mesh):
        rows = sharding.round_up_rows(mesh, 2 * config.batch_size)
        rows = sharding.round_up_rows(
            mesh, rows + rows % 2
        )  # whole pairs on odd numbers of devices too
        system, seconds = loaded.system, config.clip_seconds
        self._player = Player(system, mesh, rows, seconds, config.sampling)
        self._weights = self._player.place(loaded.policy, loaded.frozen)
        by_row = sharding.batch_sharding(mesh)
        self._features = jax.jit(system.features, out_shardings=by_row)
        self._hearing, self._seed, self._mesh = hearing, config.seed, mesh

    def play(
        self, split: str, texts: list[str], collection: "_Collection"
    ) -> list[dict[str, np.ndarray]]:
        """Returns batches of tokens and MEASURED, two clips for each text; the last is filled up."""
        pairs = self._player.rows // 2
        starts = range(0, len(texts), pairs)
        batches = []
        for first in Progress(starts, f"collect {split}", len(starts)):
            chosen = [texts[i % len(texts)] for i in range(first, first + pairs)]
            batch = cached(
                Path(collection.votes_dir) / PLAYED,
                f"{split}-{first}+{pairs}",
                collection.data,
                lambda first=first, chosen=chosen: self._play_batch(split, first, chosen),
            )
            batches.append(batch)
        return batches

    def _play_batch(self, split: str, first: int, texts: list[str]) -> dict[str, np.ndarray]:
        """Returns the tokens and MEASURED of the pairs `first`, `first` + 1, ... of a split."""
        step, rows = SPLITS.index(split), self._player.rows
        twice = [text for text in texts for _ in "ab"]
        rollout = self._player.draw(self._weights, twice, self._seed, step, Stream.VOTES, 2 * first)
        own = [twice[row] for row in sharding.own_rows(self._mesh, rows)]
        measured = self._hearing.measure(sharding.local_rows(rollout.mono), own)
        features = sharding.fetch(self._features(rollout))
        return {**features, MEASURED: sharding.gather_rows(self._mesh, measured, rows)}


@dataclasses.dataclass(frozen=True)
class _Collection:
    """A folder of votes with what they depend on.

    Attributes:
      votes_dir: the folder.
      panel: who votes.
      config: on which pairs.
      models, layout, data: of the manifest, see `inputs.tokens`.
    """

    votes_dir: str
    panel: Panel
    config: CollectConfig
    models: dict[str, str]
    layout: dict[str, int]
    data: dict[str, Any]

    @classmethod
    def of(
        cls,
        votes_dir: str,
        loaded: LoadedSystem,
        prompts: Prompts,
        audience: Audience,
        config: CollectConfig,
    ) -> "_Collection":
        """Describes what a system plays for an audience."""
        data = checkpoint.describe(
            {
                "hashes": loaded.hashes,
                "prompts": prompts,
                "audience": audience,
                "settings": config,
            }
        )
        models = {**loaded.system.data_models(loaded.hashes), **loaded.lineage}
        layout = loaded.system.data_layout()
        return cls(votes_dir, audience.panel, config, models, layout, data)

    def complete(self, split: str) -> bool:
        """Tells whether a split was written to its end."""
        return tokens.complete(self.votes_dir, split, self.models, self.layout, self.data)

    def refuse_others(self) -> None:
        """Raises ValueError if the folder has other votes, or tokens that nobody voted on.

        Votes cannot be had again, as tokens can.
        """
        listeners = {vote.listener for vote in self._read_votes()}
        others = sorted(name for name in listeners if not votes.is_of(name, self.panel.name))
        if others:
            votes.set_figures_aside(self.votes_dir, others)
            raise ValueError(
                f"votes_dir: {self.votes_dir}/{votes.VOTES} has votes of {others[0]!r}, who is not "
                f"of the {self.panel.name}, and collecting would replace them: name another folder, "
                "or leave these votes as they are with --skip=votes"
            )
        if not (Path(self.votes_dir) / tokens.MANIFEST).exists():
            return
        if not (Path(self.votes_dir) / votes.VOTES).exists():
            raise ValueError(
                f"votes_dir: {self.votes_dir} holds tokens and no {votes.VOTES}: it is a folder of "
                "`musicrl encode`, or its votes are lost; name another folder, or restore them"
            )
        manifest = tokens.read_manifest(self.votes_dir)
        before = {**manifest["models"], **manifest["layout"], **manifest["data"]}
        now = json.loads(json.dumps({**self.models, **self.layout, **self.data}))
        for name in now:
            if before.get(name) != now[name]:
                raise ValueError(
                    f"votes_dir: {self.votes_dir} was collected with other {name}: name another "
                    "folder, or leave these votes as they are with --skip=votes"
                )

    def write(
        self, split: str, texts: list[str], batches: Sequence[Mapping[str, np.ndarray]]
    ) -> None:
        """Lets the panel vote on a split's pairs, writes votes, figures and tokens, and prints.

        Args:
          split: its name.
          texts: P prompts.
          batches: what `_Stage.play` returned.
        """
        # Votes and figures come first: the manifest that tokens end with makes a split whole.
        measured = np.concatenate([batch[MEASURED] for batch in batches])[: 2 * len(texts)]
        cast, agreement, ceiling = self._vote(split, texts, measured)
        too_few = too_small(len(texts), LEAST_INTERVAL)
        path = Path(self.votes_dir) / votes.FIGURES
        figures = _read_figures(path)
        figures["agreement"][split], figures["ceiling"][split] = (
            (too_few, too_few) if too_few else (agreement, ceiling)
        )
        others = [vote for vote in self._read_votes() if not vote.a.startswith(f"{split}-")]
        votes.write_votes(self.votes_dir, [*others, *cast])
        signature = {
            "panel": self.panel.name,
            "simulated listeners": True,
            "listeners": self.panel.size,
            "people": 0,
        }
        write_json(path, {**signature, **figures})

        examples = _examples(split, texts, batches)
        tokens.write_tokens(self.votes_dir, split, examples, self.models, self.layout, self.data)

        # What came of it.
        abstained = np.mean([vote.vote == votes.ABSTAINED for vote in cast])
        shares = f"shares of them: {too_few}"
        if not too_few:
            shares = (
                f"{abstained:.0%} abstentions; two listeners agree on {agreement:.1%} of the pairs, "
                f"and {ceiling:.1%} of the choices can be foretold"
            )
        print(
            f"{split}: {len(cast)} votes of simulated listeners ({self.panel.name}) on "
            f"{len(texts)} pairs, {shares}"
        )
        if not too_few and not PEOPLE[0] <= agreement <= PEOPLE[1]:
            print(
                f"{split}: people agreed on {PEOPLE[0]:.0%} to {PEOPLE[1]:.0%}; a panel with "
                "another noise comes nearer"
            )

    def _vote(
        self, split: str, texts: list[str], measured: np.ndarray
    ) -> tuple[list[votes.Vote], float, float]:
        """Returns votes, how often two listeners would agree, and how much can be foretold."""
        utilities = self.panel.utilities(measured)  # [L, 2 P]
        a, b = utilities[:, ::2], utilities[:, 1::2]
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
        """Returns the votes that the folder has."""
        there = (Path(self.votes_dir) / votes.VOTES).exists()
        return votes.read_votes(self.votes_dir) if there else []


def _examples(
    split: str, texts: list[str], batches: Sequence[Mapping[str, np.ndarray]]
) -> Iterator[dict[str, Any]]:
    """Yields the clips of P texts with their tokens, as `inputs.tokens` writes them."""
    numbers = iter(range(2 * len(texts)))
    for batch in batches:
        names = [name for name in batch if name != MEASURED]
        # The last batch has more rows than there are clips left.
        for row, number in zip(range(len(batch[MEASURED])), numbers, strict=False):
            clip = {name: batch[name][row] for name in names}
            clip_id = f"{split}-{number // 2:06d}-{'ab'[number % 2]}"
            yield {**clip, "id": clip_id, "caption": texts[number // 2]}


def _read_figures(path: Path) -> dict[str, dict[str, Any]]:
    """Returns agreement and ceiling of the splits that are done; a damaged file is set aside.

    Figures of a split that was done before are then missing, and are not worth collecting it again.
    """
    figures: dict[str, dict[str, Any]] = {"agreement": {}, "ceiling": {}}
    if os.path.lexists(path):
        try:
            there = read_json(path, {name: {str: (float, str)} for name in figures})
            return {name: there[name] for name in figures}
        except (ValueError, OSError) as error:
            set_aside(path, str(error).removeprefix(f"{path} "))
    return figures
