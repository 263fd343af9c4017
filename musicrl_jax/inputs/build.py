"""Builds data sets: runs a TFDS builder from a folder and writes ArrayRecords."""

import dataclasses
import errno
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from musicrl_jax.core import extras, hosts, lock, shipped
from musicrl_jax.core.files import remove_abandoned
from musicrl_jax.inputs import content, pipelines

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# Type of a builder's field -> accepted types of its value.
TYPES = {str: str, bool: bool, int: int, float: (int, float)}
NEEDED_BY_BUILDERS = "joblib", "midirenderer", "music21", "pretty_midi", "soxr"  # of data/


def prepare(
    builder: str,
    config: str | Mapping[str, Any],
    data_dir: str,
    beam_pipeline_options: str = "",
) -> str:
    """Builds a data set, unless it exists, and returns its name for `Clips.datasets`.

    A new set has a content.json with the hash of each split (`content.py`).

    Args:
      builder: a folder such as 'data/score_clips', with `score_clips_dataset_builder.py` in it.
      config: the name of one of the builder's own configs, or the fields of a new one:
        {'name': 'mine', 'folder': '~/music', ...}.
      data_dir: the folder of prepared sets.
      beam_pipeline_options: options of Apache Beam, separated by commas, for the builders in data/:
        'direct_num_workers=4', 'runner=FlinkRunner,flink_master=localhost:8081'. Without them, Beam
        uses all cores of this machine; where Beam is not installed, the builder does.

    Raises:
      FileNotFoundError: if there is no such builder.
      ModuleNotFoundError: if Beam is not installed and has options.
      ValueError: if there is no such config or field, or no build works on Beam's runner.
      OSError: if the disk is full. An unfinished set never counts as a finished one.
    """
    # Before the builder, which imports TensorFlow too.
    from musicrl_jax.inputs import tasks
    from musicrl_jax.inputs.libraries import tensorflow_datasets as tfds

    module = _module(builder)
    options = pipelines.options(beam_pipeline_options) if beam_pipeline_options else None
    try:
        tfds_builder = module.Builder(
            config=_config(module, config), data_dir=Path(data_dir).expanduser()
        )
        folder = tfds_builder.data_path
        with lock.locked(folder.parent):
            remove_abandoned(folder.parent, "incomplete.*")
            is_new = not folder.exists()
            tfds_builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(beam_options=options),
            )
            # The builders in data/ hash while they write.
            if is_new and not content.read(folder):
                content.write(folder, content.of_splits(tfds_builder))
    except Exception as error:
        # A signal to the whole process group ends the workers too.
        hosts.stop_point()
        if tasks.disk_is_full(error):
            message = f"data_dir: no space left for {builder}: free some, or choose another disk"
            raise OSError(errno.ENOSPC, message, str(data_dir)) from error
        raise
    name, builder_config = tfds_builder.name, tfds_builder.builder_config
    return f"{name}/{builder_config.name}" if builder_config else name


def _module(builder: str) -> ModuleType:
    """Imports the builder of a folder."""
    folder = shipped.located(builder).resolve()
    name = f"{folder.name}_dataset_builder"
    if not (folder / f"{name}.py").is_file():
        raise FileNotFoundError(
            f"builder: {builder!r} is no TFDS builder: {folder / name}.py does not exist"
        )
    # The folder above is the package, so that relative imports work. In a checkout this gives
    # data.score_clips; in a wheel the builders are part of this package, whose root is on the path.
    root = shipped.PACKAGE.parent if folder.is_relative_to(shipped.PACKAGE) else folder.parents[1]
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(".".join((*folder.relative_to(root).parts, name)))
    except ModuleNotFoundError as error:
        if error.name in NEEDED_BY_BUILDERS:
            extras.check("building data", "data", error.name)
        raise


def _config(module: ModuleType, config: str | Mapping[str, Any]) -> "tfds.core.BuilderConfig":
    """Returns a builder's own config by its name, or a new one from its fields."""
    own = module.Builder.builder_configs
    if not isinstance(config, str):
        return _new_config(module, config)
    if config not in own:
        remedy = (
            f"choose one of {sorted(own)}"
            if own
            else "it has none of its own; give the fields of one, as {'name': 'mine', ...}"
        )
        raise ValueError(f"config {config!r} of {module.__name__} does not exist: {remedy}")
    return own[config]


def _new_config(module: ModuleType, config: Mapping[str, Any]) -> "tfds.core.BuilderConfig":
    """Returns a config of the builder's own class with the fields of `config`."""
    from musicrl_jax.inputs.libraries import tensorflow_datasets as tfds

    # The config class is the one that the builder's module defines.
    classes = []
    for value in vars(module).values():
        is_config = isinstance(value, type) and issubclass(value, tfds.core.BuilderConfig)
        if is_config and value.__module__ == module.__name__:
            classes.append(value)
    if len(classes) != 1:
        names = sorted(module.Builder.builder_configs)
        raise ValueError(
            f"config {dict(config)}: {module.__name__} takes no fields: name one of {names}"
        )
    (config_class,) = classes

    # Its fields: names, then types.
    types = {field.name: field.type for field in dataclasses.fields(config_class)}
    try:
        inspect.signature(config_class).bind(**config)
    except TypeError as error:
        raise ValueError(
            f"config: {error}; the fields of {config_class.__name__} are {sorted(types)}"
        ) from error
    for name, value in config.items():
        kind = types[name]
        # bool is a subclass of int.
        is_bool_for_number = isinstance(value, bool) and kind is not bool
        if kind in TYPES and (is_bool_for_number or not isinstance(value, TYPES[kind])):
            raise ValueError(f"config: {name} = {value!r} must be of type {kind.__name__}")
    if not config["name"] or "/" in config["name"]:
        raise ValueError(
            f"config: name = {config['name']!r} must be the name of a folder, without /"
        )
    return config_class(**config)
