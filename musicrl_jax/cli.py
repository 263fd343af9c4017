"""The `musicrl` command: `musicrl VERB [--gin_file=FILE] [--gin.NAME=VALUE] [--PARAMETER=VALUE]`.

A space does for the equals sign, and a hyphen for an underscore in a flag's name. A flag is given
once; one that takes several values, as `--prompt` of `generate`, may be repeated.

This file alone imports gin. Verbs and configs are named here, so that they stay plain functions and
dataclasses for whoever calls them from Python; a module is imported when its verb is called or a
config of it is mentioned.
"""

import argparse
import difflib
import functools
import importlib
import inspect
import os
import re
import reprlib
import sys
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import gin
from gin import config as gin_config
from gin import config_parser
from musicrl_jax.core import shipped

VERBS = {
    "run": "musicrl_jax.run:run",
    "plan": "musicrl_jax.plan:plan",
    "build": "musicrl_jax.inputs.build:prepare",
    "fetch": "musicrl_jax.inputs.pretrained:fetch",
    "vocabulary": "musicrl_jax.inputs.vocabulary:build",
    "train": "musicrl_jax.train:train",
    "assemble": "musicrl_jax.assemble:assemble",
    "encode": "musicrl_jax.encode:encode",
    "collect": "musicrl_jax.collect:collect",
    "train_rl": "musicrl_jax.train_rl:train_rl",
    "evaluate": "musicrl_jax.evaluate:evaluate",
    "generate": "musicrl_jax.generate:generate",
    "export": "musicrl_jax.export:export",
    "serve": "musicrl_jax.serve:serve",
    "pack": "musicrl_jax.pack:pack",
    "unpack": "musicrl_jax.pack:unpack",
}
WITHOUT_A_RUN = {
    "plan",
    "serve",
}  # of a run that may never be, or is over: no other hosts, no config to leave
# What computes; all others are done by the first host, while the rest wait.
ON_ALL_HOSTS = {
    *("run", "train", "encode", "collect", "train_rl", "evaluate", "generate", "export"),
}

CONFIGS = {
    name: f"musicrl_jax.{module}:{name}"
    for module, names in {
        "core.checkpoint": ("model_hash",),
        "losses.optimiser": ("Optimiser",),
        "models.tokens": ("TokenLayout",),
        "inputs.clips": ("Clips", "Ratings"),
        "inputs.prompts": ("Prompts",),
        "inputs.tokens": ("Tokens",),
        "inputs.votes": ("Votes",),
        "models.transformer": ("TransformerConfig",),
        "models.conformer": ("ConformerConfig",),
        "models.resnet": ("ResNetConfig",),
        "models.bert": ("BertConfig",),
        "models.musicnn": ("MusicnnConfig",),
        "models.soundstream": ("SoundStreamConfig",),
        "models.discriminators": ("DiscriminatorsConfig",),
        "models.semantic": ("SemanticConfig",),
        "models.mulan": ("MuLanConfig",),
        "models.musiclm": ("MusicLMConfig",),
        "models.soundstorm": ("SoundStormConfig",),
        "models.rewards": ("QualityConfig", "PreferenceConfig"),
        "objectives.codec": ("CodecObjective",),
        "objectives.semantic": ("SemanticObjective",),
        "objectives.mulan": ("MuLanObjective",),
        "objectives.mulan_projections": (
            "PretrainedTowers",
            "TowerOutputs",
            "MuLanProjectionsObjective",
        ),
        "objectives.policy": ("PolicyObjective",),
        "objectives.fine": ("FineObjective",),
        "objectives.quality": ("QualityObjective",),
        "objectives.preference": ("PreferenceObjective",),
        "objectives.dpo": ("DPOObjective",),
        "arena.listeners": ("training_panel", "judging_panel", "monitoring_panel"),
        "arena.audience": ("Audience",),
        "arena.monitor": ("Monitor",),
        "losses.policy_gradient": ("PolicyGradient",),
        "systems.system": ("Sampling",),
        "systems.scorers": (
            "TextAdherence",
            "AcousticQuality",
            "UserPreference",
            "SemanticFeatures",
        ),
        "rl.config": ("RLConfig",),
        "rl.rewards": ("Mixture",),
        "collect": ("CollectConfig",),
        "evaluate": ("EvaluationConfig", "PageConfig"),
        "serving.settings": ("ServiceLimits",),
    }.items()
    for name in names
}

# Names of older versions: 'VERB.PARAMETER' or 'CONFIG.PARAMETER' -> the name that took its place, or
# a sentence if none did.
ONE_FOLDER = (
    "a system is one folder with all its parts, which `musicrl assemble` and a run's stages "
    "'tokenizer' and 'base' write: remove this, and name that folder"
)
READ_BY_SYSTEMS = "each system and each reward reads prompts in its own way: remove this"
RENAMED = {
    f"{verb}.{name}": f"{config}.{name}"
    for verb, config, names in (
        ("train_rl", "RLConfig", "steps batch_size clip_seconds kl_strength policy_optimiser"),
        ("train_rl", "RLConfig", "value_optimiser gradient updates microbatches remat dtype seed"),
        ("train_rl", "RLConfig", "fsdp tensor save_every"),
        ("collect", "CollectConfig", "pairs clip_seconds validation_share votes_per_pair"),
        ("collect", "CollectConfig", "batch_size seed"),
        ("evaluate", "EvaluationConfig", "clip_seconds count seeds batch_size seed raters best_of"),
        ("evaluate", "PageConfig", "run_dir training notes shown worst"),
        *((verb, "Sampling", "temperature top_k") for verb in ("train_rl", "collect")),
        *((verb, "Sampling", "temperature top_k") for verb in ("evaluate", "export")),
    )
    for name in names.split()
}
RENAMED |= {
    f"{verb}.{part}": ONE_FOLDER
    for verb in ("encode", "train_rl", "collect", "evaluate", "generate", "export")
    for part in ("fine", "codec", "mulan")
}
RENAMED |= {f"Heard.{name}": f"TowerOutputs.{name}" for name in ("clips", "towers", "folder")}
RENAMED |= {
    "train_rl.kl_target": "RLConfig.kl_target_per_second",
    "train_rl.base": "train_rl.system",
    "collect.policy": "collect.system",
    "evaluate.policies": "evaluate.systems",
    "evaluate.semantic": "SemanticFeatures.semantic",
    "encode.semantic": ONE_FOLDER,
    "generate.checkpoint": "generate.system",
    "export.checkpoint": "export.system",
    "generate.format": (
        "the format follows from out: a file's ending, or a folder and an ending, as "
        "'clips/*.flac'; remove this"
    ),
    "serve.most_waiting": "ServiceLimits.waiting_clips",
    "serve.most_seconds": "ServiceLimits.piece_seconds",
    "serve.most_candidates": "ServiceLimits.candidates",
    "train.log_every": "metrics are written every ten steps: remove this",
    "Prompts.vocabulary": READ_BY_SYSTEMS,
    "Prompts.text_length": READ_BY_SYSTEMS,
}

# Macros that a run needs and a plan does not, with what a plan takes for them; one that reads models,
# so that a plan sets it aside; and the one that every size binds.
NEEDED_BY_A_RUN = {
    "MODEL_DIR": "'model_dir'",
    "DATA_DIR": "'data_dir'",
    "DATA_CONFIG": "'data_config'",
    "DATASETS": "{'datasets': 1.0}",
    "PROMPT_DATASETS": "('datasets',)",
}
TOKENIZERS = "TOKENIZERS"
SIZE, BASE_SIZE = "SAMPLE_RATE_HZ", "gin/sizes/base.gin"

# Of a flag that takes a text: a macro or a call, and not the text itself.
GIN_REFERENCE = re.compile(r"%[A-Z_]+|@[\w./]+\(\)")
# What gin adds to an error's message: the places that it went through.
GIN_CALL = re.compile(r"\n *In call to configurable [^\n]*")
GIN_PLACE = re.compile(
    r'\n  In (?:file "([^"]*)",|bindings string) line (\d+)\n    ([^\n]*)(?:\n *\^)?'
)
# Errors of the user that a verb raises, and of settings; what a gin file imports may be broken.
WRONG_USE = ValueError, OSError, FloatingPointError, ModuleNotFoundError
WRONG_SETTING = *WRONG_USE, ImportError


def folder(root: str, name: str) -> str:
    """Returns root/name: how gin files name the models of a run, each under a scope of its own."""
    return str(Path(root) / name)


def scaled(steps: int, by: float) -> int:
    """Returns so many steps of the paper's, at least one: a size shortens all schedules of a recipe
    alike.
    """
    if not by > 0:
        raise ValueError(f"scaled.by={by} must be above 0")
    return max(1, round(steps * by))


# --- verbs and configs ----------------------------------------------------------------------------


def _imported(place: str) -> Any:
    """Returns what stands at 'module:name'."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache  # gin takes a name once, or the same object again
def load_verb(name: str) -> Callable:
    """Imports a verb; as it runs on several hosts, and as a plan describes it."""
    from musicrl_jax.core import hosts
    from musicrl_jax.planning.stages import describable

    verb = _imported(VERBS[name])
    return describable(verb if name in ON_ALL_HOSTS else hosts.first_alone(verb))


def register(names: Iterable[str]) -> None:
    """Makes those verbs and configs known to gin; a name that is neither is gin's to refuse."""
    for config in (folder, scaled):
        gin.external_configurable(config, module="musicrl")
    for name in sorted(set(names)):
        if name in VERBS:
            gin.external_configurable(load_verb(name), name, module="musicrl")
        elif name in CONFIGS:
            gin.external_configurable(_imported(CONFIGS[name]), module="musicrl")


# --- gin's syntax ---------------------------------------------------------------------------------


class _Reference(str):
    """A reference or a macro in a gin text that is not resolved yet, by its name."""


class _References(config_parser.ParserDelegate):
    """Notes what a gin text refers to; the scopes of folders apart, since they name no stage."""

    def __init__(self) -> None:
        self.scopes: set[str] = set()
        self.folders: set[str] = set()
        self.macros: set[str] = set()
        self.names: set[str] = set()

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
        """Notes every scope on the way to the configurable."""
        *scopes, name = scoped_configurable_name.split("/")
        (self.folders if _is_folder(name) else self.scopes).update(scopes)
        self.names.add(name)
        return _Reference(scoped_configurable_name)

    def macro(self, macro_name: str) -> _Reference:
        """Notes the macro."""
        self.macros.add(macro_name)
        return _Reference(macro_name)


def _is_folder(selector: str) -> bool:
    return selector.split(".")[-1] == folder.__name__


def _gin_value(text: str) -> tuple[bool, Any]:
    """Returns whether a text reads as one gin value, and that value, references by their names."""
    try:
        (statement,) = config_parser.ConfigParser(f"x = {text}", _References())
    except (SyntaxError, ValueError, TypeError, tokenize.TokenError):
        return False, None
    return True, statement.value


class Source(NamedTuple):
    """A gin file that is read, itself or by an `include`."""

    path: str
    text: str
    statements: list[Any]
    references: _References

    @property
    def names(self) -> set[str]:
        """The verbs, configs and others that it binds or refers to, without their modules."""
        bound = {
            each.selector
            for each in self.statements
            if isinstance(each, config_parser.BindingStatement)
        }
        return {name.split(".")[-1] for name in bound | self.references.names}

    @property
    def imports(self) -> list[str]:
        """The modules that it imports."""
        found = [
            each for each in self.statements if isinstance(each, config_parser.ImportStatement)
        ]
        return [each.module for each in found if each.module != "__gin__.dynamic_registration"]


def _open_gin(path: str) -> TextIO:
    """Opens a gin file as UTF-8 whatever the locale; editors of Windows begin it with a byte order
    mark.
    """
    return open(path, encoding="utf-8-sig")


def search_in(folders: Sequence[str]) -> None:
    """Lets gin look for a file by its name as it is, then in these folders, then in what ships;
    by `_open_gin`.

    A file that ships is known as gin/runs/tiny.gin and as runs/tiny.gin.
    """
    places = ["", *folders, str(shipped.ROOT), str(shipped.ROOT / "gin")]
    gin_config._LOCATION_PREFIXES[:] = places  # its public function only adds to them
    gin_config._FILE_READERS[:] = [(_open_gin, os.path.isfile)]


def full_name(name: str) -> str:
    """Returns the path of a gin file that ships and is named by its stem; any other name as it is.

    Of a run and a size with one stem it is the run. Raises ValueError if other files share it.
    """
    if "/" in name or name.endswith(".gin") or os.path.isfile(name):
        return name
    paths = sorted((shipped.ROOT / "gin").rglob(f"{name}.gin"))
    paths = [path for path in paths if path.parent.name == "runs"] or paths
    if len(paths) > 1:
        names = " and ".join(f"{path.parent.name}/{path.name}" for path in paths)
        raise ValueError(f"--gin_file={name} may be {names}: give one of them")
    return str(paths[0]) if paths else name


def _located(name: str) -> str:
    """Returns the path of a gin file, where gin finds it; FileNotFoundError where it is nowhere."""
    prefixes = [""] if os.path.isabs(name) else gin_config._LOCATION_PREFIXES
    for prefix in prefixes:
        if os.path.isfile(path := os.path.join(prefix, name)):
            return path
    places = ", ".join(prefix or "." for prefix in prefixes)
    raise FileNotFoundError(
        f"no gin file {name!r} in {places}; mend the name, or add --gin_search_paths=FOLDER"
    )


def read_sources(files: Sequence[str], within: tuple[str, ...] = ()) -> list[Source]:
    """Reads gin files, and after each what it includes, and runs nothing.

    Raises FileNotFoundError or ValueError, by the file's name, where one is missing, is no UTF-8 or
    includes itself, SyntaxError where it is no gin.
    """
    sources = []
    for file in files:
        path = _located(file)
        if path in within:
            raise ValueError(f"gin: {path} includes itself, through {' and '.join(within)}")
        try:
            with _open_gin(path) as opened:
                text = opened.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"gin file {path} is not UTF-8 ({error}): save it as UTF-8") from None
        references = _References()
        try:
            statements = list(config_parser.ConfigParser(text, references))
        except (SyntaxError, TypeError, tokenize.TokenError) as error:  # TypeError: a key of a dict
            raise ValueError(
                f"gin file {path}{_line_of(error)}: {_first_line(error.args[0])}"
            ) from None
        sources.append(Source(path, text, statements, references))
        includes = [
            each.filename for each in statements if isinstance(each, config_parser.IncludeStatement)
        ]
        sources += read_sources(includes, (*within, path))
    return sources


def _first_line(text: Any) -> str:
    return str(text).split("\n")[0]


def _line_of(error: Exception) -> str:
    """' line 3', where the error of a parser says so."""
    if isinstance(error, tokenize.TokenError):
        return f" line {error.args[1][0]}"
    return f" line {error.lineno}" if isinstance(error, SyntaxError) else ""


def check_renamed(sources: Sequence[Source]) -> None:
    """Raises ValueError if a binding has a name of an older version, with what to write instead."""
    for source in sources:
        for statement in source.statements:
            if not isinstance(statement, config_parser.BindingStatement):
                continue
            old = f"{statement.selector.split('.')[-1]}.{statement.arg_name}"
            if old in RENAMED:
                place = f"{source.path} line {statement.location.line_num}: " if source.path else ""
                flag = "" if source.path else "--gin."
                scope = f"{statement.scope}/" if statement.scope else ""
                raise ValueError(place + _instead(flag + scope, old))


def _instead(prefix: str, old: str) -> str:
    """Says what took the place of a name of an older version."""
    new = RENAMED[old]
    return f"{prefix}{old} is gone: {new}" if " " in new else f"{prefix}{old} is now {prefix}{new}"


def check_bindings(text: str, files: Sequence[str] = ()) -> None:
    """Raises ValueError where a gin config has a macro or a scope too many, or a macro too few.

    gin itself refuses an unknown configurable or parameter, but takes a misspelt macro or scope in
    silence: a macro without a use, a scope that no reference opens. What one of the `files`, as
    texts, reads counts as read, also where a later one binds something else in its place: a run
    that leaves out stages need not unbind what is theirs.
    """
    references = _References()
    for file in files:
        list(config_parser.ConfigParser(file, references))
    macros, scoped, folders = set(), {}, {}
    readers: dict[str, str] = {}
    for statement in config_parser.ConfigParser(text, here := _References()):
        if not isinstance(statement, config_parser.BindingStatement):
            continue
        place = f"{statement.scope}/{statement.selector}".strip(
            "/"
        ) + f".{statement.arg_name}".rstrip(".")
        for macro in here.macros - readers.keys():
            readers[macro] = place
        if not statement.arg_name:
            macros.add(statement.selector)
        for scope in statement.scope.split("/") if statement.scope else ():
            (folders if _is_folder(statement.selector) else scoped).setdefault(scope, place)
    for macro in sorted(readers.keys() - macros):
        if "." not in macro:  # gin.REQUIRED, a constant
            raise ValueError(
                f"gin: {readers[macro]} reads the macro {macro}, which nothing binds: give --gin.{macro}=VALUE, or a "
                "--gin_file that binds it: sizes are in gin/sizes, whole runs in gin/runs"
            )
    read = references.macros | here.macros
    for macro in sorted(macros - read):
        raise ValueError(f"gin: nothing reads the macro {macro}; remove it, or mend its name")
    # A folder's name has no reader where its macro names a folder elsewhere:
    # --gin.CODEC="'elsewhere'".
    named = references.folders | here.folders | {macro.lower() for macro in macros}
    for places, known in ((scoped, references.scopes | here.scopes), (folders, named)):
        for scope in sorted(set(places) - known):
            raise ValueError(
                f"gin: nothing reads {places[scope]}: no @{scope}/... stands in the config; mend the scope's name"
            )


def warn_of_code(sources: Sequence[Source]) -> bool:
    """Says on stderr what gin files that do not ship would run; whether reading them alone would.

    A file's `import` runs the module when the file is read; a reference to something of that
    module, and a folder with a TFDS builder, are called by a verb.
    """
    runs = False
    for source in sources:
        if Path(source.path).resolve().is_relative_to(shipped.ROOT):
            continue
        called = sorted(
            name for name in source.references.names if name.split(".")[-1] not in _known_names()
        )
        bound = [
            each for each in source.statements if isinstance(each, config_parser.BindingStatement)
        ]
        called += [f"the builder {each.value!r}" for each in bound if each.arg_name == "builder"]
        warnings = [f"imports {', '.join(source.imports)}"] if source.imports else []
        warnings += [f"calls {', '.join(called)}"] if called else []
        if warnings:
            message = f"{source.path} is not of musicrl-jax and {' and '.join(warnings)}"
            print(
                f"musicrl: {message}: a gin file can run any code, so read it first",
                file=sys.stderr,
            )
        runs = runs or bool(source.imports)
    return runs


def _known_names() -> set[str]:
    return {*VERBS, *CONFIGS, folder.__name__, scaled.__name__}


# --- types ----------------------------------------------------------------------------------------

SEQUENCES = list, tuple, Sequence
UNIONS = typing.Union, types.UnionType
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "None",
}


def fits(value: Any, annotation: Any) -> bool:
    """Tells whether a value is of an annotation's type. A type that cannot be checked counts as fitting.

    Stricter than Python where Python lets mistakes through: a bool is no number, a text no
    sequence.
    """
    kind, parts = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if isinstance(value, _Reference) or annotation is Any:
        return True
    if isinstance(value, gin_config.ConfigurableReference):
        return _reference_fits(value, annotation)
    if kind in UNIONS:
        return any(fits(value, part) for part in parts)
    if kind is typing.Literal:
        return value in parts
    if kind in SEQUENCES:
        return _sequence_fits(value, kind, parts)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, parts[0]) and fits(each, parts[1]) for key, each in value.items() if parts
        )
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return not _is_class(kind) or isinstance(value, kind)


def _sequence_fits(value: Any, kind: Any, parts: tuple[Any, ...]) -> bool:
    """Tells whether a value is a list or a tuple, as `kind` asks, whose elements fit `parts`."""
    if not isinstance(value, tuple if kind is tuple else (list, tuple)):
        return False
    if kind is tuple and parts and parts[-1] is not Ellipsis:
        return len(value) == len(parts) and all(map(fits, value, parts))
    return all(fits(each, parts[0]) for each in value if parts)


def _is_class(kind: Any) -> bool:
    """Tells whether isinstance can check it: it is a class, and neither a protocol nor Any."""
    missing = kind in (inspect.Parameter.empty, Any)
    return isinstance(kind, type) and not missing and not getattr(kind, "_is_protocol", False)


def _reference_fits(reference: gin_config.ConfigurableReference, annotation: Any) -> bool:
    """Whether what a called config class gives is of the type; of functions nothing is said."""
    made = reference.configurable.wrapped
    union = typing.get_origin(annotation) in UNIONS
    kinds = typing.get_args(annotation) if union else (annotation,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in kinds)
    if not reference.evaluate or not isinstance(made, type) or not all(map(_is_class, kinds)):
        return True
    return issubclass(made, kinds)


def _described(annotation: Any) -> str:
    """An annotation in words, such as 'a number or None'."""
    kind, parts = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in UNIONS:
        return " or ".join(map(_described, parts))
    if kind in WORDS:
        return WORDS[kind]
    if kind is tuple or kind in SEQUENCES:
        name = "a tuple" if kind is tuple else "a list"
        return f"{name} of {', '.join(_described(each).removeprefix('a ') for each in parts if each is not ...)}"
    if kind in (dict, Mapping):
        return f"a dict of {' to '.join(_described(each).removeprefix('a ') for each in parts)}"
    return getattr(kind, "__name__", str(kind))


def _types(called: Callable) -> dict[str, Any]:
    """The annotation of each parameter; {} where somebody's own config has some that cannot be
    read.
    """
    try:
        return typing.get_type_hints(called)
    except NameError:  # a name that only type checkers import
        return {}


def _check_type(name: str, value: Any, annotation: Any) -> None:
    if not fits(value, annotation):
        raise ValueError(f"{name} = {reprlib.repr(value)} must be {_described(annotation)}")


# --- flags ----------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads the verb and the flags; the second part are gin bindings from --gin.NAME=VALUE and
    --PARAMETER=VALUE.

    Raises SystemExit where something is no flag, ValueError where a flag is unknown to the verb,
    given twice or not of its parameter's type.
    """
    parser = argparse.ArgumentParser(
        prog="musicrl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument(
        "--gin_file", action="append", default=[], help="a gin file; may be given several times"
    )
    paths = parser.add_argument("--gin_search_paths", action="append", default=[])
    paths.help = "folders to look for gin files in, comma-separated; may be given several times"
    parser.add_argument(
        "--dry_run", action="store_true", help="print the config, check it, and stop"
    )
    known, rest = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    values: dict[str, list[str]] = {}
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        if not flag.startswith("--") or not name or not equals:
            parser.error(f"{flag!r} is not of the form --NAME=VALUE")
        values.setdefault(name, []).append(value)
    return known, _bindings(known.verb, values)


def _with_underscores(argument: str) -> str:
    """A flag with underscores for the hyphens of its name; anything else as it is."""
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _bindings(verb: str, values: Mapping[str, list[str]]) -> list[str]:
    """The gin bindings of flags, in their order."""
    bindings: dict[str, str] = {}
    annotations = (
        _types(load_verb(verb)) if any(not name.startswith("gin.") for name in values) else {}
    )
    parameters = inspect.signature(load_verb(verb)).parameters if annotations else {}
    for name, texts in values.items():
        if name.startswith("gin."):
            key, value = name.removeprefix("gin."), _one(name, texts)
            if not re.fullmatch(r"[A-Za-z_][\w./]*", key) or not _gin_value(value)[0]:
                raise ValueError(
                    f"--{name}={value} is no gin binding: a number stands as it is, a text in quotes of its own, "
                    f"--{name}=\"'{value}'\""
                )
        elif name not in parameters and f"{verb}.{name}" in RENAMED:
            raise ValueError(_instead("--gin.", f"{verb}.{name}").replace(f"--gin.{verb}.", "--"))
        elif name not in parameters:
            near = difflib.get_close_matches(name, parameters, 1)
            raise ValueError(
                f"--{name} is no parameter of {verb}"
                + (
                    f"; did you mean --{near[0]}?"
                    if near
                    else f", which takes {', '.join(parameters)}"
                )
            )
        else:
            key, value = f"{verb}.{name}", _flag_value(name, texts, annotations.get(name, Any))
        if key in bindings:
            raise ValueError(
                f"{key} is set twice, by --{name} and by another flag: give one of them"
            )
        bindings[key] = f"{key} = {value}"
    return list(bindings.values())


def _one(name: str, texts: list[str]) -> str:
    if len(texts) > 1:
        raise ValueError(f"--{name} is given {len(texts)} times, and takes one value: give it once")
    return texts[0]


def _flag_value(name: str, texts: list[str], annotation: Any) -> str:
    """The gin text of a parameter's flag; several flags are the elements of one list or tuple."""
    union = typing.get_origin(annotation) in UNIONS
    kinds = typing.get_args(annotation) if union else (annotation,)
    (sequence,) = [kind for kind in kinds if typing.get_origin(kind) in SEQUENCES][:1] or [None]
    element = (*typing.get_args(sequence), Any)[0]
    if len(texts) == 1 or sequence is None:
        text = _one(name, texts)
        value = _typed(text, annotation)
        if value is not None:
            return value
        if sequence is None or _typed(text, element) is None:
            raise ValueError(f"--{name}={text}: {name} must be {_described(annotation)}")
    elements = [_typed(text, element) for text in texts]
    if None in elements:
        raise ValueError(
            f"--{name}={texts[elements.index(None)]}: {name} must be {_described(annotation)}"
        )
    begin, end = ("(", ",)") if typing.get_origin(sequence) is tuple else ("[", "]")
    return begin + ", ".join(elements) + end


def _typed(text: str, annotation: Any) -> str | None:
    """The gin text of a value of the annotation's type; None where the text is none.

    A text that reads as a value of that type is that value, also a list, a tuple or a dict; else,
    where the parameter takes texts, it is the text itself: "3" is a prompt, and so are "@jazz" and
    "80's pop".
    """
    is_value, value = _gin_value(text)
    takes_text = fits("", annotation)
    if is_value and isinstance(value, _Reference):
        is_value = bool(GIN_REFERENCE.fullmatch(text)) or not takes_text
    if is_value and fits(value, annotation):
        return text
    return repr(text) if takes_text else None


# --- settings -------------------------------------------------------------------------------------


def check_settings(verb: str, bindings: Sequence[str] = ()) -> None:
    """Checks the verb's settings, and those of all that they refer to: nothing is missing, all are
    of their type.

    gin itself finds that out when the configurable is called, which in a run may be after an hour.
    `bindings` are those of flags: one that no setting of the verb refers to would change nothing.
    Raises ValueError.
    """
    called = load_verb(verb)
    waiting: list[tuple[tuple[str, ...], str, Callable]] = [((), f"musicrl.{verb}", called)]
    seen = set()
    while waiting:
        scope, selector, called = waiting.pop()
        if (scope, selector) in seen:
            continue
        seen.add((scope, selector))
        bound = gin.get_bindings("/".join((*scope, selector)), resolve_references=False)
        name = "/".join((*scope, selector.split(".")[-1]))
        annotations = _types(called)
        for parameter in inspect.signature(called).parameters.values():
            if parameter.name in bound:
                value = _without_macros(bound[parameter.name])
                _check_type(f"{name}.{parameter.name}", value, annotations.get(parameter.name, Any))
            elif parameter.default is inspect.Parameter.empty and len(seen) > 1:
                raise ValueError(
                    f"{name}.{parameter.name} is not set: give --gin.{name}.{parameter.name}=VALUE"
                )
        for reference in _references(list(bound.values())):
            # gin passes a scope on to references that open none
            part = tuple(reference.scopes) or scope
            waiting.append((part, reference.configurable.selector, reference.configurable.wrapped))
    _check_used(verb, bindings, seen)


def _check_used(verb: str, bindings: Sequence[str], used: set[tuple[tuple[str, ...], str]]) -> None:
    """Raises ValueError where a flag binds a parameter of what no setting of the verb refers to."""
    for binding in bindings:
        key = binding.partition(" = ")[0]
        *scope, name = key.split("/")
        selector, _, parameter = name.rpartition(".")
        selector = selector.split(".")[-1]
        reached = [set(part) for part, place in used if place.split(".")[-1] == selector]
        if parameter and selector and not any(set(scope) <= part for part in reached):
            raise ValueError(
                f"--gin.{key} changes nothing: no setting of {verb} refers to @{selector}(); bind "
                f"it to a parameter, as --PARAMETER=@{selector}(), or remove the flag"
            )


def check_given(verb: str) -> None:
    """Raises ValueError where a parameter of the verb itself that has no default is not set."""
    bound = gin.get_bindings(f"musicrl.{verb}", resolve_references=False)
    for parameter in inspect.signature(load_verb(verb)).parameters.values():
        if parameter.default is not inspect.Parameter.empty or parameter.name in bound:
            continue
        if verb in ("run", "plan"):
            raise ValueError(
                f"{parameter.name} is not set: give --gin_file=FILE, a run of gin/runs, or a recipe of gin/experiments "
                "with a size of gin/sizes"
            )
        raise ValueError(
            f"{parameter.name} is not set: give --{parameter.name}=VALUE, or run this stage of a gin "
            f"file's run by `musicrl run --only=STAGE --gin_file=FILE`"
        )


def _without_macros(value: Any) -> Any:
    """A bound value with macros, however deep, replaced by what they are bound to."""
    if (
        isinstance(value, gin_config.ConfigurableReference)
        and value.configurable.selector == "gin.macro"
    ):
        bound = gin.get_bindings(f"{value.scoped_selector}", resolve_references=False)
        return _without_macros(bound["value"]) if "value" in bound else value
    if isinstance(value, dict):
        return {_without_macros(key): _without_macros(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_without_macros, value))
    return value


def _references(value: Any) -> Iterator[gin_config.ConfigurableReference]:
    """The gin references in a value, however deep in tuples, lists and dicts."""
    if isinstance(value, gin_config.ConfigurableReference):
        yield value
    elif isinstance(value, dict):
        yield from _references(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _references(part)


def add_missing_bindings(sources: Sequence[Source], bindings: list[str]) -> list[str]:
    """Adds to a plan's bindings the names of folders and data that the files read; it does without.

    Returns the gin files to add: the paper's size if no size is given.
    """
    bound, read = set(), set()
    for source in sources:
        read |= source.references.macros
        for each in source.statements:
            if isinstance(each, config_parser.BindingStatement) and not each.arg_name:
                bound.add(each.selector)
    bound |= {binding.partition(" = ")[0] for binding in bindings}
    for name, value in NEEDED_BY_A_RUN.items():
        if name in read - bound:
            bindings.append(f"{name} = {value}")
    if TOKENIZERS in bound:
        bindings.append(f"{TOKENIZERS} = None")  # hashes of models that may not be there yet
    return [] if SIZE in bound else [BASE_SIZE]


def configure(flags: argparse.Namespace, bindings: list[str]) -> bool:
    """Reads and checks all settings into gin; False where that stops at a warning."""
    search_in([path for paths in flags.gin_search_paths for path in paths.split(",") if path])
    flags.gin_file = [full_name(name) for name in flags.gin_file]
    references = _References()
    text = "\n".join(bindings)
    flags_source = Source("", text, list(config_parser.ConfigParser(text, references)), references)
    files = [*flags.gin_file, *([BASE_SIZE] if flags.verb == "plan" else [])]
    sources = read_sources(files)
    check_renamed([*sources, flags_source])
    if flags.dry_run and warn_of_code(sources):
        print("musicrl: nothing was imported, so that nothing more can be checked", file=sys.stderr)
        return False
    named = flags_source.names.union(*(source.names for source in sources))
    register({flags.verb, *named})
    if flags.verb == "plan":
        sources = read_sources(flags.gin_file)
        flags.gin_file += add_missing_bindings(sources, bindings)
        sources = read_sources(flags.gin_file)
    gin.parse_config_files_and_bindings(flags.gin_file, bindings, finalize_config=False)
    check_given(flags.verb)
    check_bindings(gin.config_str(), [source.text for source in sources])
    gin.finalize()
    return True


def _save_config(begun: bool) -> None:
    """Leaves in MODEL_DIR, if there is one, config.gin: what was asked for; and at the end what of
    it was used.

    At the beginning an older config stays: the run may yet be refused.
    """
    from musicrl_jax.core import hosts

    try:
        folder = Path(gin.query_parameter("MODEL_DIR/macro.value"))
    except ValueError:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not hosts.first():
        return
    if not begun or not (folder / "config.gin").exists():
        (folder / "config.gin").write_text(gin.config_str(), encoding="utf-8")
    if not begun:
        (folder / "operative_config.gin").write_text(gin.operative_config_str(), encoding="utf-8")


# --- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit status. As a command, without arguments of its own, this is one
    process of a run.
    """
    words = sys.argv[1:] if arguments is None else arguments
    gin.clear_config()  # what an earlier call in this process asked for is no part of this one
    try:
        flags, bindings = parse(words)
        if not configure(flags, bindings):
            return 1
        check_settings(flags.verb, bindings)
        if flags.dry_run:
            print(gin.config_str())
    except WRONG_SETTING as error:
        verb = next((word for word in words if word in VERBS), "")
        print(f"musicrl {verb}: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0 if flags.dry_run else _do(flags.verb, as_command=arguments is None)


def _do(name: str, as_command: bool) -> int:
    """Runs the verb with its settings from gin; the exit status."""
    import jax

    from musicrl_jax.core import compilation_cache, hosts

    verb = gin.get_configurable(f"musicrl.{name}")
    if as_command and name != "plan":  # which reads what XLA says while it compiles
        compilation_cache.enable()
    try:
        if name in WITHOUT_A_RUN:
            verb()
            return 0
        if as_command:
            hosts.join()
        _save_config(begun=True)
        verb()
        _save_config(begun=False)
    except WRONG_USE as error:
        print(f"musicrl {name}: {_sentence(error)}", file=sys.stderr)
        return 1
    except hosts.Preempted as stop:
        print(f"musicrl {name}: {stop}", file=sys.stderr)
        if as_command:
            hosts.end(hosts.AGAIN)
        return hosts.AGAIN
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            print(
                f"musicrl {name}: the device's memory is too small: {_first_line(error.args[0])}; "
                "lower batch_size, rows or clip_seconds, or take a device with more",
                file=sys.stderr,
            )
            return 1
        if not hosts.is_lost_host(error):
            raise
        told = f"musicrl {name}: another host is lost; start all of them again: {error}"
        print(told, file=sys.stderr, flush=True)
        # What is left to do at an exit would wait for the other host.
        os._exit(hosts.AGAIN if hosts.stop_requested() else hosts.LOST)
    return 0


def _sentence(error: Exception) -> str:
    """An error's message without what gin and the operating system's numbers add to it."""
    message = GIN_CALL.sub("", str(error))
    place = GIN_PLACE.search(message)
    message = (
        re.sub(r"^\[Errno \d+\] ", "", GIN_PLACE.sub("", message)).strip() or type(error).__name__
    )
    if place is None:
        return message
    file, line, text = place.groups()
    return f"{file} line {line}: {message}" if file else f"{message.rstrip('.')}: {text.strip()}"


if __name__ == "__main__":
    sys.exit(main())
