"""A whole run: its stages one after the other in one process, each of which leaves done work alone."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from musicrl_jax.core import hosts
from musicrl_jax.core.files import read_json, write_json

SECONDS = "seconds.json"
SUMMARY = "summary.json"
Stages = Mapping[str, Callable[[], Any]]


def run(model_dir: str, stages: Sequence[Stages], only: str = "", skip: str = "") -> None:
    """Runs the stages in order and writes `model_dir`/summary.json.

    Run again, finished stages return at once; after an interruption the one that was cut off goes on from its newest
    checkpoint. The summary is what the last stage returned, with the seconds spent in every stage over all attempts.

    Args:
      model_dir: the run's folder.
      stages: the name of each stage and the function that does it, in groups.
      only: names of stages, separated by commas; the others are left out, and no summary is written where the last
        stage is one of them.
      skip: names of stages to leave out, such as that of a model which was trained elsewhere.

    Raises:
      ValueError: where `only` or `skip` names no stage, none is left, or two have one name.
    """
    names = [name for group in stages for name in group]
    if len(set(names)) < len(names):
        raise ValueError(f"run.stages names a stage twice: {', '.join(names)}; keep each once")
    stages = dict(item for group in stages for item in group.items())
    wanted, unwanted = (set(filter(None, names.split(","))) for names in (only, skip))
    if unknown := sorted((wanted | unwanted) - set(stages)):
        raise ValueError(
            f"run: {unknown[0]!r} is none of the stages {', '.join(stages)}; mend only or skip"
        )
    chosen = [name for name in stages if name in (wanted or stages) and name not in unwanted]
    if not chosen:
        raise ValueError(
            f"run.only={only!r} and run.skip={skip!r} leave no stage: name fewer to skip"
        )
    directory = Path(model_dir)
    result: Any = None
    for number, name in enumerate(chosen, start=1):
        hosts.stop_point()
        print(f"\n[{number}/{len(chosen)}] {name}", flush=True)
        start = time.monotonic()
        try:
            result = stages[name]()
        finally:
            seconds = read_seconds(
                model_dir
            )  # anew: another process may do other stages of this run
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
            if hosts.first():
                write_json(directory / SECONDS, seconds)
    if hosts.first() and chosen[-1] == list(stages)[-1]:
        write_json(directory / SUMMARY, {**(result or {}), "seconds": read_seconds(model_dir)})


def read_seconds(model_dir: str) -> dict[str, float]:
    """Seconds spent so far in each stage of a run; {} before the first."""
    path = Path(model_dir) / SECONDS
    return read_json(path, {str: float}) if path.exists() else {}
