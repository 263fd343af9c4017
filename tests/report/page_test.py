"""The page as a browser reads it: well-formed, self-contained, safe, and true to the report."""

import base64
import dataclasses
import hashlib
import html.parser
import io
import re

import numpy as np
import pytest
import soundfile
from matplotlib import image

from musicrl_jax.report import curves, loudness, page, plots

RATE = 16000
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> "
    "\"quoted\" & 'single' {{ 7 * 7 }}"
)
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(html.parser.HTMLParser):
    """Collects elements and text; fails on end tags that match nothing."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def words(self):
        return " ".join(
            " ".join(data for tag, data in self.text if tag not in ("style", "script")).split()
        )


def clip(seed, level, total, samples=RATE):
    wav = np.random.default_rng(seed).uniform(-level, level, samples).astype(np.float32)
    return page.Clip(wav, RATE, {"total": total, "quality (pseudo-MOS)": total / 2.0})


I = page.Interval
SERIES = {"KL": (np.arange(3), np.arange(3.0))}


def panel(**changes):
    votes = page.Panel(
        name="judging panel",
        listeners=40,
        raters=3,
        agreement=0.66,
        measurements=["consonance", "loudness_range", "gaps"],
        matches=[
            page.Match("R", "MusicLM", 0.65, 0.221, 0.129, I(0.8345, 0.78, 0.88), 0.0004),
            page.Match("MusicLM", "best of 8", 0.5, 0.25, 0.25, I(0.667, 0.61, 0.72), 0.0123),
            page.Match("R", "best of 8", 0.4, 0.3, 0.3, I(0.571, 0.48, 0.66), 0.25),
        ],
        opinions={"MusicLM": I(3.07, 2.9, 3.2), "R": I(3.54, 3.4, 3.65), "best of 8": I(3, 2, 4)},
    )
    return dataclasses.replace(votes, **changes)


def by_policy(*figures):
    return dict(zip(("MusicLM", "R", "best of 8"), figures, strict=True))


def report(**changes):
    # The results.
    total = by_policy(I(0.4, 0.35, 0.45), I(0.6, 0.55, 0.65), I(0.42, 0.41, 0.43))
    total_gains = {"R": I(0.2, 0.125, 0.275), "best of 8": I(0.02, -0.01, 0.05)}
    quality = by_policy(I(0.3, 0.2, 0.4), I(0.25, 0.15, 0.35), I(0.1, 0.0, 0.2))
    quality_gains = {"R": I(-0.05, -0.1, 0.01), "best of 8": I(-0.2, -0.3, -0.11)}
    distance = page.Measure("Fréchet distance", by_policy(4.5, 123.456, 7.25), "not trained on")
    codes = {"R": (np.arange(2), np.arange(2.0))}

    # The clips.
    unscored = dataclasses.replace(clip(5, 0.3, 0.0), scores={})
    waltz = {"MusicLM": clip(1, 0.02, 0.4), "R": clip(2, 0.9, 0.65), "R, last": unscored}
    reel = {"MusicLM": clip(3, 0.1, 0.75), "R": clip(4, 0.1, 0.5)}

    # The page.
    content = page.Report(
        title="tiny",
        facts={"command": "musicrl train_rl --gin.SEED=1", "seed": "1"},
        policies=["MusicLM", "R", "best of 8"],
        panel=panel(),
        rewards=[
            page.Reward("total", total, total_gains),
            page.Reward("quality", quality, quality_gains, "pseudo-MOS, no people's ratings"),
        ],
        interval_note="95 % bootstrap over 64 prompts.",
        measures=[page.Measure("KL", {"R": I(12.5, 11.25, 13.75)}, "nats a clip"), distance],
        kl=[curves.Curve("KL by code", "code", "nats", codes, ticks=("semantic", "q"))],
        trials=[page.Trial("a slow waltz", waltz)],
        trials_rule="The first held-out prompt.",
        regressions=[page.Trial("a fast reel", reel)],
        regressions_rule="The prompt that lost most.",
        runs=[
            page.Run(
                "R", [curves.Curve("R: KL", "step", "nats a clip", SERIES)], "Alarm: at step 7."
            )
        ],
        runs_rule="The last checkpoint is kept.",
        training=[curves.Curve("Codec loss", "step", "loss", SERIES)],
        stages=[("codec", 12.34), ("RL", 185.0)],
        identity={"codec": "ab" * 32},
        notes=["The music is simple."],
    )
    return dataclasses.replace(content, **changes)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Writes the page and returns its path."""
    return page.write_page(tmp_path_factory.mktemp("page") / "new" / "index.html", report())


@pytest.fixture(scope="module")
def written(path):
    """Returns the page as a browser reads it."""
    return read(path)


@pytest.fixture
def drawings(monkeypatch):
    """Replaces the curves, which take most of the time."""
    monkeypatch.setattr(plots, "curve_svg", lambda curve: "<svg></svg>")


@pytest.mark.parametrize(
    "text",
    [
        "tiny",
        "musicrl train_rl --gin.SEED=1",
        "codec 12.3 s RL 3 min 05 s total before this page 3 min 17 s",
        "95 % bootstrap over 64 prompts.",
        "pseudo-MOS, no people's ratings",
        "R: KL",
        "Codec loss",
        "KL by code",
        "semantic",
        "Alarm: at step 7.",
        "The last checkpoint is kept.",
        "The first held-out prompt.",
        "The prompt that lost most.",
        "+0.250",
        "−0.250",
        "ab" * 32,
        "The music is simple.",
    ],
)
def test_the_page_shows_everything_in_the_report(written, text):
    assert text in written.words()


def rows(path, section):
    """Returns the text of each table row of a section."""
    text = path.read_text(encoding="utf-8")
    part = text[text.index(f'<section id="{section}">') :].split("</section>")[0]
    cells = re.sub(r"<[^>]*>", " ", part.replace("</tr>", "|"))
    return [" ".join(row.split()) for row in html.unescape(cells).split("|")]


def test_each_row_has_its_figures(path):
    assert rows(path, "panel")[1:4] == [
        "R against MusicLM 65.0 % 22.1 % 12.9 % 83.5 % 78.0 % to 88.0 % < 0.001",
        "MusicLM against best of 8 50.0 % 25.0 % 25.0 % 66.7 % 61.0 % to 72.0 % 0.012",
        "R against best of 8 40.0 % 30.0 % 30.0 % 57.1 % 48.0 % to 66.0 % 0.250",
    ]
    assert rows(path, "panel")[5:8] == [
        "MusicLM 3.070 2.900 to 3.200",
        "R 3.540 3.400 to 3.650",
        "best of 8 3.000 2.000 to 4.000",
    ]
    for section, first in (("rewards", "Term"), ("measures", "Measure")):
        assert rows(path, section)[0].endswith(f"{first} MusicLM R best of 8")
    assert rows(path, "rewards")[1:3] == [
        "total 0.400 0.350 to 0.450 0.600 0.550 to 0.650 0.420 0.410 to 0.430",
        "gain over MusicLM – +0.200 +0.125 to +0.275 +0.020 −0.010 to +0.050",
    ]
    assert rows(path, "measures")[1:3] == [
        "KL nats a clip – 12.50 11.25 to 13.75 –",
        "Fréchet distance not trained on 4.500 123.5 7.250",
    ]
    text = path.read_text(encoding="utf-8")
    bars = re.findall(r'<i class="([^"]*)" style="flex: ([^"]*)"></i>', text)
    assert bars[:3] == [("series-0", "0.650"), ("tie", "0.221"), ("base", "0.129")]
    strip = text[: text.index('<section id="rewards">')].split('<span class="strip base">')[1]
    # 2.9, 0.3 and 3.07 on a scale from 1 to 5.
    assert re.findall(r"[\d.]+%", strip)[:3] == ["47.50%", "7.50%", "51.75%"]
    sides = {"+0.200": "up", "+0.020": "", "−0.200": "down", "83.5 %": "up", "57.1 %": ""}
    for mean, side in sides.items():
        assert f'<td class="{side}">{mean} <small>' in text


def test_figures_of_simulated_listeners_are_labelled(written, tmp_path, drawings):
    words = written.words()
    assert "The judging panel has 40 simulated listeners. They are not people" in words
    assert "3 of them judge each pair. Two of them agree on 66.0 % of the pairs." in words
    assert "They measure consonance, loudness range and gaps." in words
    captions = [data for tag, data in written.text if tag == "caption"]
    assert [text for text in captions if "simulated listeners" in text] == [
        "Pairs, by the votes of simulated listeners",
        "Mean opinion score, by the ratings of simulated listeners from 1 to 5",
    ]
    figures = "R 83.5 % 78.0 % to 88.0 % best of 8 33.3 % 28.0 % to 39.0 % Win rate against MusicLM"
    assert figures in words and "by the votes of simulated listeners. No people voted." in words
    alone = read(page.write_page(tmp_path / "page.html", report(panel=None))).words()
    assert "simulated" not in alone and "Pairs" not in alone
    figures = (
        "R +0.200 +0.125 to +0.275 best of 8 +0.020 −0.010 to +0.050 Gain in total over MusicLM"
    )
    assert figures in alone


def test_sections_are_in_order(written):
    names = [section["id"] for section in written.all("section")]
    order = "panel rewards measures listen regressions runs training cost identity notes"
    assert names == order.split()
    assert [a["href"] for a in written.all("a")] == [f"#{name}" for name in names]


def test_a_side_without_scores_shows_none(path):
    assert rows(path, "listen")[1:3] == ["total 0.400", "quality (pseudo-MOS) 0.200"]
    assert rows(path, "listen")[4:6] == ["total 0.650 +0.250", "quality (pseudo-MOS) 0.325 +0.125"]
    sides = path.read_text(encoding="utf-8").split('<div class="side">')[1:4]
    assert ["<table>" in side for side in sides] == [True, True, False]
    assert ["Change" in side for side in sides] == [False, True, False]
    keys = [re.search(r'<h3><span class="key ([^"]*)">([^<]*)<', side).groups() for side in sides]
    assert keys == [("base", "MusicLM"), ("series-0", "R"), ("other", "R, last")]


def test_nothing_is_loaded_from_elsewhere(written, path):
    for tag, attrs in written.elements:
        for name in ("src", "href", "srcset", "poster", "action", "data", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert not written.all("link") and not written.all("iframe")
    policy = next(meta["content"] for meta in written.all("meta") if "http-equiv" in meta)
    script = "".join(data for tag, data in written.text if tag == "script")
    assert policy.startswith("default-src 'none';")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy


def test_screen_readers_get_labels(written):
    labels = [audio["aria-label"] for audio in written.all("audio")]
    assert labels == [
        "MusicLM, 1.0 seconds: a slow waltz",
        "R, 1.0 seconds: a slow waltz",
        "R, last, 1.0 seconds: a slow waltz",
        "MusicLM, 1.0 seconds: a fast reel",
        "R, 1.0 seconds: a fast reel",
    ]
    assert all("controls" in audio for audio in written.all("audio"))
    assert len(written.all("svg")) == 8 and all(svg["role"] == "img" for svg in written.all("svg"))
    spectrogram_labels = [svg["aria-label"] for svg in written.all("svg")]
    assert "Mel spectrogram, R, last: a slow waltz" in spectrogram_labels
    assert {"lang": "en"} in written.all("html")


def test_hostile_words_are_escaped(tmp_path, written):
    interval = I(0.5, 0.4, 0.6)
    curve = curves.Curve(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: (np.arange(3), np.arange(3.0))})
    bars = dataclasses.replace(curve, ticks=("<b>&$_x$",) * 3)
    scored = dataclasses.replace(clip(1, 0.1, 0.5), scores={HOSTILE: 1.0})
    other = HOSTILE + "!"
    hostile = report(
        title=HOSTILE,
        facts={HOSTILE: HOSTILE},
        policies=[HOSTILE, other],
        panel=panel(
            name=HOSTILE,
            measurements=[HOSTILE],
            matches=[page.Match(other, HOSTILE, 0.5, 0.0, 0.5, interval, 0.5)],
            opinions={HOSTILE: interval},
        ),
        rewards=[
            page.Reward(HOSTILE, {HOSTILE: interval, other: interval}, {other: interval}, HOSTILE)
        ],
        interval_note=HOSTILE,
        measures=[page.Measure(HOSTILE, {HOSTILE: 1.0}, HOSTILE)],
        kl=[bars],
        trials=[page.Trial(HOSTILE, {HOSTILE: scored, other: scored})],
        trials_rule=HOSTILE,
        regressions_rule=HOSTILE,
        runs=[page.Run(HOSTILE, [curve], HOSTILE)],
        runs_rule=HOSTILE,
        training=[curve],
        stages=[(HOSTILE, 1.0)],
        identity={HOSTILE: HOSTILE},
        notes=[HOSTILE],
    )
    reader = read(page.write_page(tmp_path / "page.html", hostile))
    assert len(reader.all("script")) == len(written.all("script")) == 1
    assert not reader.all("img") and not any("onerror" in attrs for _, attrs in reader.elements)
    # Shown as it is, braces too.
    assert reader.words().count(HOSTILE) >= 40
    assert "<b>&$_x$" in reader.words()
    assert f"{HOSTILE}, 1.0 seconds: {HOSTILE}" in [
        audio["aria-label"] for audio in reader.all("audio")
    ]


def test_audio_is_the_level_matched_clip(written):
    played = []
    for audio in written.all("audio"):
        kind, encoded = audio["src"].split(",")
        assert kind == "data:audio/flac;base64"
        audio_file = io.BytesIO(base64.b64decode(encoded, validate=True))
        played.append(soundfile.read(audio_file, dtype="float32"))
    assert len(played) == 5
    for trial in (*report().trials, *report().regressions):
        matched = loudness.level_match([clip.wav for clip in trial.clips.values()], RATE)
        for clip in matched:
            wav, rate = played.pop(0)
            # 1.0 seconds, as the label promises.
            assert rate == RATE and len(wav) == RATE
            np.testing.assert_allclose(wav, clip.wav, atol=1.0 / 32768)


def test_drawings_are_of_the_level_matched_clips(tmp_path, drawings):
    loud = clip(1, 0.9, 0.5)
    clips = {"MusicLM": loud, "R": dataclasses.replace(loud, wav=loud.wav / 10)}
    text = page.write_page(
        tmp_path / "page.html", report(trials=[page.Trial("echo", clips)])
    ).read_text()
    pictures = re.findall(r'png;base64,([^"]*)"', text)[:2]
    first, second = (image.imread(io.BytesIO(base64.b64decode(each))) for each in pictures)
    # Rounding changes a few colours.
    assert (first == second).mean() > 0.99


def test_silent_and_very_short_clips_are_shown(tmp_path, drawings):
    audible = clip(1, 0.1, 0.5)
    silent = dataclasses.replace(audible, wav=np.zeros(RATE, np.float32))
    short = clip(1, 0.1, 0.5, samples=30), clip(2, 0.2, 0.5, samples=800)
    trials = [
        page.Trial("silence", {"MusicLM": silent, "R": audible}),
        page.Trial("short", dict(zip(("MusicLM", "R"), short, strict=True))),
    ]
    path = page.write_page(tmp_path / "page.html", report(trials=trials, regressions=[]))
    words = read(path).words()
    assert "MusicLM silent" in words and "dBFS" in words
    assert not re.search(r"\b(nan|inf)\b", words.lower())
    assert "None. The reward fell for no prompt." in words


def test_a_bare_report_is_still_a_page(tmp_path):
    nothing = dict.fromkeys(
        ("measures", "kl", "trials", "regressions", "runs", "training", "stages", "notes"), ()
    )
    bare = report(**nothing, panel=None, facts={}, identity={})
    reader = read(page.write_page(tmp_path / "page.html", bare))
    names = [section["id"] for section in reader.all("section")]
    assert names == ["rewards", "listen", "regressions"]
    assert [a["href"] for a in reader.all("a")] == [f"#{name}" for name in names]


def test_a_page_is_replaced_and_repeats_byte_for_byte(path):
    first = path.read_bytes()
    path.write_text("older")
    assert page.write_page(path, report()).read_bytes() == first


INSIDE, ABOVE, BELOW = I(0.521, 0.43, 0.61), I(0.7, 0.6, 0.8), I(0.3, 0.2, 0.4)


def votes(**rates):
    """Returns a report with these win rates against the base."""
    matches = [page.Match(name, "MusicLM", 0.5, 0, 0.5, rate, 0.5) for name, rate in rates.items()]
    return report(panel=panel(matches=matches))


def test_the_verdict_gives_the_win_rate_its_interval_and_the_conclusion():
    assert page.verdict(votes(R=INSIDE)) == (
        "By the votes of simulated listeners, the win rate against MusicLM is 52.1 % for R (95 % "
        "interval 43.0 % to 61.0 %, which includes one half), so no preference for or against R "
        "is shown; this does not show what people would prefer."
    )


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (ABOVE, "excludes one half), so these listeners prefer R to MusicLM; this does not"),
        (BELOW, "excludes one half), so these listeners prefer MusicLM to R; this does not"),
        (I(0.6, 0.5, 0.7), "includes one half), so no preference for or against R is shown; this"),
    ],
)
def test_the_verdict_follows_the_interval_of_the_votes(rate, words):
    assert words in page.verdict(votes(R=rate))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.2, "excludes zero), so the reward rose for R; this does not show what listeners"),
        (-0.2, -0.01, "excludes zero), so the reward fell for R; this does not show"),
        (-0.1, 0.1, "includes zero), so no change is shown for R; this does not show"),
        (0.0, 0.2, "includes zero), so no change is shown for R; this does not show"),
    ],
)
def test_without_votes_the_verdict_follows_the_gain(low, high, words):
    total = {"MusicLM": I(0.4, 0.3, 0.5), "R": I(0.4, 0.3, 0.5)}
    rewards = [page.Reward("total", total, {"R": I((low + high) / 2, low, high)})]
    text = page.verdict(report(panel=None, policies=["MusicLM", "R"], rewards=rewards))
    assert text.startswith("On held-out prompts, the gain in total over MusicLM is ")
    assert words in text


def test_the_verdict_names_every_policy(written):
    text = page.verdict(votes(R=ABOVE, U=INSIDE, RU=ABOVE, joint=BELOW))
    assert (
        "so these listeners prefer R and RU to MusicLM, these listeners prefer MusicLM to " in text
    )
    assert "joint and no preference for or against U is shown; this" in text
    assert page.verdict(votes()).startswith("No policy was compared with MusicLM")
    # The win rate of a policy that comes second in a pair is turned round.
    assert "and 33.3 % for best of 8 (95 % interval 28.0 % to 39.0 %, which ex" in written.words()


def test_gain_marks_by_hand():
    marks = page.gain_marks({"R": I(0.5, 0.0, 1.0), "U": I(-0.1, -0.2, 0.0)})
    half = 50.0 / 1.08
    assert marks["R"] == pytest.approx({"left": 50.0, "width": half, "mean": 50.0 + half / 2})
    assert marks["U"]["left"] == pytest.approx(50.0 - 10.0 / 1.08)  # on the same scale
    still = page.gain_marks({"R": I(0.0, 0.0, 0.0)})
    assert still == {"R": {"left": 50.0, "width": 0.0, "mean": 50.0}}


@pytest.mark.parametrize(
    ("value", "plain", "with_sign"),
    [
        (0.12345, "0.123", "+0.123"),
        (-0.5, "−0.500", "−0.500"),
        (-0.0001, "0.000", "0.000"),
        (0.0001, "0.000", "0.000"),
        (9.9996, "10.00", "+10.00"),
        (-1234.56, "−1,234.6", "−1,234.6"),
        (None, "–", "–"),
        (float("nan"), "nan", "nan"),
        (float("-inf"), "−inf", "−inf"),
    ],
)
def test_numbers(value, plain, with_sign):
    assert page.number(value) == plain
    assert page.signed(value) == with_sign


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (7830, "2 h 10 min"),
    ],
)
def test_durations(seconds, text):
    assert page.duration(seconds) == text


def test_shares_and_lists():
    assert page.percent(0.1294) == "12.9 %"
    assert [page.probability(p) for p in (0.00099, 0.001, 0.0456, 1.0)] == [
        "< 0.001",
        "0.001",
        "0.046",
        "1.000",
    ]
    assert [page.listed(list(names)) for names in ("", "a", "ab", "abc")] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


GOOD = clip(1, 0.1, 0.5)


def trial(**changes):
    return page.Trial("reel", {"MusicLM": GOOD, "R": dataclasses.replace(GOOD, **changes)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trial(wav=np.zeros((2, 4), np.float32)), r"wav has shape \(2, 4\)"),
        (lambda: trial(wav=np.zeros(0, np.float32)), r"wav has shape \(0,\)"),
        (lambda: trial(wav=np.array([0.0, np.nan, np.inf])), "2 samples that are NaN or infinite"),
        (lambda: trial(sample_rate_hz=0), "sample_rate_hz = 0"),
        (
            lambda: trial(sample_rate_hz=24000),
            "'reel': sample rates differ, {'MusicLM': 16000, 'R': 24000} Hz",
        ),
        (lambda: trial(scores={"total": 1.0}), r"'reel': scores differ, .*'R': \['total'\]"),
        (lambda: page.Trial("reel", {"MusicLM": GOOD}), "'reel': clips has 1 sides"),
        (lambda: report(policies=["MusicLM"]), r"policies = .*give two or more, each once"),
        (lambda: report(policies=["MusicLM"] * 2), r"policies = .*give two or more, each once"),
        (
            lambda: report(policies=["MusicLM", "U", "R"]),
            r"reward 'total' has means of .*give the means of \['MusicLM', 'U', 'R'\]",
        ),
        (lambda: report(rewards=[]), "rewards is empty"),
        (lambda: I(0.5, 1.0, 0.0), "interval low"),
        (lambda: I(0.5, float("nan"), 1.0), "interval low"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "shares", [(0.6, 0.3, 0.2), (65.0, 22.1, 12.9), (1.2, 0.0, -0.2), (float("nan"), 0.5, 0.5)]
)
def test_shares_that_do_not_add_up_are_named(shares):
    with pytest.raises(ValueError, match="R against MusicLM: win = "):
        page.Match("R", "MusicLM", *shares, I(0.5, 0.4, 0.6), 0.1)
