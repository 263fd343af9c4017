"""Stages run in order, and the summary is that of the last one."""

import functools
import json

import pytest

from musicrl_jax.run import read_seconds, run

NAMES = ("data", "codec", "evaluate")


@pytest.fixture
def calls():
    return []


@pytest.fixture
def stages(calls):
    def stage(name):
        calls.append(name)
        return {"from": name}

    return {name: functools.partial(stage, name) for name in NAMES}


@pytest.mark.parametrize(
    ("only", "skip", "expected"),
    [
        ("", "", NAMES),
        ("evaluate,data", "", ("data", "evaluate")),
        ("", "codec", ("data", "evaluate")),
        ("data,codec", "data", ("codec",)),
    ],
)
def test_chosen_stages_run_in_order(stages, calls, tmp_path, only, skip, expected):
    run(str(tmp_path), [stages], only, skip)
    assert tuple(calls) == expected
    assert set(read_seconds(str(tmp_path))) == set(expected)
    summary = tmp_path / "summary.json"
    assert summary.exists() == ("evaluate" in expected)
    if summary.exists():
        seconds = read_seconds(str(tmp_path))
        assert json.loads(summary.read_text()) == {"from": "evaluate", "seconds": seconds}


def test_minutes_are_printed_ahead_of_a_stage(stages, tmp_path, capsys):
    run(str(tmp_path), [stages], skip="evaluate", minutes={"data": 0.4, "evaluate": 9.0})
    run(str(tmp_path), [stages], minutes={"data": 2.6, "codec": 0.5, "evaluate": 3.9})
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert printed == [
        "[1/2] data: under a minute on two CPU cores",
        "[2/2] codec",
        "[1/3] data: about 3 of about 7 minutes on two CPU cores",
        "[2/3] codec: under a minute of about 7 minutes on two CPU cores",
        "[3/3] evaluate: about 4 of about 7 minutes on two CPU cores",
    ]


@pytest.mark.parametrize(
    ("only", "skip", "complaint"),
    [
        ("sing", "", "'sing' is none"),
        ("", "sing", "'sing' is none"),
        ("codec", "codec", "leave no stage"),
    ],
)
def test_unknown_stages_are_refused_before_any_runs(stages, calls, tmp_path, only, skip, complaint):
    with pytest.raises(ValueError, match=complaint):
        run(str(tmp_path), [stages], only, skip)
    assert not calls


def test_seconds_of_an_interrupted_stage_count(stages, tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(str(tmp_path), [{"data": stages["data"]}, {"codec": interrupted}])
    first = read_seconds(str(tmp_path))
    assert set(first) == {"data", "codec"} and not (tmp_path / "summary.json").exists()
    run(str(tmp_path), [stages])
    second = read_seconds(str(tmp_path))
    assert all(second[name] >= first[name] for name in first)
