"""Every command in a page is valid: its files exist, its flags are known and of the right type."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

import gin
from musicrl_jax import cli

ROOT = Path(__file__).parents[1]
PATTERNS = (
    "*.md",
    "data/**/*.md",
    "gin/**/*.gin",
    "gin/*.md",
    "launch/*.md",
    "launch/*.sh",
    "launch/*.yaml",
    "tests/**/*.md",
    "musicrl_jax/**/*.md",
    "musicrl_jax/**/*.py",
    "tests/benchmarks/**/*.py",
    "data/**/*.py",
)
PAGES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
FENCE = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
INDENTED = re.compile(
    r"^(?:#  |   ) +((?:\.venv/bin/)?(?:musicrl|python|launch/\w+\.sh) .*)$", re.MULTILINE
)
PROGRAM = re.compile(
    r"(?:^|.*?[ ;])(?:\.venv/bin/)?(musicrl|python|launch/quickstart\.sh|launch/tpu_rl\.sh) +(.*)"
)
OPTIONAL = re.compile(r" \[[^]'\"]*\]")  # [more flags]
PLACEHOLDER = re.compile(r"\.\.\.|=(?:FILE|VALUE|STAGE|NAME)\b|--help")
YOUR_RUN = """
MODEL_DIR = 'runs/yours'
DATA_DIR = 'runs/data'
DATA_CONFIG = 'demo'
DATASETS = {'score_clips/demo': 1.0}
PROMPT_DATASETS = ('score_clips/demo',)
vocabulary.size = 1024
train.steps = 1
train.batch_size = 16
"""


def text_of(path):
    """Returns the text of a page with continued lines joined."""
    return re.sub(r" *\\\\?\n(?:# )? *(?=--)", " ", path.read_text(encoding="utf-8"))


def printed(path):
    """Returns the commands and flags of a page: in fences, in backticks, in lines of their own."""
    text = text_of(path)
    lines = "".join(FENCE.findall(text)).splitlines()
    lines += SPAN.findall(FENCE.sub("", text)) + INDENTED.findall(text)
    lines = [OPTIONAL.sub("", line).strip() for line in lines]
    return [line for line in lines if not PLACEHOLDER.search(line.split("#")[0])]


def commands():
    """Yields (page, program, arguments) of every command with arguments."""
    for page in PAGES:
        for line in printed(page):
            command = PROGRAM.fullmatch(line)
            if not command:
                continue
            # A quote that the page closes elsewhere is no command. Text for people may follow it.
            with contextlib.suppress(ValueError):
                words = shlex.split(re.split("   +", command[2])[0], comments=True)
                if any(word.startswith("--") for word in words) or command[1] != "musicrl":
                    yield page, command[1], words


def flags():
    """Yields (page, flags) of every span of a page that has only flags of `musicrl`."""
    for page in PAGES:
        for line in printed(page):
            if re.match(r"--[a-z_]\w*[.=]|--gin\.", line) and "=" in line:
                yield page, shlex.split(line)


COMMANDS, FLAGS = list(commands()), list(flags())


@pytest.fixture
def yours(tmp_path):
    path = tmp_path / "yours.gin"
    path.write_text(YOUR_RUN)
    return str(path)


def configured(words):
    """Returns the exit status of the command with these words, and its errors."""
    gin.clear_config()
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        status = cli.main([*words, "--dry_run"])
    return status, errors.getvalue()


def label(value):
    return " ".join(value)[:60] if isinstance(value, list) else getattr(value, "stem", str(value))


@pytest.mark.parametrize(("page", "program", "words"), COMMANDS, ids=label)
def test_a_command_of_a_page_is_valid(page, program, words, yours):
    words = [re.sub(r"YOUR_RUN(\.gin)?", yours, word) for word in words]
    if program == "python":
        script, *rest = words
        if script == "-m":
            return
        path = ROOT / ("musicrl_jax/serving/bundle.py" if script.endswith("bundle.py") else script)
        known = path.read_text()
        for word in rest:
            if word.startswith("--"):
                assert f'"{word.partition("=")[0]}"' in known, f"{page}: {script} has no {word}"
        return
    if program == "launch/quickstart.sh":
        run = "from_scratch" if "--from_scratch" in words else "quickstart"
        words = [
            "run",
            f"--gin_file=gin/runs/{run}.gin",
            *(word for word in words if word != "--from_scratch"),
        ]
    if program == "launch/tpu_rl.sh":
        words = ["run", *(word for word in words if word != "--dry-run")]
    status, error = configured(words)
    assert status == 0, f"{page}: {' '.join(words)}\n{error}"


@pytest.mark.parametrize(("page", "words"), FLAGS, ids=label)
def test_flags_of_a_page_are_valid_for_a_verb(page, words):
    """Checks --gin.NAME=VALUE by name and type, other flags by a verb that has all of them."""
    errors = []
    for verb in cli.VERBS:
        gin.clear_config()
        try:
            bindings = cli.parse([verb, *words])[1]
        except (SystemExit, ValueError) as error:
            errors.append(f"{verb}: {error}")
            continue
        cli.search_in([])
        references = cli._References()
        statements = list(cli.config_parser.ConfigParser("\n".join(bindings), references))
        cli.register({verb, *cli.Source("", "", statements, references).names})
        gin.parse_config("\n".join(bindings))
        return
    raise AssertionError(f"{page}: no verb takes {' '.join(words)}\n" + "\n".join(errors))


def test_the_patterns_find_the_commands():
    pages = {page.relative_to(ROOT).as_posix() for page, *_ in COMMANDS}
    some = {
        "README.md",
        "data/pretrained/demo/README.md",
        "gin/runs/demo.gin",
        "gin/ablations/no_text.gin",
    }
    assert some <= pages and len(COMMANDS) > 30 and len(FLAGS) > 15
