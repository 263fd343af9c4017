"""Exports a bundle of untrained models, and fakes of a bundle and its queue."""

import contextlib
import io
import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from musicrl_jax import export
from musicrl_jax.core import checkpoint
from musicrl_jax.models.bert import BertConfig
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.models.rewards import Quality, QualityConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import TransformerConfig
from musicrl_jax.objectives.mulan import VOCABULARY
from musicrl_jax.rl.rewards import Mixture
from musicrl_jax.serving import edge
from musicrl_jax.serving.app import Limits, create
from musicrl_jax.serving.batcher import Clip
from musicrl_jax.serving.bundle import Bundle
from musicrl_jax.serving.settings import Access, ServiceLimits, listen
from musicrl_jax.systems.musiclm import MusicLMSystem
from musicrl_jax.systems.scorers import AcousticQuality, TextAdherence

RATE, SECONDS = 8000, 0.4  # ten frames
LENGTH = 12
CONFIGS = {
    "codec": SoundStreamConfig(RATE, (8, 5, 4), channels=4, embed=8, levels=3, codes=8),
    "mulan": MuLanConfig(
        RATE,
        0.4,
        ResNetConfig(mels=16, widths=(4, 8), blocks=1),
        BertConfig(layers=1, heads=2, embed=16, mlp=32, positions=LENGTH, pieces=400),
        LENGTH,
        embed=8,
        levels=3,
        codes=4,
    ),
    "policy": MusicLMConfig(
        TransformerConfig(2, 24, 2, 32, 0.0),
        TransformerConfig(1, 16, 2, 24, 0.0),
        TokenLayout(16, 8, 1),
        3,
        4,
    ),
    "fine": SoundStormConfig(
        ConformerConfig(1, 2, 8, 16), levels=3, coarse_levels=1, codes=8, first_passes=2
    ),
    "quality": QualityConfig(RATE, 0.3, ResNetConfig(mels=16, widths=(4, 8), blocks=1)),
}


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Shares compiled functions among these tests and the processes that they start."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", folder)
        jax_cache.reset_cache()  # JAX decides at its first compilation whether it uses a cache
        yield
        jax.config.update("jax_compilation_cache_dir", before)
        jax_cache.reset_cache()


@pytest.fixture(scope="session")
def run(tmp_path_factory, vocabulary):
    """Returns the folder of a run with five models."""
    # An input of each model, for its shapes.
    folder = tmp_path_factory.mktemp("run")
    key, wav = jax.random.key(1), jnp.zeros((1, RATE))
    tokens, mulan = jnp.zeros((1, 1, 3), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    codes = jnp.zeros((1, 4, 3), jnp.int32)
    inputs = {
        "codec": (SoundStream, (wav, key)),
        "mulan": (MuLan, (wav, jnp.zeros((1, LENGTH), jnp.int32))),
        "policy": (MusicLM, (tokens, mulan)),
        "fine": (SoundStorm, (codes, codes > 0, 1)),
        "quality": (Quality, (wav,)),
    }

    # The models, each with the hashes of those before it.
    hashes = {"semantic": "of no model"}
    (folder / "config.gin").write_text("import a_module_that_nothing_may_import\n")
    for name, (module, arrays) in inputs.items():
        variables = meta.unbox(jax.jit(module(CONFIGS[name]).init)(key, *arrays))
        assets = {VOCABULARY: Path(vocabulary).read_bytes()} if name == "mulan" else {}
        if name in ("policy", "fine"):
            assets = {checkpoint.LINEAGE: json.dumps(hashes).encode()}
            assets[checkpoint.CLIP] = json.dumps({"seconds": SECONDS}).encode()
        hashes[name] = checkpoint.save_model(folder / name, CONFIGS[name], variables, assets)
    return folder


@pytest.fixture(scope="session")
def rewards(run):
    terms = TextAdherence(str(run / "mulan"), "CC0"), AcousticQuality(str(run / "quality"), "CC0")
    return Mixture(terms, {"text_adherence": 1.0, "acoustic_quality": 2.0})


@pytest.fixture(scope="session")
def exported(run, rewards, tmp_path_factory):
    """Returns (the bundle's folder, the output of `musicrl export`)."""
    output, folder = io.StringIO(), tmp_path_factory.mktemp("exported") / "bundle"
    with contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        patch.setattr(MusicLMSystem, "STREAM_FRAMES", 3)  # chunks of 4, 3 and 3 frames
        export.export(str(run / "policy"), str(folder), SECONDS, rewards, licence="CC0-1.0")
    return folder, output.getvalue()


@pytest.fixture(scope="session")
def bundle(exported):
    return Bundle(exported[0])


class FakeBundle:
    """A bundle that cannot draw; its clips have one second."""

    streams = False

    def __init__(self):
        self.manifest = {
            "version": "0",
            "sha256": "0" * 64,
            "licence": "CC0-1.0",
            "models": {},
            "rewards": {},
            "golden": {"prompts": ["jazz"]},
            "clip_seconds": 1.0,
            "frames": 25,
            "sample_rate_hz": RATE,
            "temperature": 1.0,
        }

    def encode(self, prompts):
        return np.zeros((len(prompts), LENGTH), np.int32)


class FakeQueue:
    """A queue that answers at once with silence."""

    waiting = 0

    def __init__(self, on_batch):
        pass

    def submit(self, *rows, begun=False):
        futures = [Future() for _ in rows]
        for future in futures:
            future.set_result(Clip(np.zeros((25, 1), np.int32), np.zeros(RATE, np.float32), {}))
        return futures

    def close(self):
        pass


@pytest.fixture
def fake_app():
    """Returns `fake_app(**access)`: the application with a fake bundle, and `Access(**access)`."""
    return lambda **access: create(FakeBundle(), FakeQueue, Limits(4.0, 2), Access(**access))


@pytest.fixture
def on_loopback():
    """Returns `on_loopback(app, limits)`, which serves an ASGI application while its block runs."""

    @contextlib.contextmanager
    def running(app, limits=None):
        (opened,) = listen("127.0.0.1", 0)
        address = opened.getsockname()
        server = edge.server(app, limits or ServiceLimits())
        thread = threading.Thread(target=server.run, args=([opened],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(300)
            assert not thread.is_alive()

    return running
