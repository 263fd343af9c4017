"""The loop around the learner, on the tiny system: devices, keys, anchor, kills, and the judge."""

import dataclasses
import functools
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


@dataclasses.dataclass(frozen=True)
class Zeros:
    """The share of 0 among the tokens, times a factor."""

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
    """A tenth of the gradient: near gradients give near weights; Adam's first step is their sign."""

    def build(self, steps):
        return optax.sgd(0.1)


@functools.cache
def files():
    """A folder with a base, a file of one training prompt and one of a thousand prompts."""
    directory = tempfile.TemporaryDirectory()
    path = Path(directory.name)
    tiny.write(path / "base")
    (path / "one.txt").write_text("a tune")
    (path / "many.txt").write_text("".join(f"tune {i}\n" for i in range(1000)))
    return path, directory  # which is removed with the last reference to it


class Dying(MetricWriter):
    """As a machine that is taken away: no exception, no farewell."""

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
    """train_rl itself on a mesh -> (every rollout, the last state on its devices, metrics)."""
    rollouts, states = [], []
    optimisers = {"policy_optimiser": Descent(), "value_optimiser": Descent()}
    settings = {"steps": 3, "kl_strength": 0.02, "batch_size": BATCH, **settings}
    settings = {"clip_seconds": SECONDS, "save_every": settings["steps"], **optimisers, **settings}
    with pytest.MonkeyPatch.context() as patch:

        def score(self, rollout, *rest):
            rollouts.append(sharding.fetch(rollout))
            return plain_score(self, rollout, *rest)

        plain_score = Run.score
        patch.setattr(Run, "score", score)
        if not saves:
            patch.setattr(
                RunCheckpoints, "save", lambda self, step, state, about: states.append(state)
            )
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


def a_mesh(devices, fsdp=1, tensor=1):
    shape = (devices // (fsdp * tensor), fsdp, tensor)
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), auto, devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return loop(tmp_path_factory.mktemp("alone"), a_mesh(1))


@pytest.mark.exactness(11, 15)
@pytest.mark.parametrize(
    ("devices", "fsdp", "tensor"), [(2, 1, 1), (4, 1, 2), (8, 1, 1), (8, 2, 2)]
)
def test_many_devices_do_what_one_does(alone, devices, fsdp, tensor, tmp_path):
    many = loop(tmp_path, a_mesh(devices, fsdp, tensor))
    assert [run[1].value["offset"].sharding.num_devices for run in (alone, many)] == [1, devices]
    assert many[1].policy["after"].sharding.is_fully_replicated == (fsdp * tensor == 1)
    for one, other in zip(alone[0], many[0], strict=True):
        np.testing.assert_array_equal(other.sampled.tokens, one.sampled.tokens)
        np.testing.assert_allclose(other.sampled.log_probs, one.sampled.log_probs, atol=1e-5)
        np.testing.assert_allclose(other.wav, one.wav, atol=1e-5)
    for name in ("policy", "value"):
        one, other = (jax.device_get(getattr(run[1], name)) for run in (alone, many))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-6), one, other)
    for one, other in zip(alone[2], many[2], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.exactness(11)
def test_no_two_clips_of_a_run_have_the_same_key(alone):
    phases = np.concatenate([rollout.codes["phase"] for rollout in alone[0]])
    assert len(np.unique(phases)) == len(phases) == 3 * BATCH
    clips = np.concatenate([rollout.sampled.tokens for rollout in alone[0]])
    assert len(np.unique(clips, axis=0)) == len(clips)  # of one prompt


@pytest.mark.exactness(16)
def test_a_finetuned_policy_knows_its_anchor_and_is_a_system(tmp_path):
    """RU is anchored to R: its checkpoint names the content of R's policy, and its decoder is R's."""
    base, (r, ru) = files()[0] / "base", (tmp_path / name for name in ("r", "ru"))
    loop(r, steps=1)
    loop(ru, steps=1, system=r / "run")
    hashes = [checkpoint.model_hash(path) for path in (base / "policy", r / "run", ru / "run")]
    assert len(set(hashes)) == 3
    for path, anchor in ((r, hashes[0]), (ru, hashes[1])):
        saved = checkpoint.load_model(path / "run", tiny.TinyConfig)
        assert json.loads(saved.assets[checkpoint.ANCHOR]) == {
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
        loaded = systems.load(str(path / "run"))
        assert (loaded.kind, loaded.clip_seconds) == ("tiny", SECONDS)
        assert loaded.hashes == {
            "policy": saved.hash,
            "decoder": checkpoint.model_hash(base / "decoder"),
        }


@pytest.mark.exactness(17)
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(tmp_path, processes):
    """Kill -9 in the fourth of five steps, a checkpoint after every second: metrics and weights equal to the bit."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    settings = {"steps": 5, "save_every": 2, "saves": True, "normalise": True}
    loop(tmp_path / "whole", **settings)
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
import train_rl_test
train_rl_test.loop(Path({str(tmp_path / "cut")!r}), writer=train_rl_test.Dying, **{settings!r})
"""
    done = processes.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not checkpoint.has_model(tmp_path / "cut/run")
    loop(tmp_path / "cut", **settings)
    whole, cut = ((tmp_path / name / "run/metrics.jsonl").read_text() for name in ("whole", "cut"))
    assert cut == whole and whole.count("\n") == 5
    assert checkpoint.model_hash(tmp_path / "cut/run") == checkpoint.model_hash(
        tmp_path / "whole/run"
    )


def test_normalised_rewards_are_in_units_of_the_base(tmp_path):
    """From 128 of its clips, with keys of their own: the first step's are about 0 and 1."""
    _, _, lines = loop(tmp_path, normalise=True, steps=2)
    centre, spread = learned(tmp_path)["units"]["zeros"]
    assert lines[0]["reward"] == pytest.approx((lines[0]["zeros"] - centre) / spread, abs=1e-5)
    assert 0 < abs(lines[0]["reward"]) < 0.8 and lines[0]["reward_std"] == pytest.approx(1, abs=0.5)


@dataclasses.dataclass
class Critics:
    """An audience that likes what it hears by a script: the base, then a value a look, each clip a little apart."""

    script: tuple
    already: int = dataclasses.field(
        default=0, metadata=checkpoint.NO_IDENTITY
    )  # looks of an earlier attempt
    heard: list = dataclasses.field(default_factory=list)

    def check(self, rate_hz):
        assert rate_hz == 16_000

    def load(self):
        return self

    def utilities(self, wavs, asked):
        assert len(wavs) == len(asked) == 40
        look = len(self.heard) + (
            self.already if self.heard else 0
        )  # the base is heard first, in every attempt
        self.heard.append(wavs)
        return (0, *self.script)[look] + 0.1 * np.random.default_rng(look).normal(size=len(asked))


def judged(folder, script, steps, looks, already=0, **settings):
    critics = Critics(script, already)
    judge = monitor.Monitor(
        critics, Prompts(files=(str(files()[0] / "many.txt"),)), looks, count=40
    )
    *_, lines = loop(folder, steps=steps, monitor=judge, kl_strength=0.0, **settings)
    return lines


def learned(folder):
    """What a finetuned policy's checkpoint says of how it was learned."""
    saved = checkpoint.load_model(folder / "run", tiny.TinyConfig)
    return json.loads(saved.assets[checkpoint.ANCHOR])


def test_a_judge_that_passes_its_peak_stops_the_run_and_keeps_the_best(tmp_path, monkeypatch):
    script = (0.5, 0.9, 1.0, 0.9, 0.5, -0.2, -1.2, -2.0)
    looked, save = {}, checkpoint.save_model

    def noting(directory, config, variables, assets=None):
        looked[Path(directory).name] = checkpoint.content_hash(variables)
        return save(directory, config, variables, assets)

    monkeypatch.setattr(checkpoint, "save_model", noting)
    lines = judged(tmp_path, script, steps=20, looks=9)
    looks = {line["step"]: line["judge_gain"] for line in lines if "judge_gain" in line}
    assert list(looks) == [2, 4, 6, 8, 10, 12, 14, 16][: len(looks)] and len(looks) < 9
    assert lines[-1]["step"] == list(looks)[-1] < 19
    told = learned(tmp_path)["watched"]
    assert told["kept"] in (4, 6, 8) and told["looks"] == len(looks) and told["kl"] > 0
    kept, last = (
        checkpoint.load_model(tmp_path / name, tiny.TinyConfig) for name in ("run", "run/last")
    )
    assert len({kept.hash, last.hash, checkpoint.model_hash(files()[0] / "base/policy")}) == 3
    assert not (tmp_path / "run" / monitor.LOOKS).exists()
    # The policy that is kept is the one that the judge heard at that step.
    assert kept.hash == looked[str(told["kept"])]


def test_a_judge_that_is_content_lets_the_run_end(tmp_path):
    lines = judged(tmp_path, (0.2, 0.4, 0.5, 0.55), steps=5, looks=4)
    assert [line["step"] for line in lines if "judge_gain" in line] == [1, 2, 3, 4] and len(
        lines
    ) == 5
    gains = [line["judge_gain"] for line in lines[1:]]
    np.testing.assert_allclose(gains, [0.2, 0.4, 0.5, 0.55], atol=0.1)
    assert not (tmp_path / "run/last").exists()
    assert learned(tmp_path)["watched"] == {"looks": 4, "kept": None}


def test_a_reward_that_harms_from_the_start_gives_the_base_back(tmp_path):
    judged(tmp_path, (-0.3, -0.6, -0.9, -1.2, -1.5, -1.8), steps=14, looks=6)
    assert learned(tmp_path)["watched"]["kept"] == 0
    assert checkpoint.model_hash(tmp_path / "run") == checkpoint.model_hash(
        files()[0] / "base/policy"
    )
    assert checkpoint.model_hash(tmp_path / "run/last") != checkpoint.model_hash(tmp_path / "run")


def test_the_judge_remembers_across_a_restart(tmp_path):
    """Cut off after its third look, a run stops where the uninterrupted one does, and keeps the same policy."""
    script = (0.5, 0.9, 1.0, 0.9, 0.5, -0.2, -1.2, -2.0)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    settings = {"steps": 20, "looks": 9, "saves": True, "save_every": 1}
    judged(tmp_path / "whole", script, **settings)

    class Interrupted(MetricWriter):
        def write(self, step, metrics, prefix=""):
            if step == 7:
                raise KeyboardInterrupt
            super().write(step, metrics, prefix)

    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path / "cut", script, writer=Interrupted, **settings)
    judged(tmp_path / "cut", script, already=3, **settings)
    whole, cut = ((tmp_path / name / "run/metrics.jsonl").read_text() for name in ("whole", "cut"))
    assert cut == whole and learned(tmp_path / "cut") == learned(tmp_path / "whole")
    assert checkpoint.model_hash(tmp_path / "cut/run") == checkpoint.model_hash(
        tmp_path / "whole/run"
    )


def test_a_run_whose_updates_are_all_skipped_gives_up(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^run: 11 updates in a row had a .* at step 10;"):
        loop(tmp_path, factor=np.nan, steps=20)
    assert not checkpoint.has_model(tmp_path / "run")


def test_a_clip_of_part_frames_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"clip_seconds=0\.33 must be a multiple of 0\.04 s"):
        loop(tmp_path, clip_seconds=0.33)
    assert not (tmp_path / "run").exists()
