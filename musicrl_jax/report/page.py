"""The listening page: one HTML file with a run's settings, results and clips.

It gets numbers and arrays, and computes no statistics. The file contains all styles, audio and
drawings, loads nothing from a network and forbids itself to.

Legend: N samples.
"""

import base64
import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from musicrl_jax.core.files import write_text
from musicrl_jax.report import loudness, plots
from musicrl_jax.report.curves import Curve

# A clip that starts pauses all others. The page's security policy allows only this script, by hash.
SCRIPT = """
document.addEventListener("play", function (event) {
  document.querySelectorAll("audio").forEach(function (other) {
    if (other !== event.target) { other.pause(); }
  });
}, true);
"""

# --- Content of a page ---


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval, all in one unit."""

    mean: float
    low: float
    high: float

    def __post_init__(self) -> None:
        # Written so that NaN is refused too.
        if not self.low <= self.high:
            raise ValueError(
                f"interval low = {self.low} must not be above high = {self.high}, nor NaN"
            )


# With too few prompts there is no interval, but words such as "n too small (3 < 8)".
Figure = Interval | str


@dataclasses.dataclass(frozen=True)
class Reward:
    """One row of the results: a reward term, or their total, on held-out prompts.

    Attributes:
      name: the term's name, as in `Clip.scores`.
      means: policy -> mean over prompts.
      gains: policy, all but the base -> its reward minus the base's, paired by prompt and seed.
      label: what it is and on which scale ("pseudo-MOS, not people's ratings").
    """

    name: str
    means: Mapping[str, Figure]
    gains: Mapping[str, Figure]
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure beside the rewards: KL, diversity, a distance that is not trained on.

    Attributes:
      name: e.g. "KL to the base, nats a clip".
      values: policy -> its figure; policies for which it has no meaning are left out.
      label: how to read it, and which direction is better.
    """

    name: str
    values: Mapping[str, Figure | float]
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Match:
    """A comparison of two policies by the panel.

    Attributes:
      first: a policy.
      second: another policy.
      win: share of the votes for the first.
      tie: share of the ties.
      loss: share of the votes for the second; the three add up to 1.
      win_rate: win / (win + loss); if it is words, the shares and p are None.
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
        shares = (self.win, self.tie, self.loss)
        if not abs(sum(shares) - 1.0) < 1e-3 or min(shares) < 0:
            raise ValueError(
                f"{self.first} against {self.second}: win = {self.win}, tie = {self.tie}, "
                f"loss = {self.loss}: give shares, which add up to 1"
            )


@dataclasses.dataclass(frozen=True)
class Panel:
    """Simulated listeners and their votes. The page says "simulated listeners" beside all of it.

    Attributes:
      name: of the panel.
      listeners: their number.
      raters: how many of them judge a pair.
      agreement: how often two of them make the same choice, 0 to 1. None if no two of them chose,
        words with too few prompts.
      measurements: what they measure.
      matches: comparisons of two policies.
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
      scores: term -> reward of this clip; {} for a clip without scores.
    """

    wav: np.ndarray
    sample_rate_hz: int
    scores: Mapping[str, float]

    def __post_init__(self) -> None:
        if np.ndim(self.wav) != 1 or np.size(self.wav) == 0:
            raise ValueError(f"wav has shape {np.shape(self.wav)}: give one channel, [N], N >= 1")
        if wrong := np.sum(~np.isfinite(self.wav)):
            raise ValueError(f"wav has {wrong} samples that are NaN or infinite: give finite ones")
        if self.sample_rate_hz <= 0:
            raise ValueError(f"sample_rate_hz = {self.sample_rate_hz} must be positive")


@dataclasses.dataclass(frozen=True)
class Trial:
    """Clips of one prompt side by side: one seed, one sample rate, the same score terms.

    Attributes:
      prompt: of the clips.
      clips: side, a policy's name or another -> its clip. Changes of a score are from the first.
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
        if len(set(map(tuple, terms.values()))) > 1:
            raise ValueError(
                f"prompt {self.prompt!r}: scores differ, {terms}: score all clips with the same "
                "terms"
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """An RL run.

    Attributes:
      policy: its result.
      curves: of its metrics.
      alarm: whether its reward was over-optimised, in words.
    """

    policy: str
    curves: Sequence[Curve]
    alarm: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The content of a page.

    Attributes:
      title: the run's name.
      facts: command, date, versions, sizes, in order.
      policies: two or more, the base first. Their order gives them their colours.
      panel: votes of simulated listeners, if there are any.
      rewards: the trained reward, then its terms.
      interval_note: method of the intervals, e.g. "95 % bootstrap over 64 prompts, 4 clips each".
      measures: KL, diversity and others that are not trained on.
      kl: where in a clip the KL arises; the series are all policies but the base, in order.
      trials: clips, chosen by `trials_rule`.
      trials_rule: the rule of the choice, in words; it must not be by ear.
      regressions: trials with the largest loss of reward, worst first.
      regressions_rule: the rule of their choice.
      runs: the RL runs.
      runs_rule: which checkpoint of a run is its result, and why, in words.
      training: one or more curves of every supervised stage.
      stages: (stage, seconds), in order.
      identity: hashes of the models, and seeds.
      notes: paragraphs at the end, such as limits of the results.
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
        policies, others = set(self.policies), set(self.policies[1:])
        for reward in self.rewards:
            if set(reward.means) != policies or set(reward.gains) != others:
                raise ValueError(
                    f"reward {reward.name!r} has means of {list(reward.means)} and gains of "
                    f"{list(reward.gains)}: give the means of {list(self.policies)} and the gains "
                    "of all but the first"
                )


@dataclasses.dataclass(frozen=True)
class Live:
    """Content of the page of a run that is still going on.

    Attributes:
      title: name of the run.
      facts: name -> value, such as the step.
      curves: of the metrics so far.
      trials: clips of fixed prompts.
      rule: says in a sentence what the clips are.
    """

    title: str
    facts: Mapping[str, str]
    curves: Sequence[Curve]
    trials: Sequence[Trial]
    rule: str


# --- Writing ---


def write_page(path: str | pathlib.Path, report: Report) -> pathlib.Path:
    """Writes the report as one self-contained HTML file and returns its path.

    Missing folders are made and an older page is replaced. The clips of a trial get one loudness
    (`loudness.level_match`) and are embedded as 16-bit FLAC: 24 clips of 4 s at 16 kHz make a page
    of about 4 MB. All text is escaped, since a prompt may hold anything.
    """
    base, *others = report.policies
    colours = {policy: f"series-{i % len(plots.SERIES)}" for i, policy in enumerate(others)}
    seconds = [each for _, each in report.stages]
    return _write(
        path,
        "page.html.j2",
        report=report,
        base=base,
        others=others,
        colours={base: "base", **colours},
        edges=edges_over_base(report),
        verdict=verdict(report),
        rewards=[(reward, gain_marks(reward.gains)) for reward in report.rewards],
        slowest=max(seconds, default=0.0),
        whole=sum(seconds),
        trials=[_playable(trial) for trial in report.trials],
        regressions=[_playable(trial) for trial in report.regressions],
        kl=_with_drawings(report.kl),
        runs=[(run, _with_drawings(run.curves)) for run in report.runs],
        training=_with_drawings(report.training),
        target_lufs=loudness.TARGET_LUFS,
    )


def write_live_page(path: str | pathlib.Path, live: Live) -> pathlib.Path:
    """Writes the page of a run that is still going on, and returns its path."""
    sides = [name for trial in live.trials for name in trial.clips]
    base, *others = dict.fromkeys(sides) or [""]
    colours = {name: f"series-{i % len(plots.SERIES)}" for i, name in enumerate(others)}
    return _write(
        path,
        "live.html.j2",
        live=live,
        colours={base: "base", **colours},
        curves=_with_drawings(live.curves),
        trials=[_playable(trial) for trial in live.trials],
    )


def _write(path: str | pathlib.Path, template: str, **variables: Any) -> pathlib.Path:
    """Writes a template with its variables as one file, and returns its path."""
    # The template and its functions. StrictUndefined makes a misspelt name an error.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (number, signed, percent, probability, duration, side_of, listed)
    environment.globals |= {function.__name__: function for function in functions}

    # The variables of all pages.
    html = environment.get_template(template).render(
        series=len(plots.SERIES),
        colour_bar=plots.colour_bar_css(),
        range_db=plots.RANGE_DB,
        smoothed_from=plots.SMOOTHED_FROM,
        script=Markup(SCRIPT),
        script_hash=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
        **variables,
    )
    # A reader of the page sees the old one or the new one.
    write_text(path, html)
    return pathlib.Path(path)


def _with_drawings(curves: Sequence[Curve]) -> list[tuple[Curve, Markup]]:
    return [(curve, Markup(plots.curve_svg(curve))) for curve in curves]


def _playable(trial: Trial) -> dict[str, object]:
    """Returns a trial for the template: its clips levelled, encoded and drawn, with scores."""
    clips = list(trial.clips.values())
    rate, first = clips[0].sample_rate_hz, clips[0]
    # Sound and drawing are of the levelled clips.
    levels = loudness.level_match([clip.wav for clip in clips], rate)
    labels = [f"Mel spectrogram, {name}: {trial.prompt}" for name in trial.clips]
    drawings = plots.spectrogram_svgs([level.wav for level in levels], rate, labels)
    sides = []
    for (name, clip), level, drawing in zip(trial.clips.items(), levels, drawings, strict=True):
        # Changes need scores of the first clip and do not apply to it.
        has_changes = clip is not first and first.scores
        changes = {term: clip.scores[term] - first.scores[term] for term in clip.scores}
        side = {
            "name": name,
            "level": level,
            "seconds": len(level.wav) / rate,
            "audio": base64.b64encode(loudness.flac(level.wav, rate)).decode(),
            "drawing": Markup(drawing),
            "scores": clip.scores,
            "changes": changes if has_changes else {},
        }
        sides.append(side)
    return {"prompt": trial.prompt, "sides": sides}


# --- Text and figures ---


def number(value: float | None) -> str:
    """Returns a figure with three decimals under 10, fewer above; "−" is minus, "–" is None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    # The limits are those at which rounding would add a digit.
    decimals = 3 if abs(value) < 9.9995 else 2 if abs(value) < 99.995 else 1
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("-")


def signed(value: float) -> str:
    """Returns `number` with a plus sign for values above zero."""
    text = number(value)
    return "+" + text if any(digit in "123456789" for digit in text) and value > 0 else text


def percent(share: float) -> str:
    """Returns a share as "62.5 %"."""
    return f"{100.0 * share:.1f} %"


def probability(p: float) -> str:
    """Returns a p-value with three decimals, or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    """Returns seconds as "8.2 s", "3 min 05 s" or "2 h 10 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def listed(names: Sequence[str]) -> str:
    """Returns names as "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def side_of(figure: Figure, middle: float = 0.0) -> str:
    """Returns "up" or "down" for an interval above or below `middle`, else ""."""
    if isinstance(figure, str):
        return ""
    return "up" if figure.low > middle else "down" if figure.high < middle else ""


def edges_over_base(report: Report) -> dict[str, Figure]:
    """Returns policy -> win rate against the base, or gain in reward without a panel."""
    if report.panel is None:
        return dict(report.rewards[0].gains)
    base, edges = report.policies[0], {}
    for match in report.panel.matches:
        rate = match.win_rate
        if match.second == base:
            edges[match.first] = rate
        elif match.first == base:
            # The pair is the other way round: so is the rate.
            if isinstance(rate, Interval):
                rate = Interval(1.0 - rate.mean, 1.0 - rate.high, 1.0 - rate.low)
            edges[match.second] = rate
    return edges


def verdict(report: Report) -> str:
    """Returns one sentence with the comparison's figures and what they show and do not show."""
    base, edges = report.policies[0], edges_over_base(report)
    if not edges:
        return f"No policy was compared with {base}, so nothing is shown."
    # All policies have the same prompts, so either all figures are words or none is.
    if few := [policy for policy, edge in edges.items() if isinstance(edge, str)]:
        reason = edges[few[0]]
        return f"Too few prompts to compare {listed(few)} with {base} ({reason}): nothing is shown."

    # The kind of figure.
    if report.panel is not None:
        opening = f"By the votes of simulated listeners, the win rate against {base} is"
        middle, middle_name, shown = 0.5, "one half", percent
        conclusions = {
            "up": f"these listeners prefer {{}} to {base}",
            "down": f"these listeners prefer {base} to {{}}",
            "": "no preference for or against {} is shown",
        }
        limit = "this does not show what people would prefer"
    else:
        opening = f"On held-out prompts, the gain in {report.rewards[0].name} over {base} is"
        middle, middle_name, shown = 0.0, "zero", signed
        conclusions = {
            "up": "the reward rose for {}",
            "down": "the reward fell for {}",
            "": "no change is shown for {}",
        }
        limit = "this does not show what listeners would prefer"

    # The figures, then the conclusions.
    sides: dict[str, list[str]] = {side: [] for side in conclusions}
    figures = []
    for policy, edge in edges.items():
        side = side_of(edge, middle)
        sides[side].append(policy)
        verb = "excludes" if side else "includes"
        interval = f"95 % interval {shown(edge.low)} to {shown(edge.high)}"
        figures.append(f"{shown(edge.mean)} for {policy} ({interval}, which {verb} {middle_name})")
    clauses = []
    for side, policies in sides.items():
        if policies:
            clauses.append(conclusions[side].replace("{}", listed(policies)))
    return f"{opening} {listed(figures)}, so {listed(clauses)}; {limit}."


def gain_marks(gains: Mapping[str, Figure]) -> dict[str, dict[str, float]]:
    """Returns where to draw intervals on strips of one scale with zero in the middle, in percent.

    A mark is {'left', 'width', 'mean'}. Words have none.
    """
    ends = {}
    for policy, gain in gains.items():
        if isinstance(gain, Interval):
            ends[policy] = np.array([gain.low, gain.mean, gain.high])
    # All strips have one scale, with a margin of 8 %.
    reach = 1.08 * max((np.max(np.abs(each)) for each in ends.values()), default=0.0) or 1.0
    marks = {}
    for policy, each in ends.items():
        low, mean, high = (50.0 + 50.0 * each / reach).tolist()
        marks[policy] = {"left": low, "width": high - low, "mean": mean}
    return marks
