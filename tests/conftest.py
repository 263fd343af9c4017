"""Strict JAX for every test: eight virtual devices, no silent promotion, and warnings are errors.

No dtype and no rank is promoted silently.
"""

import io
import os
import re
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# The models are tiny, so nearly all time is compilation. LLVM without optimisation takes a fifth.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = flags
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# The builders in data/ are not installed, nor are the modules beside this one.
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parent))

import jax
import pytest
import sentencepiece
from processes import Processes, default_signals

from musicrl_jax.core import sharding

default_signals()
sharding.reserve_threads()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests of these files and folders compile no model: they are marked `unit`.
UNIT = set(
    re.findall(
        r"\S+",
        "arena/figures_test.py arena/listeners_test.py cli_test.py command core/audio_test.py "
        "core/checkpoint_test.py core/extras_test.py core/files_test.py core/keys_test.py "
        "core/metrics_test.py core/progress_test.py core/shipped_test.py core/statistics_test.py "
        "core/tables_test.py core/tensors_test.py exactness_test.py front_door_test.py "
        "import_test.py inputs launch/image_test.py launch/setup_test.py models/tokens_test.py "
        "pages_test.py path_fields_test.py planning/estimate_test.py planning/hlo_test.py "
        "planning/stages_test.py processes_test.py report rl/config_test.py run_test.py "
        "serving/settings_test.py style_test.py",
    )
)
IMPORTING = "tensorflow keras seqio clu tensorflow_datasets google music21 pretty_midi"


def pytest_configure(config: pytest.Config) -> None:
    """Makes warnings errors, but for those that other packages' own code gives."""
    config.addinivalue_line("filterwarnings", "error")
    for module in IMPORTING.split():
        config.addinivalue_line("filterwarnings", rf"ignore:::{module}(\..*)?")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks unit tests, so that `pytest -m unit` runs them alone."""
    here = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(here).as_posix()
        slow = item.get_closest_marker("slow") is not None
        if not slow and any(path == unit or path.startswith(f"{unit}/") for unit in UNIT):
            item.add_marker("unit")


@pytest.fixture
def processes():
    """Starts processes that end with the test; a fixture that lives longer takes `Processes`."""
    with Processes() as started:
        yield started


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """Returns the path of a SentencePiece model of 275 pieces, made from four captions."""
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
