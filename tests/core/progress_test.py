"""A log tells how far a stage is, and the last line once."""

from musicrl_jax.core import progress


def lines(capsys):
    return [line.split()[:2] for line in capsys.readouterr().out.splitlines()]


def test_a_log_has_the_last_count_once_whether_or_not_its_time_had_come(capsys, monkeypatch):
    assert list(progress.Progress("ab", "short", 2)) == ["a", "b"]
    assert lines(capsys) == [["short", "2/2"]]
    monkeypatch.setattr(progress, "LOG_SECONDS", -1.0)
    assert list(progress.Progress("ab", "long", 5, initial=3)) == ["a", "b"]
    assert lines(capsys) == [["long", "4/5"], ["long", "5/5"]]


def test_a_note_stands_behind_the_count(capsys):
    shown = progress.Progress([1], "noted", 1)
    for _ in shown:
        shown.note("loss 0.5")
    assert capsys.readouterr().out.rstrip().endswith("loss 0.5")
