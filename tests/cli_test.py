"""Every shipped gin file resolves, and what gin would take in silence is an error."""

import re
from pathlib import Path

import pytest

import gin
from musicrl_jax import cli

ROOT = Path(__file__).parents[1]
RUNS = sorted((ROOT / "gin").glob("runs/*.gin")) + sorted((ROOT / "gin").glob("experiments/*.gin"))


@pytest.fixture(autouse=True)
def clean():
    gin.clear_config()
    yield
    gin.clear_config()


def musicrl(*arguments):
    return cli.main(arguments)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_resolves(path, capsys):
    assert musicrl("run", f"--gin_file={path}", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "run.stages" in printed
    # Every configurable that a binding asks for can be built: nothing required is missing.
    for name in re.findall(r"^(\w+Config)\.\w+ = ", printed, flags=re.MULTILINE):
        gin.get_configurable(f"musicrl.{name}")()


def test_files_that_are_no_runs_are_included_by_one():
    texts = "".join(path.read_text() for path in (ROOT / "gin").rglob("*.gin"))
    for path in (ROOT / "gin").rglob("*.gin"):
        if path not in RUNS:
            assert f"include '{path.relative_to(ROOT)}'" in texts, f"nothing includes {path}"


@pytest.mark.parametrize(
    ("binding", "complaint"),
    [
        ("--gin.trian.steps=3", "trian"),
        ("--gin.train.stpes=3", "stpes"),
        ("--gin.MODLE_DIR='/x'", "nothing reads the macro MODLE_DIR"),
        ("--gin.codek/train.steps=3", "nothing reads codek/train.steps"),
        ("--gin.train.steps=%NOWHERE", "NOWHERE"),
        ("--stpes=3", "stpes"),
    ],
)
def test_names_that_nothing_knows_are_errors(binding, complaint, capsys):
    assert musicrl("run", f"--gin_file={ROOT}/gin/runs/tiny.gin", binding, "--dry_run") == 1
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("macro", ["VOCABULARY", "CODEC", "TOKENS", "RL", "EVALUATION"])
def test_any_folder_may_lie_elsewhere(macro):
    assert musicrl("run", f"--gin_file={ROOT}/gin/runs/tiny.gin", f"--gin.{macro}='/elsewhere'", "--dry_run") == 0


def test_a_missing_gin_file_is_named(capsys):
    assert musicrl("run", "--gin_file=gin/runs/nowhere.gin") == 1
    assert "nowhere.gin" in capsys.readouterr().err


def test_flags_are_bindings_of_the_verb():
    flags, bindings = cli.parse(["generate", "--prompt=a fast reel", "--seed=3", "--gin.X='y'", "--clip_seconds=2.0"])
    assert flags.verb == "generate"
    assert bindings == [
        "generate.prompt = 'a fast reel'",
        "generate.seed = 3",
        "X = 'y'",
        "generate.clip_seconds = 2.0",
    ]


@pytest.mark.parametrize("prompt", ["80's synth pop", "'tis a reel", "3", 'a "slow" air', "медленно", "x = (", ""])
def test_any_prompt_stays_a_text(prompt):
    _, (binding,) = cli.parse(["generate", f"--prompt={prompt}"])
    gin.parse_config(binding.replace("generate.prompt", "TEXT"))
    assert gin.query_parameter("TEXT/macro.value") == prompt


@pytest.mark.parametrize("verb", ["train", "generate", "build"])
def test_a_verb_names_what_it_lacks(verb, capsys):
    assert musicrl(verb) == 1
    assert "is not set: give --" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["prompt", "-prompt=x", "--prompt"])
def test_what_is_no_flag_is_refused(argument):
    with pytest.raises(SystemExit):
        cli.parse(["generate", argument])


def test_an_unknown_verb_is_refused():
    with pytest.raises(SystemExit):
        cli.parse(["sing"])
