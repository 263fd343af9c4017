"""Prompts for RL: the captions of clip sets and lines of text files. No audio comes with them.

Legend: B prompts, L text pieces.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from musicrl_jax.core.files import read_text
from musicrl_jax.inputs.records import SPLITS, ListRecords

TRAIN_PERCENT, VALIDATION_PERCENT = 90, 5  # of the lines of text files; the rest is test


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The captions of prepared clip sets, and text files with one prompt a line.

    A clip set's captions keep their split; a line of a file goes to train, validation or test, 90 : 5 : 5,
    by a hash of its words. Each text comes once, and one that train has is in no other split, whatever its
    case and spacing.

    Attributes:
      vocabulary: path of a SentencePiece model or of a BERT's tokenizer.json.
      datasets: clip sets, by their folders under data_dir.
      files: text files in UTF-8; blank lines are skipped.
      data_dir: where prepared sets lie.
      text_length: L, pieces of a prompt; longer ones are cut, shorter ones are filled with 0.
    """

    vocabulary: str
    datasets: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    data_dir: str = "."
    text_length: int = 64

    def batches(self, split: str, batch_size: int, seed: int, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Endless {'prompt': object array of str [B], 'text': i32 [B, L]}, a pure function of (seed, step).

        Where there are fewer prompts than a batch holds, the batch repeats some. Raises FileNotFoundError
        or ValueError, before the first batch, where a file, a set or the vocabulary is missing or the split
        has no prompts.
        """
        from musicrl_jax.inputs import tasks

        records = ListRecords({"prompt": prompt.encode()} for prompt in self.unique(split))
        if not records:
            raise ValueError(
                f"split {split!r} of {[*self.datasets, *self.files]} has no prompts that earlier splits lack"
            )
        source = tasks.RecordSource({split: records}, {"prompt": tasks.spec([], bytes)})
        tokenize = functools.partial(tasks.tokenize, vocabulary=self.vocabulary, field="prompt")
        task = tasks.register("prompts", source, [tokenize], {"text": tasks.text_feature()})
        length = {"text": self.text_length}
        return tasks.batches([(task, 1.0)], split, length, batch_size, seed, start_step, passthrough=("prompt",))

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
            raise ValueError("datasets and files are both empty: name a clip set or a file of prompts")
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
