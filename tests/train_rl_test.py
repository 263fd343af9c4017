"""The loop around the learner, on a policy of one layer: devices, keys, anchor, kills, and the held-out judge."""

import dataclasses
import functools
import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import meta

from musicrl_jax import train_rl
from musicrl_jax.arena import monitor
from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.core.metrics import MetricWriter
from musicrl_jax.core.run_checkpoints import RunCheckpoints
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.losses.policy_gradient import PolicyGradient
from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
from musicrl_jax.models.transformer import TransformerConfig
from musicrl_jax.rl.rollout import Loaded
from musicrl_jax.rl.sample import sample

SMALL = MusicLMConfig(
    TransformerConfig(1, 16, 2, 32, dropout=0.0), TransformerConfig(1, 16, 2, 16), TokenLayout(6, 6, 1), 2, 4
)
BATCH, FRAMES = 32, 8
FROZEN = {"soundstorm": {}, "soundstream": {}, "mulan": {}}


class Studio:
    """The policy alone: a prompt is its MuLan tokens, and a rollout has its keys in place of the codec's codes."""

    musiclm = MusicLM(SMALL)
    sample_rate_hz = 16_000

    def frames(self, clip_seconds):
        return FRAMES

    def read(self, variables, text):
        return jnp.zeros((len(text), 1), jnp.float32), text

    def draw(self, policy, mulan, keys, frames, sampling):
        return sample(self.musiclm, policy, mulan, keys, frames, sampling)

    def fill(self, variables, tokens, keys):
        return jax.random.key_data(keys)

    def sound(self, variables, acoustic):
        return jnp.zeros((len(acoustic), 1), jnp.float32)


@dataclasses.dataclass
class Listener:
    """A mixture that counts zeros among the semantic codes, and keeps what it heard in every step."""

    weight: float = 1.0
    heard: list = dataclasses.field(default_factory=list)
    variables: dict = dataclasses.field(default_factory=dict)
    hashes: dict = dataclasses.field(default_factory=dict)
    terms: tuple = ()
    normalise: bool = False

    def load(self):
        return self

    def score(self, variables, rollout):
        zeros = (rollout.tokens[:, :, 0] == 0).mean(axis=1, dtype=jnp.float32)
        return {"zeros": zeros, "tokens": rollout.tokens, "log_probs": rollout.log_probs, "keys": rollout.acoustic}

    def units(self, terms):
        return {"zeros": (float(terms["zeros"].mean()), float(terms["zeros"].std()))}

    def total(self, terms, units):
        centre, spread = units.get("zeros", (0.0, 1.0))
        return self.weight * (terms["zeros"] - centre) / spread

    def describe(self):
        return {"zeros": {"weight": self.weight}}

    def check(self, terms):
        self.heard.append(terms)

    def check_models(self, loaded):
        assert loaded.lineage == b"{}"


@dataclasses.dataclass(frozen=True)
class OnePrompt:
    """The same prompt for every clip."""

    vocabulary: str

    text_length: int = 2

    def batches(self, split, batch_size, seed, start_step=0):
        while True:
            yield {"text": np.ones((batch_size, 2), np.int32)}

    def unique(self, split):
        assert split == "validation"
        return [f"tune {i}" for i in range(2 * BATCH)]


@dataclasses.dataclass(frozen=True)
class Descent:
    """A tenth of the gradient: near gradients give near weights, where Adam's first step would be their sign."""

    def build(self, steps):
        return optax.sgd(0.1)


@functools.cache
def base():
    shapes = np.zeros((1, 1, SMALL.layout.depth), int), np.zeros((1, SMALL.mulan_levels), int)
    return meta.unbox(jax.jit(MusicLM(SMALL).init)(jax.random.key(2), *shapes))["params"]


class Dying(MetricWriter):
    """As a machine that is taken away: no exception, no farewell."""

    def write(self, step, metrics, prefix=""):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write(step, metrics, prefix)


def loop(folder, mesh=None, weight=1.0, vocabulary=b"words", normalise=False, writer=None, saves=False, **settings):
    """train_rl itself on `mesh` -> (what was heard in every step, the last state on its devices, lines of metrics)."""
    (folder / "vocabulary.model").write_bytes(vocabulary)
    listener, states = Listener(weight, normalise=normalise), []
    settings = {
        "gradient": PolicyGradient(),
        "steps": 3,
        "kl_strength": 0.02,
        "batch_size": BATCH,
        **settings,
    }
    with pytest.MonkeyPatch.context() as patch:
        loaded = Loaded(Studio(), base(), FROZEN, b"words", {"policy": checkpoint.content_hash(base())}, b"{}")
        patch.setattr(train_rl.rollouts, "load", lambda *folders: loaded)
        patch.setattr(
            monitor.pieces, "encode", lambda vocabulary, asked, length: np.ones((len(asked), length), np.int32)
        )
        if not saves:
            patch.setattr(RunCheckpoints, "save", lambda self, step, state, about: states.append(state))
        if writer is not None:
            patch.setattr(train_rl, "MetricWriter", writer)
        if mesh is not None:
            patch.setattr(sharding, "make_mesh", lambda fsdp, tensor: mesh)
        train_rl.train_rl(
            f"{folder}/run",
            *("base", "fine", "codec", "mulan"),
            rewards=listener,
            prompts=OnePrompt(f"{folder}/vocabulary.model"),
            clip_seconds=1.0,
            policy_optimiser=Descent(),
            value_optimiser=Descent(),
            **{"save_every": settings["steps"], **settings},
        )
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return listener.heard, states[-1:][0] if states else None, [json.loads(line) for line in lines]


def a_mesh(devices, fsdp=1, tensor=1):
    shape = (devices // (fsdp * tensor), fsdp, tensor)
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), auto, devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return loop(tmp_path_factory.mktemp("alone"), a_mesh(1))


@pytest.mark.exactness(11, 15)
@pytest.mark.parametrize(("devices", "fsdp", "tensor"), [(2, 1, 1), (4, 1, 2), (8, 1, 1), (8, 2, 2)])
def test_many_devices_do_what_one_does(alone, devices, fsdp, tensor, tmp_path):
    many = loop(tmp_path, a_mesh(devices, fsdp, tensor))
    assert [run[1].value["offset"].sharding.num_devices for run in (alone, many)] == [1, devices]
    assert many[1].policy["acoustic_head"].sharding.is_fully_replicated == (fsdp * tensor == 1)
    for one, other in zip(alone[0], many[0], strict=True):
        np.testing.assert_array_equal(other["tokens"], one["tokens"])
        np.testing.assert_allclose(other["log_probs"], one["log_probs"], atol=1e-5)
    for name in ("policy", "value"):
        one, other = (jax.device_get(getattr(run[1], name)) for run in (alone, many))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-6), one, other)
    for one, other in zip(alone[2], many[2], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.exactness(11)
def test_no_two_clips_of_a_run_have_the_same_key(alone):
    keys = np.concatenate([step["keys"] for step in alone[0]])
    assert len(np.unique(keys, axis=0)) == len(keys) == 3 * BATCH
    clips = np.concatenate([step["tokens"].reshape(BATCH, -1) for step in alone[0]])
    assert len(np.unique(clips, axis=0)) == len(clips)  # of one prompt


@pytest.mark.exactness(16)
def test_a_finetuned_policy_knows_its_anchor(tmp_path):
    """RU is anchored to R: what its checkpoint names is the content of R's."""
    loop(tmp_path, steps=1)
    saved = checkpoint.load_model(tmp_path / "run", MusicLMConfig)
    assert json.loads(saved.assets[checkpoint.CLIP]) == {"seconds": 1.0}
    told = json.loads(saved.assets[checkpoint.ANCHOR])
    assert told == {
        "anchor": checkpoint.content_hash(base()),
        "rewards": {"zeros": {"weight": 1.0}},
        "units": {},
        "watched": None,
    }
    assert saved.hash != checkpoint.content_hash(base())


@pytest.mark.exactness(17)
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(tmp_path, processes):
    """kill -9 in the fourth of five steps, a checkpoint after every second: metrics and weights equal to the bit."""
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
    assert checkpoint.model_hash(tmp_path / "cut/run") == checkpoint.model_hash(tmp_path / "whole/run")


def test_normalised_rewards_are_in_units_of_the_base(tmp_path):
    """From 128 of its clips, with keys of their own: the first step's are about 0 and 1."""
    _, _, lines = loop(tmp_path, normalise=True, steps=2)
    told = json.loads(checkpoint.load_model(tmp_path / "run", MusicLMConfig).assets[checkpoint.ANCHOR])
    centre, spread = told["units"]["zeros"]
    assert lines[0]["reward"] == pytest.approx((lines[0]["zeros"] - centre) / spread, abs=1e-5)
    assert 0 < abs(lines[0]["reward"]) < 0.8 and lines[0]["reward_std"] == pytest.approx(1, abs=0.5)


@dataclasses.dataclass
class Critics:
    """An audience that likes what it hears by a script: the base, then a value a look, each clip a little apart."""

    script: tuple
    already: int = dataclasses.field(default=0, metadata=checkpoint.NO_IDENTITY)  # looks of an earlier attempt
    heard: list = dataclasses.field(default_factory=list)

    def check(self, rate_hz):
        assert rate_hz == 16_000

    def load(self):
        return self

    def utilities(self, wavs, asked):
        assert len(wavs) == len(asked) == 40
        look = len(self.heard) + (self.already if self.heard else 0)  # the base is heard first, in every attempt
        self.heard.append(wavs)
        return (0, *self.script)[look] + 0.1 * np.random.default_rng(look).normal(size=len(asked))


def judged(folder, script, steps, looks, already=0, **settings):
    critics = Critics(script, already)
    judge = monitor.Monitor(critics, OnePrompt(""), looks, count=40)
    *_, lines = loop(folder, steps=steps, monitor=judge, kl_strength=0.0, **settings)
    return lines


def told_of(folder):
    return json.loads(checkpoint.load_model(folder / "run", MusicLMConfig).assets[checkpoint.ANCHOR])["watched"]


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
    told = told_of(tmp_path)
    assert told["kept"] in (4, 6, 8) and told["looks"] == len(looks) and told["kl"] > 0
    kept, last = (checkpoint.load_model(tmp_path / name, MusicLMConfig) for name in ("run", "run/last"))
    assert len({kept.hash, last.hash, checkpoint.content_hash({"params": base()})}) == 3
    assert not (tmp_path / "run" / train_rl.LOOKS).exists()
    # The policy that is kept is the one that the judge heard at that step.
    assert kept.hash == looked[str(told["kept"])]


def test_a_judge_that_is_content_lets_the_run_end(tmp_path):
    lines = judged(tmp_path, (0.2, 0.4, 0.5, 0.55), steps=5, looks=4)
    assert [line["step"] for line in lines if "judge_gain" in line] == [1, 2, 3, 4] and len(lines) == 5
    gains = [line["judge_gain"] for line in lines[1:]]
    np.testing.assert_allclose(gains, [0.2, 0.4, 0.5, 0.55], atol=0.1)
    assert not (tmp_path / "run/last").exists()
    assert told_of(tmp_path) == {"looks": 4, "kept": None}


def test_a_reward_that_harms_from_the_start_gives_the_base_back(tmp_path):
    judged(tmp_path, (-0.3, -0.6, -0.9, -1.2, -1.5, -1.8), steps=14, looks=6)
    assert told_of(tmp_path)["kept"] == 0
    assert checkpoint.model_hash(tmp_path / "run") == checkpoint.content_hash({"params": base()})
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
    assert cut == whole and told_of(tmp_path / "cut") == told_of(tmp_path / "whole")
    assert checkpoint.model_hash(tmp_path / "cut/run") == checkpoint.model_hash(tmp_path / "whole/run")


def test_a_run_whose_updates_are_all_skipped_gives_up(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^run: 11 updates in a row had a .* at step 10;"):
        loop(tmp_path, weight=np.nan, steps=20)
    assert not checkpoint.has_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kl_strength": -0.001}, r"kl_strength=-0.001 must lie in \[0, 1\)"),
        ({"kl_strength": 1.0}, r"kl_strength=1.0 must lie in \[0, 1\)"),
        ({"kl_strength": np.nan}, r"kl_strength=nan must lie in \[0, 1\)"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be above 0"),
        ({"temperature": np.nan}, "temperature=nan must be above 0 and finite"),
        ({"updates": 2}, "updates=2 must be 1, or more with PolicyGradient.surrogate='clipped'"),
        ({"kl_target": 0.0}, "kl_target=0.0 must be above 0"),
        ({"top_k": 0}, "top_k=0 must be 1 or more"),
        ({"top_k": 1.5}, "top_k=1.5 must be 1 or more"),
        ({"temperature": "hot"}, "temperature='hot' must be above 0"),
        ({"dtype": "half"}, "dtype=.half. must be .float32. or .bfloat16."),
        ({"microbatches": 3}, "microbatches=3 must divide batch_size=32"),
        ({"gradient": PolicyGradient("group", group=5)}, "batch_size=32 is no multiple of PolicyGradient.group=5"),
        ({"vocabulary": b"other words"}, r"Prompts.vocabulary=.* is not the one that mulan was trained with"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        loop(tmp_path, **changes)
    assert not (tmp_path / "run").exists()
