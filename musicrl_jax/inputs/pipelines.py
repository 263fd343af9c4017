"""Apache Beam for builders of data sets: options of a pipeline, and a map over many items.

Beam is an extra of its own. A builder runs without it in one process group on one machine.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from musicrl_jax.core import extras

if TYPE_CHECKING:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
    from etils import epath

    from musicrl_jax.inputs.libraries import tensorflow_datasets as tfds

# FnApiRunner is what DirectRunner chooses for a batch, but DirectRunner first tries to download
# another runner, which ignores the number of processes. 0 is one process for each core.
LOCAL = (
    "--runner=FnApiRunner",
    "--direct_running_mode=multi_processing",
    "--direct_num_workers=0",
)


def is_installed() -> bool:
    """Returns whether Beam is installed."""
    return importlib.util.find_spec("apache_beam") is not None


def options(flags: str = "") -> "PipelineOptions":
    """Returns options of a pipeline on this machine, with changes.

    Args:
      flags: Beam's options without dashes, as `tfds build --beam_pipeline_options` takes them:
        "direct_num_workers=4", or "runner=FlinkRunner,flink_master=localhost:8081".

    Raises:
      ModuleNotFoundError: if Beam is not installed.
      ValueError: for a runner on which no build works.
    """
    extras.check("beam_pipeline_options", "beam", "apache_beam")
    from apache_beam.options.pipeline_options import PipelineOptions

    changes = [f"--{flag.strip().removeprefix('--')}" for flag in flags.split(",") if flag.strip()]
    return checked(PipelineOptions([*LOCAL, *changes]))


def checked(pipeline_options: "PipelineOptions", runner: object = None) -> "PipelineOptions":
    """Returns the options. Raises ValueError if they or `runner` choose Beam's DaskRunner."""
    from apache_beam.options.pipeline_options import StandardOptions

    named = pipeline_options.view_as(StandardOptions).runner
    for name in (named, runner if isinstance(runner, str) else type(runner).__name__):
        if "dask" in (name or "").lower():
            raise ValueError(
                f"beam_pipeline_options: runner={name} fails inside TFDS's writer: choose "
                "DirectRunner, FlinkRunner, SparkRunner or DataflowRunner"
            )
    return pipeline_options


def with_options(config: "tfds.download.DownloadConfig") -> "tfds.download.DownloadConfig":
    """Returns a download config with the options of this machine, unless it has its own.

    Leaves it as it is where Beam is not installed.
    """
    if not is_installed():
        return config
    if config.beam_options is None and config.beam_runner is None:
        return config.replace(beam_options=options())
    checked(config.beam_options or options(), config.beam_runner)
    return config


def is_local(config: "tfds.download.DownloadConfig") -> bool:
    """Returns whether the options name a runner of this machine, and no runner is passed."""
    from apache_beam.options.pipeline_options import StandardOptions

    if config.beam_runner is not None:
        return False
    runner = config.beam_options.view_as(StandardOptions).runner
    return runner in (None, "DirectRunner", "FnApiRunner")


@contextmanager
def pipeline(config: "tfds.download.DownloadConfig", label: str) -> Iterator["beam.Pipeline"]:
    """Runs a pipeline at the end of the block, with runner and options of a download config.

    Prints a line when it starts and when it ends: Beam's runners count in ways of their own.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import TypeOptions

    options = config.beam_options
    if options is not None:
        # As TFDS does: Beam expects outputs of one type.
        options.view_as(TypeOptions).pipeline_type_check = False
    print(f"{label}: Beam starts ...", flush=True)
    start = time.monotonic()
    with beam.Pipeline(runner=config.beam_runner, options=options) as steps:
        yield steps
    print(f"{label}: done, {time.monotonic() - start:.0f} s", flush=True)


@contextmanager
def shared_path() -> Iterator[None]:
    """Lets Beam's processes on this machine import modules from where this process does."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path


# --- Many items, as lines of JSON. ---


def write_items(path: "epath.Path", items: Iterable[Any]) -> None:
    """Writes items that JSON can hold, for `read_items`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        for item in items:
            lines.write(json.dumps(item) + "\n")


def read_items(path: "epath.Path") -> "beam.PTransform":
    """Returns a transform that reads the items of a file and spreads them over all processes.

    The items are no part of the pipeline itself: a runner may limit its size.
    """
    import apache_beam as beam

    return (
        "Read" >> beam.io.ReadFromText(str(path))
        | "Parse" >> beam.Map(json.loads)
        | "Spread" >> beam.Reshuffle()
    )


def mapped(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    folder: "epath.Path",
    config: "tfds.download.DownloadConfig",
    label: str,
) -> Iterator[Any]:
    """Yields function(item) for each item, in no order, computed by a pipeline of its own.

    Items and results are JSON. They pass through files, so all processes must share the folder.
    """
    import apache_beam as beam

    write_items(folder / "items.jsonl", items)
    with pipeline(config, label) as steps:
        _ = (
            steps
            | read_items(folder / "items.jsonl")
            | "Map" >> beam.Map(function)
            | "Format" >> beam.Map(json.dumps)
            | "Write" >> beam.io.WriteToText(str(folder / "results"))
        )
    for path in sorted(folder.glob("results-*")):
        with path.open() as lines:
            yield from map(json.loads, lines)
