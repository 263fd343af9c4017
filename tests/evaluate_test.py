"""Evaluation: devices and hosts share the rows, and an interrupted comparison goes on."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from multihost import run_on_hosts

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
    """Features: the mean square of four parts of each tenth of a second."""

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
class MissingTexts:
    """The same prompts, which are gone."""

    def unique(self, split):
        raise FileNotFoundError(split)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Real clips: 13 clips of noise."""

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
    """Measures only the level and the roughness of a clip."""

    def measure(self, wav, request):
        level = np.square(wav.astype(np.float64)).mean()
        return np.array([level, np.abs(np.diff(wav)).mean(), *[0.0] * (len(MEASUREMENTS) - 2)])


@dataclasses.dataclass(frozen=True)
class Listeners:
    """An audience with these ears."""

    panel: Panel = dataclasses.field(default_factory=judging_panel)

    def check(self, rate_hz):
        assert rate_hz == 16_000

    def load(self):
        return LoadedAudience(self.panel, Ears(), {})


def write_systems(place):
    """Writes a base and a finetuned system that has its last policy too; returns their folders."""
    base = str(place / "base")
    if not (place / "r").exists():
        tiny.write(base)
        loaded, other = folder.load(base), folder.load(tiny.write(place / "other", seed=1))
        policy = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, loaded.policy, other.policy)
        alarm = {"watched": {"looks": 5, "kept": 3, "kl": 6.25}}
        assets = {checkpoint.ANCHOR: json.dumps(alarm).encode()}
        folder.save_policy(place / "r" / folder.LAST, loaded, other.policy, {})
        folder.save_policy(place / "r", loaded, policy, assets)
    return {"base": base, "R": str(place / "r")}


def judge(place, out="out", config=CONFIG, audience=Listeners(), page=None, **changes):
    """Evaluates the systems of a folder."""
    page = page or evaluate.PageConfig(notes=("Not music.",), shown=2, worst=1)
    arguments = {
        "systems": changes.pop("systems", None) or write_systems(place),
        "rewards": Mixture((Zeros(),), {"zeros": 1.0}),
        "prompts": Texts(),
        "clips": Noise(),
        "features": Loudness(),
        **changes,
    }
    path = str(place / out)
    return evaluate.evaluate(path, config=config, audience=audience, page=page, **arguments)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Returns (folder, summary) of an evaluation on 8 devices, which was killed once."""
    place, rows, systems = tmp_path_factory.mktemp("evaluated"), [], []
    draw, bench_class, benches = Player.draw, evaluate.Bench, []
    play = bench_class.play

    def recorded_draw(player, *arguments):
        rollout = draw(player, *arguments)
        rows.append([shard.data.shape[0] for shard in rollout.wav.addressable_shards])
        return rollout

    def killed_once(bench, name, *how):
        systems.append(name)
        if systems == ["base", "R"]:
            raise KeyboardInterrupt
        return play(bench, name, *how)

    def build_once(*arguments):
        """Lets the second attempt use the compiled functions of the first."""
        if not benches:
            benches.append(bench_class(*arguments))
        return benches[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Player, "draw", recorded_draw)
        patch.setattr(bench_class, "play", killed_once)
        patch.setattr(evaluate, "Bench", build_once)
        with pytest.raises(KeyboardInterrupt):
            judge(place)
        assert not (place / "out" / "summary.json").exists()
        summary = judge(place)
    assert systems == ["base", "R", "R", "best of 2"]  # the base does not play again
    batches = -(-PROMPTS * SEEDS // 8)  # a batch of 3 clips becomes one of 8
    assert rows == [[1] * 8] * (batches * (2 + 2) + 1)  # base, R, twice best of 2, and R's last
    return place, summary


def scores(place):
    with np.load(place / "scores.npz") as arrays:
        return dict(arrays)


def test_one_device_and_another_batch_give_the_same_clips(evaluated, monkeypatch):
    """Also without the interruption."""
    place, summary = evaluated
    one = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda: one)
    monkeypatch.setattr(comparison, "write_page", lambda *page: None)  # drawing is slow
    other = judge(place, "one", dataclasses.replace(CONFIG, batch_size=7))
    assert other["identity"] == summary["identity"]
    assert other["gains"]["zeros"]["R"]["mean"] == summary["gains"]["zeros"]["R"]["mean"]
    arrays = scores(place / "one")
    assert arrays.keys() == scores(place / "out").keys()
    for name, array in scores(place / "out").items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(array, arrays[name], rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(array, arrays[name], name)


def judge_on_a_host(place):
    """Evaluates on this host and others together."""
    comparison.write_page = lambda *page: None
    judge(place, "hosts")


@pytest.mark.slow
def test_two_hosts_give_the_bits_of_one(evaluated, processes):
    """Two processes of two devices, against one of eight that was interrupted."""
    place, summary = evaluated
    run_on_hosts(processes, judge_on_a_host, place, hosts=2, devices=2)
    arrays = scores(place / "hosts")
    assert arrays.keys() == scores(place / "out").keys()
    for name, array in scores(place / "out").items():
        assert array.dtype == arrays[name].dtype and array.tobytes() == arrays[name].tobytes(), name
    other = json.loads((place / "hosts" / "summary.json").read_text())
    assert other == json.loads(json.dumps({**summary, "page": other["page"]}))
    assert not (place / "hosts" / "played").exists()


def test_the_summary_says_what_was_measured(evaluated):
    place, summary = evaluated
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


def test_the_page_has_the_last_policy_too(evaluated):
    page = (evaluated[0] / "out" / "page.html").read_text()
    assert page.count("R, last, 1.2 seconds") in (2, 3)  # of the first prompts, and one that lost
    assert "step 3 is kept" in page and "Real clips are of noise: Free." in page
    assert not (evaluated[0] / "out" / "played").exists()


def test_a_finished_evaluation_is_left_alone_until_a_setting_changes(evaluated, capsys):
    """Its prompts may be gone."""
    place, summary = evaluated
    config = dataclasses.replace(CONFIG, batch_size=100)
    page = evaluate.PageConfig("elsewhere", ("runs/codec",), ("Not music.",), 2, 1)
    again = judge(place, config=config, page=page, prompts=MissingTexts())
    assert again == json.loads(json.dumps(summary))
    assert "evaluated already" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="test"):
        judge(place, config=dataclasses.replace(config, seed=1), prompts=MissingTexts())


def test_a_host_measures_only_its_own_rows(monkeypatch):
    measured = []

    class RecordingEars(Ears):
        def measure(self, wav, request):
            measured.append((float(wav[0]), request))
            return super().measure(wav, request)

    bench = object.__new__(evaluate.Bench)
    bench.mesh = None
    requests = {f"tune {number}": number for number in range(8)}
    bench._audience = LoadedAudience(None, RecordingEars(), requests)
    monkeypatch.setattr(sharding, "own_rows", lambda mesh, count: np.arange(count // 2, count))
    monkeypatch.setattr(sharding, "gather_rows", lambda mesh, rows, count: rows)
    wav = np.arange(8, dtype=np.float32)[:, None] + np.zeros(10, np.float32)
    rows = bench._listen(wav, [f"tune {number}" for number in range(8)])
    assert measured == [(4, 4), (5, 5), (6, 6), (7, 7)]
    np.testing.assert_array_equal(rows[:, 0], [16, 25, 36, 49])


def test_systems_and_settings_that_do_not_fit_are_refused(evaluated, tmp_path, monkeypatch):
    place, _ = evaluated
    base = str(place / "base")
    monkeypatch.setattr(folder, "load", functools.cache(folder.load))
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


def test_a_whole_summary_is_read(evaluated):
    place, summary = evaluated
    path = place / "out" / "summary.json"
    assert evaluate._summary(path) == json.loads(json.dumps(summary))
