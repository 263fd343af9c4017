"""Runs over several processes, as over the hosts of a slice: what befalls one of them, and what comes of it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from musicrl_jax.core import checkpoint, hosts
from musicrl_jax.systems import tiny

WORKER = Path(__file__).with_name("several_hosts_worker.py")
LONGEST = 240  # seconds that a process may take


def start(processes, verb, folder, count, devices, dies_at=99):
    """The `count` processes of one attempt."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, str(WORKER), verb, str(folder), str(devices), str(dies_at)]
    started = []
    for number in range(count):
        environment = {**os.environ, "JAX_COORDINATOR_ADDRESS": address}
        environment |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
        with (folder / f"log-{number}.txt").open("a") as log:
            started.append(
                processes.start(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    return started


def ended(started):
    """Their exit statuses."""
    deadline = time.monotonic() + LONGEST
    try:
        return [process.wait(max(deadline - time.monotonic(), 1)) for process in started]
    finally:
        for process in started:
            process.kill()


def told(folder):
    """The last line of each step of the metrics, and what was drawn in it."""
    run = folder / "run" if (folder / "run").exists() else folder
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines, checkpoint.model_hash(run)


def drawn(folder):
    """What was drawn in each step, by the first process, over all attempts in their order; each kind once."""
    lines = (folder / "drawn-0.jsonl").read_text().splitlines()
    return list(dict.fromkeys(lines))


def share(folder, count):
    """Rows that each process has computed."""
    return [int((folder / f"rows-{number}.txt").read_text()) for number in range(count)]


def written(folder, name):
    """What a folder of tokens holds, by hash, and the votes on them."""
    votes = folder / name / "votes.jsonl"
    return json.loads(
        (folder / name / "manifest.json").read_text()
    ), votes.exists() and votes.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "rows"), [("collect", 80), ("encode", 12)])
def test_hosts_share_the_rows_and_write_what_one_process_does(verb, rows, tmp_path, processes):
    """2 processes of 2 devices against one of 4: ten batches of four pairs, and three of four clips."""
    name = {"collect": "votes", "encode": "tokens"}[verb]
    alone, together = tmp_path / "alone", tmp_path / "together"
    for folder in (alone, together):
        folder.mkdir()
        tiny.write(folder / "system")
    assert ended(start(processes, verb, alone, 1, 4)) == [0], (alone / "log-0.txt").read_text()[
        -3000:
    ]
    assert ended(start(processes, verb, together, 2, 2)) == [0, 0], (
        together / "log-0.txt"
    ).read_text()[-3000:]
    assert written(together, name) == written(alone, name)
    assert share(alone, 1) == [rows] and share(together, 2) == [rows // 2, rows // 2]
    if verb == "encode":
        return

    # One is killed in its fourth batch of four clips; what both had measured is not measured again.
    cut = tmp_path / "cut"
    cut.mkdir()
    tiny.write(cut / "system")
    lost = ended(start(processes, verb, cut, 2, 2, dies_at=15))
    assert lost[0] in (hosts.LOST, -signal.SIGABRT) and lost[1] == -signal.SIGKILL
    assert (
        len(list((cut / "votes/played").iterdir())) == 3
        and not (cut / "votes/votes.jsonl").exists()
    )
    assert ended(start(processes, verb, cut, 2, 2)) == [0, 0], (cut / "log-0.txt").read_text()[
        -3000:
    ]
    assert written(cut, name) == written(alone, name) and not (cut / "votes/played").exists()
    assert share(cut, 2)[1] == rows // 2 + 3


@pytest.mark.slow
@pytest.mark.exactness(17)
@pytest.mark.parametrize("verb", ["train", "train_rl"])
def test_a_run_survives_all_that_befalls_its_hosts(verb, tmp_path, processes):
    """Uninterrupted on 2 processes of 2 devices; and with one of them killed, then told to stop."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    assert ended(start(processes, verb, whole, 2, 2)) == [0, 0], (whole / "log-0.txt").read_text()[
        -3000:
    ]

    lost = ended(start(processes, verb, cut, 2, 2, dies_at=2))
    assert lost[0] in (hosts.LOST, -signal.SIGABRT), (cut / "log-0.txt").read_text()[
        -3000:
    ]  # ours, or JAX's own
    assert lost[1] == -signal.SIGKILL
    assert not checkpoint.has_model(cut) and not checkpoint.has_model(cut / "run")

    started = start(processes, verb, cut, 2, 2, dies_at=-4)
    while not (cut / "here-0").exists() and started[0].poll() is None:
        time.sleep(0.1)
    since = time.monotonic()
    started[1].send_signal(signal.SIGTERM)  # one is told, both stop
    assert ended(started) == [hosts.AGAIN, hosts.AGAIN], (cut / "log-0.txt").read_text()[-3000:]
    assert time.monotonic() - since < 30

    # A lone process of 4 devices goes on too. Its sums differ in their last digits: JAX gives Gloo, which adds in the
    # order of several hosts, to processes with a coordination service alone.
    moved = tmp_path / "moved"
    shutil.copytree(cut, moved)
    assert ended(start(processes, verb, cut, 2, 2)) == [0, 0], (cut / "log-0.txt").read_text()[
        -3000:
    ]
    if verb == "train":
        assert ended(start(processes, verb, moved, 1, 4)) == [0], (moved / "log-0.txt").read_text()[
            -3000:
        ]
        for one, other in zip(told(moved)[0], told(whole)[0], strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    assert told(cut) == told(whole)
    if verb == "train_rl":
        assert drawn(cut) == drawn(whole)
