"""The listening page: one HTML file with what was run, what it gained and what it sounds like.

It does no statistics and runs no models: it gets numbers and arrays. The file carries everything inside
(styles, audio, drawings), asks no network for anything and forbids itself to. Letters: N samples.
"""

import base64
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence

import jinja2
import numpy as np
from markupsafe import Markup

from musicrl_jax.report import loudness, plots
from musicrl_jax.report.curves import Curve

# One clip at a time: starting one pauses the others. The page's policy allows this script alone, by its hash.
SCRIPT = """
document.addEventListener("play", function (event) {
  document.querySelectorAll("audio").forEach(function (other) {
    if (other !== event.target) { other.pause(); }
  });
}, true);
"""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with the ends of its interval, all in one unit."""

    mean: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:  # NaN lands here too
            raise ValueError(f"interval low = {self.low} must not be above high = {self.high}, nor NaN")


@dataclasses.dataclass(frozen=True)
class Reward:
    """One row of the results: a reward term, or their total, on held-out prompts.

    Attributes:
        name: the term's name, as in `Clip.scores`.
        base: mean over prompts for the base model.
        finetuned: the same for the finetuned model.
        gain: finetuned - base, paired by prompt and seed.
        label: in words, what it is and on which scale ("pseudo-MOS, not people's ratings").
    """

    name: str
    base: Interval
    finetuned: Interval
    gain: Interval
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure that stands beside the rewards: KL, diversity, a distance that nothing was trained on.

    Attributes:
        name: e.g. "KL from the base model, nats a clip".
        base: for the base model; None where it has no meaning.
        finetuned: for the finetuned model.
        label: in words, how to read it, and which way is better.
    """

    name: str
    base: Interval | float | None
    finetuned: Interval | float | None
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A generated clip.

    Attributes:
        wav: f32 [N], mono, in [-1, 1], finite, not empty.
        sample_rate_hz: of `wav`.
        scores: term -> reward of this clip; the total among them.
    """

    wav: np.ndarray
    sample_rate_hz: int
    scores: Mapping[str, float]

    def __post_init__(self) -> None:
        if np.ndim(self.wav) != 1 or np.size(self.wav) == 0:
            raise ValueError(f"wav has shape {np.shape(self.wav)}: give one channel, [N], N >= 1")
        if not np.all(np.isfinite(self.wav)):
            raise ValueError(f"wav has {np.sum(~np.isfinite(self.wav))} samples that are NaN or infinite")
        if self.sample_rate_hz <= 0:
            raise ValueError(f"sample_rate_hz = {self.sample_rate_hz} must be positive")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both models' clips for one prompt: one seed, one sample rate, the same terms scored."""

    prompt: str
    base: Clip
    finetuned: Clip

    def __post_init__(self) -> None:
        if self.base.sample_rate_hz != self.finetuned.sample_rate_hz:
            raise ValueError(
                f"prompt {self.prompt!r}: base is at {self.base.sample_rate_hz} Hz and finetuned at "
                f"{self.finetuned.sample_rate_hz} Hz: resample one"
            )
        if set(self.base.scores) != set(self.finetuned.scores):
            raise ValueError(
                f"prompt {self.prompt!r}: base has scores {sorted(self.base.scores)} and finetuned "
                f"{sorted(self.finetuned.scores)}: score both clips with the same terms"
            )


@dataclasses.dataclass(frozen=True)
class Report:
    """All that stands on a page.

    Attributes:
        title: the run's name.
        facts: what was run, in order: command, date, versions, seeds, hashes, sizes.
        stages: (stage, seconds), in order.
        total: the trained reward.
        terms: what it is made of.
        measures: KL, diversity and what was not trained on.
        interval_note: how the intervals were made, e.g. "95 % bootstrap over 64 prompts, 4 clips each".
        curves: of the RL run: reward terms, KL, value loss.
        training: one or more of every supervised stage.
        pairs: clips to hear, chosen by `pairs_rule`.
        pairs_rule: the rule by which they were chosen, in words; it must not be by ear.
        regressions: pairs whose reward fell the most, worst first.
        regressions_rule: the same for these.
        notes: paragraphs at the end: limits, honest words.
    """

    title: str
    facts: Mapping[str, str]
    stages: Sequence[tuple[str, float]]
    total: Reward
    terms: Sequence[Reward]
    measures: Sequence[Measure]
    interval_note: str
    curves: Sequence[Curve]
    training: Sequence[Curve]
    pairs: Sequence[Pair]
    pairs_rule: str
    regressions: Sequence[Pair]
    regressions_rule: str
    notes: Sequence[str] = ()


def write_page(path: str | pathlib.Path, report: Report) -> pathlib.Path:
    """Write the report as one self-contained HTML file at `path` and return that path.

    Folders are made as needed and an older page is replaced. The two clips of a pair are brought to one
    loudness (`loudness.level_match`) and embedded as 16-bit FLAC: 24 clips of 4 s at 16 kHz make a page of
    about 4 MB. All text is escaped: a prompt may hold anything.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "duration": duration}
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    html = environment.get_template("page.html.j2").render(
        report=report,
        verdict=verdict(report.total.gain),
        rows=[(reward, gain_marks(reward.gain)) for reward in (report.total, *report.terms)],
        slowest=max([seconds for _, seconds in report.stages], default=0.0),
        whole=sum(seconds for _, seconds in report.stages),
        pairs=[_hearable(pair) for pair in report.pairs],
        regressions=[_hearable(pair) for pair in report.regressions],
        curves=[(curve, Markup(plots.curve_svg(curve))) for curve in report.curves],
        training=[(curve, Markup(plots.curve_svg(curve))) for curve in report.training],
        colour_bar=plots.colour_bar_css(),
        range_db=plots.RANGE_DB,
        smoothed_from=plots.SMOOTHED_FROM,
        target_lufs=loudness.TARGET_LUFS,
        script=Markup(SCRIPT),
        script_hash=script_hash,
    )
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def number(value: float) -> str:
    """A figure for a table: three decimals under 10, fewer above, a true minus sign; "–" for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    decimals = 3 if abs(value) < 9.9995 else 2 if abs(value) < 99.995 else 1
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("-")


def signed(value: float) -> str:
    """As `number`, with a plus sign on what is above zero."""
    text = number(value)
    return "+" + text if any(digit in "123456789" for digit in text) and value > 0 else text


def duration(seconds: float) -> str:
    """Seconds as "8.2 s", "3 min 05 s" or "2 h 10 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def verdict(gain: Interval) -> str:
    """What an interval of the gain in the trained reward shows, in one sentence."""
    if gain.low > 0.0:
        return "The reward rose: the interval of the gain excludes zero."
    if gain.high < 0.0:
        return "The reward fell: the interval of the gain lies below zero."
    return "No gain is shown: its interval includes zero."


def gain_marks(gain: Interval) -> dict[str, float]:
    """Where to draw an interval on a strip with zero in its middle, in percent: left, width and mean."""
    reach = 1.08 * max(abs(gain.low), abs(gain.high), abs(gain.mean)) or 1.0
    place = {end: 50.0 + 50.0 * value / reach for end, value in dataclasses.asdict(gain).items()}
    return {"left": place["low"], "width": place["high"] - place["low"], "mean": place["mean"]}


def _hearable(pair: Pair) -> dict[str, object]:
    """What the template shows of a pair: both clips levelled, encoded and drawn; scores side by side."""
    rate = pair.base.sample_rate_hz
    names = ("Base", "Finetuned")
    levelled = loudness.level_match([pair.base.wav, pair.finetuned.wav], rate)
    drawings = plots.spectrogram_svgs(
        (levelled[0].wav, levelled[1].wav),
        rate,
        (f"Mel spectrogram, base model: {pair.prompt}", f"Mel spectrogram, finetuned model: {pair.prompt}"),
    )
    sides = [
        {
            "name": name,
            "seconds": len(clip.wav) / rate,
            "silent": clip.silent,
            "loudness": clip.loudness,
            "unit": clip.unit,
            "gain_db": clip.gain_db,
            "audio": base64.b64encode(loudness.flac(clip.wav, rate)).decode(),
            "drawing": Markup(drawing),
        }
        for name, clip, drawing in zip(names, levelled, drawings, strict=True)
    ]
    scores = [
        (term, base, pair.finetuned.scores[term], pair.finetuned.scores[term] - base)
        for term, base in pair.base.scores.items()
    ]
    return {"prompt": pair.prompt, "sides": sides, "scores": scores}
