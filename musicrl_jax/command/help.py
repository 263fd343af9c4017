"""Writes `musicrl --help`, `musicrl VERB --help` and `musicrl CONFIG --help`."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from musicrl_jax.command import signatures
from musicrl_jax.command.names import CONFIGS, VERBS, place_of
from musicrl_jax.command.signatures import Parameter

WIDTH = 100
USAGE = "musicrl VERB [--gin_file=FILE] [--gin.NAME=VALUE] [--PARAMETER=VALUE]"
FLAGS = """\
--gin_file=FILE: a gin file, by its path or, if it ships, by its stem; may be repeated
--gin.NAME=VALUE: binds a gin name: a MACRO, VERB.PARAMETER, CONFIG.FIELD or SCOPE/CONFIG.FIELD
--gin_search_paths=DIR,DIR: folders to look for gin files in; may be repeated
--dry_run: prints the config, checks it, and stops
--wandb: logs training to Weights & Biases too; its own variables, as WANDB_MODE=offline, hold
--help: prints what a verb does and takes"""
OVERVIEW = """\
Flags of every verb:
{flags}

A space may replace the equals sign, and a hyphen an underscore in a flag's name. A flag that takes
several values, such as --prompt of generate, may be repeated. Shell completion:
eval "$(register-python-argcomplete musicrl)"."""


def overview() -> str:
    """Returns the help of the command: every verb in one line, in the order of the work."""
    verbs = [f"{name:<12}{verb.purpose}" for name, verb in VERBS.items()]
    flags = "\n".join(_wrapped(line, "  ", "      ") for line in FLAGS.splitlines())
    head = f"usage: {USAGE}\n\nMusicRL-JAX finetunes text-to-music models on what listeners like."
    head += "\n\nStart with `musicrl run --gin_file=quickstart`. `musicrl VERB --help` says more."
    return f"{head}\n\n{_section('Verbs', verbs)}\n\n{OVERVIEW.format(flags=flags)}"


def of(name: str, bound: Mapping[str, Sequence[str]]) -> str:
    """Returns the help of a verb or a config.

    Args:
      name: of the verb or the config.
      bound: the gin files that bind a name, such as {'r/train_rl.system': ['runs/tiny.gin']}.
    """
    # What it is for, and how it is called.
    verb = VERBS.get(name)
    signature = signatures.read(place_of(name))
    parts = [signature.doc]
    if verb:
        examples = [f"musicrl {example}" for example in verb.examples]
        parts = [f"usage: {USAGE.replace('VERB', name)}", *parts, _section("Examples", examples)]

    # What it takes, and what the configs that it takes take.
    form = "--{}" if verb else "--gin." + name + ".{}"
    parts.append(_parameters("Parameters", signature.parameters, form))
    configs = list(_configs_of(signature.parameters, {name}))
    for config in configs:
        title = f"{config}: set --gin.{config}.FIELD=VALUE, and pass it as @{config}()"
        parts.append(_parameters(title, signatures.read(CONFIGS[config]).parameters, "{}"))

    # Where recipes set it.
    lines = []
    for key, files in bound.items():
        if re.split(r"[/.]", key)[-2] in (name, *configs):
            lines.append(f"{key:<40} {', '.join(files)}")
    if lines:
        parts.append(_section("Gin names that shipped files bind", lines))
    return "\n\n".join(parts)


def _configs_of(parameters: Sequence[Parameter], listed: set[str]) -> Iterator[str]:
    """Yields the configs that annotations name, and those of their fields, each once."""
    # By name, since annotations are source here.
    for parameter in parameters:
        for name in re.findall(r"\w+", parameter.type):
            if name in CONFIGS and name not in listed:
                listed.add(name)
                yield name
                yield from _configs_of(signatures.read(CONFIGS[name]).parameters, listed)


def _derived(parameter: Parameter) -> list[str]:
    """Returns the configs whose class derives from the one that a parameter takes."""
    names = re.findall(r"\w+", parameter.type)
    derived = []
    for config, place in CONFIGS.items():
        if any(base.partition(":")[2] in names for base in signatures.parents(place)):
            derived.append(f"@{config}()")
    return derived


def _parameters(title: str, parameters: Sequence[Parameter], form: str) -> str:
    """Returns a section of parameters: name, type and default, and below it what they are for."""
    lines = []
    for parameter in parameters:
        default = "required" if parameter.default is None else f"default {parameter.default}"
        lines.append(f"{form.format(parameter.name)}: {parameter.type}, {default}")
        # A base class, such as an objective, is no config: name those that derive from it.
        doc = parameter.doc
        if derived := _derived(parameter):
            doc += f" One of {', '.join(derived)}; `musicrl NAME --help` prints its fields."
        if doc:
            lines.append(_wrapped(doc, "    ", "    "))
    return _section(title, lines)


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(textwrap.indent(line, "  ") for line in lines)])


def _wrapped(text: str, first: str, rest: str) -> str:
    return textwrap.fill(text, WIDTH - 2, initial_indent=first, subsequent_indent=rest)
