"""A log shows the progress of a stage, and the last count once."""

import threading

import pytest

from musicrl_jax.core import hosts, progress


def lines(capsys):
    return [line.split()[:2] for line in capsys.readouterr().out.splitlines()]


def test_a_log_has_the_last_count_once(capsys, monkeypatch):
    assert list(progress.Progress("ab", "short", 2)) == ["a", "b"]
    assert lines(capsys) == [["short", "2/2"]]
    # A line for each item.
    monkeypatch.setattr(progress, "LOG_SECONDS", -1.0)
    assert list(progress.Progress("ab", "long", 5, initial=3)) == ["a", "b"]
    assert lines(capsys) == [["long", "4/5"], ["long", "5/5"]]


def test_a_note_follows_the_count(capsys):
    shown = progress.Progress([1], "noted", 1)
    for _ in shown:
        shown.note("loss 0.5")
    assert capsys.readouterr().out.rstrip().endswith("loss 0.5")


def test_a_stop_ends_the_loop_between_two_items(monkeypatch):
    monkeypatch.setattr(hosts, "_stop", threading.Event())
    done = []
    with pytest.raises(hosts.Preempted):
        for item in progress.Progress(range(9), "stopped", 9):
            done.append(item)
            if item == 4:
                hosts._request_stop()
    assert done == [0, 1, 2, 3, 4]

    # SIGTERM while an item is computed: the item is dropped.
    def slow():
        yield "made before the signal"
        hosts._request_stop()
        yield "made while it came"

    hosts._stop.clear()
    with pytest.raises(hosts.Preempted):
        done.extend(progress.Progress(slow(), "stopped", 2))
    assert done[5:] == ["made before the signal"]
