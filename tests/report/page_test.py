"""The page as a browser would read it: well-formed, alone, inert, and true to what it was given."""

import base64
import dataclasses
import hashlib
import html.parser
import io
import re

import numpy as np
import pytest
import soundfile

from musicrl_jax.report import curves, loudness, page

RATE = 16000
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" & 'single' {{ 7 * 7 }}"
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
        return " ".join(" ".join(data for tag, data in self.text if tag not in ("style", "script")).split())


def clip(seed, level, total, samples=RATE):
    wav = np.random.default_rng(seed).uniform(-level, level, samples).astype(np.float32)
    return page.Clip(wav, RATE, {"total": total, "quality (pseudo-MOS)": total / 2.0})


def report(**changes):
    interval = page.Interval
    given = page.Report(
        title="tiny",
        facts={"command": "musicrl train_rl --gin.SEED=1", "seed": "1"},
        stages=[("codec", 12.34), ("RL", 185.0)],
        total=page.Reward("total", interval(0.4, 0.35, 0.45), interval(0.6, 0.55, 0.65), interval(0.2, 0.125, 0.275)),
        terms=[
            page.Reward(
                "quality",
                interval(0.3, 0.2, 0.4),
                interval(0.25, 0.15, 0.35),
                interval(-0.05, -0.1, 0.01),
                "pseudo-MOS, no people's ratings",
            )
        ],
        measures=[
            page.Measure("KL", None, interval(12.5, 11.25, 13.75), "nats a clip"),
            page.Measure("Fréchet distance", 4.5, 123.456, "lower is better; not trained on"),
        ],
        interval_note="95 % bootstrap over 64 prompts.",
        curves=[curves.Curve("KL", "step", "nats a clip", {"KL": (np.arange(3), np.arange(3.0))})],
        training=[curves.Curve("Codec loss", "step", "loss", {"train": (np.arange(3), np.arange(3.0))})],
        pairs=[page.Pair("a slow waltz", clip(1, 0.02, 0.4), clip(2, 0.9, 0.65))],
        pairs_rule="The first held-out prompt.",
        regressions=[page.Pair("a fast reel", clip(3, 0.1, 0.75), clip(4, 0.1, 0.5))],
        regressions_rule="The prompt that lost most.",
        notes=["The music is simple."],
    )
    return dataclasses.replace(given, **changes)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return read(page.write_page(tmp_path_factory.mktemp("page") / "new" / "index.html", report()))


def test_everything_given_is_shown(written):
    words = written.words()
    for text in (
        *("tiny", "musicrl train_rl --gin.SEED=1", "12.3 s", "3 min 05 s", "3 min 17 s"),
        *("0.400", "0.350 to 0.450", "+0.200", "+0.125 to +0.275", "−0.050", "−0.100 to +0.010"),
        *("pseudo-MOS, no people's ratings", "12.50 11.25 to 13.75", "4.500", "123.5", "nats a clip"),
        *("95 % bootstrap over 64 prompts.", "The first held-out prompt.", "The prompt that lost most."),
        *("a slow waltz", "a fast reel", "+0.250", "−0.250", "KL", "Codec loss", "The music is simple."),
        "The reward rose: the interval of the gain excludes zero.",
    ):
        assert text in words, text


def test_nothing_is_loaded_from_elsewhere(written, tmp_path):
    for tag, attrs in written.elements:
        for name in ("src", "href", "srcset", "poster", "action", "data", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    text = page.write_page(tmp_path / "page.html", report()).read_text(encoding="utf-8")
    text = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert not written.all("link") and not written.all("iframe")
    policy = next(meta["content"] for meta in written.all("meta") if "http-equiv" in meta)
    script = "".join(data for tag, data in written.text if tag == "script")
    assert policy.startswith("default-src 'none';")
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_it_can_be_read_aloud(written):
    labels = [audio["aria-label"] for audio in written.all("audio")]
    assert labels == [
        "Base model, 1.0 seconds: a slow waltz",
        "Finetuned model, 1.0 seconds: a slow waltz",
        "Base model, 1.0 seconds: a fast reel",
        "Finetuned model, 1.0 seconds: a fast reel",
    ]
    assert all("controls" in audio for audio in written.all("audio"))
    assert len(written.all("svg")) == 6 and all(svg["role"] == "img" for svg in written.all("svg"))
    assert "Mel spectrogram, base model: a slow waltz" in [svg["aria-label"] for svg in written.all("svg")]
    assert {"lang": "en"} in written.all("html")


def test_hostile_words_are_inert(tmp_path, written):
    given = report()
    hostile = report(
        title=HOSTILE,
        facts={HOSTILE: HOSTILE},
        stages=[(HOSTILE, 1.0)],
        total=dataclasses.replace(given.total, name=HOSTILE, label=HOSTILE),
        measures=[page.Measure(HOSTILE, 1.0, 2.0, HOSTILE)],
        curves=[curves.Curve(HOSTILE, HOSTILE, HOSTILE, {HOSTILE: (np.arange(3), np.arange(3.0))})],
        pairs=[
            page.Pair(
                HOSTILE,
                dataclasses.replace(given.pairs[0].base, scores={HOSTILE: 1.0}),
                dataclasses.replace(given.pairs[0].finetuned, scores={HOSTILE: 2.0}),
            )
        ],
        pairs_rule=HOSTILE,
        notes=[HOSTILE],
    )
    reader = read(page.write_page(tmp_path / "page.html", hostile))
    assert len(reader.all("script")) == len(written.all("script")) == 1
    assert not reader.all("img") and not any("onerror" in attrs for _, attrs in reader.elements)
    assert reader.words().count(HOSTILE) >= 10  # shown as it is, braces too
    assert f"Base model, 1.0 seconds: {HOSTILE}" in [audio["aria-label"] for audio in reader.all("audio")]


def test_audio_is_the_level_matched_clip(written):
    given = report()
    heard = []
    for audio in written.all("audio"):
        kind, encoded = audio["src"].split(",")
        assert kind == "data:audio/flac;base64"
        heard.append(soundfile.read(io.BytesIO(base64.b64decode(encoded, validate=True)), dtype="float32"))
    for pair, sides in zip((*given.pairs, *given.regressions), (heard[:2], heard[2:]), strict=True):
        matched = loudness.level_match([pair.base.wav, pair.finetuned.wav], RATE)
        for (wav, rate), clip in zip(sides, matched, strict=True):
            assert rate == RATE and len(wav) == RATE  # 1.0 seconds, as the label promises
            np.testing.assert_allclose(wav, clip.wav, atol=1.0 / 32768)


def test_silent_and_very_short_clips_are_shown(tmp_path):
    heard = clip(1, 0.1, 0.5)
    silent = page.Pair("silence", dataclasses.replace(heard, wav=np.zeros(RATE, np.float32)), heard)
    short = page.Pair("short", clip(1, 0.1, 0.5, samples=30), clip(2, 0.2, 0.5, samples=800))
    words = read(page.write_page(tmp_path / "page.html", report(pairs=[silent, short], regressions=[]))).words()
    assert "Base silent" in words and "dBFS" in words
    assert "nan" not in words.lower() and "inf" not in words.lower()
    assert "None: the reward fell for no prompt." in words


def test_an_empty_report_is_still_a_page(tmp_path):
    bare = report(facts={}, stages=[], terms=[], measures=[], curves=[], training=[], pairs=[], regressions=[])
    reader = read(page.write_page(tmp_path / "page.html", bare))
    anchors = {a["href"][1:] for a in reader.all("a")}
    assert anchors <= {attrs.get("id") for attrs in reader.all("section")}


def test_a_page_is_replaced_and_repeats_byte_for_byte(tmp_path):
    path = tmp_path / "page.html"
    page.write_page(path, report(title="older"))
    first = page.write_page(path, report()).read_bytes()
    assert page.write_page(path, report()).read_bytes() == first and b"older" not in first


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.01, 0.2, "rose"), (-0.2, -0.01, "fell"), (-0.1, 0.1, "No gain"), (0.0, 0.2, "No gain")],
)
def test_the_verdict_follows_the_interval(low, high, word):
    assert word in page.verdict(page.Interval((low + high) / 2.0, low, high))


def test_gain_marks_by_hand():
    marks = page.gain_marks(page.Interval(0.5, 0.0, 1.0))
    assert marks["left"] == 50.0
    assert marks["width"] == pytest.approx(50.0 / 1.08) and marks["mean"] == pytest.approx(50.0 + 25.0 / 1.08)
    assert page.gain_marks(page.Interval(0.0, 0.0, 0.0)) == {"left": 50.0, "width": 0.0, "mean": 50.0}


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
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (3599.7, "1 h 00 min"), (7830, "2 h 10 min")],
)
def test_durations(seconds, text):
    assert page.duration(seconds) == text


def test_bad_input_is_named():
    good = clip(1, 0.1, 0.5)
    with pytest.raises(ValueError, match=r"wav has shape \(2, 4\)"):
        page.Clip(np.zeros((2, 4), np.float32), RATE, {})
    with pytest.raises(ValueError, match=r"wav has shape \(0,\)"):
        page.Clip(np.zeros(0, np.float32), RATE, {})
    with pytest.raises(ValueError, match="2 samples that are NaN or infinite"):
        page.Clip(np.array([0.0, np.nan, np.inf], np.float32), RATE, {})
    with pytest.raises(ValueError, match="sample_rate_hz = 0"):
        page.Clip(good.wav, 0, {})
    with pytest.raises(ValueError, match="'reel': base is at 16000 Hz and finetuned at 24000 Hz"):
        page.Pair("reel", good, dataclasses.replace(good, sample_rate_hz=24000))
    with pytest.raises(ValueError, match="'reel': base has scores"):
        page.Pair("reel", good, dataclasses.replace(good, scores={"total": 1.0}))
    for low, high in ((1.0, 0.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="interval low"):
            page.Interval(0.5, low, high)
