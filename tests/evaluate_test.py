"""The judge: devices and hosts share the rows, and a killed comparison goes on."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from musicrl_jax import evaluate
from musicrl_jax.arena.audience import LoadedAudience
from musicrl_jax.arena.listeners import MEASUREMENTS, Panel, judging_panel
from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.report import comparison
from musicrl_jax.rl.rewards import Mixture
from musicrl_jax.systems import folder, tiny
from musicrl_jax.systems.player import Player
from musicrl_jax.systems.system import Sampling

PROMPTS, SEEDS = 9, 2
CONFIG = evaluate.EvaluationConfig(
    1.2, Sampling(0.9), PROMPTS, SEEDS, batch_size=3, raters=2, best_of=2
)


@dataclasses.dataclass(frozen=True)
class Zeros:
    """A reward: the share of tokens that are 0."""

    name = "zeros"
    low, high, licence = 0.0, 1.0, "none"

    def load(self, read=None):
        return checkpoint.Model(None, {}, "no model", {})

    def windows(self, model):
        return "all"

    def lineage(self, model):
        return {}

    def read(self, model, prompts):
        return {}

    def score(self, model, variables, rollout, text):
        return (rollout.sampled.tokens == 0).mean(axis=1, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Loudness:
    """Features: the mean square of four bits of a tenth of a second."""

    def load(self):
        return checkpoint.Model(None, {"scale": np.float32(2)}, "no model", {})

    def features(self, model, variables, wav):
        return variables["scale"] * jnp.square(wav.reshape(len(wav), -1, 4, 400)).mean(axis=3)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Held-out prompts."""

    def unique(self, split):
        return [f"{split} tune {number}" for number in range(20)]


@dataclasses.dataclass(frozen=True)
class Noise:
    """Real clips: 13 of noise."""

    with_captions: bool = False

    def batches(self, split, batch_size, seed, epochs):
        wav = np.random.default_rng(0).uniform(-1, 1, (13, 19_200)).astype(np.float32)
        captions = np.array([f"noise {number}" for number in range(13)], object)
        for first in range(0, 13, batch_size):
            rows = slice(first, first + batch_size)
            yield {"audio": wav[rows], "caption": captions[rows]}

    def licences(self):
        return {"noise": "Free."}


class Ears:
    """Measures a clip's level and roughness, and no more."""

    def measure(self, wav, asked):
        level = np.square(wav.astype(np.float64)).mean()
        return np.array([level, np.abs(np.diff(wav)).mean(), *[0.0] * (len(MEASUREMENTS) - 2)])


@dataclasses.dataclass(frozen=True)
class Listeners:
    """An audience with such ears."""

    panel: Panel = dataclasses.field(default_factory=judging_panel)

    def check(self, rate_hz):
        assert rate_hz == 16_000

    def load(self):
        return LoadedAudience(self.panel, Ears(), {})


def systems(place):
    """Folders of a base and of a finetuned system that keeps its last policy too."""
    base = tiny.write(place / "base")
    if not (place / "r").exists():
        loaded, other = folder.load(base), folder.load(tiny.write(place / "other", seed=1))
        policy = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, loaded.policy, other.policy)
        watched = {"watched": {"looks": 5, "kept": 3, "kl": 6.25}}
        assets = {checkpoint.ANCHOR: json.dumps(watched).encode()}
        folder.save_policy(place / "r" / folder.LAST, loaded, other.policy, {})
        folder.save_policy(place / "r", loaded, policy, assets)
    return {"base": base, "R": str(place / "r")}


def judge(place, out="out", config=CONFIG, audience=Listeners(), page=None, **changes):
    """Evaluates the systems of a folder."""
    page = page or evaluate.PageConfig(notes=("Not music.",), shown=2, worst=1)
    arguments = {
        "systems": systems(place),
        "rewards": Mixture((Zeros(),), {"zeros": 1.0}),
        "prompts": Texts(),
        "clips": Noise(),
        "features": Loudness(),
        **changes,
    }
    folder_name = str(place / out)
    return evaluate.evaluate(folder_name, config=config, audience=audience, page=page, **arguments)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """(place, summary) of an evaluation on 8 devices, whose rows were looked at while it played."""
    place, draw, rows = tmp_path_factory.mktemp("judged"), Player.draw, []

    def looked_at(player, *arguments):
        rollout = draw(player, *arguments)
        rows.append([shard.data.shape[0] for shard in rollout.wav.addressable_shards])
        return rollout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Player, "draw", looked_at)
        summary = judge(place)
    batches = -(-PROMPTS * SEEDS // 8)  # 3 clips at a time become 8
    assert rows == [[1] * 8] * (batches * (2 + 2) + 1)  # base, R, twice best of 2, and R's last
    return place, summary


def scores(place):
    with np.load(place / "scores.npz") as arrays:
        return dict(arrays)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(array, other[name], rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(array, other[name], name)


def test_one_device_and_another_batch_give_the_same_clips(judged, monkeypatch):
    place, summary = judged
    one = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(evaluate.sharding, "make_mesh", lambda: one)
    monkeypatch.setattr(comparison, "write_page", lambda *page: None)  # drawing takes half the time
    config = dataclasses.replace(CONFIG, batch_size=7)
    other = judge(place, "one", config)
    assert_same(scores(place / "out"), scores(place / "one"))
    assert other["identity"] == summary["identity"]
    assert other["gains"]["zeros"]["R"]["mean"] == summary["gains"]["zeros"]["R"]["mean"]


def test_the_summary_says_what_was_measured(judged):
    place, summary = judged
    assert summary["policies"] == ["base", "R", "best of 2"]
    assert list(summary["rewards"]) == ["reward", "zeros"]
    arrays = scores(place / "out")
    for name in summary["policies"]:
        assert arrays[f"{name}/zeros"].shape == (PROMPTS, SEEDS)
        assert arrays[f"{name}/ratings"].shape == (PROMPTS, SEEDS, 2)
        mean = summary["rewards"]["zeros"][name]["mean"]
        assert mean == pytest.approx(arrays[f"{name}/zeros"].mean(), abs=1e-6)
    assert summary["gains"]["reward"]["best of 2"]["mean"] > 0
    assert np.all(arrays["base/kl"] == 0) and summary["kl"]["R"]["mean"] > 0
    assert len(summary["kl_by_level"]["R"]) == 2 and len(summary["kl_by_second"]["R"]) == 2
    for by in ("kl_by_level", "kl_by_second"):
        assert sum(summary[by]["R"]) == pytest.approx(summary["kl"]["R"]["mean"], rel=1e-4)
    assert summary["kl_by_second"]["R"][0] > 3 * summary["kl_by_second"]["R"][1]  # 1 s and 0.2 s
    assert summary["watched"] == {"R": {"looks": 5, "kept": 3, "kl": 6.25}}
    assert summary["real"]["clips"] == PROMPTS
    assert summary["frechet"]["base"] > 0 and summary["diversity"]["real"] > 0


def test_the_page_has_the_last_policy_too(judged):
    page = (judged[0] / "out" / "page.html").read_text()
    assert page.count("R, last, 1.2 seconds") in (2, 3)  # of the first prompts, and one that lost
    assert "step 3 is kept" in page and "Real clips are of noise: Free." in page
    assert not (judged[0] / "out" / "played").exists()


def test_what_is_done_is_left_alone_until_a_setting_changes(judged, capsys):
    place, summary = judged
    config = dataclasses.replace(CONFIG, batch_size=100)
    page = evaluate.PageConfig("elsewhere", ("runs/codec",), ("Not music.",), 2, 1)
    assert judge(place, config=config, page=page) == json.loads(json.dumps(summary))
    assert "evaluated already" in capsys.readouterr().out


def test_a_killed_comparison_goes_on_with_the_next_system(judged, monkeypatch):
    place, _ = judged
    play, played = evaluate._Bench.play, []

    def killed(bench, name, *how):
        played.append(name)
        if played == ["base", "R"]:
            raise KeyboardInterrupt
        return play(bench, name, *how)

    monkeypatch.setattr(evaluate._Bench, "play", killed)
    monkeypatch.setattr(comparison, "write_page", lambda *page: None)
    with pytest.raises(KeyboardInterrupt):
        judge(place, "cut")
    assert not (place / "cut" / "summary.json").exists()
    judge(place, "cut")
    assert played == ["base", "R", "R", "best of 2"]
    assert_same(scores(place / "out"), scores(place / "cut"))


def test_a_host_listens_to_its_own_rows_alone(monkeypatch):
    measured = []

    class Counted(Ears):
        def measure(self, wav, asked):
            measured.append((float(wav[0]), asked))
            return super().measure(wav, asked)

    bench = object.__new__(evaluate._Bench)
    bench.mesh = None
    bench._hearing = LoadedAudience(
        None, Counted(), {f"tune {number}": number for number in range(8)}
    )
    monkeypatch.setattr(sharding, "own_rows", lambda mesh, count: np.arange(count // 2, count))
    monkeypatch.setattr(sharding, "gather_rows", lambda mesh, rows, count: rows)
    wav = np.arange(8, dtype=np.float32)[:, None] + np.zeros(10, np.float32)
    found = bench._listen(wav, [f"tune {number}" for number in range(8)])
    assert measured == [(4, 4), (5, 5), (6, 6), (7, 7)]
    np.testing.assert_array_equal(found[:, 0], [16, 25, 36, 49])


def test_what_cannot_be_compared_is_named(judged, tmp_path):
    place, _ = judged
    base = str(place / "base")
    with pytest.raises(ValueError, match=r"evaluate\.systems has 1: nothing to compare"):
        config = dataclasses.replace(CONFIG, best_of=1)
        judge(place, "x", config, systems={"base": base})
    with pytest.raises(ValueError, match="'real' names something else"):
        judge(place, "x", systems={"base": base, "real": base})
    with pytest.raises(ValueError, match=r"raters=99 must be at most the panel's size, 40"):
        judge(place, "x", dataclasses.replace(CONFIG, raters=99))
    with pytest.raises(ValueError, match=r"clip_seconds=1\.23 must be a multiple of 0\.04 s"):
        judge(place, "x", dataclasses.replace(CONFIG, clip_seconds=1.23))
    shutil.copytree(place / "base", tmp_path / "other")
    model = checkpoint.load_model(tmp_path / "other" / "decoder", tiny.TinyConfig)
    louder = jax.tree.map(lambda hz: 2 * hz, model.variables)
    checkpoint.save_model(tmp_path / "other" / "decoder", model.config, louder)
    parts = {name: str(tmp_path / "other" / name) for name in ("policy", "decoder")}
    folder.write(tmp_path / "other", "tiny", parts)
    with pytest.raises(ValueError, match=r"systems\['R'\] has another decoder than the first"):
        judge(place, "x", systems={"base": base, "R": str(tmp_path / "other")})
    assert not (place / "x").exists()


@pytest.mark.parametrize("name", ["count", "seeds", "batch_size", "raters", "best_of"])
def test_a_number_out_of_range_is_named(name):
    with pytest.raises(ValueError, match=f"EvaluationConfig.{name}=0 must be 1 or more"):
        evaluate.EvaluationConfig(1.0, **{name: 0})
    with pytest.raises(ValueError, match=r"EvaluationConfig\.seed=-1 must be 0 or more"):
        evaluate.EvaluationConfig(1.0, seed=-1)
    with pytest.raises(ValueError, match="shown=8 and worst=-1 must be 0 or more"):
        evaluate.PageConfig(worst=-1)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"\0" * 99, b'{"identity": 3}', b'{"identity": {}, "rewards": []}']
)
def test_a_damaged_summary_is_set_aside(tmp_path, content, capsys):
    path = tmp_path / "summary.json"
    path.write_bytes(content)
    assert evaluate._summary(path) == {} == evaluate._summary(path)
    assert (tmp_path / "summary.json.damaged").read_bytes() == content and not path.exists()
    assert capsys.readouterr().out.startswith(f"{path} is damaged: ")


def test_a_whole_summary_is_read(judged):
    place, summary = judged
    path = place / "out" / "summary.json"
    assert evaluate._summary(path) == json.loads(json.dumps(summary))
