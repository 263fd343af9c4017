"""The page of `musicrl evaluate`: figures by hand, curves point by point."""

import html
import json
import re

import numpy as np
import pytest

from musicrl_jax.report import comparison, plots

RATE = 8000
POLICIES = ("MusicLM", "R", "best of 8")
HOSTILE = '<script>alert(1)</script> & "angry" {{ 7 * 7 }}'


def interval(mean):
    return {"mean": mean, "low": mean - 0.125, "high": mean + 0.25}


def wav(seed):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, RATE // 2).astype(np.float32)


def summary(panel=True):
    result = {
        "policies": list(POLICIES),
        "rewards": {
            "quality": {policy: interval(0.5 + i) for i, policy in enumerate(POLICIES)},
            "reward": {policy: interval(1.5 + i) for i, policy in enumerate(POLICIES)},
        },
        "gains": {
            term: {"R": interval(0.75), "best of 8": interval(-1.5)}
            for term in ("quality", "reward")
        },
        "kl": {"R": interval(12.5)},
        "kl_by_level": {"R": [1.0, 2.0, 3.0, 4.0, 5.0]},
        "kl_by_second": {"R": [7.0, 8.0]},
        "token_names": ["semantic", "coarse 1", "coarse 2", "coarse 1", "coarse 2"],
        "diversity": {"MusicLM": 3.5, "R": 3.25, "best of 8": 3.375, "real": 4.25},
        "frechet": {"MusicLM": 14.25, "R": 11.75, "best of 8": 12.5},
        "watched": {"R": {"looks": 5, "kept": 3, "kl": 6.25}},
        "rule": "The checkpoint of step 2 is kept, the last before the alarm.",
        "identity": {"hashes": {"codec": "c0dec" * 12, "R": "f00d" * 16}},
        "seeds": 2,
        "seed": 17,
    }
    if panel:
        result["panel"] = {
            "name": "judging panel",
            "listeners": 40,
            "raters": 3,
            "agreement": 0.5,
            "measurements": ["gaps"],
        }
        result["mos"] = {policy: interval(2.5 + i) for i, policy in enumerate(POLICIES)}
        result["real"] = {"mos": interval(4.25)}
        shares = {"win": 0.625, "tie": 0.125, "loss": 0.25}
        rate = {"mean": 0.714, "low": 0.6, "high": 0.8}
        result["pairs"] = [
            {"first": "R", "second": "MusicLM", **shares, "win_rate": rate, "wilcoxon_p": 0.0123}
        ]
    return result


def scores(panel=True):
    """Returns scores of 3 prompts: reward row + i / 8, quality half of that, opinion i + 1.

    Those are of the first seed of policy i, the one on the page.
    """
    result = {}
    for i, policy in enumerate(POLICIES):
        rewards = [np.arange(3) + i / 8, np.full(3, 99.0)]
        reward = np.stack(rewards, axis=1).astype(np.float32)  # [n, s]
        result[policy] = {"reward": reward, "quality": reward / 2}
        if panel:
            result[policy]["opinion"] = np.full((3, 2), i + 1, np.float32)
    return result


@pytest.fixture
def folders(tmp_path):
    """Writes the metrics of an RL run, with a judge at every other step, and of a codec."""
    lines = []
    for step, kl in enumerate((0.0, 4.0, 1.0, 9.0)):
        line = {"step": step, "reward": 10.0 + step, "quality": step / 2, "kl": kl}
        line |= {"value_loss": 0.5, "explained_variance": 0.25, "reward_std": 1.0}
        if step % 2:
            line |= {"judge_gain": -float(step), "judge_error": step / 4}
        lines.append(line)
    codec = [{"step": 0, "loss": 2.0}, {"step": 5, "loss": 1.0}]
    for name, records in (("rl", lines), ("codec", codec)):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return tmp_path


def write(
    folders, results=None, prompts=("a waltz", "a reel", "a march"), panel=True, sides=POLICIES[:2]
):
    clips = {side: wav(i) for i, side in enumerate((*sides, "R, last"))}
    comparison.write_comparison(
        folders / "page.html",
        results or summary(panel),
        comparison.Sounds(prompts, [(0, clips), (2, clips)], [(1, clips)], scores(panel), RATE),
        "runs/quickstart",
        {"R": str(folders / "rl"), "best of 8": str(folders / "missing")},
        [str(folders / "codec"), str(folders / "missing")],
        {"codec": 12.34, "rl": 185.0},
        ["Nothing here is music."],
    )
    return (folders / "page.html").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def drawings(monkeypatch):
    """Replaces the drawings, which take nearly all the time, by their labels."""
    monkeypatch.setattr(plots, "curve_svg", lambda curve: f"<svg>{len(curve.series)}</svg>")
    monkeypatch.setattr(
        plots, "spectrogram_svgs", lambda wavs, rate, labels: ["<svg/>"] * len(wavs)
    )


@pytest.fixture
def reports(monkeypatch):
    """Collects the reports instead of writing them."""
    written = []

    def collect(path, report):
        written.append(report)
        path.write_text("")

    monkeypatch.setattr(comparison, "write_page", collect)
    return written


def words(text):
    """Returns the text of a page without drawings."""
    text = re.sub(r"<svg/>|<(style|script|svg).*?</\1>", " ", text, flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", text).split()))


def test_figures_are_on_the_page(folders):
    text = words(write(folders))
    for part in (
        "quickstart By the votes of simulated listeners, the win rate against MusicLM is 71.4 % "
        "for R (95 % interval 60.0 % to 80.0 %, which excludes one half), so these listeners "
        "prefer R to MusicLM; this does not show what people would prefer.",
        "R against MusicLM 62.5 % 12.5 % 25.0 % 71.4 % 60.0 % to 80.0 % 0.012",
        "best of 8 4.500 4.375 to 4.750 real clips 4.250 4.125 to 4.500",  # MOS
        # The total first, though the summary has it last.
        "reward the weighted sum of the terms below 1.500 1.375 to 1.750 2.500 2.375 to 2.750",
        "gain over MusicLM – +0.750 +0.625 to +1.000 −1.500 −1.625 to −1.250 quality 0.500 0.375",
        "KL to the base, nats a clip how far the policy moved – 12.50 12.38 to 12.75 –",
        "of real clips it is 4.25 3.500 3.250 3.375",
        "lower is nearer 14.25 11.75 12.50",
        "95 % bootstrap over 3 prompts, 2 clip(s) each.",
        "The checkpoint of step 2 is kept, the last before the alarm.",
        "R Alarm for over-optimisation: raised in look 5; step 3 is kept, "
        "6.2 nats a clip from its anchor.",
        "codec 12.3 s rl 3 min 05 s",
        "codec " + "c0dec" * 12 + " R " + "f00d" * 16 + " seed 17",
        "Nothing here is music.",
    ):
        assert part in text, part


def test_figures_of_simulated_listeners_are_labelled(folders):
    text = write(folders)
    panel = text.split('<section id="rewards">')[0]
    for caption in re.findall(r"<caption>([^<]*)</caption>", panel):
        assert "simulated listeners" in caption
    assert '<th scope="row">opinion</th>' not in text
    row = '<th scope="row">opinion, simulated listeners</th>'
    # 3 prompts, 2 sides with scores.
    assert text.count(row) == 6
    alone = write(folders, panel=False)
    assert "simulated" not in alone and "opinion" not in words(alone)
    assert (
        "so the reward rose for R and the reward fell for best of 8; this does not show"
        in words(alone)
    )


def test_each_clip_has_the_scores_of_its_own_prompt_and_first_seed(folders, reports):
    write(folders)
    trials = [*reports[0].trials, *reports[0].regressions]
    assert [trial.prompt for trial in trials] == ["a waltz", "a march", "a reel"]
    for trial, row in zip(trials, (0, 2, 1), strict=True):
        assert list(trial.clips) == ["MusicLM", "R", "R, last"]
        opinion = "opinion, simulated listeners"
        assert trial.clips["MusicLM"].scores == {"reward": row, "quality": row / 2, opinion: 1}
        assert trial.clips["R"].scores == {
            "reward": row + 0.125,
            "quality": row / 2 + 0.0625,
            opinion: 2,
        }
        assert trial.clips["R, last"].scores == {}
        np.testing.assert_array_equal(trial.clips["R"].wav, wav(1))


def test_curves_go_through_the_logged_points(folders, reports):
    write(folders)
    run, without = reports[0].runs
    assert (without.policy, without.curves, without.alarm) == ("best of 8", [], "")
    series = {curve.title: curve.series for curve in run.curves}
    assert list(series) == [
        "R: reward and its terms",
        "R: reward against KL",
        "R: a held-out judge's gain",
        "R: KL to the anchor",
        "R: value loss",
        "R: explained variance of the value",
    ]
    assert list(series["R: reward and its terms"]) == ["reward", "quality"]
    expected = [
        ("reward and its terms", "quality", [[0, 1, 2, 3], [0, 0.5, 1, 1.5]]),
        ("reward against KL", "reward", [[0, 1, 4, 9], [10, 12, 11, 13]]),
        ("a held-out judge's gain", "gain", [[2, 3], [-1, -3]]),  # KL 4 and 9
        ("a held-out judge's gain", "chosen step", [[2.5, 2.5], [-3.75, -0.75]]),
        ("KL to the anchor", "kl", [[0, 1, 2, 3], [0, 4, 1, 9]]),
    ]
    for title, name, points in expected:
        np.testing.assert_array_equal(series[f"R: {title}"][name], points)
    np.testing.assert_array_equal(run.curves[2].errors["gain"], [0.25, 0.75])
    (codec,) = reports[0].training
    np.testing.assert_array_equal(codec.series["training"], [[0, 5], [2.0, 1.0]])


def test_the_kl_is_drawn_over_codes_and_seconds(folders, reports):
    results = summary()
    results["kl_by_level"]["best of 8"] = [0.5] * 5
    write(folders, results)
    codes, seconds = reports[0].kl
    assert codes.ticks == ("semantic", "coarse 1", "coarse 2", "coarse 1", "coarse 2")
    np.testing.assert_array_equal(codes.series["R"], [range(5), [1, 2, 3, 4, 5]])
    assert list(codes.series) == list(seconds.series) == ["R", "best of 8"]
    np.testing.assert_array_equal(seconds.series["R"], [[1, 2], [7, 8]])
    # It keeps its place, so that colours hold.
    assert seconds.series["best of 8"][0].size == 0


def test_listeners_without_a_common_pair_have_no_agreement(folders):
    results = summary()
    results["panel"]["agreement"] = None
    assert "judge each pair. Intervals of win rates" in words(write(folders, results))


def too_few(figures, message):
    """Returns the same figures with intervals replaced by words."""
    if not isinstance(figures, dict):
        return figures
    if {"mean", "low", "high"} <= set(figures):
        return {"too_small": message}
    return {name: too_few(part, message) for name, part in figures.items()}


@pytest.mark.parametrize("panel", [True, False], ids=["listeners", "rewards alone"])
def test_with_too_few_prompts_the_page_has_words_instead_of_figures(folders, panel):
    few, results = "n too small (4 < 8)", summary(panel)
    words_alone = {}
    for name in ("diversity", "frechet"):
        words_alone[name] = {key: {"too_small": few} for key in results[name]}
    results = too_few(results, few) | words_alone | {"kl_by_level": {}, "kl_by_second": {}}
    if panel:
        results["panel"] |= {"agreement": few}
        results["pairs"] = [{"first": "R", "second": "MusicLM", "win_rate": {"too_small": few}}]
    page_html = write(folders, results, panel=panel)
    text = words(page_html)
    policies = "R" if panel else "R and best of 8"
    assert f"Too few prompts to compare {policies} with MusicLM ({few}): nothing is shown." in text
    largest = page_html.split('<div class="figures">')[1].split("</div>\n</div>")[0]
    assert "<b>" not in largest and largest.count("n too small (4 &lt; 8)") == (1 if panel else 2)
    # The sections after these figures are of single clips.
    figures = text.split("The first held-out prompts, in their order")[0]
    assert "%" not in figures.replace("95 %", "")
    assert figures.count(few) == 20 + 5 * panel and "real clips it is" not in figures
    if panel:
        assert f"R against MusicLM {few}" in text and "an unknown share of the pairs" in text


def test_a_silent_alarm_is_reported(folders):
    results = summary() | {"watched": {"R": {"looks": 5, "kept": None}}}
    assert "Alarm for over-optimisation: silent in 5 looks." in write(folders, results)
    assert "Alarm for" not in write(folders, results | {"watched": {"R": None}})


def test_without_an_alarm_no_step_is_marked(folders, reports):
    write(folders, summary() | {"watched": {"R": {"looks": 5, "kept": None}}})
    assert list(reports[0].runs[0].curves[2].series) == ["gain"]


def test_hostile_names_are_escaped(folders):
    text = json.dumps(summary()).replace("best of 8", json.dumps(HOSTILE)[1:-1])
    results = json.loads(text.replace('"quality"', '"<b>quality"'))
    assert HOSTILE in results["policies"]
    text = write(folders, results, prompts=(HOSTILE, "b", "c"), sides=("MusicLM", HOSTILE))
    assert text.count("<script") == 1 and "<b>quality" not in text
    assert f"MusicLM, the base; R and {HOSTILE}" in words(text) and f"1 {HOSTILE}" in words(text)


def test_two_policies_are_enough_and_one_is_too_few(folders):
    results = summary(panel=False)
    for figures in (*results["rewards"].values(), *results["gains"].values()):
        del figures["best of 8"]
    text = words(write(folders, results | {"policies": ["MusicLM", "R"]}, panel=False))
    assert "so the reward rose for R; this does not show what listeners" in text
    assert "Policies MusicLM, the base; R Held-out" in text
    with pytest.raises(ValueError, match="policies"):
        write(folders, results | {"policies": ["MusicLM"]}, panel=False)
