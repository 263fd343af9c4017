"""Every shipped gin file resolves, and what gin would take in silence is an error."""

import inspect
import json
import re
import subprocess
import sys
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
        # The length of each finetuning stands in its stage's scope.
        stages = (
            re.findall(r"@(\w+)/train_rl\b", printed) if name == "RLConfig" else [scope.rstrip("/")]
        )
        for stage in stages:
            with gin.config_scope(stage or None):
                gin.get_configurable(f"musicrl.{name}")()  # its own checks pass


@pytest.mark.parametrize("size", ["tiny", "demo", "base", None])
@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "gin").glob("experiments/*.gin")), ids=lambda path: path.stem
)
def test_every_recipe_resolves_at_every_size(recipe, size, capsys):
    files = [recipe] if size is None else [recipe, ROOT / f"gin/sizes/{size}.gin"]
    macros = {
        "MODEL_DIR": "'/x'",
        "DATA_DIR": "'/x'",
        "DATA_CONFIG": "'x'",
        "DATASETS": {"x/x": 1.0},
    }
    macros |= {"PROMPT_DATASETS": ("x/x",)} | (
        {} if size else {"SAMPLE_RATE_HZ": 24_000, "CLIP_SECONDS": 30.0}
    )
    flags = [f"--gin_file={file}" for file in files] + [
        f"--gin.{name}={value}" for name, value in macros.items()
    ]
    assert (
        musicrl(
            "run",
            *flags,
            "--gin.vocabulary.size=100",
            "--gin.train.steps=1",
            "--gin.train.batch_size=1",
            "--dry_run",
        )
        == 0
    ), capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "gin").glob("ablations/*.gin")), ids=lambda path: path.stem
)
def test_every_ablation_resolves(path, capsys):
    assert (
        musicrl("run", f"--gin_file={ROOT}/gin/runs/demo.gin", f"--gin_file={path}", "--dry_run")
        == 0
    )
    assert f"preference/folder.name = 'preference_{path.stem}'" in capsys.readouterr().out


def test_files_that_are_no_runs_are_included_by_one():
    texts = "".join(path.read_text() for path in (ROOT / "gin").rglob("*.gin"))
    for path in (ROOT / "gin").rglob("*.gin"):
        if (
            path not in RUNS
            and path.parent.name != "ablations"
            and path.relative_to(ROOT) != Path(cli.BASE_SIZE)
        ):
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
    path.write_text(
        "\n".join(line for line in text.splitlines() if not line.startswith(f"{name} "))
    )
    return "run", f"--gin_file={path}", "--dry_run"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data/build.builder", "'data/score_clips'"),
        ("vocabulary/vocabulary.size", "1"),
        ("votes/collect.votes_dir", "'/votes'"),
    ],
)
def test_the_name_of_every_stage_is_its_scope(name, value, tmp_path, capsys):
    """A binding under that scope is read; without one, the stage lacks a parameter."""
    run = without(name.split("/")[1], tmp_path)
    assert musicrl(*run) == 1
    assert f"{name} is not set: give --gin.{name}=VALUE" in capsys.readouterr().err
    assert musicrl(*run, f"--gin.{name}={value}") == 0


@pytest.mark.parametrize(
    "name",
    [
        "RLConfig.kl_strength",
        "CollectConfig.pairs",
        "Clips.data_dir",
        "codec/train.objective",
        "MODEL_DIR",
    ],
)
def test_what_a_later_stage_lacks_is_said_at_once(name, tmp_path, capsys):
    assert musicrl(*without(name, tmp_path)) == 1
    assert re.split("[./]", name)[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "macro", ["VOCABULARY", "CODEC", "TOKENIZER", "TOKENS", "BASE", "VOTES", "RU", "EVALUATION"]
)
def test_any_folder_may_lie_elsewhere(macro):
    assert (
        musicrl(
            "run",
            f"--gin_file={ROOT}/gin/runs/tiny.gin",
            f"--gin.{macro}='/elsewhere'",
            "--dry_run",
        )
        == 0
    )


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
    flags, bindings = cli.parse(
        ["generate", "--prompt=a fast reel", "--seed=3", "--gin.X='y'", "--clip_seconds=2.0"]
    )
    assert flags.verb == "generate"
    assert bindings == [
        "generate.prompt = 'a fast reel'",
        "generate.seed = 3",
        "X = 'y'",
        "generate.clip_seconds = 2.0",
    ]
    spaced = [
        "generate",
        "--prompt",
        "a fast reel",
        "--seed",
        "3",
        "--gin.X",
        "'y'",
        "--clip_seconds=2.0",
    ]
    assert cli.parse(spaced) == (flags, bindings)


@pytest.mark.parametrize(
    "prompt",
    ["80's synth pop", "'tis a reel", "3", 'a "slow" air', "медленно", "x = (", "", "@jazz", "%x"],
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


# --- errors of the user: one sentence, no traceback, no config -------------------------------------------------------


def refused(capsys, *arguments):
    """The one line that a wrong command ends with."""
    capsys.readouterr()
    assert musicrl(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"musicrl {arguments[0]}: ") and printed.err.count("\n") == 1, (
        printed.err
    )
    assert not printed.out and "Error" not in printed.err and len(printed.err) < 500
    return printed.err


CLIP = "--system=x", "--prompt=y"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", *CLIP, "--seed=1,2,3"], "--seed=1,2,3: seed must be a whole number"),
        (["generate", *CLIP, "--seed=1.5"], "--seed=1.5: seed must be a whole number"),
        (["generate", *CLIP, "--seed=True"], "seed must be a whole number"),
        (
            ["generate", *CLIP, "--clip_seconds=two"],
            "--clip_seconds=two: clip_seconds must be a number or None",
        ),
        (
            ["generate", *CLIP, "--sede=1"],
            "--sede is no parameter of generate; did you mean --seed?",
        ),
        (["generate", *CLIP, "--seed=1", "--seed=2"], "--seed is given 2 times"),
        (["generate", *CLIP, "--seed=1", "--gin.generate.seed=2"], "generate.seed is set twice"),
        (["generate", *CLIP, "--gin.X=1", "--gin.X=1"], "--gin.X is given 2 times"),
        (["generate", *CLIP, "--gin.MODEL_DIR=runs/foo"], "give|--gin.MODEL_DIR=\"'runs/foo'\""),
        (["generate", *CLIP, "--gin.X=(1,"], "--gin.X=(1, is no gin binding"),
        (
            ["generate", *CLIP, "--gin.generate.seed='3'"],
            "generate.seed = '3' must be a whole number",
        ),
        (["serve", "--bundle=x", "--port=http"], "--port=http: port must be a whole number"),
        (["export", "--system=x", "--chips=two"], "--chips=two: chips must be a whole number"),
        (
            [
                "export",
                "--system=x",
                "--out=y",
                "--clip_seconds=4",
                "--gin.export.platforms='cpu'",
            ],
            "export.platforms = 'cpu' must be a list of text",
        ),
        (["pack", "--models=runs/x", "--out=y"], "models must be a dict of text to text"),
        (
            ["build", "--builder=x", "--config=y", "--data_dir=z", "--gin_file=nowhere.gin"],
            "no gin file 'nowhere.gin'",
        ),
        (
            ["serve", "--bundle=x", "--gin.ServiceLimits.connections=9"],
            "--gin.ServiceLimits.connections changes nothing: no setting of serve refers to",
        ),
        (["run"], "model_dir is not set: give --gin_file=FILE"),
        (["plan"], "stages is not set: give --gin_file=FILE"),
        (["plan", "--topology=v5e:4x4", "--slices=many"], "slices must be a whole number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_sentence(arguments, complaint, capsys):
    assert complaint.removeprefix("give|") in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("binding", "complaint"),
    [
        (
            "--gin.Optimiser.learning_rate='fast'",
            "Optimiser.learning_rate = 'fast' must be a number",
        ),
        (
            "--gin.r/Mixture.weights=(1.0, 2.0)",
            "r/Mixture.weights = (1.0, 2.0) must be a dict of text to number",
        ),
        ("--gin.SAMPLE_RATE_HZ='16k'", "= '16k' must be a whole number"),
        (
            "--gin.SoundStreamConfig.strides=[8, 5, 4, 2]",
            "strides = [8, 5, 4, 2] must be a tuple of whole number",
        ),
        ("--gin.train_rl.prompts=@Clips()", "train_rl.prompts = @Clips() must be Prompts"),
        ("--gin.train.steps=1e3", "train.steps = 1000.0 must be a whole number"),
        (
            "--gin.CLIP_SECONDS=%LENGTH",
            "reads the macro LENGTH, which nothing binds: give --gin.LENGTH=VALUE",
        ),
    ],
)
def test_a_setting_of_the_wrong_type_is_found_before_the_run_begins(binding, complaint, capsys):
    assert musicrl("run", f"--gin_file={ROOT}/gin/runs/tiny.gin", binding) == 1
    printed = capsys.readouterr()
    assert complaint in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_an_unbound_macro_is_named_with_its_reader_and_nothing_else(capsys):
    error = refused(capsys, "run", f"--gin_file={ROOT}/gin/experiments/musicrl_r.gin")
    assert re.search(
        r"gin: [\w/.]+ reads the macro [A-Z_]+, which nothing binds: give --gin", error
    )


def test_an_error_of_a_verb_comes_without_gins_own_words(capsys, tmp_path):
    error = refused(capsys, "generate", f"--system={tmp_path}/nowhere", "--prompt=x")
    assert "no system in" in error and "configurable" not in error


def test_a_device_without_memory_is_one_sentence(capsys, monkeypatch):
    import jax

    def exhausted():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers: ..."
        )

    monkeypatch.setattr(cli.gin, "get_configurable", lambda _: exhausted)
    assert cli._do("generate", as_command=False) == 1
    error = capsys.readouterr().err
    assert (
        "memory is too small: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; lower" in error
    )
    assert error.count("\n") == 1


def test_a_hyphen_does_for_an_underscore_in_every_flag():
    spelt = [
        "generate",
        "--prompts-file=a-b",
        "--gin-file=x.gin",
        "--gin-search-paths=a",
        "--dry-run",
        "--top-k=3",
    ]
    flags, bindings = cli.parse(spelt)
    assert flags.gin_file == ["x.gin"] and flags.gin_search_paths == ["a"] and flags.dry_run
    assert bindings == ["generate.prompts_file = 'a-b'", "generate.top_k = 3"]


def test_a_flag_that_takes_several_values_collects_them_in_order():
    _, bindings = cli.parse(["generate", "--prompt=b", "--seed=1", "--prompt", "3", "--prompt=@a"])
    assert bindings == ["generate.prompt = ['b', '3', '@a']", "generate.seed = 1"]
    assert cli.parse(["export", "--platforms=cpu", "--platforms=cuda"])[1] == [
        "export.platforms = ['cpu', 'cuda']"
    ]
    for flag in ("--platforms=cpu", "--platforms=['cpu']"):
        gin.parse_config(cli.parse(["export", flag])[1][0].replace("export.platforms", "X"))
        assert gin.query_parameter("X/macro.value") == ["cpu"]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["pack", "--models={'ru': 'runs/quickstart/ru'}"], {"ru": "runs/quickstart/ru"}),
        (["export", "--platforms=('cpu', 'cuda')"], ("cpu", "cuda")),
        (["unpack", "--changed=('ru',)"], ("ru",)),
        (["build", "--config={'name': 'mine'}"], {"name": "mine"}),
        (["build", "--config=tiny"], "tiny"),
        (["generate", "--clip_seconds=None"], None),
        (["generate", "--prompt=None"], "None"),
        (["generate", "--prompt={jazz}"], "{jazz}"),
        (["generate", "--prompt=(slow)"], "(slow)"),
        (["generate", "--prompt=[1, 2]"], "[1, 2]"),
        (["generate", "--prompt=['a', 'b']"], ["a", "b"]),
        (["generate", "--clip_seconds=4"], 4),
        (["plan", "--search=True"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_flag_holds_is_told_by_its_parameters_type(arguments, value):
    _, (binding,) = cli.parse(arguments)
    gin.parse_config("X =" + binding.partition("=")[2])
    assert gin.query_parameter("X/macro.value") == value


# --- names of older versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        (
            "--gin.train_rl.batch_size=8",
            "--gin.train_rl.batch_size is now --gin.RLConfig.batch_size",
        ),
        ("--gin.r/train_rl.steps=8", "--gin.r/train_rl.steps is now --gin.r/RLConfig.steps"),
        (
            "--gin.train_rl.kl_target=5.0",
            "--gin.train_rl.kl_target is now --gin.RLConfig.kl_target_per_second",
        ),
        ("--gin.collect.policy='x'", "--gin.collect.policy is now --gin.collect.system"),
        ("--gin.collect.fine='x'", "--gin.collect.fine is gone: a system is one folder"),
        ("--gin.export.top_k=3", "--gin.export.top_k is now --gin.Sampling.top_k"),
        ("--gin.Prompts.vocabulary='x'", "--gin.Prompts.vocabulary is gone: each system"),
    ],
)
def test_an_old_name_is_answered_with_the_new_one(flag, answer, tmp_path, capsys):
    """By a flag, and by a gin file with its line."""
    assert answer in refused(capsys, "run", "--gin_file=tiny", flag)
    path = tmp_path / "mine.gin"
    path.write_text(RUN + flag.removeprefix("--gin.").replace("=", " = ") + "\n")
    assert f"mine.gin line 2: {answer.replace('--gin.', '')}" in refused(
        capsys, "run", f"--gin_file={path}"
    )


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["generate", "--checkpoint=x"], "--checkpoint is now --system"),
        (["export", "--temperature=0.9"], "--temperature is now --gin.Sampling.temperature"),
        (["train_rl", "--batch-size=8"], "--batch_size is now --gin.RLConfig.batch_size"),
        (["evaluate", "--policies={'a': 'b'}"], "--policies is now --systems"),
        (["evaluate", "--semantic=x"], "--semantic is now --gin.SemanticFeatures.semantic"),
        (["encode", "--codec=x"], "--codec is gone: a system is one folder with all its parts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_old_flag_is_answered_with_the_new_one(arguments, answer, capsys):
    assert answer in refused(capsys, *arguments)


def parameters_of(name):
    """What a verb or a config takes."""
    place = cli.VERBS.get(name) or cli.CONFIGS[name]
    return inspect.signature(cli._imported(place)).parameters


@pytest.mark.parametrize(("old", "new"), cli.RENAMED.items(), ids=cli.RENAMED.keys())
def test_old_names_are_gone_and_new_ones_are_there(old, new):
    name, _, parameter = old.partition(".")
    assert name == "Heard" or parameter not in parameters_of(name)  # which is gone as a whole
    if " " not in new:
        name, _, parameter = new.partition(".")
        assert parameter in parameters_of(name)


# --- where gin files are, and what they may do -----------------------------------------------------------------------

RUN = "include 'gin/runs/tiny.gin'\n"


def test_gin_files_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
    """By their names in the checkout, in the working folder and in --gin_search_paths; the latter may be several."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "here/a.gin").write_text(RUN + "include 'away/b.gin'\n")
    (tmp_path / "far/away/b.gin").write_text("train.save_every = 7\n")
    for flags in (
        ["--gin_search_paths=here,far"],
        ["--gin_search_paths=here", "--gin-search-paths=far"],
    ):
        assert musicrl("run", *flags, "--gin_file=a.gin", "--dry_run") == 0, capsys.readouterr().err
        assert "train.save_every = 7" in capsys.readouterr().out
    for name in ("gin/runs/tiny.gin", "runs/tiny.gin", "tiny"):
        assert musicrl("run", f"--gin_file={name}", "--dry_run") == 0
        assert "train.save_every = 2" in capsys.readouterr().out
    assert musicrl("run", "--gin_file=here/a.gin", "--dry_run") == 1
    assert "no gin file 'away/b.gin'" in capsys.readouterr().err


def test_a_stem_names_the_one_file_that_has_it(tmp_path, monkeypatch):
    """A run before a size; a file of the working folder before both."""
    for name in ("runs/a", "sizes/a", "sizes/b", "ablations/c", "experiments/c"):
        path = tmp_path / f"gin/{name}.gin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "b").touch()
    monkeypatch.setattr(cli.shipped, "ROOT", tmp_path)
    assert cli.full_name("a") == f"{tmp_path}/gin/runs/a.gin"
    assert cli.full_name("b") == f"{tmp_path}/gin/sizes/b.gin"
    assert [cli.full_name(name) for name in ("a.gin", "x/a", "d")] == ["a.gin", "x/a", "d"]
    with pytest.raises(
        ValueError, match=r"--gin_file=c may be ablations/c\.gin and experiments/c\.gin"
    ):
        cli.full_name("c")
    monkeypatch.chdir(tmp_path)
    assert cli.full_name("b") == "b"


def test_a_byte_order_mark_and_any_locale_are_read(tmp_path, capsys):
    path = tmp_path / "bom.gin"
    path.write_bytes(b"\xef\xbb\xbf" + (RUN + "PageConfig.notes = ('slåttemusikk',)\n").encode())
    assert musicrl("run", f"--gin_file={path}", "--dry_run") == 0
    assert "slåttemusikk" in capsys.readouterr().out
    path.write_bytes((RUN + "PageConfig.notes = ('slåttemusikk',)\n").encode("latin-1"))
    assert "bom.gin is not UTF-8" in refused(capsys, "run", f"--gin_file={path}")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("X = \n", "mine.gin line 2: "),
        ("X = (1,\n", "mine.gin line"),
        ("include 'mine.gin'\n", "mine.gin includes itself"),
        ("import no_such_module\n", "no_such_module"),
        ("train.steps 3\n", "mine.gin line 2: "),
    ],
)
def test_a_broken_gin_file_is_named(text, complaint, tmp_path, capsys):
    (tmp_path / "mine.gin").write_text(RUN + text)
    assert complaint in refused(
        capsys, "run", f"--gin_search_paths={tmp_path}", "--gin_file=mine.gin"
    )


def test_a_dry_run_imports_nothing_that_a_file_from_elsewhere_names(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "inner.gin").write_text(
        "from __gin__ import dynamic_registration\nimport evil_module\n"
    )
    path = tmp_path / "outer.gin"
    path.write_text(
        f"{RUN}include '{tmp_path}/inner.gin'\nbuild.builder = '/elsewhere/builder'\nX = @evil_module.f\n"
    )
    assert musicrl("run", f"--gin_file={path}", "--dry_run") == 1
    printed = capsys.readouterr()
    assert not (tmp_path / "ran").exists() and not printed.out
    assert f"{tmp_path}/inner.gin is not of musicrl-jax and imports evil_module" in printed.err
    assert "calls evil_module.f, the builder '/elsewhere/builder'" in printed.err
    path.write_text(
        f"{RUN}build.builder = '/elsewhere/builder'\n"
    )  # nothing runs before the stage does
    assert musicrl("run", f"--gin_file={path}", "--dry_run") == 0
    assert "calls the builder '/elsewhere/builder'" in capsys.readouterr().err
    assert musicrl("run", f"--gin_file={ROOT}/gin/runs/tiny.gin", "--dry_run") == 0
    assert not capsys.readouterr().err


# --- what a command imports ------------------------------------------------------------------------------------------

HEAVY = "tensorflow", "tensorflow_datasets", "seqio", "keras", "sklearn"


def fresh(script, *arguments):
    """What a script prints as JSON in a process of its own."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_imports_neither_jax_nor_a_verb():
    script = """
import contextlib, json, sys, time
from musicrl_jax import cli
with contextlib.suppress(SystemExit):
    cli.main(["--help"])
needed = "musicrl_jax.cli", "musicrl_jax.core", "musicrl_jax.core.shipped"
ours = [name for name in sys.modules if name.startswith("musicrl_jax.") and name not in needed]
seconds = time.process_time()
print(json.dumps({"ours": ours, "jax": "jax" in sys.modules, "numpy": "numpy" in sys.modules, "s": seconds}))
"""
    seen = fresh(script)
    assert not seen["ours"] and not seen["jax"] and not seen["numpy"] and seen["s"] < 0.5


def test_a_whole_run_is_configured_without_what_reads_data():
    """Every verb, and every config that gin/runs/quickstart.gin mentions."""
    script = """
import contextlib, io, json, sys
from musicrl_jax import cli
with contextlib.redirect_stdout(io.StringIO()):
    assert cli.main(["run", "--gin_file=gin/runs/quickstart.gin", "--dry_run"]) == 0
    assert cli.main(["export", "--gin_file=gin/runs/quickstart.gin", "--out=bundle", "--dry_run"]) == 0
for verb in cli.VERBS:
    cli.load_verb(verb)
import musicrl_jax.serving.app
print(json.dumps(sorted(sys.modules)))
"""
    assert not set(HEAVY) & set(fresh(script))


def test_tensorflow_starts_without_a_word():
    done = subprocess.run(
        [sys.executable, "-c", "import musicrl_jax.inputs.tasks, sys; print('passed on', file=sys.stderr)"],
        capture_output=True, text=True, timeout=300, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stderr == "passed on\n" and not done.stdout
