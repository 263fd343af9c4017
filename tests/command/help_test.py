"""Help of the command: every verb, every parameter, examples that are taken."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import gin
from musicrl_jax import cli
from musicrl_jax.command import help as helps
from musicrl_jax.command import signatures
from musicrl_jax.command.names import CONFIGS, VERBS, did_you_mean, place_of

ROOT = Path(__file__).parents[2]
EXAMPLES = [example for verb in VERBS.values() for example in verb.examples]


@pytest.fixture(autouse=True)
def no_config():
    gin.clear_config()
    yield
    gin.clear_config()


def help_of(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([name, "--help"])
    return capsys.readouterr().out


def test_the_overview_names_every_verb_in_one_line(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    overview = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"\n  {name:<12}{verb.purpose}\n" in overview and len(verb.purpose) < 90
    assert list(VERBS).index("train") < list(VERBS).index("train_rl") < list(VERBS).index("serve")
    assert max(map(len, overview.splitlines())) <= helps.WIDTH


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_prints_its_signature_its_docstring_and_examples(verb, capsys):
    text = help_of(verb, capsys)
    function = cli._imported(place_of(verb))
    assert inspect.getdoc(function).splitlines()[0] in text
    documented = "Args:" in inspect.getdoc(function)
    for name, parameter in inspect.signature(function).parameters.items():
        line, words = re.findall(rf"^  --{name}: (.*)\n( {{6}})?", text, flags=re.MULTILINE)[0]
        assert ("required" in line) == (parameter.default is parameter.empty)
        assert words or not documented, f"the docstring says nothing of {name}"
    for example in VERBS[verb].examples:
        assert f"  musicrl {example}\n" in text


@pytest.mark.parametrize("name", [*VERBS, *CONFIGS])
def test_a_signature_that_is_read_from_source_is_the_function_s_own(name):
    place = place_of(name)
    called = cli._imported(place)
    module = vars(importlib.import_module(place.partition(":")[0]))
    read = {each.name: each for each in signatures.read(place).parameters}
    parameters = inspect.signature(called).parameters
    assert list(read) == list(parameters)
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty:
            assert read[key].default is None
        elif repr(parameter.default) != "<factory>":
            assert eval(read[key].default, dict(module)) == parameter.default


def test_help_of_a_verb_prints_fields_of_its_configs_and_names_that_recipes_bind(capsys):
    text = help_of("train_rl", capsys)
    assert "\n  kl_strength: float, required\n      a in J" in text
    assert "\n  warmup_steps: int, default 10\n" in text
    assert re.search(r"\n  r/train_rl.system +experiments/musicrl_r.gin\n", text)
    assert re.search(r"\n  RLConfig.kl_strength +musicrl.gin, runs/demo.gin", text)
    assert "codec/" not in text and "CodecObjective" not in text
    assert "One of @CodecObjective(), " in help_of("train", capsys)
    assert "--gin.SoundStreamConfig.strides: " in help_of("SoundStreamConfig", capsys)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_a_command_that_the_verb_takes(example, capsys):
    words = shlex.split(example)
    assert cli.main([*words, "--dry_run"]) == 0, capsys.readouterr().err


def test_entries_of_a_docstring_are_read_in_google_s_style():
    docstring = """Does it.

    Args:
      a, b: two things: of one kind,
        over two lines.
      c: one.

    Raises:
      d: never.
    """
    entries = signatures.documented(inspect.cleandoc(docstring))
    two = "two things: of one kind, over two lines."
    assert entries == {"a": two, "b": two, "c": "one."}
    assert signatures.documented("Attributes are none.") == {}
    with pytest.raises(LookupError, match="defines neither a function nor a class nothing"):
        signatures.read("musicrl_jax.train:nothing")


def test_a_near_name_is_suggested_and_a_far_one_is_not():
    assert did_you_mean("trian", VERBS) == "; did you mean train?"
    assert did_you_mean("sede", ["seed"], "--") == "; did you mean --seed?"
    assert did_you_mean("xylophone", VERBS) == ""


@pytest.mark.parametrize("arguments", [["--help"], ["train_rl", "--help"]])
def test_help_imports_neither_jax_nor_numpy_and_takes_little_time(arguments):
    script = """
import contextlib, sys, time
from musicrl_jax import cli
with contextlib.suppress(SystemExit):
    cli.main(sys.argv[1:])
print("imported:", sorted({"jax", "numpy", "musicrl_jax.train_rl"} & set(sys.modules)))
print("seconds:", time.process_time())
"""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    *_, imported, seconds = done.stdout.splitlines()
    assert imported == "imported: []"
    assert float(seconds.removeprefix("seconds: ")) < (0.5 if arguments == ["--help"] else 1.5)
