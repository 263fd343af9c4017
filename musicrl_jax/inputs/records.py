"""Records by number, and the splits that they come in: what data configs need before anything is
read.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SPLITS = ("train", "validation", "test")


class Records(Protocol):
    """Records by number, as TFDS's `as_data_source` gives them."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Sequence[Mapping[str, Any]]: ...


class ListRecords(list):
    """Records that are in memory."""

    def __getitems__(self, indices: list[int]) -> list[Mapping[str, Any]]:
        return [self[i] for i in indices]
