"""Votes: which of two clips a listener chose.

A vote folder is a token folder (`tokens.py`) with `votes.jsonl` in it, one line for each vote:

    {"prompt": "a slow waltz", "a": "17-0", "b": "17-1", "vote": "a",
     "listener": "training panel 3", "heard": [true, true]}

`a` and `b` are ids of clips in the token folder; `vote` is "a", "b", "tie" or "abstain". As in
MusicRL, a vote counts only if the listener heard both clips. Abstentions do not count. A tie is
half a vote for each clip.

Legend: B votes.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import numpy as np

from musicrl_jax.core import tables
from musicrl_jax.core.files import read_json, set_aside, write_text
from musicrl_jax.inputs.records import Records
from musicrl_jax.inputs.tokens import VOTES, ClipShapes, Shapes, Tokens, read, token_spec

if TYPE_CHECKING:
    import tensorflow as tf

# File with the agreement of the simulated listeners who voted.
FIGURES = "agreement.json"
# Start of the name of every simulated listener.
SIMULATED = "simulated listener"
# Share of the vote that clip a gets.
CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5}
ABSTAINED = "abstain"
# Columns of `votes.jsonl`, in the order of the fields of `Vote` after `line`.
FIELDS = {"prompt": str, "a": str, "b": str, "vote": str, "listener": str, "heard": list}
# Token arrays that both clips share; all others are stacked.
OF_THE_PROMPT = ("mulan",)


class Vote(NamedTuple):
    """A line of `votes.jsonl`, and its number."""

    line: int
    prompt: str
    a: str
    b: str
    vote: str
    listener: str
    clips_heard: list[bool]

    @property
    def counts(self) -> bool:
        """Whether both clips were heard and the listener did not abstain."""
        return all(self.clips_heard) and self.vote != ABSTAINED


@dataclasses.dataclass(frozen=True)
class Votes(Tokens):
    """The votes that count, with the tokens of both clips.

    A batch holds the token arrays, i32 [B, 2, ...] by name, or [B, ...] if both clips share them,
    and 'vote', f32 [B], the share of the first clip. `batches` also raises ValueError, with the
    line, if a vote is damaged or its clips are missing.

    Attributes:
      directory: the vote folder.
      models: hash of each model of this run, as in `Tokens`.
    """

    verb: ClassVar[str] = "collect"
    examples: ClassVar[str] = "votes"
    remedy: ClassVar[str] = "lower it, or collect more"

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch; see `objectives.objective.Data`."""
        shapes = super().shapes(batch_size, clip_seconds, tokens)
        for name in shapes.keys() - set(OF_THE_PROMPT):
            shape = (batch_size, 2, *shapes[name].shape[1:])
            shapes[name] = jax.ShapeDtypeStruct(shape, np.int32)
        return shapes | {"vote": jax.ShapeDtypeStruct((batch_size,), np.float32)}

    def splits(self) -> list[str]:
        """Returns the splits with votes."""
        return [split for split in super().splits() if self.count(split)]

    def count(self, split: str) -> int:
        """Returns the number of votes in a split that count."""
        return len(self.votes(split))

    def votes(self, split: str) -> list[Vote]:
        """Returns the votes that count on the clips of a split."""
        places = {each: self._places(each) for each in super().splits()}
        votes = read_votes(self.directory)
        set_figures_aside(self.directory, {vote.listener for vote in votes})
        # A vote on a clip of no split would be dropped silently.
        for vote in votes:
            if not any(vote.a in clips for clips in places.values()):
                raise self._error(vote, "a", "in any split")
        return [vote for vote in votes if vote.counts and vote.a in places.get(split, {})]

    def _error(self, vote: Vote, column: str, place: str) -> ValueError:
        row = tables.Row(Path(self.directory) / VOTES, vote.line, {})
        return row.error(column, f"no clip {getattr(vote, column)!r} {place}")

    def _places(self, split: str) -> dict[str, int]:
        """Returns the number of every clip of a split, by id."""
        super().count(split)  # checks the models
        records = read(self.directory, split)[0]
        return {record["id"].decode(): number for number, record in enumerate(records)}

    def _records(self, split: str) -> tuple[Records, dict[str, "tf.TensorSpec"]]:
        from musicrl_jax.inputs import tasks

        places = self._places(split)
        clips, spec = read(self.directory, split)
        spec = token_spec(spec)
        pairs = _Pairs(clips, list(spec))
        for vote in self.votes(split):
            if vote.b not in places:
                raise self._error(vote, "b", f"in split {split!r}")
            pairs.append((places[vote.a], places[vote.b], CHOICES[vote.vote]))
        for name in spec.keys() - set(OF_THE_PROMPT):
            spec[name] = tasks.spec([2, *spec[name].shape], np.int32)
        return pairs, {**spec, "vote": tasks.spec([], np.float32)}


# --- Records ---


class _Pairs(list):
    """(number of clip a, number of clip b, share of a) as records."""

    def __init__(self, clips: Records, names: Sequence[str]):
        """Initialises an empty list of pairs of `clips`, with the token arrays `names`."""
        super().__init__()
        self._clips, self._names = clips, names

    def __getitems__(self, indices: list[int]) -> list[Mapping[str, Any]]:
        pairs = [self[i] for i in indices]
        # One call of the reader for all clips: a, b, a, b, ...
        clips = self._clips.__getitems__([number for a, b, _ in pairs for number in (a, b)])
        records = []
        for a, b, (_, _, share) in zip(clips[::2], clips[1::2], pairs, strict=True):
            record = {"vote": np.float32(share)}
            for name in self._names:
                is_shared = name in OF_THE_PROMPT
                record[name] = a[name] if is_shared else np.stack([a[name], b[name]])
            records.append(record)
        return records


# --- The file ---


def read_votes(directory: str) -> list[Vote]:
    """Returns every vote of a folder.

    Raises FileNotFoundError without a file, and ValueError with line and column for a wrong vote.
    """
    path = Path(directory) / VOTES
    if not path.exists():
        raise FileNotFoundError(f"directory: no votes at {path}; write them with `musicrl collect`")
    choices = (*CHOICES, ABSTAINED)
    votes = []
    for row in tables.read_rows(path, FIELDS, only=True):
        vote = Vote(row.line, *(row.values[name] for name in FIELDS))
        if vote.vote not in choices:
            raise row.error("vote", f"{vote.vote!r} is none of {choices}")
        if [type(each) for each in vote.clips_heard] != [bool, bool]:
            message = f"{vote.clips_heard!r} must be two of true and false, for a and for b"
            raise row.error("heard", message)
        if vote.a == vote.b:
            raise row.error("b", f"{vote.a!r} is clip a too: give two clips")
        votes.append(vote)
    return votes


def is_of(listener: str, panel: str) -> bool:
    """Returns whether a name is that of a simulated listener of the panel."""
    return listener.startswith(f"{SIMULATED} ") and listener.endswith(f" of the {panel}")


def set_figures_aside(directory: str, listeners: Iterable[str]) -> None:
    """Renames agreement.json if anybody voted who is not of its panel of simulated listeners.

    The figures of the panel must not be mistaken for those of others.
    """
    path = Path(directory) / FIGURES
    if not os.path.lexists(path):
        return
    try:
        panel = read_json(path, {"panel": str})["panel"]
    except (ValueError, OSError) as error:
        set_aside(path, str(error).removeprefix(f"{path} "))
        return
    # Listeners who are not of the panel.
    others = sorted(listener for listener in listeners if not is_of(listener, panel))
    if not others:
        return
    suffix = panel.replace(" ", "_").replace("/", "_")
    aside = path.with_name(f"{path.stem}.{suffix}{path.suffix}")
    message = f"{path} is of simulated listeners of the {panel}, and {others[0]!r} voted"
    try:
        os.replace(path, aside)
    except OSError as error:  # a read-only folder, or another process was faster
        print(f"{message}; do not take it for theirs ({error.strerror})", flush=True)
    else:
        print(f"{message}; renamed {aside.name}", flush=True)


def write_votes(directory: str, votes: list[Vote]) -> None:
    """Writes the file anew, whole or not at all. Line numbers follow from the order.

    Figures of other listeners are set aside; see `set_figures_aside`.
    """
    set_figures_aside(directory, {vote.listener for vote in votes})
    lines = []
    for _, *values in votes:
        lines.append(json.dumps(dict(zip(FIELDS, values, strict=True)), ensure_ascii=False))
    write_text(Path(directory) / VOTES, "\n".join(lines) + "\n")
