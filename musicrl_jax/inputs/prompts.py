"""Prompts for RL: the captions of clip sets and lines of text files. No audio comes with them.

Prompts are strings: each system and each reward reads them in its own way.

Legend: B prompts.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from musicrl_jax.core.checkpoint import PATH
from musicrl_jax.core.files import read_text
from musicrl_jax.inputs import order
from musicrl_jax.inputs.records import SPLITS

TRAIN_PERCENT, VALIDATION_PERCENT = 90, 5  # of the lines of text files; the rest is test


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The captions of prepared clip sets, and text files with one prompt a line.

    A clip set's captions keep their split; a line of a file goes to train, validation or test, 90 : 5 : 5,
    by a hash of its words. Each text comes once, and one that train has is in no other split, whatever its
    case and spacing.

    Attributes:
      datasets: clip sets, by their folders under data_dir.
      files: text files in UTF-8; blank lines are skipped.
      data_dir: where prepared sets lie; '' is the working directory.
    """

    datasets: tuple[str, ...] = ()
    files: tuple[str, ...] = dataclasses.field(default=(), metadata=PATH)
    data_dir: str = dataclasses.field(default="", metadata=PATH)

    def batches(
        self, split: str, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[list[str]]:
        """Yields B prompts a step, endlessly; a pure function of (seed, step).

        If there are fewer prompts than B, a batch repeats some. Raises FileNotFoundError or
        ValueError, before the first batch, if a file or a set is missing, the split has no prompts
        or a number is out of range.
        """
        if batch_size < 1 or start_step < 0 or seed < 0:
            raise ValueError(
                f"batch_size {batch_size} must be at least 1, start_step {start_step} and seed "
                f"{seed} at least 0"
            )
        prompts = self.unique(split)
        if not prompts:
            raise ValueError(
                f"split {split!r} of {[*self.datasets, *self.files]} has no prompts that earlier "
                "splits lack"
            )
        return self._shuffled(prompts, batch_size, seed, start_step)

    def _shuffled(
        self, prompts: list[str], batch_size: int, seed: int, start_step: int
    ) -> Iterator[list[str]]:
        for position in order.positions(batch_size, start_step):
            _, index = order.example_at(seed, position, [len(prompts)], [1.0])
            yield [prompts[i] for i in index]

    def count(self, split: str) -> int:
        """The number of prompts in a split."""
        return len(self.unique(split))

    def content_hashes(self) -> dict[str, Any]:
        """Returns {set: {split: hash}}; sets without hashes are left out. `files` are known by their own content."""
        if not self.datasets:
            return {}
        from musicrl_jax.inputs import tasks

        return tasks.content_hashes(self.datasets, self.data_dir)

    def unique(self, split: str) -> list[str]:
        """Every prompt of a split once, in the order of `datasets` and `files`; none that a split before it has."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        if not self.datasets and not self.files:
            raise ValueError(
                "datasets and files are both empty: name a clip set or a file of prompts"
            )
        seen: set[str] = set()
        for earlier in SPLITS[: SPLITS.index(split)]:
            seen.update(map(_words, self._all(earlier)))
        prompts = []
        for prompt in self._all(split):
            if _words(prompt) not in seen:
                seen.add(_words(prompt))
                prompts.append(prompt)
        return prompts

    def _all(self, split: str) -> Iterator[str]:
        for name in self.datasets:
            from musicrl_jax.inputs import tasks

            yield from (text["caption"] for text in tasks.texts(name, self.data_dir, split))
        for file in self.files:
            yield from (line for line in _lines(file) if _split(line) == split)


def _words(text: str) -> str:
    """The text without what does not make it another prompt: case and spacing."""
    return " ".join(text.casefold().split())


def _split(line: str) -> str:
    percent = int.from_bytes(hashlib.blake2b(_words(line).encode(), digest_size=8).digest()) % 100
    if percent < TRAIN_PERCENT:
        return "train"
    return "validation" if percent < TRAIN_PERCENT + VALIDATION_PERCENT else "test"


def _lines(file: str) -> Iterable[str]:
    try:
        text = read_text(Path(file).expanduser())
    except FileNotFoundError:
        raise FileNotFoundError(f"files: {file!r} is no file") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"files: {file!r} holds no prompts")
    return lines
