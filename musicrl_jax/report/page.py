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
            raise ValueError(
                f"interval low = {self.low} must not be above high = {self.high}, nor NaN"
            )


Figure = (
    Interval | str
)  # of too few prompts there is no figure, but words such as "n too small (3 < 8)"


@dataclasses.dataclass(frozen=True)
class Reward:
    """One row of the results: a reward term, or their total, on held-out prompts.

    Attributes:
        name: the term's name, as in `Clip.scores`.
        means: policy -> mean over prompts.
        gains: policy, all but the base -> its reward less the base's, paired by prompt and seed.
        label: in words, what it is and on which scale ("pseudo-MOS, not people's ratings").
    """

    name: str
    means: Mapping[str, Figure]
    gains: Mapping[str, Figure]
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure that stands beside the rewards: KL, diversity, a distance that nothing was trained on.

    Attributes:
        name: e.g. "KL to the base, nats a clip".
        values: policy -> its figure; a policy for which it has no meaning is left out.
        label: in words, how to read it, and which way is better.
    """

    name: str
    values: Mapping[str, Figure | float]
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Match:
    """Two policies side by side before the panel.

    Attributes:
        first, second: the policies.
        win, tie, loss: shares of the votes, from the first's side; they add up to 1.
        win_rate: win / (win + loss); where that is words, shares and p are None.
        p: of Wilcoxon's signed-rank test on the ratings.
    """

    first: str
    second: str
    win: float | None
    tie: float | None
    loss: float | None
    win_rate: Figure
    p: float | None

    def __post_init__(self) -> None:
        if isinstance(self.win_rate, str):
            return
        if (
            not abs(self.win + self.tie + self.loss - 1.0) < 1e-3
            or min(self.win, self.tie, self.loss) < 0
        ):
            raise ValueError(
                f"{self.first} against {self.second}: win = {self.win}, tie = {self.tie}, loss = {self.loss}: "
                "give shares, which add up to 1"
            )


@dataclasses.dataclass(frozen=True)
class Panel:
    """Simulated listeners and what they said. The page says "simulated listeners" wherever it shows any of it.

    Attributes:
        name: of the panel.
        listeners: how many there are.
        raters: how many of them judge a pair.
        agreement: how often two of them make the same choice, 0 to 1; None where no two of them chose, words where
            there were too few prompts.
        measurements: what they hear.
        matches: policies side by side.
        opinions: policy, or "real clips" -> mean rating, 1 to 5.
    """

    name: str
    listeners: int
    raters: int
    agreement: float | str | None
    measurements: Sequence[str]
    matches: Sequence[Match]
    opinions: Mapping[str, Figure]


@dataclasses.dataclass(frozen=True)
class Clip:
    """A generated clip.

    Attributes:
        wav: f32 [N], mono, in [-1, 1], finite, not empty.
        sample_rate_hz: of `wav`.
        scores: term -> reward of this clip; {} where it was not scored.
    """

    wav: np.ndarray
    sample_rate_hz: int
    scores: Mapping[str, float]

    def __post_init__(self) -> None:
        if np.ndim(self.wav) != 1 or np.size(self.wav) == 0:
            raise ValueError(f"wav has shape {np.shape(self.wav)}: give one channel, [N], N >= 1")
        if not np.all(np.isfinite(self.wav)):
            raise ValueError(
                f"wav has {np.sum(~np.isfinite(self.wav))} samples that are NaN or infinite"
            )
        if self.sample_rate_hz <= 0:
            raise ValueError(f"sample_rate_hz = {self.sample_rate_hz} must be positive")


@dataclasses.dataclass(frozen=True)
class Trial:
    """Clips of one prompt to hear side by side: one seed, one sample rate, the same terms where they are scored.

    Attributes:
        prompt: what was asked for.
        clips: side, a policy's name or another -> its clip, in order; changes of a score are from the first one's.
    """

    prompt: str
    clips: Mapping[str, Clip]

    def __post_init__(self) -> None:
        if len(self.clips) < 2:
            raise ValueError(
                f"prompt {self.prompt!r}: clips has {len(self.clips)} sides: give two or more"
            )
        rates = {name: clip.sample_rate_hz for name, clip in self.clips.items()}
        if len(set(rates.values())) > 1:
            raise ValueError(f"prompt {self.prompt!r}: sample rates differ, {rates} Hz: resample")
        terms = {name: sorted(clip.scores) for name, clip in self.clips.items() if clip.scores}
        if len({tuple(names) for names in terms.values()}) > 1:
            raise ValueError(
                f"prompt {self.prompt!r}: scores differ, {terms}: score all clips with the same terms"
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """An RL run.

    Attributes:
        policy: what came out of it.
        curves: of its metrics.
        alarm: in words, whether its reward was over-optimised.
    """

    policy: str
    curves: Sequence[Curve]
    alarm: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """All that stands on a page.

    Attributes:
        title: the run's name.
        facts: what was run, in order: command, date, versions, sizes.
        policies: two or more, the base first. Their order gives them their colours.
        panel: what simulated listeners said, where they were asked.
        rewards: the trained reward, then the terms it is made of.
        interval_note: how the intervals were made, e.g. "95 % bootstrap over 64 prompts, 4 clips each".
        measures: KL, diversity and what was not trained on.
        kl: where in a clip the KL arises; the series are all policies but the base, in order.
        trials: clips to hear, chosen by `trials_rule`.
        trials_rule: the rule by which they were chosen, in words; it must not be by ear.
        regressions: trials whose reward fell the most, worst first.
        regressions_rule: the same for these.
        runs: the RL runs.
        runs_rule: which of a run's checkpoints was kept, and why, in words.
        training: one or more curves of every supervised stage.
        stages: (stage, seconds), in order.
        identity: hashes of the models, and seeds.
        notes: paragraphs at the end: limits, honest words.
    """

    title: str
    facts: Mapping[str, str]
    policies: Sequence[str]
    panel: Panel | None
    rewards: Sequence[Reward]
    interval_note: str
    measures: Sequence[Measure]
    kl: Sequence[Curve]
    trials: Sequence[Trial]
    trials_rule: str
    regressions: Sequence[Trial]
    regressions_rule: str
    runs: Sequence[Run]
    runs_rule: str
    training: Sequence[Curve]
    stages: Sequence[tuple[str, float]]
    identity: Mapping[str, str]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if len(set(self.policies)) < max(2, len(self.policies)):
            raise ValueError(
                f"policies = {list(self.policies)}: give two or more, each once, the base first"
            )
        if not self.rewards:
            raise ValueError("rewards is empty: give the trained reward, then its terms")
        for reward in self.rewards:
            if set(reward.means) != set(self.policies) or set(reward.gains) != set(
                self.policies[1:]
            ):
                raise ValueError(
                    f"reward {reward.name!r} has means of {list(reward.means)} and gains of {list(reward.gains)}: "
                    f"give the means of {list(self.policies)} and the gains of all but the first"
                )


def write_page(path: str | pathlib.Path, report: Report) -> pathlib.Path:
    """Write the report as one self-contained HTML file at `path` and return that path.

    Folders are made as needed and an older page is replaced. The clips of a trial are brought to one loudness
    (`loudness.level_match`) and embedded as 16-bit FLAC: 24 clips of 4 s at 16 kHz make a page of about 4 MB.
    All text is escaped: a prompt may hold anything.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        function.__name__: function
        for function in (number, signed, percent, probability, duration, side_of, listed)
    }
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    base, *others = report.policies
    edges = edges_over_base(report)
    html = environment.get_template("page.html.j2").render(
        report=report,
        base=base,
        others=others,
        colours={base: "base"}
        | {policy: f"series-{i % len(plots.SERIES)}" for i, policy in enumerate(others)},
        series=len(plots.SERIES),
        edges=edges,
        verdict=verdict(base, edges, report.panel is not None),
        rewards=[(reward, gain_marks(reward.gains)) for reward in report.rewards],
        slowest=max([seconds for _, seconds in report.stages], default=0.0),
        whole=sum(seconds for _, seconds in report.stages),
        trials=[_hearable(trial) for trial in report.trials],
        regressions=[_hearable(trial) for trial in report.regressions],
        kl=_drawn(report.kl),
        runs=[(run, _drawn(run.curves)) for run in report.runs],
        training=_drawn(report.training),
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


def percent(share: float) -> str:
    """A share as "62.5 %"."""
    return f"{100.0 * share:.1f} %"


def probability(p: float) -> str:
    """A p-value: three decimals, "< 0.001" below them."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """Seconds as "8.2 s", "3 min 05 s" or "2 h 10 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def listed(names: Sequence[str]) -> str:
    """Names as "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def side_of(interval: Figure, middle: float = 0.0) -> str:
    """On which side of `middle` an interval lies: "up", "down", or "" where it holds it, and for words."""
    if isinstance(interval, str):
        return ""
    return "up" if interval.low > middle else "down" if interval.high < middle else ""


def edges_over_base(report: Report) -> dict[str, Figure]:
    """What the verdict is of: policy -> win rate against the base where a panel was asked, else gain in reward."""
    if report.panel is None:
        return dict(report.rewards[0].gains)
    base, edges = report.policies[0], {}
    for match in report.panel.matches:
        rate = match.win_rate
        if match.second == base:
            edges[match.first] = rate
        elif match.first == base:
            other = (
                rate
                if isinstance(rate, str)
                else Interval(1.0 - rate.mean, 1.0 - rate.high, 1.0 - rate.low)
            )
            edges[match.second] = other
    return edges


def verdict(base: str, edges: Mapping[str, Figure], heard: bool) -> str:
    """What the intervals show, in one sentence: of win rates against the base if `heard`, else of gains over it."""
    if not edges:
        return f"No policy stood against {base}."
    sides: dict[str, list[str]] = {"up": [], "down": [], "": []}
    if few := [
        policy for policy, edge in edges.items() if isinstance(edge, str)
    ]:  # all have the same prompts
        return f"Too few prompts to compare {listed(few)} with {base}: {edges[few[0]]}."
    for policy, edge in edges.items():
        sides[side_of(edge, 0.5 if heard else 0.0)].append(policy)
    if heard:
        opening = "By the interval of the win rate, simulated listeners"
        words = {
            "up": ("prefer", f" to {base}"),
            "down": (f"prefer {base} to", ""),
            "": ("show no preference either way for", ""),
        }
    else:
        opening = f"By the interval of the gain over {base}, the reward"
        words = {"up": ("rose for", ""), "down": ("fell for", ""), "": ("shows no gain for", "")}
    clauses = [
        f"{words[side][0]} {listed(names)}{words[side][1]}"
        for side, names in sides.items()
        if names
    ]
    return f"{opening} {', and '.join(clauses)}."


def gain_marks(gains: Mapping[str, Figure]) -> dict[str, dict[str, float]]:
    """Where to draw intervals on strips of one scale with zero in their middle, in percent: left, width and mean.
    Words are not drawn.
    """
    ends = {
        policy: dataclasses.asdict(gain)
        for policy, gain in gains.items()
        if not isinstance(gain, str)
    }
    reach = (
        1.08 * max((abs(end) for gain in ends.values() for end in gain.values()), default=0.0)
        or 1.0
    )
    places = {
        policy: {end: 50.0 + 50.0 * x / reach for end, x in gain.items()}
        for policy, gain in ends.items()
    }
    return {
        policy: {"left": place["low"], "width": place["high"] - place["low"], "mean": place["mean"]}
        for policy, place in places.items()
    }


def _drawn(curves: Sequence[Curve]) -> list[tuple[Curve, Markup]]:
    """Each curve with its drawing."""
    return [(curve, Markup(plots.curve_svg(curve))) for curve in curves]


def _hearable(trial: Trial) -> dict[str, object]:
    """What the template shows of a trial: its clips levelled, encoded and drawn, each above its scores."""
    names, clips = list(trial.clips), list(trial.clips.values())
    rate, first = clips[0].sample_rate_hz, clips[0].scores
    levelled = loudness.level_match([clip.wav for clip in clips], rate)
    drawings = plots.spectrogram_svgs(
        [level.wav for level in levelled],
        rate,
        [f"Mel spectrogram, {name}: {trial.prompt}" for name in names],
    )
    sides = [
        {
            "name": name,
            "seconds": len(level.wav) / rate,
            "silent": level.silent,
            "loudness": level.loudness,
            "unit": level.unit,
            "gain_db": level.gain_db,
            "audio": base64.b64encode(loudness.flac(level.wav, rate)).decode(),
            "drawing": Markup(drawing),
            "scores": clip.scores,
            "changes": {
                term: score - first[term]
                for term, score in clip.scores.items()
                if first and clip is not clips[0]
            },
        }
        for name, clip, level, drawing in zip(names, clips, levelled, drawings, strict=True)
    ]
    return {"prompt": trial.prompt, "sides": sides}
