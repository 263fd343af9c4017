"""Reads the charts of a run: the files of TensorBoard, and those of W&B offline."""

import collections
import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Session states of event files; see TensorFlow's event.proto.
START = 1


def read(directory: Path) -> dict[str, list[tuple[int, Any]]]:
    """Returns tag -> [(step, value)] in order: a number, a histogram or a clip.

    A run that resumes at a step writes a start event; TensorBoard then forgets what earlier files
    have from that step on.
    """
    charts = collections.defaultdict(list)
    for file in sorted(directory.glob("events.*")):
        for event in _events(file):
            if event.session_log.status == START:
                for values in charts.values():
                    values[:] = [pair for pair in values if pair[0] < event.step]
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                number = getattr(value, {"histo": "histo", "audio": "audio"}.get(kind, kind))
                charts[value.tag].append((event.step, number))
    return charts


def _events(file: Path) -> Iterator[Any]:
    """Yields a file's events; a killed process may leave the last one cut off."""
    from tensorflow.compat.v1.train import summary_iterator
    from tensorflow.errors import DataLossError

    with contextlib.suppress(DataLossError):
        yield from summary_iterator(str(file))


def read_wandb(directory: Path) -> Iterator[Any]:
    """Yields the records of all offline runs of a folder, in order.

    First ends W&B's service: `Run.finish` may return before the service has written the last file.
    The files are logs of LevelDB (blocks of 32 KiB; records of crc u32, length u16, type u8 and
    data) behind a header of seven bytes.
    """
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        content, position, parts = file.read_bytes(), 7, b""
        while position + 7 <= len(content):
            if (rest := 2**15 - position % 2**15) < 7:  # padding at the end of a block
                position += rest
                continue
            length, kind = struct.unpack_from("<HB", content, position + 4)
            parts += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # a whole record, or its last part
                yield wandb_internal_pb2.Record.FromString(parts)
                parts = b""
