"""Every gin file that ships resolves, and mistakes are one sentence with the remedy."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gin
from musicrl_jax import cli
from musicrl_jax.command.names import RENAMED, place_of

ROOT = Path(__file__).parents[1]
RUNS = sorted((ROOT / "gin").glob("runs/*.gin"))


@pytest.fixture(autouse=True)
def no_config():
    gin.clear_config()
    yield
    gin.clear_config()


def musicrl(*arguments):
    return cli.main(arguments)


def tiny(*flags):
    """Configures the tiny run, and returns the exit status."""
    return musicrl("run", "--gin_file=tiny", "--dry_run", *flags)


def gin_value(binding):
    """Returns the value that gin reads in 'name = value'."""
    gin.parse_config(f"X = {binding.partition(' = ')[2]}")
    return gin.query_parameter("X/macro.value")


# --- every file that ships ------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_resolves(path, capsys):
    assert musicrl("run", f"--gin_file={path}", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert "run.stages" in printed
    for scope, name in re.findall(r"^((?:\w+/)?)(\w+Config)\.\w+ = ", printed, flags=re.MULTILINE):
        # The length of each finetuning is in its stage's scope.
        stages = [scope.rstrip("/")]
        if name == "RLConfig":
            stages = re.findall(r"@(\w+)/train_rl\b", printed)
        for stage in stages:
            with gin.config_scope(stage or None):
                gin.get_configurable(f"musicrl.{name}")()  # its own checks pass


@pytest.mark.parametrize("size", ["tiny", "demo", "base", None])
@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "gin").glob("experiments/*.gin")), ids=lambda path: path.stem
)
def test_every_recipe_resolves_at_every_size(recipe, size, capsys):
    settings = {
        "MODEL_DIR": "/x",
        "DATA_DIR": "/x",
        "DATA_CONFIG": "x",
        "DATASETS": {"x/x": 1.0},
        "PROMPT_DATASETS": ("x/x",),
        "vocabulary.size": 100,
        "train.steps": 1,
        "train.batch_size": 1,
    }
    flags = [f"--gin_file={recipe}"]
    if size is None:
        settings |= {"SAMPLE_RATE_HZ": 24_000, "CLIP_SECONDS": 30.0}
    else:
        flags.append(f"--gin_file=gin/sizes/{size}.gin")
    flags += [f"--gin.{name}={value}" for name, value in settings.items()]
    assert musicrl("run", *flags, "--dry_run") == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "path", sorted((ROOT / "gin").glob("ablations/*.gin")), ids=lambda path: path.stem
)
def test_every_ablation_resolves(path, capsys):
    assert musicrl("run", "--gin_file=demo", f"--gin_file={path}", "--dry_run") == 0
    assert f"preference/folder.name = 'preference_{path.stem}'" in capsys.readouterr().out


def test_a_file_that_is_no_run_is_included_by_one():
    paths = set((ROOT / "gin").rglob("*.gin"))
    texts = "".join(path.read_text() for path in paths)
    alone = {*RUNS, *(ROOT / "gin/ablations").iterdir(), ROOT / cli.BASE_SIZE}
    for path in paths - alone:
        assert f"include '{path.relative_to(ROOT)}'" in texts, f"nothing includes {path}"


# --- what a run lacks or does not read ------------------------------------------------------------


@pytest.mark.parametrize(
    ("binding", "complaint"),
    [
        ("--gin.train.steps=%NOWHERE", "NOWHERE"),
        ("--gin.tokens/Clips.crop_seconds=1.0", "nothing reads tokens/Clips.crop_seconds"),
        ("--gin.codek/folder.name=x", "nothing reads codek/folder.name"),
    ],
)
def test_a_name_without_a_use_is_an_error(binding, complaint, capsys):
    assert tiny(binding) == 1
    assert complaint in capsys.readouterr().err


def included(path):
    """Returns the text of a gin file, with the files that it includes in place."""
    text = (ROOT / path).read_text()
    return re.sub(r"^include '(.*)'$", lambda match: included(match[1]), text, flags=re.MULTILINE)


def without(name, tmp_path):
    """Writes the tiny run to one file without the bindings of a name, and returns its command."""
    path = tmp_path / "run.gin"
    lines = included("gin/runs/tiny.gin").splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith(f"{name} ")))
    return "run", f"--gin_file={path}", "--dry_run"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data/build.builder", "'data/score_clips'"),
        ("vocabulary/vocabulary.size", "1"),
        ("votes/collect.votes_dir", "'/votes'"),
    ],
)
def test_a_stage_s_name_is_its_scope(name, value, tmp_path, capsys):
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
def test_a_missing_setting_of_a_later_stage_is_an_error_at_once(name, tmp_path, capsys):
    assert musicrl(*without(name, tmp_path)) == 1
    assert re.split("[./]", name)[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "macro", ["VOCABULARY", "CODEC", "TOKENIZER", "TOKENS", "BASE", "VOTES", "RU", "EVALUATION"]
)
def test_any_folder_may_be_elsewhere(macro):
    assert tiny(f"--gin.{macro}=/elsewhere") == 0


def test_a_run_may_leave_out_stages_and_keep_their_bindings(tmp_path, capsys):
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
    flags, bindings = cli.parse(["generate", "--prompt=a reel", "--seed=3", "--gin.X='y'"])
    assert flags.verb == "generate"
    assert bindings == ["generate.prompt = 'a reel'", "generate.seed = 3", "X = 'y'"]
    spaced = ["generate", "--prompt", "a reel", "--seed", "3", "--gin.X", "'y'"]
    assert cli.parse(spaced) == (flags, bindings)


@pytest.mark.parametrize(
    "prompt",
    ["80's synth pop", "'tis a reel", "3", 'a "slow" air', "медленно", "x = (", "", "@jazz", "%x"],
)
def test_any_prompt_stays_a_text(prompt):
    _, (binding,) = cli.parse(["generate", f"--prompt={prompt}"])
    assert gin_value(binding) == prompt


@pytest.mark.parametrize("verb", ["train", "generate", "build"])
def test_a_verb_names_a_missing_parameter(verb, capsys):
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
def test_a_word_that_is_no_flag_is_refused(arguments):
    with pytest.raises(SystemExit, match="2"):
        cli.parse(["generate", *arguments])


@pytest.mark.parametrize("arguments", [["sing"], [], ["sing", "--help"]])
def test_an_unknown_verb_is_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse(arguments)
    assert "`musicrl --help` lists them" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["runs/x", "'runs/x'", '"runs/x"'])
def test_a_text_needs_no_inner_quotes_behind_gin_either(text, capsys):
    assert cli.parse(["run", f"--gin.MODEL_DIR={text}"])[1][0] in (
        "MODEL_DIR = 'runs/x'",
        'MODEL_DIR = "runs/x"',
    )
    assert tiny(f"--gin.MODEL_DIR={text}") == 0
    assert "MODEL_DIR = 'runs/x'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("None", None),
        ("True", True),
        ("('a', 'b')", ("a", "b")),
        ("{'a': 1.0}", {"a": 1.0}),
        ("80's pop", "80's pop"),
        ("CC BY 4.0", "CC BY 4.0"),
        ("cpu,cuda", "cpu,cuda"),
        ("~/music/a b", "~/music/a b"),
        ("", ""),
    ],
)
def test_a_gin_value_keeps_its_type_and_any_other_word_is_a_text(text, value):
    _, (binding,) = cli.parse(["run", f"--gin.NAME={text}"])
    assert gin_value(binding) == value


# --- misspelt names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "wrong", "nearest"),
    [
        ("trian --dry_run", "'trian' is no verb", "train"),
        ("evalute --gin_file=tiny", "'evalute' is no verb", "evaluate"),
        ("config --verb=exprot", "'exprot' is no verb", "export"),
        ("generate --prmopt=x", "--prmopt is no parameter of generate", "--prompt"),
        ("run --gin_fil=tiny", "--gin_fil is no parameter of run", "--gin_file"),
        ("run --dry_rnu", "'--dry_rnu' is not of the form", "--dry_run"),
        ("run --gin_file=quikstart", "no gin file 'quikstart'", "quickstart"),
        ("run --gin_file=tiny --gin.train.stpes=3", "'stpes'", "steps"),
        ("run --gin_file=tiny --gin.RLConfg.steps=3", "'RLConfg'", "RLConfig"),
        ("run --gin_file=tiny --gin.trian.steps=3", "'trian'", "train"),
        ("run --gin_file=tiny --gin.BASE=@base/foldr()", "foldr", "folder"),
        ("run --gin_file=tiny --gin.MODLE_DIR=x", "the macro MODLE_DIR", "MODEL_DIR"),
        ("run --gin_file=tiny --gin.train.steps=%SCHEDUL", "the macro SCHEDUL", "SCHEDULE"),
        ("run --gin_file=tiny --gin.codek/train.steps=3", "nothing reads codek/", "codec"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(command, wrong, nearest, capsys):
    try:
        assert musicrl(*command.split()) == 1
    except SystemExit as error:
        assert error.code == 2
    printed = capsys.readouterr()
    assert wrong in printed.err and f"; did you mean {nearest}?" in printed.err
    assert "Traceback" not in printed.err and not printed.out


# --- mistakes of the user: one sentence, no traceback, no config ----------------------------------


def refused(capsys, *arguments):
    """Returns the one line that a wrong command prints."""
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
        (["generate", *CLIP, "--clip_seconds=two"], "clip_seconds must be a number or None"),
        (["generate", *CLIP, "--seed=1", "--seed=2"], "--seed is given 2 times"),
        (["generate", *CLIP, "--seed=1", "--gin.generate.seed=2"], "generate.seed is set twice"),
        (["generate", *CLIP, "--gin.X=1", "--gin.X=1"], "--gin.X is given 2 times"),
        (["generate", *CLIP, "--gin.X=(1,"], "--gin.X=(1, is no gin binding: close its quotes"),
        (["generate", *CLIP, "--gin.=1"], "--gin.=1 is no gin binding: write --gin.NAME=VALUE"),
        (["generate", *CLIP, "--gin.generate.seed='3'"], "seed = '3' must be a whole number"),
        (["serve", "--bundle=x", "--port=http"], "--port=http: port must be a whole number"),
        (["export", "--system=x", "--chips=two"], "--chips=two: chips must be a whole number"),
        (
            ["export", "--system=x", "--out=y", "--gin.export.platforms=cpu"],
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
    assert complaint in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("binding", "complaint"),
    [
        ("--gin.Optimiser.learning_rate=fast", "learning_rate = 'fast' must be a number"),
        (
            "--gin.r/Mixture.weights=(1.0, 2.0)",
            "r/Mixture.weights = (1.0, 2.0) must be a dict of text to number",
        ),
        ("--gin.SAMPLE_RATE_HZ=16k", "= '16k' must be a whole number"),
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
def test_a_setting_of_the_wrong_type_is_an_error_before_the_run_begins(binding, complaint, capsys):
    assert complaint in refused(capsys, "run", "--gin_file=tiny", binding)


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


def test_a_hyphen_may_replace_an_underscore_in_every_flag():
    shared = "--gin-file=x.gin", "--gin-search-paths=a", "--dry-run"
    flags, bindings = cli.parse(["generate", "--prompts-file=a-b", *shared, "--top-k=3"])
    assert flags.gin_file == ["x.gin"] and flags.gin_search_paths == ["a"] and flags.dry_run
    assert bindings == ["generate.prompts_file = 'a-b'", "generate.top_k = 3"]


def test_a_flag_that_takes_several_values_collects_them_in_order():
    _, bindings = cli.parse(["generate", "--prompt=b", "--seed=1", "--prompt", "3", "--prompt=@a"])
    assert bindings == ["generate.prompt = ['b', '3', '@a']", "generate.seed = 1"]
    assert cli.parse(["export", "--platforms=cpu", "--platforms=cuda"])[1] == [
        "export.platforms = ['cpu', 'cuda']"
    ]
    for flag in ("--platforms=cpu", "--platforms=['cpu']"):
        assert gin_value(cli.parse(["export", flag])[1][0]) == ["cpu"]


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
        (["plan", "--search"], True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_is_read_by_the_type_of_its_parameter(arguments, value):
    _, (binding,) = cli.parse(arguments)
    assert gin_value(binding) == value


# --- names of older versions ----------------------------------------------------------------------


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
    return inspect.signature(cli._imported(place_of(name))).parameters


@pytest.mark.parametrize(("old", "new"), RENAMED.items(), ids=RENAMED.keys())
def test_an_old_name_is_gone_and_the_new_one_is_there(old, new):
    name, _, parameter = old.partition(".")
    assert name == "Heard" or parameter not in parameters_of(name)  # which is gone as a whole
    if " " not in new:
        name, _, parameter = new.partition(".")
        assert parameter in parameters_of(name)


def test_a_flag_that_a_scope_hides_is_noted(capsys):
    """The value of the scope holds, as gin has it."""
    assert musicrl("run", "--gin_file=quickstart", "--gin.RLConfig.steps=50", "--dry_run") == 0
    error = capsys.readouterr().err
    assert (
        "--gin.RLConfig.steps has no effect in the scope 'r', where a file binds 24: give "
        "--gin.r/RLConfig.steps" in error
    )
    assert musicrl("run", "--gin_file=quickstart", "--gin.r/RLConfig.steps=50", "--dry_run") == 0
    assert "has no effect" not in capsys.readouterr().err


def test_a_misspelt_config_has_a_suggestion(capsys):
    with pytest.raises(SystemExit):
        musicrl("RLConfg", "--help")
    assert "did you mean RLConfig?" in capsys.readouterr().err


# --- every setting of a run -----------------------------------------------------------------------


def settings_of(capsys, *flags):
    """Returns what `musicrl config --json` prints, by name."""
    capsys.readouterr()
    assert musicrl("config", "--gin_file=tiny", "--json", *flags) == 0
    return {each.pop("name"): each for each in json.loads(capsys.readouterr().out)}


def test_config_lists_what_is_bound_and_what_could_be(capsys):
    settings = settings_of(capsys, "--gin.RLConfig.seed=7", "--gin.MODEL_DIR=runs/x")
    assert settings["r/RLConfig.seed"] == {
        "type": "int",
        "default": "0",
        "bound": "7",
        "value": "7",
        "doc": settings["r/RLConfig.seed"]["doc"],
    }
    updates, strength = settings["r/RLConfig.updates"], settings["ru/RLConfig.kl_strength"]
    assert updates["bound"] is None and updates["value"] == updates["default"] == "1"
    assert strength["default"] is None and strength["doc"].startswith("a in J")
    assert settings["run.model_dir"]["bound"] == "%MODEL_DIR"
    assert settings["run.model_dir"]["value"] == settings["MODEL_DIR"]["value"] == "'runs/x'"
    assert settings["codec/train.objective"]["bound"] == "@CodecObjective()"
    # Every parameter of everything that the run refers to.
    for verb in ("run", "train_rl", "evaluate"):
        names = {name.rpartition("/")[2] for name in settings}
        assert {f"{verb}.{name}" for name in parameters_of(verb)} <= names


def test_config_prints_a_gin_file_that_binds_the_same(capsys, tmp_path):
    settings = settings_of(capsys)
    assert musicrl("config", "--gin_file=tiny") == 0
    path = tmp_path / "all.gin"
    path.write_text(text := capsys.readouterr().out)
    bound = {
        f"{each.selector}.{each.arg_name}" for each in cli.read_sources([str(path)])[0].bindings
    }
    assert {"run.stages", "RLConfig.batch_size"} <= bound
    assert len(re.findall(r"^[\w/.]+ = ", text, flags=re.MULTILINE)) == sum(
        each["bound"] is not None for each in settings.values()
    )
    assert re.search(r"^# r/RLConfig.updates = 1 +# int: updates with", text, flags=re.MULTILINE)
    assert musicrl("run", f"--gin_file={path}", "--dry_run") == 0


def test_config_lists_settings_that_are_missing_and_of_other_verbs(capsys):
    settings = settings_of(capsys, "--verb=export")
    assert settings["export.out"]["bound"] is settings["export.out"]["default"] is None
    assert not any(name.startswith("run.") for name in settings)
    assert musicrl("config", "--gin_file=musicrl_r") == 0  # a recipe without a size
    assert "SAMPLE_RATE_HZ" in capsys.readouterr().out


# --- where gin files are, and what they may do ----------------------------------------------------

RUN = "include 'gin/runs/tiny.gin'\n"


def test_gin_files_are_found_from_any_folder(tmp_path, monkeypatch, capsys):
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


def test_a_stem_names_a_run_before_a_size_and_a_local_file_before_both(tmp_path, monkeypatch):
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
    dynamic = "from __gin__ import dynamic_registration\n"
    (tmp_path / "inner.gin").write_text(f"{dynamic}import evil_module\n")
    path = tmp_path / "outer.gin"
    builder = "build.builder = '/elsewhere/builder'\n"
    path.write_text(f"{RUN}include '{tmp_path}/inner.gin'\n{builder}X = @evil_module.f\n")
    assert musicrl("run", f"--gin_file={path}", "--dry_run") == 1
    printed = capsys.readouterr()
    assert not (tmp_path / "ran").exists() and not printed.out
    assert f"{tmp_path}/inner.gin is not of musicrl-jax and imports evil_module" in printed.err
    assert "calls evil_module.f, the builder '/elsewhere/builder'" in printed.err
    path.write_text(RUN + builder)  # nothing runs before the stage does
    assert musicrl("run", f"--gin_file={path}", "--dry_run") == 0
    assert "calls the builder '/elsewhere/builder'" in capsys.readouterr().err
    assert tiny() == 0
    assert not capsys.readouterr().err


# --- what a command imports -----------------------------------------------------------------------

HEAVY = {"tensorflow", "tensorflow_datasets", "seqio", "keras", "sklearn"}


def test_a_whole_run_is_configured_without_tensorflow_which_then_starts_silently():
    """With every verb, and every config that gin/runs/quickstart.gin names."""
    script = """
import contextlib, io, json, sys
from musicrl_jax import cli
with contextlib.redirect_stdout(io.StringIO()):
    assert cli.main(["run", "--gin_file=quickstart", "--dry_run"]) == 0
    assert cli.main(["export", "--gin_file=quickstart", "--out=bundle", "--dry_run"]) == 0
for verb in cli.VERBS:
    cli.load_verb(verb)
import musicrl_jax.serving.app
print(json.dumps(sorted(sys.modules)))
import musicrl_jax.inputs.tasks
print("stderr works", file=sys.stderr)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert not HEAVY & set(json.loads(done.stdout))
    assert done.stderr == "stderr works\n"
