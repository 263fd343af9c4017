"""Runs over several processes, as over the hosts of a slice: killed, stopped and resumed."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from musicrl_jax.core import checkpoint, hosts
from musicrl_jax.systems import tiny

WORKER = Path(__file__).with_name("several_hosts_worker.py")
MAX_SECONDS = 240  # for one process


def start(processes, verb, folder, count, devices, dies_at=99):
    """Starts `count` processes of one run, with `devices` each."""
    command = [sys.executable, str(WORKER), verb, str(folder), str(devices), str(dies_at)]
    return processes.start_hosts(command, folder, count)


def check_ends(processes, workers, folder, *statuses):
    """Asserts that each process ends with its status, or with one of a tuple of statuses."""
    ends = processes.wait(workers, MAX_SECONDS)
    for end, expected in zip(ends, statuses, strict=True):
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert end in expected, (ends, (folder / "log-0.txt").read_text()[-3000:])


IS_LOST = hosts.LOST, -signal.SIGABRT  # the latter is JAX's own


def results(folder):
    """Returns the lines of a run's metrics and the hash of its model."""
    run = folder / "run" if (folder / "run").exists() else folder
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines, checkpoint.model_hash(run)


def rollouts(folder):
    """Returns the hashes of the first process's rollouts over all attempts, each once."""
    return list(dict.fromkeys((folder / "rollouts-0.jsonl").read_text().splitlines()))


def row_counts(folder, count):
    """Returns the number of rows that each process has computed."""
    return [int((folder / f"rows-{number}.txt").read_text()) for number in range(count)]


def data_set(folder, name):
    """Returns the manifest of a folder of tokens, which holds its hashes, and the votes on them."""
    votes = folder / name / "votes.jsonl"
    manifest = json.loads((folder / name / "manifest.json").read_text())
    return manifest, votes.exists() and votes.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "rows"), [("collect", 80), ("encode", 12)])
def test_hosts_share_the_rows_and_write_what_one_process_writes(verb, rows, tmp_path, processes):
    """2 processes of 2 devices against one of 4: ten batches of four pairs, three of four clips."""
    name = {"collect": "votes", "encode": "tokens"}[verb]
    alone, together, cut = folders = [tmp_path / each for each in ("alone", "together", "cut")]
    for folder in folders:
        folder.mkdir()
        tiny.write(folder / "system")
    check_ends(processes, start(processes, verb, alone, 1, 4), alone, 0)
    check_ends(processes, start(processes, verb, together, 2, 2), together, 0, 0)
    assert data_set(together, name) == data_set(alone, name)
    assert row_counts(alone, 1) == [rows]
    assert row_counts(together, 2) == [rows // 2, rows // 2]
    if verb == "encode":
        return

    # One is killed in its fourth batch of four clips. Measurements of both are not repeated.
    workers = start(processes, verb, cut, 2, 2, dies_at=15)
    check_ends(processes, workers, cut, IS_LOST, -signal.SIGKILL)
    assert len(list((cut / "votes/played").iterdir())) == 3
    assert not (cut / "votes/votes.jsonl").exists()
    check_ends(processes, start(processes, verb, cut, 2, 2), cut, 0, 0)
    assert data_set(cut, name) == data_set(alone, name) and not (cut / "votes/played").exists()
    assert row_counts(cut, 2)[1] == rows // 2 + 3


@pytest.mark.slow
@pytest.mark.exactness(17)
@pytest.mark.parametrize("verb", ["train", "train_rl"])
def test_a_run_survives_the_loss_and_the_stop_of_a_host(verb, tmp_path, processes):
    """One run on 2 hosts of 2 devices is uninterrupted; in another one host dies, then stops."""
    whole, cut, moved = tmp_path / "whole", tmp_path / "cut", tmp_path / "moved"
    whole.mkdir()
    cut.mkdir()
    check_ends(processes, start(processes, verb, whole, 2, 2), whole, 0, 0)

    # One host is killed.
    workers = start(processes, verb, cut, 2, 2, dies_at=2)
    check_ends(processes, workers, cut, IS_LOST, -signal.SIGKILL)
    assert not checkpoint.has_model(cut) and not checkpoint.has_model(cut / "run")

    # One host gets SIGTERM, and both stop.
    workers = start(processes, verb, cut, 2, 2, dies_at=-4)
    while not (cut / "here-0").exists() and workers[0].poll() is None:
        time.sleep(0.1)
    since = time.monotonic()
    workers[1].send_signal(signal.SIGTERM)
    check_ends(processes, workers, cut, hosts.AGAIN, hosts.AGAIN)
    assert time.monotonic() - since < 30

    # Both resume, and a lone process of 4 devices does too. Its sums differ in their last digits:
    # JAX gives Gloo, which adds in the order of several hosts, only to processes with a
    # coordination service.
    shutil.copytree(cut, moved)
    check_ends(processes, start(processes, verb, cut, 2, 2), cut, 0, 0)
    assert results(cut) == results(whole)
    if verb == "train_rl":
        assert rollouts(cut) == rollouts(whole)
        return
    check_ends(processes, start(processes, verb, moved, 1, 4), moved, 0)
    for one, other in zip(results(moved)[0], results(whole)[0], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
