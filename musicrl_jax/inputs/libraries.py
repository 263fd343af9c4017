"""TensorFlow, SeqIO and TFDS: imported through here, so that nothing is heard of them before there
is data to read.

They take seconds to import and write to the process's stderr while they start, from C++ and before
any setting of theirs is read. Those lines are left out; whatever else stands there meanwhile is
passed on.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# "I0000 00:00:1796022448.10 6258 port.cc:153] ..." and what absl says before the first of them.
START_UP_LINE = re.compile(
    rb"[IW]\d{4} [\d:. ]+\w+\.cc:\d+\] |\d{4}-\d\d-\d\d .*\.cc:\d+\] |WARNING: All log messages"
)


@contextmanager
def _without_start_up_lines() -> Iterator[None]:
    """Drops from the process's stderr, in the block, the lines that TensorFlow writes as it starts."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read once, at the import
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

    tensorflow.config.set_visible_devices([], "GPU")  # the accelerators are JAX's

__all__ = ["seqio", "tensorflow", "tensorflow_datasets"]
