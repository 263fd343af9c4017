"""Content hashes of data sets in the identity of a run, and the comparison of two of them."""

import typing
from typing import Any

CONTENT = "content"  # key of the data sets' hashes in `checkpoint.describe`
ABSENT = "not there"  # replaces the hashes of a deleted data set; a finished run accepts it


@typing.runtime_checkable
class HashedData(typing.Protocol):
    """Data whose content hashes were computed when they were written."""

    def content_hashes(self) -> dict[str, Any]:
        """Returns {data set: {split: hash}}, with ABSENT for a deleted data set.

        Data sets without hashes are omitted.
        """


def changed_content(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Returns a phrase that names the data sets whose hashes differ, '' if none do.

    Args:
      before: the saved CONTENT of `checkpoint.describe`.
      now: the current one; a data set that is ABSENT counts as unchanged.
    """
    before, now = before or {}, now or {}
    changes = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if new in (ABSENT, old):
            continue
        # One of them was built before data sets had hashes.
        if not isinstance(old, dict) or not isinstance(new, dict):
            has, lacks = ("now", "then") if isinstance(new, dict) else ("then", "now")
            changes.append(
                f"{name} was built anew ({has} it has a content hash, {lacks} it has none)"
            )
            continue
        # Both have hashes: name the splits.
        hashes = [
            f"{split} {str(old.get(split))[:12]}, now {str(new.get(split))[:12]}"
            for split in sorted(set(old) | set(new))
            if old.get(split) != new.get(split)
        ]
        changes.append(
            f"{name} was built anew with other examples (content hash of {'; '.join(hashes)})"
        )
    return " and ".join(changes)
