"""A resumed run's metrics file is that of an uninterrupted one."""

import json

from musicrl_jax.core.metrics import MetricWriter


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_resuming_drops_what_will_be_written_again(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(4):
            writer.write(step, {"loss": step / 2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in mid-line
    with MetricWriter(tmp_path, start_step=2) as writer:
        writer.write(2, {"loss": 9.0}, prefix="validation/")
    assert lines(tmp_path) == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 0.5},
        {"step": 2, "validation/loss": 9.0},
    ]
    assert list((tmp_path / "tensorboard").glob("events.*"))
