"""Prompts for RL: captions of clip sets and lines of text files, without audio.

Prompts are strings. Each system and each reward tokenizes them in its own way.

Legend: B prompts.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from musicrl_jax.core.checkpoint import PATH
from musicrl_jax.core.files import read_text
from musicrl_jax.inputs import order
from musicrl_jax.inputs.order import BatchOrder
from musicrl_jax.inputs.records import SPLITS

# Shares of the lines of text files; the rest is test.
TRAIN_PERCENT, VALIDATION_PERCENT = 90, 5


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Captions of prepared clip sets, and text files with one prompt a line.

    Captions keep the split of their clip. A line of a file goes to train, validation or test,
    90 : 5 : 5, by a hash of its words. Texts that differ only in case and spacing are one prompt.
    Each prompt is in one split only, train before validation before test.

    Attributes:
      datasets: clip sets, by their folders under data_dir.
      files: text files in UTF-8; blank lines are skipped.
      data_dir: the folder of prepared sets; '' is the working directory.
    """

    datasets: tuple[str, ...] = ()
    files: tuple[str, ...] = dataclasses.field(default=(), metadata=PATH)
    data_dir: str = dataclasses.field(default="", metadata=PATH)

    def batches(
        self, split: str, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[list[str]]:
        """Yields B prompts a step without end, a pure function of (seed, step).

        If there are fewer prompts than B, a batch repeats some. Raises FileNotFoundError or
        ValueError, before the first batch, if a file or a set is missing, the split has no prompts
        or a number is out of range.
        """
        batch_order = BatchOrder(batch_size, seed, start_step)
        prompts = self.unique(split)
        if not prompts:
            raise ValueError(
                f"split {split!r} of {[*self.datasets, *self.files]} has no prompts that earlier "
                "splits lack"
            )
        return _shuffled(prompts, batch_order)

    def count(self, split: str) -> int:
        """Returns the number of prompts in a split."""
        return len(self.unique(split))

    def content_hashes(self) -> dict[str, Any]:
        """Returns {set: {split: hash}}; sets without hashes are left out, and so are `files`."""
        if not self.datasets:
            return {}
        from musicrl_jax.inputs import tasks

        return tasks.content_hashes(self.datasets, self.data_dir)

    def unique(self, split: str) -> list[str]:
        """Returns every prompt of a split once, without those of earlier splits.

        The order is that of `datasets` and `files`.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        if not self.datasets and not self.files:
            raise ValueError(
                "datasets and files are both empty: name a clip set or a file of prompts"
            )
        # Words of the prompts of earlier splits.
        earlier = set()
        for each in SPLITS[: SPLITS.index(split)]:
            earlier.update(map(_words, self._all(each)))
        # Words -> the first prompt with them.
        prompts = {}
        for prompt in self._all(split):
            if (words := _words(prompt)) not in earlier:
                prompts.setdefault(words, prompt)
        return list(prompts.values())

    def _all(self, split: str) -> Iterator[str]:
        for name in self.datasets:
            from musicrl_jax.inputs import tasks

            yield from (text["caption"] for text in tasks.texts(name, self.data_dir, split))
        for file in self.files:
            yield from (line for line in _lines(file) if _split(line) == split)


def _shuffled(prompts: list[str], batch_order: BatchOrder) -> Iterator[list[str]]:
    for position in order.positions(batch_order.batch_size, batch_order.start_step):
        _, index = order.example_at(batch_order.seed, position, [len(prompts)], [1.0])
        yield [prompts[i] for i in index]


def _words(text: str) -> str:
    """Returns a text with case folded and spacing unified."""
    return " ".join(text.casefold().split())


def _split(line: str) -> str:
    percent = int.from_bytes(hashlib.blake2b(_words(line).encode(), digest_size=8).digest()) % 100
    if percent < TRAIN_PERCENT:
        return "train"
    return "validation" if percent < TRAIN_PERCENT + VALIDATION_PERCENT else "test"


def _lines(file: str) -> list[str]:
    try:
        text = read_text(Path(file).expanduser())
    except FileNotFoundError:
        raise FileNotFoundError(f"files: {file!r} is no file") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"files: {file!r} holds no prompts")
    return lines
