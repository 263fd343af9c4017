"""What a run learned from, as it stands in the run's identity: hashes of data sets, and how two of them differ."""

import typing
from typing import Any

CONTENT = "content"  # the key of `checkpoint.describe` under which the hashes of data sets stand
ABSENT = "not there"  # in place of the hashes of a data set that is gone, with which a finished run still agrees


@typing.runtime_checkable
class HashedData(typing.Protocol):
    """Data whose content is known by hashes that were made when they were written."""

    def content_hashes(self) -> dict[str, Any]:
        """Returns {name of a set: {split: hash}}, or ABSENT for a set; sets without hashes are left out."""


def changed_content(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Returns what differs between two CONTENTs of `describe` in a sentence's words, '' where nothing does.

    A set that is ABSENT now is taken to be what it was.
    """
    before, now = before or {}, now or {}
    changes = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if new in (ABSENT, old):
            continue
        if not isinstance(old, dict) or not isinstance(new, dict):
            with_hash, without = ("now", "then") if isinstance(new, dict) else ("then", "now")
            changes.append(
                f"{name} was built anew ({with_hash} it has a content hash, {without} it has none)"
            )
            continue
        splits = [
            split for split in sorted(set(old) | set(new)) if old.get(split) != new.get(split)
        ]
        hashes = "; ".join(
            f"{split} {str(old.get(split))[:12]}, now {str(new.get(split))[:12]}"
            for split in splits
        )
        changes.append(f"{name} was built anew with other examples (content hash of {hashes})")
    return " and ".join(changes)
