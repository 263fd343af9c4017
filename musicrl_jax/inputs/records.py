"""Records by number, and the names of splits. Data configs need both before anything is read."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SPLITS = ("train", "validation", "test")


class Records(Protocol):
    """Records by number, as TFDS's `as_data_source` returns them."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Sequence[Mapping[str, Any]]: ...
