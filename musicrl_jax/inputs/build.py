"""Building data sets: runs a TFDS builder that lies in a folder, and leaves ArrayRecords for random access."""

import dataclasses
import errno
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from musicrl_jax.core import extras, hosts, lock, shipped
from musicrl_jax.core.files import remove_abandoned
from musicrl_jax.inputs import content

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

TYPES = {
    str: str,
    bool: bool,
    int: int,
    float: (int, float),
}  # of a builder's fields: what may be given for each
NEEDED_BY_BUILDERS = "joblib", "midirenderer", "music21", "pretty_midi", "soxr"  # of data/


def prepare(builder: str, config: str | Mapping[str, Any], data_dir: str) -> str:
    """Builds a data set under `data_dir`, unless it is there; its name, as `Clips.datasets` takes it.

    `builder` is a folder such as 'data/score_clips', with `score_clips_dataset_builder.py` in it. `config`
    names one of the configs that the builder comes with, or gives the fields of a new one: {'name': 'mine',
    'folder': '~/music', ...}.

    Raises FileNotFoundError where there is no builder, ValueError where there is no such config or field,
    and OSError where the disk is full; an unfinished data set is never taken for a finished one.

    A set that is built here has a content.json with the hash of each split (`content.py`).
    """
    from musicrl_jax.inputs import tasks  # before the builder, which imports TensorFlow too

    module = _module(builder)
    try:
        made = module.Builder(config=_config(module, config), data_dir=Path(data_dir).expanduser())
        with lock.locked(made.data_path.parent):
            remove_abandoned(Path(made.data_dir).parent, "incomplete.*")
            there = made.data_path.exists()
            made.download_and_prepare(file_format="array_record")
            if not there and not content.read(
                made.data_path
            ):  # the builders in data/ hash while they write
                content.write(made.data_path, content.of_splits(made))
    except Exception as error:
        hosts.stop_point()  # a signal to the whole process group ends the workers too
        if tasks.disk_is_full(error):
            raise OSError(
                errno.ENOSPC,
                f"data_dir: no space left for {builder}: free some, or choose another disk",
                str(data_dir),
            ) from error
        raise
    return f"{made.name}/{made.builder_config.name}" if made.builder_config else made.name


def _module(builder: str) -> ModuleType:
    folder = shipped.located(builder).resolve()
    name = f"{folder.name}_dataset_builder"
    if not (folder / f"{name}.py").is_file():
        raise FileNotFoundError(
            f"builder: {builder!r} is no TFDS builder; {folder / name}.py is not there"
        )
    # Imported with the folder above it, for relative imports: as data.score_clips from a checkout,
    # and from a wheel as a part of this package, whose root is on the path already.
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
    from musicrl_jax.inputs.libraries import tensorflow_datasets as tfds

    known = module.Builder.builder_configs
    if isinstance(config, str):
        if not known:
            raise ValueError(
                f"config {config!r}: {module.__name__} has no configs of its own; give the fields of one, as "
                "{'name': 'mine', ...}"
            )
        if config not in known:
            raise ValueError(
                f"config {config!r} of {module.__name__} does not exist; there are {sorted(known)}"
            )
        return known[config]
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, tfds.core.BuilderConfig)
        and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ValueError(
            f"config {dict(config)}: {module.__name__} takes no fields; name one of {sorted(known)}"
        )
    (config_class,) = classes
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    if unknown := sorted(set(config) - set(fields)):
        raise ValueError(
            f"config has no field {', '.join(unknown)}; {config_class.__name__} has {sorted(fields)}"
        )
    needed = [
        name
        for name, field in fields.items()
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing := sorted(set(needed) - set(config)):
        raise ValueError(f"config lacks {', '.join(missing)}, which {config_class.__name__} needs")
    for name, value in config.items():
        kind = fields[name].type
        if kind in TYPES and (
            not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind is not bool)
        ):
            raise ValueError(f"config: {name} = {value!r} must be of type {kind.__name__}")
    if not config["name"] or "/" in config["name"]:
        raise ValueError(
            f"config: name = {config['name']!r} must be the name of a folder, without /"
        )
    return config_class(**config)
