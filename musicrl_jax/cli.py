"""The `musicrl` command: `musicrl VERB [--gin_file=FILE] [--gin.NAME=VALUE] [--PARAMETER=VALUE]`.

This file alone imports gin. Verbs and configs stay plain functions and dataclasses for Python: a
module is imported, and its names registered, when its verb is called or a gin file names it.
"""

import argparse
import functools
import importlib
import inspect
import os
import re
import reprlib
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import gin
from gin import config as gin_config
from gin import config_parser
from musicrl_jax.command import help as helps
from musicrl_jax.command import settings, signatures
from musicrl_jax.command.names import CONFIGS, RENAMED, VERBS, did_you_mean, place_of
from musicrl_jax.command.settings import Setting
from musicrl_jax.command.signatures import Parameter
from musicrl_jax.command.values import Reference, annotations, described, element_kind, fits
from musicrl_jax.core import extras, shipped

# Macros that a run needs and a plan does not: what a plan takes for them. One macro reads models,
# so a plan unbinds it. Every size binds the last one.
NEEDED_BY_A_RUN = {
    "MODEL_DIR": "'model_dir'",
    "DATA_DIR": "'data_dir'",
    "DATA_CONFIG": "'data_config'",
    "DATASETS": "{'datasets': 1.0}",
    "PROMPT_DATASETS": "('datasets',)",
}
TOKENIZERS = "TOKENIZERS"
MACRO = "gin.macro"  # gin's selector of a macro
SIZE, BASE_SIZE = "SAMPLE_RATE_HZ", "gin/sizes/base.gin"

# Values of text parameters that count as gin references: a macro %NAME or a call @name().
GIN_REFERENCE = re.compile(r"%[A-Z_]+|@[\w./]+\(\)")
# Begins a gin value that is not a bare text, or a broken one.
GIN_BEGINNING = tuple("([{'\"@%")
# Lines that gin adds to the message of an error: where it came from.
GIN_CALL = re.compile(r"\n *In call to configurable [^\n]*")
GIN_PLACE = re.compile(
    r'\n  In (?:file "([^"]*)",|bindings string) line (\d+)\n    ([^\n]*)(?:\n *\^)?'
)
# Messages of gin about a name that it does not know.
UNKNOWN_NAME = re.compile(r"No configurable matching (?:reference )?'@?([\w./]+)")
UNKNOWN_PARAMETER = re.compile(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'")
# Mistakes of the user, which a verb or reading its settings raises. A gin file may import what is
# broken.
WRONG_USE = ValueError, OSError, FloatingPointError, ModuleNotFoundError
WRONG_SETTING = *WRONG_USE, ImportError


def folder(root: str, name: str) -> str:
    """Returns the path root/name. Gin files call it once per model of a run: @codec/folder()."""
    return str(Path(root) / name)


def scaled(steps: int, by: float) -> int:
    """Returns `by` times the paper's steps, at least 1. A size shortens all schedules alike."""
    if not by > 0:
        raise ValueError(f"scaled.by={by} must be above 0")
    return max(1, round(steps * by))


# --- verbs and configs ----------------------------------------------------------------------------


def _imported(place: str) -> Any:
    """Returns the object at 'module:name'."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


@functools.cache  # gin refuses a second object under the same name
def load_verb(name: str) -> Callable:
    """Imports a verb, to be run on several hosts and described by a plan."""
    from musicrl_jax.core import hosts
    from musicrl_jax.planning.stages import describable

    verb = _imported(VERBS[name].place)
    return describable(verb if VERBS[name].on_all_hosts else hosts.first_alone(verb))


def register(names: Iterable[str]) -> None:
    """Registers verbs and configs with gin. Ignores other names, which gin refuses later."""
    for function in (folder, scaled):
        gin.external_configurable(function, module="musicrl")
    for name in sorted(set(names)):
        if name in VERBS:
            gin.external_configurable(load_verb(name), name, module="musicrl")
        elif name in CONFIGS:
            gin.external_configurable(_imported(CONFIGS[name]), module="musicrl")


def known_names() -> set[str]:
    """Returns the names that gin files may bind without an import."""
    return {*VERBS, *CONFIGS, folder.__name__, scaled.__name__}


# --- gin's syntax ---------------------------------------------------------------------------------


class _References(config_parser.ParserDelegate):
    """Collects what a gin text refers to.

    Attributes:
      scoped: references with their scopes, such as 'r/train_rl'.
      macros: names of macros.
    """

    def __init__(self) -> None:
        self.scoped: set[str] = set()
        self.macros: set[str] = set()

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        """Collects a reference."""
        self.scoped.add(scoped_configurable_name)
        return Reference(scoped_configurable_name)

    def macro(self, macro_name: str) -> Reference:
        """Collects a macro."""
        self.macros.add(macro_name)
        return Reference(macro_name)

    @property
    def names(self) -> set[str]:
        """The references without their scopes."""
        return {reference.split("/")[-1] for reference in self.scoped}

    def scopes(self, of_folders: bool = False) -> set[str]:
        """Returns the scopes of folders, which name no stage, or those of all other references."""
        scopes = set()
        for reference in self.scoped:
            *parts, name = reference.split("/")
            if _is_folder(name) == of_folders:
                scopes.update(parts)
        return scopes


def _is_folder(selector: str) -> bool:
    return selector.split(".")[-1] == folder.__name__


def _gin_value(text: str) -> tuple[bool, Any]:
    """Returns (whether a text is one gin value, that value with references by their names)."""
    try:
        (statement,) = config_parser.ConfigParser(f"x = {text}", _References())
    except (SyntaxError, ValueError, TypeError, tokenize.TokenError):
        return False, None
    return True, statement.value


class Source(NamedTuple):
    """A gin file, or the text of flags.

    Attributes:
      path: of the file; '' for flags.
      text: what is in it.
      statements: as gin's parser reads them.
      references: what it refers to.
    """

    path: str
    text: str
    statements: list[Any]
    references: _References

    @classmethod
    def parsed(cls, path: str, text: str) -> "Source":
        """Parses a gin text; raises what gin's parser raises."""
        references = _References()
        return cls(path, text, list(config_parser.ConfigParser(text, references)), references)

    @property
    def bindings(self) -> list[config_parser.BindingStatement]:
        """The statements that bind a macro or a parameter."""
        kind = config_parser.BindingStatement
        return [each for each in self.statements if isinstance(each, kind)]

    @property
    def names(self) -> set[str]:
        """The verbs, configs and others that it binds or refers to, without their modules."""
        bound = {each.selector for each in self.bindings}
        return {name.split(".")[-1] for name in bound | self.references.names}

    @property
    def imports(self) -> list[str]:
        """The modules that it imports."""
        kind = config_parser.ImportStatement
        modules = [each.module for each in self.statements if isinstance(each, kind)]
        return [module for module in modules if module != "__gin__.dynamic_registration"]


def _open_gin(path: str) -> TextIO:
    """Opens a gin file as UTF-8 in any locale, with or without a byte order mark."""
    return open(path, encoding="utf-8-sig")


def search_in(folders: Sequence[str]) -> None:
    """Makes gin look for a file in the working folder, then in these folders, then in what ships.

    A file that ships is known as gin/runs/tiny.gin and as runs/tiny.gin.
    """
    places = ["", *folders, str(shipped.ROOT), str(shipped.ROOT / "gin")]
    gin_config._LOCATION_PREFIXES[:] = places  # its public function only adds to them
    gin_config._FILE_READERS[:] = [(_open_gin, os.path.isfile)]


def full_name(name: str) -> str:
    """Returns the path of a gin file that ships, by its stem; any other name as it is.

    A run wins over a size of the same stem. Raises ValueError if other files share it.
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
    """Returns the path of a gin file, where gin finds it; FileNotFoundError if it is nowhere."""
    prefixes = [""] if os.path.isabs(name) else gin_config._LOCATION_PREFIXES
    for prefix in prefixes:
        if os.path.isfile(path := os.path.join(prefix, name)):
            return path
    places = ", ".join(prefix or "." for prefix in prefixes)
    raise FileNotFoundError(
        f"no gin file {name!r} in {places}: correct the name, or add --gin_search_paths=FOLDER"
        f"{did_you_mean(name, shipped_files())}"
    )


def shipped_files() -> list[str]:
    """Returns the names of the gin files that ship: by path, by path in gin/, and by stem."""
    names = []
    for path in sorted((shipped.ROOT / "gin").rglob("*.gin")):
        names += [str(path.relative_to(shipped.ROOT)), str(path.relative_to(shipped.ROOT / "gin"))]
        names.append(path.stem)
    return names


def read_sources(files: Sequence[str], within: tuple[str, ...] = ()) -> list[Source]:
    """Reads gin files, and after each the files that it includes, and runs nothing.

    Raises FileNotFoundError or ValueError, with the file's name, if one is missing, is not UTF-8,
    is not gin, or includes itself.
    """
    sources = []
    for file in files:
        path = _located(file)
        if path in within:
            raise ValueError(f"gin: {path} includes itself, through {' and '.join(within)}")
        try:
            with _open_gin(path) as opened:
                source = Source.parsed(path, opened.read())
        except UnicodeDecodeError as error:
            raise ValueError(f"gin file {path} is not UTF-8 ({error}): save it as UTF-8") from None
        except (SyntaxError, TypeError, tokenize.TokenError) as error:  # TypeError: a key of a dict
            message = _first_line(error.args[0])
            raise ValueError(f"gin file {path}{_line_of(error)}: {message}") from None
        sources.append(source)
        for each in source.statements:
            if isinstance(each, config_parser.IncludeStatement):
                sources += read_sources([each.filename], (*within, path))
    return sources


def _first_line(text: Any) -> str:
    return str(text).split("\n")[0]


def _line_of(error: Exception) -> str:
    """Returns ' line 3' if the error of a parser has a line, else ''."""
    if isinstance(error, tokenize.TokenError):
        return f" line {error.args[1][0]}"
    return f" line {error.lineno}" if isinstance(error, SyntaxError) else ""


# --- checks before anything runs ------------------------------------------------------------------


def check_renamed(sources: Sequence[Source]) -> None:
    """Raises ValueError if a binding has a name of an older version; names the new one."""
    for source in sources:
        for statement in source.bindings:
            old = f"{statement.selector.split('.')[-1]}.{statement.arg_name}"
            if old in RENAMED:
                place = f"{source.path} line {statement.location.line_num}: " if source.path else ""
                flag = "" if source.path else "--gin."
                scope = f"{statement.scope}/" if statement.scope else ""
                raise ValueError(place + _instead(flag + scope, old))


def _instead(prefix: str, old: str) -> str:
    """Returns a sentence that names what replaced a name of an older version."""
    new = RENAMED[old]
    return f"{prefix}{old} is gone: {new}" if " " in new else f"{prefix}{old} is now {prefix}{new}"


def note_hidden(flags: Source) -> None:
    """Prints which flags have no effect in a scope, as the scope has a value of its own."""
    for each in flags.bindings:
        name = f"{each.selector}.{each.arg_name}"
        for (scope, selector), bound in gin_config._CONFIG.items():
            same = selector.rpartition(".")[2] == each.selector.rpartition(".")[2]
            if same and scope and not each.scope and each.arg_name in bound:
                print(
                    f"musicrl: --gin.{name} has no effect in the scope {scope!r}, where a file "
                    f"binds {bound[each.arg_name]!r}: give --gin.{scope}/{name}",
                    file=sys.stderr,
                )


def check_bindings(text: str, files: Sequence[Source] = ()) -> None:
    """Raises ValueError if a gin config has an unread macro, an unread scope or an unbound macro.

    gin itself refuses an unknown configurable or parameter, but takes a misspelt macro or scope
    silently. What one of the `files` reads counts as read, even if a later file binds something
    else in its place: a run that leaves out stages need not unbind their settings.
    """
    # What is bound, and the first place that reads each macro.
    macros, scoped, folders = set(), {}, {}
    readers: dict[str, str] = {}
    for statement in config_parser.ConfigParser(text, here := _References()):
        if not isinstance(statement, config_parser.BindingStatement):
            continue
        place = _place(statement)
        for macro in here.macros - readers.keys():
            readers[macro] = place
        if not statement.arg_name:
            macros.add(statement.selector)
        for scope in statement.scope.split("/") if statement.scope else ():
            (folders if _is_folder(statement.selector) else scoped).setdefault(scope, place)

    # Macros.
    for macro in sorted(readers.keys() - macros):
        if "." not in macro:  # gin.REQUIRED, a constant
            raise ValueError(
                f"gin: {readers[macro]} reads the macro {macro}, which nothing binds: give "
                f"--gin.{macro}=VALUE, or a --gin_file that binds it: sizes are in gin/sizes, "
                f"whole runs in gin/runs{did_you_mean(macro, macros)}"
            )
    read = here.macros.union(*(file.references.macros for file in files))
    for macro in sorted(macros - read):
        raise ValueError(
            f"gin: nothing reads the macro {macro}: remove it, or correct its name"
            f"{did_you_mean(macro, read)}"
        )

    # Scopes. --gin.CODEC=elsewhere replaces @codec/folder(). The bindings of the scope `codec` are
    # then unused, which is no error.
    scopes, named = set(), {macro.lower() for macro in macros}
    for references in (here, *(file.references for file in files)):
        scopes |= references.scopes()
        named |= references.scopes(of_folders=True)
    for places, known in ((scoped, scopes), (folders, named)):
        for scope in sorted(set(places) - known):
            raise ValueError(
                f"gin: nothing reads {places[scope]}: no @{scope}/... is in the config, correct "
                f"the scope's name{did_you_mean(scope, known)}"
            )


def _place(statement: config_parser.BindingStatement) -> str:
    """Returns the name that a statement binds, such as 'r/train_rl.system'."""
    name = f"{statement.scope}/{statement.selector}".strip("/")
    return f"{name}.{statement.arg_name}".rstrip(".")


def warn_of_code(sources: Sequence[Source]) -> bool:
    """Prints on stderr what gin files that do not ship would run; whether reading them alone would.

    A file's `import` runs the module when the file is read. A verb calls references to that module
    and a folder with a TFDS builder.
    """
    runs = False
    for source in sources:
        if Path(source.path).resolve().is_relative_to(shipped.ROOT):
            continue
        names = source.references.names
        called = sorted(name for name in names if name.split(".")[-1] not in known_names())
        for each in source.bindings:
            if each.arg_name == "builder":
                called.append(f"the builder {each.value!r}")
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


# --- flags ----------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads the verb and the flags, and returns with them the gin bindings of the other flags.

    Bindings come from --gin.NAME=VALUE and --PARAMETER=VALUE. With --help, prints it and raises
    SystemExit. Raises SystemExit for an unknown verb or what is no flag, ValueError if a flag is
    unknown to the verb, given twice or not of its parameter's type.
    """
    # What every verb takes.
    parser = argparse.ArgumentParser("musicrl", helps.USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("verb", nargs="?", default="")
    parser.add_argument("--gin_file", action="append", default=[])
    parser.add_argument("--gin_search_paths", action="append", default=[])
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--wandb", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    known, rest = parser.parse_known_args([_with_underscores(argument) for argument in arguments])
    verb = known.verb
    if known.help and (not verb or verb in CONFIGS | VERBS):
        print(helps.of(verb, _bound_by_recipes(verb)) if verb else helps.overview())
        raise SystemExit(0)
    if verb not in VERBS:
        problem = f"{verb!r} is no verb: " if verb else "name a verb: "
        parser.error(
            f"{problem}`musicrl --help` lists them{did_you_mean(verb, [*VERBS, *CONFIGS])}"
        )

    # What this verb takes: all other flags, as gin bindings.
    parameters = {each.name: each for each in signatures.read(VERBS[verb].place).parameters}
    values: dict[str, list[str]] = {}
    while rest:
        flag = rest.pop(0)
        # argparse would need every --gin.NAME in advance.
        name, equals, value = flag.removeprefix("--").partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        if not equals and name in parameters and parameters[name].type == "bool":
            equals, value = "=", "True"
        if not flag.startswith("--") or not name or not equals:
            near = did_you_mean(name, (*parameters, *vars(known)), "--")
            parser.error(f"{flag!r} is not of the form --NAME=VALUE{near}")
        values.setdefault(name, []).append(value)
    return known, _bindings(verb, values)


def _with_underscores(argument: str) -> str:
    """Returns a flag with underscores for the hyphens of its name; anything else as it is."""
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument


def _bindings(verb: str, values: Mapping[str, list[str]]) -> list[str]:
    """Returns the gin bindings of flags, in their order."""
    bindings: dict[str, str] = {}
    # A verb brings jax: import it only for flags that are its own parameters.
    of_verb = any(not name.startswith("gin.") for name in values)
    parameters = inspect.signature(load_verb(verb)).parameters if of_verb else {}
    kinds = annotations(load_verb(verb)) if of_verb else {}
    for name, texts in values.items():
        if name.startswith("gin."):
            key, value = name.removeprefix("gin."), _bare(name, _one(name, texts))
        elif name in parameters:
            key, value = f"{verb}.{name}", _flag_value(name, texts, kinds.get(name, Any))
        elif f"{verb}.{name}" in RENAMED:
            raise ValueError(_instead("--gin.", f"{verb}.{name}").replace(f"--gin.{verb}.", "--"))
        else:
            near = did_you_mean(name, (*parameters, "gin_file", "gin_search_paths"), "--")
            takes = near or f", which takes {', '.join(parameters)}"
            raise ValueError(f"--{name} is no parameter of {verb}{takes}")
        if key in bindings:
            raise ValueError(
                f"{key} is set twice, by --{name} and by another flag: give one of them"
            )
        bindings[key] = f"{key} = {value}"
    return list(bindings.values())


def _bare(name: str, text: str) -> str:
    """Returns the gin text of the value of --gin.NAME: a text may come without inner quotes.

    Raises ValueError for a name that is none, and for a list, a text in quotes or the like that is
    not closed.
    """
    if not re.fullmatch(r"gin\.[A-Za-z_][\w./]*", name):
        raise ValueError(f"--{name}={text} is no gin binding: write --gin.NAME=VALUE")
    if _gin_value(text)[0]:
        return text
    if text.startswith(GIN_BEGINNING):
        raise ValueError(
            f"--{name}={text} is no gin binding: close its quotes and brackets, or quote a text, "
            f'--{name}="{text!r}"'
        )
    return repr(text)


def _one(name: str, texts: list[str]) -> str:
    if len(texts) > 1:
        raise ValueError(f"--{name} is given {len(texts)} times, and takes one value: give it once")
    return texts[0]


def _flag_value(name: str, texts: list[str], annotation: Any) -> str:
    """Returns the gin text of a parameter's flag; several flags become one list or tuple."""
    sequence, element = element_kind(annotation)
    if len(texts) == 1 or sequence is None:
        value = _typed(_one(name, texts), annotation)
        if value is not None:
            return value
    elements = [sequence and _typed(text, element) for text in texts]
    if None in elements:
        text = texts[elements.index(None)]
        raise ValueError(f"--{name}={text}: {name} must be {described(annotation)}")
    begin, end = ("(", ",)") if sequence is tuple else ("[", "]")
    return begin + ", ".join(elements) + end


def _typed(text: str, annotation: Any) -> str | None:
    """Returns the gin text of a value of the annotation's type; None if the text is no such value.

    A text that reads as a value of that type is that value, also a list, a tuple or a dict.
    Otherwise, if the parameter takes texts, it is the text itself: "3" is a prompt, and so are
    "@jazz" and "80's pop".
    """
    is_value, value = _gin_value(text)
    takes_text = fits("", annotation)
    # "@jazz" reads as a reference, and is one only if it calls or is a macro in capitals.
    if is_value and isinstance(value, Reference):
        is_value = bool(GIN_REFERENCE.fullmatch(text)) or not takes_text
    if is_value and fits(value, annotation):
        return text
    return repr(text) if takes_text else None


def _bound_by_recipes(verb: str) -> dict[str, list[str]]:
    """Returns {gin name: the files that ship and bind it}, without the stages of other verbs."""
    root = shipped.ROOT / "gin"
    files: dict[str, list[str]] = {}
    stages: dict[str, set[str]] = {}  # the verbs of a stage's name
    for path in sorted(root.rglob("*.gin")):
        source = Source.parsed(str(path), path.read_text(encoding="utf-8"))
        for reference in source.references.scoped:
            scope, _, name = reference.partition("/")
            if name in VERBS:
                stages.setdefault(scope, set()).add(name)
        for key in dict.fromkeys(map(_place, source.bindings)):
            files.setdefault(key, []).append(str(path.relative_to(root)))
    bound = {}
    for key, names in files.items():
        scope = key.partition("/")[0]
        if "." in key and verb in stages.get(scope, (verb,)):
            bound[key] = names
    return bound


# --- settings -------------------------------------------------------------------------------------


class _Configurable(NamedTuple):
    """A verb or a config that a run refers to: its name with scopes, itself, what gin binds."""

    name: str
    called: Callable
    bound: dict[str, Any]


def _configurables(verb: str) -> Iterator[_Configurable]:
    """Yields a verb, and then everything that its settings refer to, each once in every scope."""
    waiting: list[tuple[tuple[str, ...], str, Callable]] = []
    waiting.append(((), f"musicrl.{verb}", load_verb(verb)))
    places = set()
    while waiting:
        scope, selector, called = waiting.pop(0)
        if (scope, selector) in places:
            continue
        places.add((scope, selector))
        bound = gin.get_bindings("/".join((*scope, selector)), resolve_references=False)
        yield _Configurable("/".join((*scope, selector.split(".")[-1])), called, bound)
        for reference in _references(list(bound.values())):
            # gin passes a scope on to references that open none.
            part = tuple(reference.scopes) or scope
            waiting.append((part, reference.configurable.selector, reference.configurable.wrapped))


def check_required(verb: str) -> None:
    """Raises ValueError if a parameter of the verb itself that has no default is not set."""
    bound = gin.get_bindings(f"musicrl.{verb}", resolve_references=False)
    for name, parameter in inspect.signature(load_verb(verb)).parameters.items():
        if parameter.default is not inspect.Parameter.empty or name in bound:
            continue
        if verb in ("run", "plan"):
            raise ValueError(
                f"{name} is not set: give --gin_file=FILE, a run of gin/runs, or a recipe of "
                "gin/experiments with a size of gin/sizes"
            )
        raise ValueError(
            f"{name} is not set: give --{name}=VALUE, or run this stage of a gin file's run by "
            "`musicrl run --only=STAGE --gin_file=FILE`"
        )


def check_settings(verb: str, bindings: Sequence[str] = ()) -> None:
    """Raises ValueError if a setting of the verb, or of what it refers to, is missing or mistyped.

    gin itself finds that out when the configurable is called, which may be after an hour of a run.
    `bindings` are those of flags: one that no setting of the verb refers to would change nothing.
    """
    reached = list(_configurables(verb))
    # The verb itself, number 0, is checked by `check_required`.
    for number, (name, called, bound) in enumerate(reached):
        kinds = annotations(called)
        for parameter in inspect.signature(called).parameters.values():
            key = f"{name}.{parameter.name}"
            if parameter.name in bound:
                value, kind = _resolved(bound[parameter.name]), kinds.get(parameter.name, Any)
                if not fits(value, kind):
                    raise ValueError(f"{key} = {reprlib.repr(value)} must be {described(kind)}")
            elif parameter.default is inspect.Parameter.empty and number:
                raise ValueError(f"{key} is not set: give --gin.{key}=VALUE")
    _check_used(verb, bindings, [each.name for each in reached])


def _check_used(verb: str, bindings: Sequence[str], reached: Sequence[str]) -> None:
    """Raises ValueError if a flag binds a parameter of what the verb does not refer to."""
    for binding in bindings:
        key = binding.partition(" = ")[0]
        *scope, name = key.split("/")
        selector, _, parameter = name.rpartition(".")
        selector = selector.split(".")[-1]
        same = [each.split("/") for each in reached if each.split("/")[-1] == selector]
        if parameter and selector and not any(set(scope) <= set(each[:-1]) for each in same):
            raise ValueError(
                f"--gin.{key} changes nothing: no setting of {verb} refers to @{selector}(); bind "
                f"it to a parameter, as --PARAMETER=@{selector}(), or remove the flag"
            )


def _resolved(value: Any) -> Any:
    """Returns a bound value with macros, however deep, replaced by what they are bound to.

    Other references become a `Reference` with the class that they call.
    """
    if isinstance(value, gin_config.ConfigurableReference):
        configurable = value.configurable
        # An unbound macro has no type, and fits anything: `check_bindings` refuses it.
        if configurable.selector == MACRO:
            bound = gin.get_bindings(value.scoped_selector, resolve_references=False)
            return _resolved(bound["value"]) if "value" in bound else Reference(repr(value))
        reference = Reference(repr(value))
        if value.evaluate and isinstance(configurable.wrapped, type):
            reference.target = configurable.wrapped
        return reference
    if isinstance(value, dict):
        return {_resolved(key): _resolved(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(_resolved, value))
    return value


def _references(value: Any) -> Iterator[gin_config.ConfigurableReference]:
    """Yields the gin references in a value, however deep in tuples, lists and dicts."""
    if isinstance(value, gin_config.ConfigurableReference):
        yield value
    elif isinstance(value, dict):
        yield from _references(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _references(part)


def add_missing_bindings(sources: Sequence[Source], bindings: list[str]) -> list[str]:
    """Adds to a plan's bindings the folders and data that its files read and a plan does not need.

    Returns the gin files to add: the paper's size if no size is given.
    """
    bound = {binding.partition(" = ")[0] for binding in bindings}
    read = set()
    for source in sources:
        read |= source.references.macros
        bound |= {each.selector for each in source.bindings if not each.arg_name}
    for name, value in NEEDED_BY_A_RUN.items():
        if name in read - bound:
            bindings.append(f"{name} = {value}")
    if TOKENIZERS in bound:
        bindings.append(f"{TOKENIZERS} = None")  # hashes of models that may not be there yet
    return [] if SIZE in bound else [BASE_SIZE]


def configure(flags: argparse.Namespace, bindings: list[str]) -> bool:
    """Reads all settings into gin and checks their names; False if that stops at a warning."""
    # Read the files, and run nothing of theirs.
    search_in([path for paths in flags.gin_search_paths for path in paths.split(",") if path])
    flags.gin_file = [full_name(name) for name in flags.gin_file]
    from_flags = Source.parsed("", "\n".join(bindings))
    files = [*flags.gin_file, *([BASE_SIZE] if flags.verb == "plan" else [])]
    sources = read_sources(files)
    check_renamed([*sources, from_flags])
    if flags.dry_run and warn_of_code(sources):
        print("musicrl: nothing was imported, so that nothing more can be checked", file=sys.stderr)
        return False

    # Register what they name, and let gin read them.
    register({flags.verb, *from_flags.names.union(*(source.names for source in sources))})
    if flags.verb == "config":  # of another verb
        own = [str(each.value) for each in from_flags.bindings if each.selector == "config"]
        register({"run", *own})
    if flags.verb == "plan":  # without the base size, which was read for its names
        sources = read_sources(flags.gin_file)
        flags.gin_file += add_missing_bindings(sources, bindings)
        sources = read_sources(flags.gin_file)
    gin.parse_config_files_and_bindings(flags.gin_file, bindings, finalize_config=False)
    check_required(flags.verb)
    if flags.verb != "config":  # which also lists what is not set yet
        check_bindings(gin.config_str(), sources)
        gin.finalize()
    return True


def config(verb: str = "run", json: bool = False) -> None:
    """Prints every setting of a verb, and of all that it refers to, as a gin file.

    A setting that no file and no flag binds is a comment with its default.

    Args:
      verb: the verb whose settings are listed.
      json: prints JSON with complete docstrings: a list of objects with `name`, `type`, `default`,
        `bound` (null if there is none), `value` (`bound` with its macros resolved) and `doc`.

    Raises:
      ValueError: there is no such verb.
    """
    if verb not in VERBS:
        raise ValueError(f"verb={verb!r} is no verb{did_you_mean(verb, VERBS)}")
    listed = []
    for (scope, selector), bound in gin_config._CONFIG.items():
        # Macros first: they are what most recipes leave to set.
        if selector == MACRO:
            listed.append(_setting(Parameter(scope, "macro", None, ""), scope, bound, "value"))
    for name, called, bound in _configurables(verb):
        if called is not gin_config.macro:
            for each in settings.parameters(called):
                listed.append(_setting(each, f"{name}.{each.name}", bound, each.name))
    print(settings.as_json(listed) if json else settings.as_gin(listed))


def _setting(parameter: Parameter, name: str, bound: Mapping[str, Any], key: str) -> Setting:
    """Returns a parameter with its gin name and with bound[key], if gin binds it."""
    _, kind, default, doc = parameter
    if key not in bound:
        return Setting(name, kind, default, None, default, doc)
    return Setting(name, kind, default, repr(bound[key]), repr(_resolved(bound[key])), doc)


def _save_config(begun: bool) -> None:
    """Writes config.gin to MODEL_DIR, if that is bound; at the end also what of it was used.

    At the beginning an older config stays: the run may yet be refused.
    """
    from musicrl_jax.core import hosts

    try:
        directory = Path(gin.query_parameter("MODEL_DIR/macro.value"))
    except ValueError:
        return
    directory.mkdir(parents=True, exist_ok=True)
    if not hosts.first():
        return
    if not begun or not (directory / "config.gin").exists():
        (directory / "config.gin").write_text(gin.config_str(), encoding="utf-8")
    if not begun:
        operative = gin.operative_config_str()
        (directory / "operative_config.gin").write_text(operative, encoding="utf-8")


# --- the command ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status.

    As a command, without `arguments`, this is one process of a run.
    """
    # Before anything else, since a shell waits for the completions at each key press.
    if "_ARGCOMPLETE" in os.environ and arguments is None:
        from musicrl_jax.command import completion

        completion.complete(shipped_files())
    words = sys.argv[1:] if arguments is None else arguments
    gin.clear_config()  # of an earlier call in this process
    try:
        flags, bindings = parse(words)
        if not configure(flags, bindings):
            return 1
        check_settings(flags.verb, bindings if flags.verb != "config" else ())
        note_hidden(Source.parsed("", "\n".join(bindings)))
        if flags.wandb:
            extras.check("--wandb", "wandb", "wandb")
        if flags.dry_run:
            print(gin.config_str())
    # Mistakes of the user.
    except WRONG_SETTING as error:
        verb = next((word for word in words if word in VERBS), "")
        print(f"musicrl {verb}: {_sentence(error)}", file=sys.stderr)
        return 1
    if flags.dry_run:
        return 0
    if flags.wandb:
        os.environ["MUSICRL_WANDB"] = "1"  # core.metrics reads it
    return _do(flags.verb, as_command=arguments is None)


def _do(name: str, as_command: bool) -> int:
    """Runs a verb with its settings from gin, and returns the exit status."""
    import jax

    from musicrl_jax.core import compilation_cache, hosts, sharding

    sharding.reserve_threads()
    verb = gin.get_configurable(f"musicrl.{name}")
    if as_command and name != "plan":  # which reads what XLA says while it compiles
        compilation_cache.enable()
    try:
        if not VERBS[name].needs_run:
            verb()
            return 0
        if as_command:
            hosts.join()
        _save_config(begun=True)
        verb()
        _save_config(begun=False)

    # Mistakes of the user.
    except WRONG_USE as error:
        print(f"musicrl {name}: {_sentence(error)}", file=sys.stderr)
        return 1

    # A request to stop: the run goes on when it is started again.
    except hosts.Preempted as stop:
        print(f"musicrl {name}: {stop}", file=sys.stderr)
        if as_command:
            hosts.end(hosts.AGAIN)
        return hosts.AGAIN

    # A device without memory, or another host that is lost.
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
        message = f"musicrl {name}: another host is lost; start all of them again: {error}"
        print(message, file=sys.stderr, flush=True)
        # An ordinary exit would wait for the other host.
        os._exit(hosts.AGAIN if hosts.stop_requested() else hosts.LOST)
    return 0


def _sentence(error: Exception) -> str:
    """Returns an error's message without what gin and the operating system add to it.

    If gin does not know a name in it, the nearest right name is added.
    """
    message = GIN_CALL.sub("", str(error))
    place = GIN_PLACE.search(message)
    message = re.sub(r"^\[Errno \d+\] ", "", GIN_PLACE.sub("", message)).strip()
    message = message or type(error).__name__
    if near := _nearest(message):
        message = message.rstrip(".") + near
    if place is None:
        return message
    file, line, text = place.groups()
    return f"{file} line {line}: {message}" if file else f"{message.rstrip('.')}: {text.strip()}"


def _nearest(message: str) -> str:
    """Returns '; did you mean NAME?' for a message of gin about a name that it does not know."""
    if match := UNKNOWN_NAME.search(message):
        return did_you_mean(re.split("[./]", match[1])[-1], known_names())
    if match := UNKNOWN_PARAMETER.search(message):
        name = match[1].split(".")[-1]
        if name in VERBS or name in CONFIGS:
            parameters = signatures.read(place_of(name)).parameters
            return did_you_mean(match[2], [each.name for each in parameters])
    return ""


if __name__ == "__main__":
    # By the module's own name, under which `config` is found: gin takes each verb once.
    from musicrl_jax import cli

    sys.exit(cli.main())
