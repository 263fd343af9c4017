"""Every shipped gin file resolves, and what gin would take in silence is an error."""

import re
from pathlib import Path

import pytest

import gin
from musicrl_jax import cli

ROOT = Path(__file__).parents[1]
RUNS = sorted((ROOT / "gin").glob("runs/*.gin"))


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
    for scope, name in re.findall(r"^((?:\w+/)?)(\w+Config)\.\w+ = ", printed, flags=re.MULTILINE):
        with gin.config_scope(scope.rstrip("/") or None):
            gin.get_configurable(f"musicrl.{name}")()  # its own checks pass


@pytest.mark.parametrize("size", ["tiny", "demo", "base", None])
@pytest.mark.parametrize("recipe", sorted((ROOT / "gin").glob("experiments/*.gin")), ids=lambda path: path.stem)
def test_every_recipe_resolves_at_every_size(recipe, size, capsys):
    files = [recipe] if size is None else [recipe, ROOT / f"gin/sizes/{size}.gin"]
    macros = {"MODEL_DIR": "'/x'", "DATA_DIR": "'/x'", "DATA_CONFIG": "'x'", "DATASETS": {"x/x": 1.0}}
    macros |= {"PROMPT_DATASETS": ("x/x",)} | ({} if size else {"SAMPLE_RATE_HZ": 24_000, "CLIP_SECONDS": 30.0})
    flags = [f"--gin_file={file}" for file in files] + [f"--gin.{name}={value}" for name, value in macros.items()]
    assert (
        musicrl(
            "run", *flags, "--gin.vocabulary.size=100", "--gin.train.steps=1", "--gin.train.batch_size=1", "--dry_run"
        )
        == 0
    ), capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "gin").glob("ablations/*.gin")), ids=lambda path: path.stem)
def test_every_ablation_resolves(path, capsys):
    assert musicrl("run", f"--gin_file={ROOT}/gin/runs/demo.gin", f"--gin_file={path}", "--dry_run") == 0
    assert f"preference/folder.name = 'preference_{path.stem}'" in capsys.readouterr().out


def test_files_that_are_no_runs_are_included_by_one():
    texts = "".join(path.read_text() for path in (ROOT / "gin").rglob("*.gin"))
    for path in (ROOT / "gin").rglob("*.gin"):
        if path not in RUNS and path.parent.name != "ablations" and path.relative_to(ROOT) != Path(cli.BASE_SIZE):
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
        ("--gin.tokens/Clips.crop_seconds=1.0", "nothing reads tokens/Clips.crop_seconds"),
        ("--gin.codek/folder.name='x'", "nothing reads codek/folder.name"),
    ],
)
def test_names_that_nothing_knows_are_errors(binding, complaint, capsys):
    assert musicrl("run", f"--gin_file={ROOT}/gin/runs/tiny.gin", binding, "--dry_run") == 1
    assert complaint in capsys.readouterr().err


def included(path):
    """A gin file with all that it includes, in place."""
    text = (ROOT / path).read_text()
    return re.sub(r"^include '(.*)'$", lambda found: included(found[1]), text, flags=re.MULTILINE)


def without(name, tmp_path):
    """The tiny run in one file, without the bindings of `name`."""
    path = tmp_path / "run.gin"
    text = included("gin/runs/tiny.gin")
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith(f"{name} ")))
    return "run", f"--gin_file={path}", "--dry_run"


@pytest.mark.parametrize("name", ["data/build.builder", "vocabulary/vocabulary.size", "votes/collect.pairs"])
def test_the_name_of_every_stage_is_its_scope(name, tmp_path, capsys):
    """A binding under that scope is read; without one, the stage lacks a parameter."""
    run = without(name.split("/")[1], tmp_path)
    assert musicrl(*run) == 1
    assert f"{name} is not set: give --gin.{name}=VALUE" in capsys.readouterr().err
    assert musicrl(*run, f"--gin.{name}=1") == 0


@pytest.mark.parametrize("name", ["train_rl.kl_strength", "Clips.data_dir", "codec/train.objective", "MODEL_DIR"])
def test_what_a_later_stage_lacks_is_said_at_once(name, tmp_path, capsys):
    assert musicrl(*without(name, tmp_path)) == 1
    assert re.split("[./]", name)[-1] in capsys.readouterr().err


@pytest.mark.parametrize("macro", ["VOCABULARY", "CODEC", "TOKENS", "VOTES", "RU", "EVALUATION"])
def test_any_folder_may_lie_elsewhere(macro):
    assert musicrl("run", f"--gin_file={ROOT}/gin/runs/tiny.gin", f"--gin.{macro}='/elsewhere'", "--dry_run") == 0


def test_a_run_may_leave_out_stages_without_unbinding_what_is_theirs(tmp_path, capsys):
    """What an included file reads counts as read; what no file reads does not."""
    path = tmp_path / "less.gin"
    path.write_text("include 'gin/runs/tiny.gin'\nMODELS = {'data': @data/build}\n")
    assert musicrl("run", f"--gin_file={path}", "--dry_run") == 0
    assert "codec/train.steps" not in capsys.readouterr().err
    assert musicrl("run", f"--gin_file={path}", "--gin.codex/train.steps=3", "--dry_run") == 1
    assert "nothing reads codex/train.steps" in capsys.readouterr().err


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
    spaced = ["generate", "--prompt", "a fast reel", "--seed", "3", "--gin.X", "'y'", "--clip_seconds=2.0"]
    assert cli.parse(spaced) == (flags, bindings)


@pytest.mark.parametrize(
    "prompt", ["80's synth pop", "'tis a reel", "3", 'a "slow" air', "медленно", "x = (", "", "@jazz", "%x"]
)
def test_any_prompt_stays_a_text(prompt):
    _, (binding,) = cli.parse(["generate", f"--prompt={prompt}"])
    gin.parse_config(binding.replace("generate.prompt", "TEXT"))
    assert gin.query_parameter("TEXT/macro.value") == prompt


@pytest.mark.parametrize("verb", ["train", "generate", "build"])
def test_a_verb_names_what_it_lacks(verb, capsys):
    assert musicrl(verb) == 1
    assert "is not set: give --" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["prompt"],
        ["-prompt=x"],
        ["--prompt"],
        ["--prompt", "--seed=3"],
        ["--seed=3", "x"],
        ["--seed=3", "--", "--prompt=x"],
    ],
)
def test_what_is_no_flag_is_refused(arguments):
    with pytest.raises(SystemExit):
        cli.parse(["generate", *arguments])


def test_an_unknown_verb_is_refused():
    with pytest.raises(SystemExit):
        cli.parse(["sing"])
