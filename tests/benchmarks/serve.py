"""A bundle under load, by locust: batches against one clip at a time, and four times as much as it can.

    python tests/benchmarks/serve.py --bundle=bundle             half an hour with the demo's bundle on two CPU cores

1. Clips a second, p50 and p99 of `musicrl serve` with --rows=1 and with --rows=8, in turns, with as many clients as
   keep each busy; the ratio is what batching brings.
2. The latter again with four times as many requests a second as it answered: what they were answered with, how long
   the slowest took, and how the process's memory grew.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np

CLIENT = """
import random, time
from locust import FastHttpUser, constant_throughput, task

answers = open({answers!r}, "a", buffering=1)

class Client(FastHttpUser):
    wait_time = constant_throughput({pace})
    network_timeout = connection_timeout = 600.0

    @task
    def clip(self):
        asked = {{"prompt": random.choice(["upbeat jazz", "a slow piano", "a reel on a harp"])}}
        start = time.time()
        answer = self.client.post("/v1/clips", json=asked)
        answers.write(f"{{start}},{{time.time()}},{{answer.status_code}}\\n")
"""


@contextmanager
def service(bundle: str, *flags: str):
    """(address, process) of `musicrl serve`, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "musicrl_jax.cli",
        "serve",
        f"--bundle={bundle}",
        f"--port={port}",
        *flags,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urlopen(f"{address}/readyz", timeout=5).close()
                break
            except (URLError, OSError):
                if process.poll() is not None:
                    raise SystemExit(
                        f"musicrl serve ended with {process.returncode}: {' '.join(command)}"
                    ) from None
                time.sleep(0.5)
        yield address, process
    finally:
        process.terminate()
        process.wait()


def memory(process: subprocess.Popen) -> float:
    """MB that are resident."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def load(
    address: str, clients: int, pace: float, seconds: float, process: subprocess.Popen
) -> tuple[np.ndarray, list[float]]:
    """(a row an answer: when it was asked for, when it came, in seconds from the first one asked, its status, 0 where
    none came; MB that were resident, twice a second).
    """
    with tempfile.TemporaryDirectory() as folder:
        client = CLIENT.format(pace=pace, answers=f"{folder}/answers.csv")
        Path(folder, "client.py").write_text(client)
        command = [
            sys.executable,
            "-m",
            "locust",
            "-f",
            f"{folder}/client.py",
            "--headless",
            f"--host={address}",
        ]
        spawn = max(1.0, pace * clients) if pace < 1 else clients  # a second
        command += [f"-u{clients}", f"-r{spawn}", f"-t{max(seconds, 1):.0f}s", "--stop-timeout=600"]
        with open(f"{folder}/log", "w") as log:
            run = subprocess.Popen(command, stdout=log, stderr=log)
            resident = []
            while run.poll() is None:
                resident.append(memory(process))
                time.sleep(0.5)
        if not Path(folder, "answers.csv").exists():
            raise SystemExit(f"locust asked for nothing: {Path(folder, 'log').read_text()[-2000:]}")
        found = np.loadtxt(f"{folder}/answers.csv", delimiter=",", ndmin=2)
    found[:, :2] -= found[:, 0].min()
    return found, resident


def told(rows: np.ndarray) -> str:
    """p50, p99 and the slowest of some answers, as cells of a table."""
    seconds = rows[:, 1] - rows[:, 0]
    return " | ".join(f"{x:.2f}" for x in (*np.percentile(seconds, (50, 99)), seconds.max()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--requests", type=int, default=5000, help="of the second part")
    asked = parser.parse_args()
    found = {1: [], asked.rows: []}
    for _ in range(asked.turns):
        for rows in found:
            with service(asked.bundle, f"--rows={rows}") as (address, process):
                answers, _ = load(address, 2 * rows, 1000.0, asked.seconds, process)
                found[rows].append(
                    answers[answers[:, 1] <= asked.seconds]
                )  # what came while all clients asked
    print("| --rows | clips a second | p50 s | p99 s | slowest s |\n|---|---|---|---|---|")
    pace = {}
    for rows, turns in found.items():
        pace[rows] = statistics.median((turn[:, 2] == 200).sum() for turn in turns) / asked.seconds
        print(f"| {rows} | {pace[rows]:.2f} | {told(np.concatenate(turns))} |", flush=True)
    print(f"\nbatches over one at a time: {pace[asked.rows] / pace[1]:.2f}\n", flush=True)
    offered = 4 * pace[asked.rows]
    clients = 400
    with service(asked.bundle, f"--rows={asked.rows}") as (address, process):
        answers, resident = load(
            address, clients, offered / clients, asked.requests / offered, process
        )
    print(f"{offered:.1f} requests a second, {len(answers)} in all\n")
    print("| answer | requests | p50 s | p99 s | slowest s |\n|---|---|---|---|---|")
    for status in np.unique(answers[:, 2]):
        rows = answers[answers[:, 2] == status]
        print(f"| {status:.0f} | {len(rows)} | {told(rows)} |")
    parts = [f"{statistics.mean(part):.0f}" for part in np.array_split(resident, 4)]
    print(f"\nresident memory, MB, over each quarter of the time: {', '.join(parts)}")


if __name__ == "__main__":
    main()
