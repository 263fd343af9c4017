"""A system outside the package is finetuned and evaluated with one gin file."""

import json
from pathlib import Path

import pytest

import gin
from musicrl_jax import cli
from musicrl_jax.core import checkpoint
from musicrl_jax.systems import folder

HERE = Path(__file__).parent


def musicrl(verb, directory):
    """Runs one command, as from a shell."""
    gin.clear_config()
    return cli.main(
        [
            verb,
            f"--gin_file={HERE}/bigram.gin",
            f"--gin.MODEL_DIR='{directory}'",
            f"--gin.PROMPTS='{directory}/prompts.txt'",
        ]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the folder of a run with a base and a finetuned system."""
    directory = tmp_path_factory.mktemp("bigram")
    (directory / "prompts.txt").write_text("".join(f"tune {i}\n" for i in range(200)))
    assert musicrl("train_rl", directory) == 0
    return directory


def test_train_rl_raises_the_reward_of_a_system_of_forty_lines(run):
    lines = [json.loads(line) for line in (run / "r/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(30))
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["low"] == pytest.approx(0.25, abs=0.05)
    assert lines[-1]["low"] > lines[0]["low"] + 0.1
    loaded = folder.load(str(run / "r"))
    assert loaded.kind == "bigram" and loaded.clip_seconds == 1.0
    assert loaded.hashes["policy"] != checkpoint.model_hash(run / "base")


def test_evaluate_reports_that_it_is_better_than_its_base(run):
    assert musicrl("evaluate", run) == 0
    summary = json.loads((run / "evaluation/summary.json").read_text())
    assert summary["policies"][:2] == ["base", "finetuned"]
    assert summary["gains"]["low"]["finetuned"]["low"] > 0
    assert summary["kl"]["finetuned"]["mean"] > 0
    assert (run / "evaluation/page.html").is_file()
