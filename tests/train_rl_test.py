"""The RL loop on the tiny system: devices, keys, anchor, restarts and the held-out judge."""

import dataclasses
import functools
import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import compilation
import events
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile

from musicrl_jax import train_rl
from musicrl_jax.arena import monitor
from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.core.metrics import MetricWriter
from musicrl_jax.core.run_checkpoints import RunCheckpoints
from musicrl_jax.inputs.prompts import Prompts
from musicrl_jax.rl.config import RLConfig
from musicrl_jax.rl.rewards import Mixture
from musicrl_jax.rl.steps import Run
from musicrl_jax.systems import folder as systems
from musicrl_jax.systems import tiny

BATCH, SECONDS = 32, 0.4


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with compilation.cached(tmp_path_factory.mktemp("compiled")):
        yield


@dataclasses.dataclass(frozen=True)
class Zeros:
    """A reward: the share of 0 among the tokens, times a factor."""

    factor: float = 1.0
    name = "zeros"
    low, high = 0.0, 1.0
    licence = "none needed"

    def load(self, read=checkpoint.load_model):
        return checkpoint.Model(None, {}, "0", {})

    def windows(self, model):
        return "all"

    def lineage(self, model):
        return {}

    def read(self, model, prompts):
        return {}

    def score(self, model, variables, rollout, text):
        return self.factor * (rollout.sampled.tokens == 0).mean(axis=1, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Descent:
    """Gradient descent; Adam's first step would depend on the signs of tiny gradients."""

    def build(self, steps):
        return optax.sgd(0.1)


@functools.cache
def files():
    """Writes a base, a file of one training prompt and one of a thousand prompts."""
    directory = tempfile.TemporaryDirectory()
    path = Path(directory.name)
    tiny.write(path / "base")
    (path / "one.txt").write_text("a tune")
    (path / "many.txt").write_text("".join(f"tune {i}\n" for i in range(1000)))
    return path, directory  # Python removes the folder with the last reference to `directory`


class Dying(MetricWriter):
    """Kills the process in step 3, without an exception."""

    def write(self, step, metrics, prefix=""):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(step, metrics, prefix)


def loop(
    folder,
    mesh=None,
    factor=1.0,
    normalise=False,
    writer=None,
    saves=False,
    system=None,
    monitor=None,
    **settings,
):
    """Runs train_rl; returns all rollouts, the last state on its devices, and the metrics."""
    rollouts, states = [], []
    optimisers = {"policy_optimiser": Descent(), "value_optimiser": Descent()}
    settings = {"steps": 3, "kl_strength": 0.02, "batch_size": BATCH, **settings}
    settings = {"save_every": settings["steps"], "show_every": 0, **settings}
    settings = {"clip_seconds": SECONDS, **optimisers, **settings}

    def save(self, step, state, record):
        states.append(state)

    with pytest.MonkeyPatch.context() as patch:
        # Note the rollouts and the states.
        def score(self, rollout, *rest):
            rollouts.append(sharding.fetch(rollout))
            return plain_score(self, rollout, *rest)

        plain_score = Run.score
        patch.setattr(Run, "score", score)
        if not saves:
            patch.setattr(RunCheckpoints, "save", save)

        # Run.
        if writer is not None:
            patch.setattr(train_rl, "MetricWriter", writer)
        if mesh is not None:
            patch.setattr(sharding, "make_mesh", lambda fsdp, tensor: mesh)
        train_rl.train_rl(
            f"{folder}/run",
            str(system or files()[0] / "base"),
            rewards=Mixture((Zeros(factor),), {"zeros": 1.0}, normalise),
            prompts=Prompts(files=(str(files()[0] / "one.txt"),)),
            config=RLConfig(**settings),
            monitor=monitor,
        )
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return rollouts, states[-1] if states else None, [json.loads(line) for line in lines]


def make_mesh(devices, fsdp=1, tensor=1):
    return sharding.make_mesh(fsdp, tensor, jax.devices()[:devices])


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """Finetunes on one device; returns the folder and the results."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, *loop(folder, make_mesh(1))


@pytest.mark.exactness(11, 15)
@pytest.mark.parametrize(("devices", "fsdp", "tensor"), [(4, 1, 2), (8, 1, 1), (8, 2, 2)])
def test_many_devices_do_what_one_does(one_device, devices, fsdp, tensor, tmp_path):
    (_, *one_run), many = one_device, loop(tmp_path, make_mesh(devices, fsdp, tensor))
    assert [run[1].value["offset"].sharding.num_devices for run in (one_run, many)] == [1, devices]
    assert many[1].policy["after"].sharding.is_fully_replicated == (fsdp * tensor == 1)
    for one, other in zip(one_run[0], many[0], strict=True):
        np.testing.assert_array_equal(other.sampled.tokens, one.sampled.tokens)
        np.testing.assert_allclose(other.sampled.log_probs, one.sampled.log_probs, atol=1e-5)
        np.testing.assert_allclose(other.wav, one.wav, atol=1e-5)
    for name in ("policy", "value"):
        one, other = (jax.device_get(getattr(run[1], name)) for run in (one_run, many))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-6), one, other)
    for one, other in zip(one_run[2], many[2], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.exactness(11)
def test_no_two_clips_of_a_run_have_the_same_key(one_device):
    rollouts = one_device[1]
    phases = np.concatenate([rollout.codes["phase"] for rollout in rollouts])
    assert len(np.unique(phases)) == len(phases) == 3 * BATCH
    clips = np.concatenate([rollout.sampled.tokens for rollout in rollouts])
    assert len(np.unique(clips, axis=0)) == len(clips)  # of one prompt


@pytest.mark.exactness(16)
def test_a_finetuned_system_records_its_anchor(one_device, tmp_path):
    """A second run finetunes the policy of the first; both have the decoder of the base."""
    base, first, second = files()[0] / "base", one_device[0] / "run", tmp_path / "run"
    loop(tmp_path, make_mesh(1), system=first)
    hashes = [checkpoint.model_hash(path) for path in (base / "policy", first, second)]
    assert len(set(hashes)) == 3
    for path, anchor, policy in zip((first, second), hashes, hashes[1:], strict=False):
        assert read_record(path) == {
            "anchor": anchor,
            "rewards": {
                "zeros": {
                    "weight": 1.0,
                    "range": ["0.0", "1.0"],
                    "windows": "all",
                    "licence": "none needed",
                    "hash": "0",
                }
            },
            "units": {"zeros": [0.0, 1.0]},
            "watched": None,
        }
        loaded = systems.load(str(path))
        assert (loaded.kind, loaded.clip_seconds) == ("tiny", SECONDS)
        decoder = checkpoint.model_hash(base / "decoder")
        assert loaded.hashes == {"policy": policy, "decoder": decoder}


def read_record(run):
    """Reads how a finetuned policy was trained."""
    model = checkpoint.load_model(run, tiny.TinyConfig)
    return json.loads(model.assets[checkpoint.ANCHOR])


NORMALISED = {"steps": 5, "save_every": 2, "saves": True, "normalise": True, "show_every": 2}


@pytest.fixture(scope="module")
def normalised(tmp_path_factory):
    """Finetunes with normalised rewards; returns the folder."""
    folder = tmp_path_factory.mktemp("whole")
    loop(folder, **NORMALISED)
    return folder / "run"


@pytest.mark.exactness(17)
def test_a_killed_run_goes_on_to_the_bit(normalised, tmp_path, processes):
    """It is killed in the fourth of five steps, with a checkpoint after every second."""
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
import train_rl_test
train_rl_test.loop(Path({str(tmp_path)!r}), writer=train_rl_test.Dying, **{NORMALISED!r})
"""
    process = processes.run([sys.executable, "-c", code], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    assert not checkpoint.has_model(tmp_path / "run")
    loop(tmp_path, **NORMALISED)
    assert_equal_runs(tmp_path / "run", normalised, steps=5)
    # Its charts go on as well.
    for run in (tmp_path / "run", normalised):
        charts = events.read(run / "tensorboard")
        assert [step for step, _ in charts["zeros"]] == list(range(5))
        assert [step for step, _ in charts["kl"]] == list(range(5))
        assert [step for step, _ in charts["histogram/zeros"]] == list(range(5))
        assert charts["histogram/zeros"][0][1].num == BATCH
        for side in ("base", "policy"):
            clips = charts[f"clip_1/{side}"]
            assert [step for step, _ in clips] == [1, 3, 4]
            wav, rate = soundfile.read(io.BytesIO(clips[0][1].encoded_audio_string))
            assert (rate, len(wav)) == (16_000, SECONDS * 16_000) and np.ptp(wav) > 0.1
        assert charts["clips_per_second"][-1][0] == 4 and charts["clips_per_second"][-1][1] > 0
        page = (run / "page.html").read_text()
        assert page.count("<audio ") == 2 and "a tune" in page and "Steps done" in page
        assert "run: reward and its terms" in page and "KL to the anchor" in page


def assert_equal_runs(run, expected, steps=None):
    """Compares metrics, records and weights of two runs, to the bit."""
    metrics, expected_metrics = ((each / "metrics.jsonl").read_text() for each in (run, expected))
    assert metrics == expected_metrics and steps in (None, metrics.count("\n"))
    assert read_record(run) == read_record(expected)
    assert checkpoint.model_hash(run) == checkpoint.model_hash(expected)


def test_normalised_rewards_are_in_units_of_the_base(normalised):
    """The rewards of the first step are about 0 and 1 apart; 128 other clips give the units."""
    line = json.loads((normalised / "metrics.jsonl").read_text().splitlines()[0])
    centre, spread = read_record(normalised)["units"]["zeros"]
    assert line["reward"] == pytest.approx((line["zeros"] - centre) / spread, abs=1e-5)
    assert 0 < abs(line["reward"]) < 0.8 and line["reward_std"] == pytest.approx(1, abs=0.5)


# --- the held-out judge ---

PEAK = (0.5, 0.9, 1.0, 0.9, 0.5, -0.2, -1.2, -2.0)  # a script


@dataclasses.dataclass
class Critics:
    """An audience whose opinions follow a script: 0 for the base, then one number for each look."""

    script: tuple
    earlier_looks: int = dataclasses.field(default=0, metadata=checkpoint.NO_IDENTITY)
    calls: int = dataclasses.field(default=0, metadata=checkpoint.NO_IDENTITY)

    def check(self, rate_hz):
        assert rate_hz == 16_000

    def load(self):
        return self

    def utilities(self, wavs, prompts):
        assert len(wavs) == len(prompts) == 40
        look = self.calls and self.calls + self.earlier_looks  # each attempt starts with the base
        self.calls += 1
        noise = np.random.default_rng(look).normal(size=len(prompts))
        return (0, *self.script)[look] + 0.1 * noise


def judged(folder, script, looks, earlier_looks=0, **settings):
    """Runs 20 steps with a judge, and returns the metrics."""
    prompts = Prompts(files=(str(files()[0] / "many.txt"),))
    judge = monitor.Monitor(Critics(script, earlier_looks), prompts, looks, count=40)
    settings = {"steps": 20, "kl_strength": 0.0, "save_every": 1, **settings}
    return loop(folder, monitor=judge, **settings)[2]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Finetunes until the alarm; returns folder, metrics and hashes of the policies by step."""
    folder, hashes = tmp_path_factory.mktemp("stopped"), {}
    save = checkpoint.save_model

    def save_and_hash(directory, config, variables, assets=None):
        hashes[Path(directory).name] = checkpoint.content_hash(variables)
        return save(directory, config, variables, assets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_model", save_and_hash)
        lines = judged(folder, PEAK, looks=9, saves=True)
    return folder / "run", lines, hashes


def test_a_judge_that_passes_its_peak_stops_the_run_and_keeps_the_best(stopped):
    run, lines, hashes = stopped
    looks = [line["step"] for line in lines if "judge_gain" in line]
    assert looks == [2, 4, 6, 8, 10, 12, 14, 16][: len(looks)] and len(looks) < 9
    assert lines[-1]["step"] == looks[-1] < 19
    record = read_record(run)["watched"]
    assert record["kept"] in (4, 6, 8) and record["looks"] == len(looks) and record["kl"] > 0
    base = checkpoint.model_hash(files()[0] / "base/policy")
    best, last = (checkpoint.model_hash(path) for path in (run, run / "last"))
    assert len({best, last, base}) == 3
    assert not (run / monitor.LOOKS).exists()
    # The judge listened to this very policy at that step.
    assert best == hashes[str(record["kept"])]


def test_a_judge_without_an_alarm_lets_the_run_end(tmp_path):
    script = (0.2, 0.4, 0.5, 0.55)
    lines = judged(tmp_path, script, looks=4)
    gains = {line["step"]: line["judge_gain"] for line in lines if "judge_gain" in line}
    assert list(gains) == [4, 8, 12, 16] and len(lines) == 20
    np.testing.assert_allclose(list(gains.values()), script, atol=0.1)
    assert not (tmp_path / "run/last").exists()
    assert read_record(tmp_path / "run")["watched"] == {"looks": 4, "kept": None}


def test_a_harmful_reward_gives_the_base_back(tmp_path):
    judged(tmp_path, (-0.3, -0.6, -0.9, -1.2, -1.5, -1.8), looks=6)
    run, base = tmp_path / "run", files()[0] / "base/policy"
    assert read_record(run)["watched"]["kept"] == 0
    assert checkpoint.model_hash(run) == checkpoint.model_hash(base)
    assert checkpoint.model_hash(run / "last") != checkpoint.model_hash(run)


def test_a_judge_remembers_its_looks_after_a_restart(stopped, tmp_path):
    """A run that is interrupted after the third look ends like the uninterrupted one."""

    class Interrupted(MetricWriter):
        def write(self, step, metrics, prefix=""):
            if step == 7:
                raise KeyboardInterrupt
            super().write(step, metrics, prefix)

    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path, PEAK, looks=9, saves=True, writer=Interrupted)
    judged(tmp_path, PEAK, looks=9, saves=True, earlier_looks=3)
    assert_equal_runs(tmp_path / "run", stopped[0])


# --- runs that end in an error ---


def test_a_run_whose_updates_are_all_skipped_gives_up(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^run: 11 updates in a row had a .* at step 10;"):
        loop(tmp_path, factor=np.nan, steps=20)
    assert not checkpoint.has_model(tmp_path / "run")


def test_a_part_of_a_frame_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"clip_seconds=0\.33 must be a multiple of 0\.04 s"):
        loop(tmp_path, clip_seconds=0.33)
    assert not (tmp_path / "run").exists()


def test_an_empty_train_split_is_refused_before_the_state_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(train_rl, "Run", None)
    monkeypatch.setattr(Prompts, "unique", lambda self, split: [])
    with pytest.raises(ValueError, match=r"split 'train' of .* has no prompts"):
        loop(tmp_path)
