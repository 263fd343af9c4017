"""What `musicrl evaluate` measured, as it stands on the page: figures by hand, curves point by point."""

import html
import json
import re

import numpy as np
import pytest

from musicrl_jax.report import comparison, page

RATE = 8000
POLICIES = ("MusicLM", "R", "best of 8")
HOSTILE = '<script>alert(1)</script> & "angry" {{ 7 * 7 }}'


def interval(mean):
    return {"mean": mean, "low": mean - 0.125, "high": mean + 0.25}


def wav(seed):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, RATE // 2).astype(np.float32)


def summary(panel=True):
    found = {
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
        found["panel"] = {
            "name": "judging panel",
            "listeners": 40,
            "raters": 3,
            "agreement": 0.5,
            "measurements": ["gaps"],
        }
        found["mos"] = {policy: interval(2.5 + i) for i, policy in enumerate(POLICIES)}
        found["real"] = {"mos": interval(4.25)}
        shares = {"win": 0.625, "tie": 0.125, "loss": 0.25}
        rate = {"mean": 0.714, "low": 0.6, "high": 0.8}
        found["pairs"] = [
            {"first": "R", "second": "MusicLM", **shares, "win_rate": rate, "wilcoxon_p": 0.0123}
        ]
    return found


def scores(panel=True):
    """The clip heard of prompt `row` by policy i has reward row + i / 8, quality half of that, opinion i + 1."""
    found = {}
    for i, policy in enumerate(POLICIES):
        reward = np.stack([np.arange(3) + i / 8, np.full(3, 99.0)], axis=1).astype(
            np.float32
        )  # [n, s]
        found[policy] = {"reward": reward, "quality": reward / 2}
        if panel:
            found[policy]["opinion"] = np.full((3, 2), i + 1, np.float32)
    return found


@pytest.fixture
def folders(tmp_path):
    """An RL run whose judge listens at every other step, a supervised stage, and a folder without metrics."""
    lines = []
    for step, kl in enumerate((0.0, 4.0, 1.0, 9.0)):
        line = {
            "step": step,
            "reward": 10.0 + step,
            "quality": step / 2,
            "kl": kl,
            "kl_per_second": kl / 2,
        }
        line |= {"value_loss": 0.5, "explained_variance": 0.25, "reward_std": 1.0}
        lines.append(
            line | ({"judge_gain": -float(step), "judge_error": step / 4} if step % 2 else {})
        )
    for name, records in (
        ("rl", lines),
        ("codec", [{"step": 0, "loss": 2.0}, {"step": 5, "loss": 1.0}]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
    return tmp_path


def write(
    folders, found=None, prompts=("a waltz", "a reel", "a march"), panel=True, sides=POLICIES[:2]
):
    clips = {side: wav(i) for i, side in enumerate((*sides, "R, last"))}
    comparison.write_comparison(
        folders / "page.html",
        found or summary(panel),
        comparison.Sounds(prompts, [(0, clips), (2, clips)], [(1, clips)], scores(panel), RATE),
        "runs/quickstart",
        {"R": str(folders / "rl"), "best of 8": str(folders / "missing")},
        [str(folders / "codec"), str(folders / "missing")],
        {"codec": 12.34, "rl": 185.0},
        ["Nothing here is music."],
    )
    return (folders / "page.html").read_text(encoding="utf-8")


@pytest.fixture
def reports(monkeypatch):
    """What is handed over to be written."""
    found = []

    def keep(path, report):
        found.append(report)
        return page.write_page(path, report)

    monkeypatch.setattr(comparison, "write_page", keep)
    return found


def words(text):
    """What is read on the page, drawings left out."""
    text = re.sub(r"<(style|script|svg).*?</\1>", " ", text, flags=re.DOTALL)
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", text).split()))


def test_figures_stand_on_the_page(folders):
    text = words(write(folders))
    for part in (
        "quickstart By the interval of the win rate, simulated listeners prefer R to MusicLM.",
        "R against MusicLM 62.5 % 12.5 % 25.0 % 71.4 % 60.0 % to 80.0 % 0.012",
        "best of 8 4.500 4.375 to 4.750 real clips 4.250 4.125 to 4.500",  # MOS
        # The total first, though the summary has it last.
        "reward the weighted sum of the terms below 1.500 1.375 to 1.750 2.500 2.375 to 2.750 3.500",
        "gain over MusicLM – +0.750 +0.625 to +1.000 −1.500 −1.625 to −1.250 quality 0.500 0.375 to 0.750",
        "KL to the base, nats a clip how far the policy moved – 12.50 12.38 to 12.75 –",
        "of real clips it is 4.25 3.500 3.250 3.375",
        "lower is nearer 14.25 11.75 12.50",
        "95 % bootstrap over 3 prompts, 2 clip(s) each.",
        "The checkpoint of step 2 is kept, the last before the alarm.",
        "R Alarm against over-optimisation: went off in look 5; step 3 is kept, at 6.2 nats a clip from its anchor.",
        "codec 12.3 s rl 3 min 05 s",
        "codec " + "c0dec" * 12 + " R " + "f00d" * 16 + " seed 17",
        "Nothing here is music.",
    ):
        assert part in text, part


def test_what_simulated_listeners_say_is_signed(folders):
    text = write(folders)
    for caption in re.findall(
        r"<caption>([^<]*)</caption>", text.split('<section id="rewards">')[0]
    ):
        assert "simulated listeners" in caption
    assert '<th scope="row">opinion</th>' not in text
    assert (
        text.count('<th scope="row">opinion, simulated listeners</th>') == 6
    )  # 3 prompts, 2 sides that have scores
    alone = write(folders, panel=False)
    assert "simulated" not in alone and "opinion" not in words(alone)
    assert (
        "By the interval of the gain over MusicLM, the reward rose for R, and fell for best of 8."
        in words(alone)
    )


def test_each_clip_has_the_scores_of_its_own_prompt_and_first_seed(folders, reports):
    write(folders)
    trials, (lost,) = reports[0].trials, reports[0].regressions
    assert [(trial.prompt, list(trial.clips)) for trial in (*trials, lost)] == [
        (prompt, ["MusicLM", "R", "R, last"]) for prompt in ("a waltz", "a march", "a reel")
    ]
    for trial, row in ((trials[0], 0), (trials[1], 2), (lost, 1)):
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
    drawn = {curve.title: curve.series for curve in run.curves}
    assert list(drawn) == [
        "R: reward and its terms",
        "R: reward against KL",
        "R: a held-out judge's gain",
        "R: KL to the anchor",
        "R: value loss",
        "R: explained variance of the value",
    ]
    assert list(drawn["R: reward and its terms"]) == ["reward", "quality"]
    np.testing.assert_array_equal(
        drawn["R: reward and its terms"]["quality"], [[0, 1, 2, 3], [0, 0.5, 1, 1.5]]
    )
    np.testing.assert_array_equal(
        drawn["R: reward against KL"]["reward"], [[0, 1, 4, 9], [10, 12, 11, 13]]
    )
    np.testing.assert_array_equal(
        drawn["R: a held-out judge's gain"]["gain"], [[2, 3], [-1, -3]]
    )  # KL 4 and 9
    np.testing.assert_array_equal(run.curves[2].errors["gain"], [0.25, 0.75])
    np.testing.assert_array_equal(
        drawn["R: a held-out judge's gain"]["kept"], [[2.5, 2.5], [-3.75, -0.75]]
    )
    np.testing.assert_array_equal(drawn["R: KL to the anchor"]["kl"], [[0, 1, 2, 3], [0, 4, 1, 9]])
    (codec,) = reports[0].training
    np.testing.assert_array_equal(codec.series["training"], [[0, 5], [2.0, 1.0]])


def test_the_kl_stands_over_codes_and_seconds(folders, reports):
    found = summary()
    found["kl_by_level"]["best of 8"] = [0.5] * 5
    write(folders, found)
    codes, seconds = reports[0].kl
    assert codes.ticks == ("semantic", "coarse 1", "coarse 2", "coarse 1", "coarse 2")
    np.testing.assert_array_equal(codes.series["R"], [range(5), [1, 2, 3, 4, 5]])
    assert list(codes.series) == list(seconds.series) == ["R", "best of 8"]
    np.testing.assert_array_equal(seconds.series["R"], [[1, 2], [7, 8]])
    assert seconds.series["best of 8"][0].size == 0  # in its place, so that colours hold


def test_listeners_who_never_both_choose_agree_on_nothing(folders):
    found = summary()
    found["panel"] = {**found["panel"], "agreement": None}
    assert "judge a pair. Intervals of win rates" in words(write(folders, found))


def too_few(figures, words):
    """The same figures, intervals replaced by words."""
    if isinstance(figures, dict) and {"mean", "low", "high"} <= set(figures):
        return {"too_small": words}
    return (
        {name: too_few(part, words) for name, part in figures.items()}
        if isinstance(figures, dict)
        else figures
    )


@pytest.mark.parametrize("panel", [True, False], ids=["listeners", "rewards alone"])
def test_of_too_few_prompts_the_page_has_words_and_no_figures(folders, panel):
    few, found = "n too small (4 < 8)", summary(panel)
    plain = {
        name: {key: {"too_small": few} for key in found[name]} for name in ("diversity", "frechet")
    }
    found = too_few(found, few) | plain | {"kl_by_level": {}, "kl_by_second": {}}
    if panel:
        found["panel"] |= {"agreement": few}
        found["pairs"] = [{"first": "R", "second": "MusicLM", "win_rate": {"too_small": few}}]
    page_html = write(folders, found, panel=panel)
    text = words(page_html)
    assert (
        f"Too few prompts to compare R{'' if panel else ' and best of 8'} with MusicLM: {few}."
        in text
    )
    largest = page_html.split('<div class="figures">')[1].split("</div>\n</div>")[0]
    assert "<b>" not in largest and largest.count("n too small (4 &lt; 8)") == (1 if panel else 2)
    figures = text.split("The first held-out prompts, as they come")[
        0
    ]  # what follows is of single clips
    assert "%" not in figures.replace("95 %", "")
    assert figures.count(few) == 20 + 5 * panel and "real clips it is" not in figures
    if panel:
        assert f"R against MusicLM {few}" in text and "an unknown share of the pairs" in text


def test_a_silent_alarm_says_so(folders):
    found = summary() | {"watched": {"R": {"looks": 5, "kept": None}}}
    text = write(folders, found)
    assert "Alarm against over-optimisation: silent in 5 looks." in text
    assert "gain, kept over" not in text  # no line in the drawing
    assert "Alarm against" not in write(folders, found | {"watched": {"R": None}})


def test_hostile_names_are_inert(folders):
    text = (
        json.dumps(summary())
        .replace("best of 8", json.dumps(HOSTILE)[1:-1])
        .replace('"quality"', '"<b>quality"')
    )
    found = json.loads(text)
    assert HOSTILE in found["policies"]
    shown = write(folders, found, prompts=(HOSTILE, "b", "c"), sides=("MusicLM", HOSTILE))
    assert shown.count("<script") == 1 and "<b>quality" not in shown
    assert f"MusicLM, the base; R and {HOSTILE}" in words(shown) and f"1 {HOSTILE}" in words(shown)


def test_two_policies_are_enough_and_one_is_too_few(folders):
    found = summary(panel=False)
    for figures in (*found["rewards"].values(), *found["gains"].values()):
        del figures["best of 8"]
    text = words(write(folders, found | {"policies": ["MusicLM", "R"]}, panel=False))
    assert "the reward rose for R." in text and "Policies MusicLM, the base; R Held-out" in text
    with pytest.raises(ValueError, match="policies"):
        write(folders, found | {"policies": ["MusicLM"]}, panel=False)
