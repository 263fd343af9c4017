"""The supervised loop: meshes, restarts, validation and updates that are not finite."""

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import compilation
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax import train as trainer
from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.losses.optimiser import Optimiser, create_state
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import TransformerConfig
from musicrl_jax.objectives.mulan import MuLanObjective
from musicrl_jax.objectives.policy import PolicyObjective
from musicrl_jax.train import _validate, train

CONFIG = MusicLMConfig(
    TransformerConfig(1, 16, 4, 16, dropout=0.0),
    TransformerConfig(1, 8, 2, 16),
    TokenLayout(8, 8, 2),
    2,
    4,
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with compilation.cached(tmp_path_factory.mktemp("compiled")):
        yield


@dataclasses.dataclass(frozen=True)
class RandomTokens:
    """Token batches that depend on (seed, step) alone; step `killed_at` interrupts a run."""

    size: int = 8
    killed_at = None

    def layout(self):
        return {"acoustic_codes": 8, "semantic_codes": 8, "mulan_levels": 2, "mulan_codes": 4}

    def splits(self):
        return ["train", "validation"]

    def count(self, split):
        return 100

    def batches(self, split, batch_size, seed, start_step=0, epochs=None, rows=None):
        step = start_step
        rows = range(batch_size) if rows is None else rows
        while True:
            if step == self.killed_at and split == "train":
                raise KeyboardInterrupt
            rng = np.random.default_rng([seed, step, len(split)])
            batch = {
                "semantic": rng.integers(0, 8, (batch_size, 6)).astype(np.int32),
                "acoustic": rng.integers(0, 8, (batch_size, 12, 3)).astype(np.int32),
                "mulan": rng.integers(0, 4, (batch_size, 2)).astype(np.int32),
                "id": np.array(["x"] * batch_size, object),
            }
            yield {name: values[list(rows)] for name, values in batch.items()}
            step += 1


@dataclasses.dataclass(frozen=True)
class Policy(PolicyObjective):
    """The policy's objective without a token folder, and so without a lineage."""

    data: Any

    def assets(self):
        return {}


def run(folder, objective=None, **changes):
    """Trains, and logs every step."""
    arguments = {"steps": 4, "batch_size": 8, "optimiser": Optimiser(1e-2, 1), "seed": 3}
    arguments |= {"save_every": 2}
    objective = objective or Policy(CONFIG, changes.pop("data", RandomTokens()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "LOG_EVERY", 1)
        return train(objective, str(folder), **(arguments | changes))


def losses(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(RandomTokens, "killed_at", 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.undo()
    run(tmp_path / "cut")
    assert losses(whole) == losses(tmp_path / "cut")
    assert checkpoint.model_hash(whole) == checkpoint.model_hash(tmp_path / "cut")
    assert run(tmp_path / "cut") == {}  # the run is complete


def test_one_device_equals_eight_on_any_mesh():
    """Loss and gradients of one batch are equal on meshes of 1x1x1, 8x1x1 and 2x2x2."""
    objective = Policy(CONFIG, RandomTokens())
    batch = next(objective.data.batches("train", 8, 0))
    results = []

    def create(key, arrays):
        return create_state(objective.init(key, arrays), Optimiser().build(10))

    def loss(params, batch):
        return objective.loss(params, {}, {}, batch, jax.random.key(1))[0]

    for devices, fsdp, tensor in ((1, 1, 1), (8, 1, 1), (8, 2, 2)):
        mesh = sharding.make_mesh(fsdp, tensor, jax.devices()[:devices])
        arrays = sharding.put_batch(mesh, batch)
        state, _ = sharding.create_sharded(mesh, create, jax.random.key(0), arrays)
        with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
            results.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(state.params, arrays)))
        gate = state.params["trunk"]["temporal"]["block_0"]["gate"].sharding
        assert len(gate.device_set) == devices
        assert gate.is_fully_replicated == (tensor == 1)
    for result in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result, results[0])


def test_a_model_trained_on_eight_devices_loads_on_one(whole, processes):
    """JAX fixes the number of devices when it starts, so this takes a process of its own."""
    code = """
import sys
import jax
from musicrl_jax.core import checkpoint
from musicrl_jax.models.musiclm import MusicLMConfig
assert jax.device_count() == 1
model = checkpoint.load_model(sys.argv[1], MusicLMConfig)
print(checkpoint.content_hash(model.variables))
"""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, whole]
    process = processes.run(command, env=environment, capture_output=True, timeout=300)
    assert process.stdout.strip() == checkpoint.model_hash(whole), process.stderr


def test_other_data_in_the_same_folder_is_refused(whole):
    with pytest.raises(ValueError, match=r"data\.size is 8 there and 9 here"):
        run(whole, data=RandomTokens(size=9))


def test_a_model_is_saved_without_validation_examples(tmp_path, capsys):
    @dataclasses.dataclass(frozen=True)
    class Few(RandomTokens):
        def count(self, split):
            return 3

    assert run(tmp_path, steps=1, data=Few()) == {}
    assert "not validated" in capsys.readouterr().out
    assert checkpoint.has_model(tmp_path)


@pytest.mark.parametrize(
    ("clips", "loss"), [(1, 0.5), (7, 0.5), (8, 0.5), (19, 0.5), (20, 0.5), (1, np.nan)]
)
def test_metrics_of_too_few_examples_are_left_out(clips, loss, capsys):
    """MuLan's recall among one clip is 1. A metric that is not finite stays: it ends the run."""

    class Clips:
        def splits(self):
            return ["validation"]

        def count(self, split):
            return clips

        def batches(self, split, batch_size, seed, rows):
            return itertools.repeat({"audio": np.zeros((len(rows), 4), np.float32)})

    class Objective(MuLanObjective):
        def evaluate(self, params, state, frozen, batch, key):
            metrics = {"loss": loss, "recall_1": 1.0, "temperature": 0.25}
            return jax.tree.map(jnp.float32, metrics)

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    metrics = _validate(Objective(None, Clips(), ""), {"params": {}}, {}, mesh, 32, 0, 1)
    out = capsys.readouterr().out
    if clips == 20:
        assert metrics == {"loss": 0.5, "recall_1": 1, "temperature": 0.25} and not out
    else:
        assert ("loss" in metrics) == (np.isnan(loss) or clips >= 8)
        assert set(metrics) - {"loss"} == {"temperature"}
        assert f"validation recall_1: n too small ({clips} < 20)" in out


def test_another_size_in_the_same_folder_is_refused(whole):
    other = dataclasses.replace(CONFIG, mulan_codes=5)
    with pytest.raises(ValueError, match=r"model\.mulan_codes is 4 there and 5 here"):
        train(Policy(other, RandomTokens()), str(whole), 4, 8, Optimiser(1e-2, 1), seed=3)


def test_a_batch_that_does_not_divide_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size=6 .* multiple of the 8 data shards"):
        run(tmp_path, batch_size=6)


def test_a_mesh_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="fsdp=3 times tensor=1 must divide the 8 devices"):
        sharding.make_mesh(fsdp=3)


@dataclasses.dataclass(frozen=True)
class Broken(Policy):
    """A loss or gradient of NaN for batches whose first code is 0, or for all."""

    always: bool = False
    loss_too: bool = True

    def loss(self, params, state, frozen, batch, key):
        loss, (state, metrics) = super().loss(params, state, frozen, batch, key)
        breaks = self.always | (batch["semantic"][0, 0] == 0)
        if self.loss_too:
            loss = jnp.where(breaks, jnp.nan, loss)
        level = jax.tree.leaves(params)[0].reshape(-1)[0]
        kink = jnp.where(breaks, level * 0.0, 1.0)
        loss += jnp.sqrt(kink) - jax.lax.stop_gradient(kink)  # 0; the slope at 0 is 0 x infinity
        return loss, (state, {**metrics, "loss": loss})


@pytest.mark.parametrize("loss_too", [True, False])
def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path, loss_too):
    """Weights and moments stay, and the run goes on."""
    broken, steps = Broken(CONFIG, RandomTokens(), loss_too=loss_too), 30
    batches = itertools.islice(broken.data.batches("train", 8, 3), steps)
    skipped = [int(batch["semantic"][0, 0] == 0) for batch in batches]
    assert 1 <= sum(skipped) < 10
    run(tmp_path, broken, steps=steps, save_every=1000)
    lines = losses(tmp_path)[:steps]
    assert [line["skipped"] for line in lines] == list(np.cumsum(skipped))
    for line, skip in zip(lines, skipped, strict=True):
        assert np.isfinite(line["loss"]) == (not skip or not loss_too)
    variables = checkpoint.load_model(tmp_path, MusicLMConfig).variables
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("steps", "loss_too", "complaint"),
    [(12, True, "is nan at step 9"), (1, False, "gradient_norm is nan at step 0")],
)
def test_a_run_of_skipped_updates_stops_before_its_model_is_saved(
    tmp_path, steps, loss_too, complaint
):
    """A run of one step ends with it, even if only the gradient is not finite."""
    broken = Broken(CONFIG, RandomTokens(), always=True, loss_too=loss_too)
    with pytest.raises(FloatingPointError, match=complaint):
        run(tmp_path, broken, steps=steps, save_every=1000)
    assert not checkpoint.has_model(tmp_path)
