"""TensorFlow, SeqIO and TFDS. Import them from here, and only where data is read.

They take seconds to import. While they start, their C++ code writes to stderr before any of their
settings applies. Those lines are dropped; everything else that arrives meanwhile is passed on.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# Lines such as "I0000 00:00:1796022448.10 6258 port.cc:153] ...", and absl's line before the first.
START_UP_LINE = re.compile(
    rb"[IW]\d{4} [\d:. ]+\w+\.cc:\d+\] |\d{4}-\d\d-\d\d .*\.cc:\d+\] |WARNING: All log messages"
)


@contextmanager
def _without_start_up_lines() -> Iterator[None]:
    """Drops TensorFlow's start-up lines from the stderr of this process inside the block."""
    # Read once, at the import.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            written.seek(0)
            for line in written:
                if not START_UP_LINE.match(line):
                    os.write(stderr, line)
            os.close(stderr)


with _without_start_up_lines():
    import seqio
    import tensorflow
    import tensorflow_datasets

    # Leaves the accelerators to JAX.
    tensorflow.config.set_visible_devices([], "GPU")

__all__ = ["seqio", "tensorflow", "tensorflow_datasets"]
