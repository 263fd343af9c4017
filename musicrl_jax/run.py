"""Runs the stages of an experiment one after the other, in one process."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from musicrl_jax.core import hosts
from musicrl_jax.core.files import read_json, write_json

SECONDS = "seconds.json"
SUMMARY = "summary.json"
Stages = Mapping[str, Callable[[], Any]]


def run(
    model_dir: str,
    stages: Sequence[Stages],
    only: str = "",
    skip: str = "",
    minutes: Mapping[str, float] | None = None,
) -> None:
    """Runs the stages in order, and writes `model_dir`/summary.json after the last one.

    A second run skips finished stages, and an interrupted stage goes on from its newest checkpoint.
    The summary has the result of the last stage, and the seconds of each stage over all attempts.

    Args:
      model_dir: folder of the run.
      stages: functions by the name of their stage, in groups.
      only: names of the stages to run, separated by commas; by default all.
      skip: names of stages to leave out, separated by commas.
      minutes: minutes that stages take on two CPU cores, by name; printed before each stage.

    Raises:
      ValueError: if `only` or `skip` has an unknown name, or no stage is left to run, or two stages
        have one name.
    """
    # Choose the stages.
    names = [name for group in stages for name in group]
    if len(set(names)) < len(names):
        raise ValueError(f"run.stages names a stage twice: {', '.join(names)}; keep each once")
    functions = {name: function for group in stages for name, function in group.items()}
    included, excluded = (set(filter(None, text.split(","))) for text in (only, skip))
    if unknown := sorted((included | excluded) - set(names)):
        raise ValueError(
            f"run: {unknown[0]!r} is none of the stages {', '.join(names)}; mend only or skip"
        )
    chosen = [name for name in names if name in (included or names) and name not in excluded]
    if not chosen:
        raise ValueError(
            f"run.only={only!r} and run.skip={skip!r} leave no stage: name fewer to skip"
        )

    # Run them.
    directory, result = Path(model_dir), None
    for number, name in enumerate(chosen, start=1):
        hosts.stop_point()
        print(f"\n[{number}/{len(chosen)}] {name}{_expected(name, chosen, minutes)}", flush=True)
        start = time.monotonic()
        try:
            result = functions[name]()
        finally:
            # Another process may run other stages and write this file meanwhile: read it again.
            seconds = read_seconds(model_dir)
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
            if hosts.first():
                write_json(directory / SECONDS, seconds)
    if hosts.first() and chosen[-1] == names[-1]:
        write_json(directory / SUMMARY, {**(result or {}), "seconds": read_seconds(model_dir)})


def _expected(name: str, chosen: Sequence[str], minutes: Mapping[str, float] | None) -> str:
    """Returns words on how long a stage takes; '' if that is not known."""
    if not minutes or name not in minutes:
        return ""
    whole = sum(minutes.get(each, 0.0) for each in chosen)
    own = "under a minute" if minutes[name] < 1 else f"about {minutes[name]:.0f}"
    of_all = f" of about {whole:.0f} minutes" if whole >= 1 else ""
    return f": {own}{of_all} on two CPU cores"


def read_seconds(model_dir: str) -> dict[str, float]:
    """Reads the seconds spent so far in each stage of a run; {} before the first."""
    path = Path(model_dir) / SECONDS
    return read_json(path, {str: float}) if path.exists() else {}
