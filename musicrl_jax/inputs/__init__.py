"""SeqIO tasks over TFDS records: the only TensorFlow in the package."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported, or it talks
