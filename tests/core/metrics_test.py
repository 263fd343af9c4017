"""A resumed run's metrics file is that of an uninterrupted one."""

import json
import os

import hypothesis
import hypothesis.strategies as st
import pytest

from musicrl_jax.core.metrics import MetricWriter, _drop_from, read_records


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


# --- Resuming. ---


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


# --- Damage. ---

GOOD = ['{"step": 0, "loss": 1.0}', '{"step": 1, "loss": 0.5}', '{"step": 2, "loss": NaN}']
DAMAGED = {
    "half a line": b'{"step": 1, "lo',
    "two lines in one": b'{"step": 1, "loss": 2.0}{"step": 3, "loss": 2.0}',
    "garbage": bytes(range(128, 256)),
    "NUL bytes": bytes(512),
    "an empty line": b"",
    "no object": b"[1, 2]",
    "no step": b'{"loss": 1.0}',
    "a fractional step": b'{"step": 1.5, "loss": 2.0}',
    "a step as text": b'{"step": "1", "loss": 2.0}',
    "a negative step": b'{"step": -1, "loss": 2.0}',
    "a step that is true": b'{"step": true, "loss": 2.0}',
    "a value as text": b'{"step": 1, "loss": "low"}',
    "a null": b'{"step": 1, "loss": null}',
    "a number beyond floats": b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
    "deep nesting": b"[" * 100_000,
    "half of a surrogate pair": b'{"step": 1, "lo\\ud800s": 1.0}',
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_set_aside_and_its_good_lines_are_kept(tmp_path, damage, capsys):
    path = tmp_path / "metrics.jsonl"
    content = "\n".join(GOOD[:2]).encode() + b"\n" + damage + b"\n" + GOOD[2].encode() + b"\n"
    path.write_bytes(content)
    with MetricWriter(tmp_path, start_step=3) as writer:
        writer.write(3, {"loss": 4.0})
    assert path.read_text().splitlines() == [*GOOD, '{"step": 3, "loss": 4.0}']
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content
    assert f"{path} is damaged: line 3 " in capsys.readouterr().out


def test_repeated_steps_and_a_line_cut_short_are_no_damage(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    repeated = ['{"step": 1, "loss": 7.0}', '{"step": 1, "kl": 3.0}', '{"step": 2, "lo']
    path.write_text("\n".join([*GOOD[:2], *repeated]))
    MetricWriter(tmp_path, start_step=2).close()
    assert lines(tmp_path) == [
        {"step": 0, "loss": 1.0},
        {"step": 1, "loss": 7.0},
        {"step": 1, "kl": 3.0},
    ]
    assert not list(tmp_path.glob("*.damaged")) and not capsys.readouterr().out


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["a folder", "a FIFO"])
def test_a_folder_or_fifo_in_its_place_is_set_aside(tmp_path, make, capsys):
    make(tmp_path / "metrics.jsonl")
    with MetricWriter(tmp_path) as writer:
        writer.write(0, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 0, "loss": 1.0}]
    assert "must be a regular file; set aside as metrics.jsonl.damaged" in capsys.readouterr().out


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(data=st.data())
def test_a_run_resumes_with_any_bytes_in_the_file(tmp_path_factory, data):
    # Up to three bytes changed, and up to nine replaced by others.
    content = bytearray("\n".join(GOOD).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    start = data.draw(st.integers(0, len(content)))
    content[start : start + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    path.write_bytes(content)
    _drop_from(path, 2)
    records, fault = read_records(path)
    assert not fault and all(0 <= record["step"] < 2 for record in records)
