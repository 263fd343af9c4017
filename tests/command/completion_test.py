"""Completion of verbs, flags and gin files, by the protocol of a shell and argcomplete."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def completions(line, folder):
    """Returns what a shell would offer at the end of a line."""
    variables = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\013",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",  # bash's
        "_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "completions"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    script = "import sys; from musicrl_jax import cli; cli.main(); assert 'jax' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **variables, "PYTHONPATH": paths},
        cwd=folder,
        check=True,
        timeout=60,
    )
    return {word.strip() for word in (folder / "completions").read_text().split("\013")}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("musicrl ev", {"evaluate"}),
        ("musicrl train", {"train", "train_rl"}),
        ("musicrl train_rl --sy", {"--system"}),
        ("musicrl generate --prompt", {"--prompt", "--prompts_file"}),
        ("musicrl serve --gin_f", {"--gin_file"}),
        ("musicrl run --gin_file=quick", {"quickstart"}),
        ("musicrl run --gin_file runs/", {"runs/demo.gin", "runs/tiny.gin", "runs/mine.gin"}),
    ],
)
def test_a_shell_is_offered_what_fits(line, offered, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine.gin").touch()
    words = completions(line, tmp_path)
    assert offered <= words
    assert len(words) <= len(offered) + 3
