"""The `musicrl` command: `musicrl VERB [--gin_file=FILE] [--gin.NAME=VALUE] [--PARAMETER=VALUE]`.

A space does for the equals sign.

This file alone imports gin. Verbs and configs are registered here from outside, so that they stay plain functions and
dataclasses for whoever calls them from Python.
"""

import argparse
import inspect
import os
import re
import sys
import tokenize
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

import gin
from gin import config as gin_config
from gin import config_parser
from musicrl_jax import collect, encode, evaluate, export, generate, pack, plan, run, serve, train, train_rl
from musicrl_jax.arena import audience, listeners, monitor
from musicrl_jax.core import hosts, state, tokens
from musicrl_jax.inputs import build, clips, pretrained, prompts, vocabulary, votes
from musicrl_jax.inputs import tokens as token_data
from musicrl_jax.losses import policy_gradient
from musicrl_jax.models import (
    bert,
    conformer,
    discriminators,
    mulan,
    musiclm,
    musicnn,
    resnet,
    rewards,
    semantic,
    soundstorm,
    soundstream,
    transformer,
)
from musicrl_jax.objectives import codec, dpo, fine, mulan_projections, policy, preference, quality
from musicrl_jax.objectives import mulan as mulan_objective
from musicrl_jax.objectives import semantic as semantic_objective
from musicrl_jax.rl import rewards as reward_terms


def folder(root: str, name: str) -> str:
    """root/name: how gin files name the models of a run, each under a scope of its own."""
    return str(Path(root) / name)


def scaled(steps: int, by: float) -> int:
    """So many steps of the paper's, at least one: how a size shortens all schedules of a recipe alike."""
    if not by > 0:
        raise ValueError(f"scaled.by={by} must be above 0")
    return max(1, round(steps * by))


def first(verb: Callable) -> Callable:
    """A verb that the first host of a run does alone."""
    return plan.recordable(hosts.first_alone(verb))


VERBS: dict[str, Callable] = {
    "run": run.run,
    "plan": plan.plan,
    "build": first(build.prepare),
    "fetch": first(pretrained.fetch),
    "vocabulary": first(vocabulary.build),
    "train": plan.recordable(train.train),
    "encode": first(encode.encode),
    "collect": first(collect.collect),
    "train_rl": plan.recordable(train_rl.train_rl),
    "evaluate": first(evaluate.evaluate),
    "generate": first(generate.generate),
    "export": first(export.export),
    "serve": serve.serve,
    "pack": first(pack.pack),
    "unpack": first(pack.unpack),
}

CONFIGS: tuple[Callable, ...] = (
    folder,
    scaled,
    plan.model_hash,
    state.Optimiser,
    tokens.TokenLayout,
    clips.Clips,
    clips.Ratings,
    prompts.Prompts,
    token_data.Tokens,
    votes.Votes,
    transformer.TransformerConfig,
    conformer.ConformerConfig,
    resnet.ResNetConfig,
    bert.BertConfig,
    musicnn.MusicnnConfig,
    soundstream.SoundStreamConfig,
    discriminators.DiscriminatorsConfig,
    semantic.SemanticConfig,
    mulan.MuLanConfig,
    musiclm.MusicLMConfig,
    soundstorm.SoundStormConfig,
    rewards.QualityConfig,
    rewards.PreferenceConfig,
    codec.CodecObjective,
    semantic_objective.SemanticObjective,
    mulan_objective.MuLanObjective,
    mulan_projections.PretrainedTowers,
    mulan_projections.Heard,
    mulan_projections.MuLanProjectionsObjective,
    policy.PolicyObjective,
    fine.FineObjective,
    quality.QualityObjective,
    preference.PreferenceObjective,
    dpo.DPOObjective,
    listeners.training_panel,
    listeners.judging_panel,
    listeners.monitoring_panel,
    audience.Audience,
    monitor.Monitor,
    policy_gradient.PolicyGradient,
    reward_terms.TextAdherence,
    reward_terms.AcousticQuality,
    reward_terms.UserPreference,
    reward_terms.Mixture,
    serve.ServiceLimits,
)


# Macros that a run needs and a plan does not, and the one that every size binds.
NEEDED_BY_A_RUN = "MODEL_DIR", "DATA_DIR", "DATA_CONFIG", "DATASETS", "PROMPT_DATASETS"
SIZE, BASE_SIZE = "SAMPLE_RATE_HZ", "gin/sizes/base.gin"

# Of a flag that takes a text: a macro, a call, a list or a quoted text; anything else is the text itself.
GIN_TEXT = re.compile(r"""%[A-Z_]+$|@[\w./]+\(\)$|\[|['"]""")


def register() -> dict[str, Callable]:
    """Makes verbs and configs known to gin; the verbs, with their parameters filled from it."""
    for config in CONFIGS:
        gin.external_configurable(config, module="musicrl")
    return {name: gin.external_configurable(verb, name, module="musicrl") for name, verb in VERBS.items()}


class _References(config_parser.ParserDelegate):
    """Notes what a gin text refers to; the scopes of folders apart, since they name no stage."""

    def __init__(self) -> None:
        self.scopes: set[str] = set()
        self.folders: set[str] = set()
        self.macros: set[str] = set()

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
        """Notes every scope on the way to the configurable."""
        *scopes, name = scoped_configurable_name.split("/")
        (self.folders if _is_folder(name) else self.scopes).update(scopes)
        return scoped_configurable_name

    def macro(self, macro_name: str) -> str:
        """Notes the macro."""
        self.macros.add(macro_name)
        return macro_name


def _is_folder(selector: str) -> bool:
    return selector.split(".")[-1] == folder.__name__


def check_bindings(text: str, files: Sequence[str] = ()) -> None:
    """ValueError where a gin config holds what nothing reads: a macro without a use, a scope that no reference opens.

    gin itself refuses an unknown configurable or parameter, but takes a misspelt macro or scope in silence. What one of
    the `files` reads counts as read, also where a later one binds something else in its place: a run that leaves out
    stages need not unbind what is theirs.
    """
    references = _References()
    for file in files:
        list(config_parser.ConfigParser(file, references))
    macros, scoped, folders = set(), {}, {}
    for statement in config_parser.ConfigParser(text, references):
        if not isinstance(statement, config_parser.BindingStatement):
            continue
        if not statement.arg_name:
            macros.add(statement.selector)
        for scope in statement.scope.split("/") if statement.scope else ():
            found = folders if _is_folder(statement.selector) else scoped
            found.setdefault(scope, f"{statement.scope}/{statement.selector}.{statement.arg_name}")
    for macro in sorted(macros - references.macros):
        raise ValueError(f"gin: nothing reads the macro {macro}; remove it, or mend its name")
    # A folder's name has no reader where its macro names a folder elsewhere: --gin.CODEC="'elsewhere'".
    named = references.folders | {macro.lower() for macro in macros}
    for found, known in ((scoped, references.scopes), (folders, named)):
        for scope in sorted(set(found) - known):
            raise ValueError(
                f"gin: nothing reads {found[scope]}: no @{scope}/... stands in the config; mend the scope's name"
            )


def _read_all(parsed: Sequence[gin_config.ParsedConfigFileIncludesAndImports]) -> Iterator[str]:
    """The content of gin files and of all that they include."""
    for file in parsed:
        yield Path(file.filename).read_text()
        yield from _read_all(file.includes)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The verb and the flags; the second part are gin bindings from --gin.NAME=VALUE and --PARAMETER=VALUE."""
    parser = argparse.ArgumentParser(
        prog="musicrl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--gin_file", action="append", default=[], help="a gin file; may be given several times")
    parser.add_argument("--gin_search_paths", default="", help="folders to look for gin files in, comma-separated")
    parser.add_argument("--dry_run", action="store_true", help="print the config, check it, and stop")
    known, rest = parser.parse_known_args(arguments)
    bindings = []
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        if not flag.startswith("--") or not name or not equals:
            parser.error(f"{flag!r} is not of the form --NAME=VALUE")
        if name.startswith("gin."):
            bindings.append(f"{name.removeprefix('gin.')} = {value}")
        else:
            plain = _takes_text(known.verb, name) and not GIN_TEXT.match(value)
            bindings.append(f"{known.verb}.{name} = {repr(value) if plain or not _is_gin_value(value) else value}")
    return known, bindings


def _takes_text(verb: str, name: str) -> bool:
    """Whether a verb's parameter is a text, so that "3" is one too."""
    parameter = inspect.signature(VERBS[verb]).parameters.get(name)
    return parameter is not None and str in (parameter.annotation, *typing.get_args(parameter.annotation))


def _is_gin_value(text: str) -> bool:
    """Whether a flag's value reads as a gin value; if not it is taken as a string."""
    try:
        list(config_parser.ConfigParser(f"x = {text}", _References()))
    except (SyntaxError, tokenize.TokenError):
        return False
    return True


def check_required(verb: str) -> None:
    """ValueError where the verb, or anything that its parameters refer to, lacks a parameter without a default.

    gin itself finds that out when the configurable is called, which in a run may be after an hour.
    """
    waiting: list[tuple[tuple[str, ...], str, Callable]] = [((), f"musicrl.{verb}", VERBS[verb])]
    seen = set()
    while waiting:
        scope, selector, called = waiting.pop()
        if (scope, selector) in seen:
            continue
        seen.add((scope, selector))
        bound = gin.get_bindings("/".join((*scope, selector)), resolve_references=False)
        for parameter in inspect.signature(called).parameters.values():
            if parameter.default is inspect.Parameter.empty and parameter.name not in bound:
                if called is VERBS[verb]:
                    raise ValueError(
                        f"{parameter.name} is not set: give --{parameter.name}=VALUE, or run this stage of a gin "
                        f"file's run by `musicrl run --only=STAGE --gin_file=FILE`"
                    )
                name = "/".join((*scope, selector.split(".")[-1]))
                raise ValueError(f"{name}.{parameter.name} is not set: give --gin.{name}.{parameter.name}=VALUE")
        for reference in _references(list(bound.values())):
            part = tuple(reference.scopes) or scope  # gin passes a scope on to references that open none
            waiting.append((part, reference.configurable.selector, reference.configurable.wrapped))


def _references(value: typing.Any) -> Iterator[gin.config.ConfigurableReference]:
    """The gin references in a value, however deep in tuples, lists and dicts."""
    if isinstance(value, gin.config.ConfigurableReference):
        yield value
    elif isinstance(value, dict):
        yield from _references(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _references(part)


def what_a_plan_leaves_open(files: Sequence[str], bindings: list[str]) -> list[str]:
    """The gin files to add to those of a plan, which is the paper's size where none is given; the names of folders and
    data, which it does without, are added to the bindings."""
    gin.parse_config_files_and_bindings(files, bindings, finalize_config=False)
    bound = {name for name in (*NEEDED_BY_A_RUN, SIZE) if gin.get_bindings(f"{name}/macro")}
    gin.clear_config()
    bindings.extend(f"{name} = '{name.lower()}'" for name in NEEDED_BY_A_RUN if name not in bound)
    return [] if SIZE in bound else [BASE_SIZE]


def _save_config(begun: bool) -> None:
    """Leaves in MODEL_DIR, if there is one, config.gin: what was asked for; and at the end what of it was used.

    At the beginning an older config stays: the run may yet be refused.
    """
    try:
        folder = Path(gin.query_parameter("MODEL_DIR/macro.value"))
    except ValueError:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not hosts.first():
        return
    if not begun or not (folder / "config.gin").exists():
        (folder / "config.gin").write_text(gin.config_str())
    if not begun:
        (folder / "operative_config.gin").write_text(gin.operative_config_str())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; the exit status. As a command, without arguments of its own, this is one process of a run."""
    gin.clear_config()  # what an earlier call in this process asked for is no part of this one
    verbs = register()
    flags, bindings = parse(sys.argv[1:] if arguments is None else arguments)
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    for path in (*filter(None, flags.gin_search_paths.split(",")), Path(__file__).parents[1]):
        gin.add_config_file_search_path(str(path))
    try:
        if flags.verb == "plan":
            flags.gin_file += what_a_plan_leaves_open(flags.gin_file, bindings)
        parsed = gin.parse_config_files_and_bindings(flags.gin_file, bindings)
        check_bindings(gin.config_str(), list(_read_all(parsed)))
        if flags.dry_run:
            print(gin.config_str())
        check_required(flags.verb)
        if flags.dry_run:
            return 0
        if flags.verb in ("plan", "serve"):  # of a run that may never be, or is over
            verbs[flags.verb]()
            return 0
        if arguments is None:
            hosts.join()
        _save_config(begun=True)
        verbs[flags.verb]()
        _save_config(begun=False)
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"musicrl {flags.verb}: {error}", file=sys.stderr)
        return 1
    except hosts.Preempted as stop:
        print(f"musicrl {flags.verb}: {stop}", file=sys.stderr)
        return hosts.AGAIN
    except jax.errors.JaxRuntimeError as error:
        if not hosts.lost(error):
            raise
        told = f"musicrl {flags.verb}: another host is lost; start all of them again: {error}"
        print(told, file=sys.stderr, flush=True)
        os._exit(hosts.LOST)  # what is left to do at an exit would wait for the other host
    return 0


if __name__ == "__main__":
    sys.exit(main())
