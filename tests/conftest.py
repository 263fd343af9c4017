"""Strict JAX for every test: eight virtual devices, no silent promotion of dtypes or ranks, warnings are errors."""

import io
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# The models here are tiny: nearly all time is compilation, which LLVM without optimisation does five times faster.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # for the builders in data/, which are not installed

sys.path.append(str(Path(__file__).parent))  # for processes.py

import jax
import pytest
import sentencepiece
from processes import Processes, default_signals

default_signals()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but for those that other packages' own code gives on import or inside."""
    config.addinivalue_line("filterwarnings", "error")
    for module in (
        "tensorflow",
        "keras",
        "seqio",
        "clu",
        "tensorflow_datasets",
        "google",
        "music21",
        "pretty_midi",
    ):
        config.addinivalue_line("filterwarnings", rf"ignore:::{module}(\..*)?")


@pytest.fixture
def processes():
    """Starts processes that are gone when the test ends; a fixture that lives longer takes `Processes` itself."""
    with Processes() as started:
        yield started


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """Path of a SentencePiece model of 275 pieces, made from four captions: "a low tone" and so on."""
    captions = [f"a {word} tone" for word in ("low", "middling", "high", "shrill")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions * 20),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    path.write_bytes(model.getvalue())
    return str(path)
