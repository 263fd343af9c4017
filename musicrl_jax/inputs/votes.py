"""Votes: which of two clips a listener chose. A vote folder holds the clips' tokens, as `inputs.tokens` writes them,
and `votes.jsonl`, a line a vote:

    {"prompt": "a slow waltz", "a": "17-0", "b": "17-1", "vote": "a", "listener": "training panel 3",
     "heard": [true, true]}

`a` and `b` are ids of clips in the token folder; `vote` is "a", "b", "tie" or "abstain". As in MusicRL, a vote counts
only where both clips were heard; abstentions do not count, a tie is half a vote for each.

Legend: B votes.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from musicrl_jax.core import tables
from musicrl_jax.core.checkpoint import PATH
from musicrl_jax.core.files import read_json, set_aside, write_text
from musicrl_jax.inputs.records import Records
from musicrl_jax.inputs.tokens import VOTES, ClipShapes, Shapes, Tokens, read, token_spec

if TYPE_CHECKING:
    import tensorflow as tf

FIGURES = "agreement.json"  # how far the simulated listeners who voted agree
SIMULATED = "simulated listener"  # how the name of each begins
CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5}  # the share of the vote that clip a gets
ABSTAINED = "abstain"
FIELDS = {"prompt": str, "a": str, "b": str, "vote": str, "listener": str, "heard": list}
OF_THE_PROMPT = (
    "mulan",
)  # arrays of tokens that both clips share; those of all others are stacked


class Vote(NamedTuple):
    """A line of `votes.jsonl`, and its number."""

    line: int
    prompt: str
    a: str
    b: str
    vote: str
    listener: str
    heard: list[bool]

    @property
    def counts(self) -> bool:
        """Whether it says anything: both clips were heard, and the listener did not abstain."""
        return all(self.heard) and self.vote != ABSTAINED


@dataclasses.dataclass(frozen=True)
class Votes:
    """The votes that count, with the tokens of both clips.

    Attributes:
      directory: the vote folder.
      models: as in `Tokens`: the hash of each model that this run uses.
    """

    directory: str = dataclasses.field(metadata=PATH)
    models: Mapping[str, str] | None = None

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields arrays of tokens, i32 [B, 2, ...] by name, or [B, ...] if both clips share them, and 'vote', f32 [B].

        'vote' is the share of the first clip. Otherwise as `Tokens.batches`; ValueError, naming the line, where a vote
        is damaged or its clips are missing.
        """
        from musicrl_jax.inputs import tasks

        pairs, spec = self._pairs(split)
        if epochs is None and batch_size > len(pairs):
            raise ValueError(
                f"batch_size {batch_size} is more than the {len(pairs)} votes of split {split!r} in {self.directory}: "
                "lower it, or collect more"
            )
        source = tasks.RecordSource({split: pairs}, spec)
        features = {
            name: tasks.number_feature(each.dtype.as_numpy_dtype, each.shape.rank)
            for name, each in spec.items()
        }
        task = tasks.register("votes", source, [], features)
        length = {name: each.shape[0] for name, each in spec.items() if each.shape.rank}
        return tasks.batches(
            [(task, 1.0)], split, length, batch_size, seed, start_step, epochs, rows
        )

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch; see `objectives.objective.Data`."""
        shapes = self._tokens.shapes(batch_size, clip_seconds, tokens)
        for name in shapes.keys() - set(OF_THE_PROMPT):
            shape = (batch_size, 2, *shapes[name].shape[1:])
            shapes[name] = jax.ShapeDtypeStruct(shape, np.int32)
        return shapes | {"vote": jax.ShapeDtypeStruct((batch_size,), np.float32)}

    def layout(self) -> dict[str, int]:
        """As `Tokens.layout`."""
        return self._tokens.layout()

    def content_hashes(self) -> dict[str, Any]:
        """As `Tokens.content_hashes`: of the clips' tokens. The votes are known by the content of their file."""
        return self._tokens.content_hashes()

    def splits(self) -> list[str]:
        """The splits that have votes."""
        return [split for split in self._tokens.splits() if self.count(split)]

    def count(self, split: str) -> int:
        """The number of votes in a split that count."""
        return len(self.votes(split))

    def votes(self, split: str) -> list[Vote]:
        """The votes of a split that count: those of its clips."""
        places = {each: self._places(each) for each in self._tokens.splits()}
        cast = read_votes(self.directory)
        set_figures_aside(self.directory, {vote.listener for vote in cast})
        for vote in cast:
            if not any(vote.a in known for known in places.values()):
                raise self._error(vote, "a", "in any split")
        return [vote for vote in cast if vote.counts and vote.a in places.get(split, {})]

    def _error(self, vote: Vote, column: str, place: str) -> ValueError:
        row = tables.Row(Path(self.directory) / VOTES, vote.line, {})
        return row.error(column, f"no clip {getattr(vote, column)!r} {place}")

    @property
    def _tokens(self) -> Tokens:
        return _VotedTokens(self.directory, self.models)

    def _places(self, split: str) -> dict[str, int]:
        """The number of every clip of a split, by id."""
        self._tokens.count(split)  # a check of the models
        return {
            record["id"].decode(): number
            for number, record in enumerate(read(self.directory, split)[0])
        }

    def _pairs(self, split: str) -> tuple["_Pairs", dict[str, "tf.TensorSpec"]]:
        from musicrl_jax.inputs import tasks

        places = self._places(split)
        clips, spec = read(self.directory, split)
        spec = token_spec(spec)
        pairs = _Pairs(clips, list(spec))
        for vote in self.votes(split):
            if vote.b not in places:
                raise self._error(vote, "b", f"in split {split!r}")
            pairs.append((places[vote.a], places[vote.b], CHOICES[vote.vote]))
        paired = {
            name: each if name in OF_THE_PROMPT else tasks.spec([2, *each.shape], np.int32)
            for name, each in spec.items()
        }
        return pairs, {**paired, "vote": tasks.spec([], np.float32)}


class _VotedTokens(Tokens):
    """Tokens of clips that were voted on."""

    verb = "collect"


class _Pairs(list):
    """(number of clip a, number of clip b, share of a) as records."""

    def __init__(self, clips: Records, names: Sequence[str]):
        """Clips as records, and the names of their arrays of tokens."""
        super().__init__()
        self._clips, self._names = clips, names

    def __getitems__(self, indices: list[int]) -> list[Mapping[str, Any]]:
        chosen = [self[i] for i in indices]
        clips = self._clips.__getitems__([number for a, b, _ in chosen for number in (a, b)])
        records = []
        for a, b, (_, _, share) in zip(clips[::2], clips[1::2], chosen, strict=True):
            record = {
                name: a[name] if name in OF_THE_PROMPT else np.stack([a[name], b[name]])
                for name in self._names
            }
            records.append({**record, "vote": np.float32(share)})
        return records


def read_votes(directory: str) -> list[Vote]:
    """Reads every line of a vote folder's file.

    Raises FileNotFoundError where there is none, and ValueError with line and column where a vote is wrong.
    """
    path = Path(directory) / VOTES
    if not path.exists():
        raise FileNotFoundError(f"directory: no votes at {path}; write them with `musicrl collect`")
    votes = []
    for row in tables.read_rows(path, FIELDS, only=True):
        fields = row.values
        if fields["vote"] not in (*CHOICES, ABSTAINED):
            raise row.error("vote", f"{fields['vote']!r} is none of {(*CHOICES, ABSTAINED)}")
        if len(fields["heard"]) != 2 or not all(
            isinstance(heard, bool) for heard in fields["heard"]
        ):
            raise row.error(
                "heard", f"{fields['heard']!r} must be two of true and false, for a and for b"
            )
        if fields["a"] == fields["b"]:
            raise row.error("b", f"{fields['a']!r} is clip a too: give two clips")
        votes.append(Vote(row.line, **fields))
    return votes


def is_of(listener: str, panel: str) -> bool:
    """Tells whether a vote is signed by a simulated listener of that panel."""
    return listener.startswith(f"{SIMULATED} ") and listener.endswith(f" of the {panel}")


def set_figures_aside(directory: str, listeners: Iterable[str]) -> None:
    """Renames agreement.json where it is of other listeners than those who voted, so that it is not taken for theirs.

    It is of the panel of simulated listeners that it names.
    """
    path = Path(directory) / FIGURES
    if not os.path.lexists(path):
        return
    try:
        panel = read_json(path, {"panel": str})["panel"]
    except (ValueError, OSError) as error:
        set_aside(path, str(error).removeprefix(f"{path} "))
        return
    if others := sorted(listener for listener in listeners if not is_of(listener, panel)):
        aside = path.with_name(
            f"{path.stem}.{panel.replace(' ', '_').replace('/', '_')}{path.suffix}"
        )
        told = f"{path} is of simulated listeners of the {panel}, and {others[0]!r} voted"
        try:
            os.replace(path, aside)
        except OSError as error:  # a folder that is only read; or another process was faster
            print(f"{told}; do not take it for theirs ({error.strerror})", flush=True)
        else:
            print(f"{told}; renamed {aside.name}", flush=True)


def write_votes(directory: str, votes: list[Vote]) -> None:
    """Writes the file anew, whole or not at all; line numbers are given here.

    Figures about other listeners do not stay beside it; see `set_figures_aside`.
    """
    set_figures_aside(directory, {vote.listener for vote in votes})
    lines = [
        json.dumps({name: getattr(vote, name) for name in FIELDS}, ensure_ascii=False)
        for vote in votes
    ]
    write_text(Path(directory) / VOTES, "\n".join(lines) + "\n")
