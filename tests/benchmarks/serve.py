"""Measures a bundle under load: batches against single clips, and four times the load it can take.

    python tests/benchmarks/serve.py --bundle=bundle

1. Clips a second, and median and 99th percentile of the latency, of `musicrl serve` with --rows=1
   and --rows=8 in turns, with enough clients to keep each busy. The ratio is the gain of batches.
2. The same with --rows=8 and four times the requests a second that it answered: statuses,
   latencies, and the growth of the process's memory.

Clients are locust's. It takes half an hour with the demo's bundle on two CPU cores.
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
        body = {{"prompt": random.choice(["upbeat jazz", "a slow piano", "a reel on a harp"])}}
        start = time.time()
        answer = self.client.post("/v1/clips", json=body)
        answers.write(f"{{start}},{{time.time()}},{{answer.status_code}}\\n")
"""


@contextmanager
def service(bundle: str, *flags: str):
    """Yields (address, process) of `musicrl serve` when it is ready."""
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
    """Returns the resident memory of a process in MB."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def load(
    address: str, clients: int, pace: float, seconds: float, process: subprocess.Popen
) -> tuple[np.ndarray, list[float]]:
    """Sends requests to a service for some seconds.

    Returns (answers f64 [n, 3], resident MB twice a second). An answer has the seconds of its
    request and of its end, both after the first request, and its status; 0 if none came.
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
        rows = np.loadtxt(f"{folder}/answers.csv", delimiter=",", ndmin=2)
    rows[:, :2] -= rows[:, 0].min()
    return rows, resident


def latencies(rows: np.ndarray) -> str:
    """Returns median, 99th percentile and maximum of the seconds of answers, as table cells."""
    seconds = rows[:, 1] - rows[:, 0]
    return " | ".join(f"{x:.2f}" for x in (*np.percentile(seconds, (50, 99)), seconds.max()))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--requests", type=int, default=5000, help="of the second part")
    flags = parser.parse_args()

    # One clip at a time against batches.
    answers_by_rows = {1: [], flags.rows: []}
    for _ in range(flags.turns):
        for rows in answers_by_rows:
            with service(flags.bundle, f"--rows={rows}") as (address, process):
                answers, _ = load(address, 2 * rows, 1000.0, flags.seconds, process)
                # Only answers of the time when all clients sent requests.
                answers_by_rows[rows].append(answers[answers[:, 1] <= flags.seconds])
    print("| --rows | clips a second | p50 s | p99 s | slowest s |\n|---|---|---|---|---|")
    pace = {}
    for rows, turns in answers_by_rows.items():
        pace[rows] = statistics.median((turn[:, 2] == 200).sum() for turn in turns) / flags.seconds
        print(f"| {rows} | {pace[rows]:.2f} | {latencies(np.concatenate(turns))} |", flush=True)
    print(f"\nbatches over one at a time: {pace[flags.rows] / pace[1]:.2f}\n", flush=True)

    # Four times the load.
    offered = 4 * pace[flags.rows]
    clients = 400
    with service(flags.bundle, f"--rows={flags.rows}") as (address, process):
        answers, resident = load(
            address, clients, offered / clients, flags.requests / offered, process
        )
    print(f"{offered:.1f} requests a second, {len(answers)} in all\n")
    print("| answer | requests | p50 s | p99 s | slowest s |\n|---|---|---|---|---|")
    for status in np.unique(answers[:, 2]):
        rows = answers[answers[:, 2] == status]
        print(f"| {status:.0f} | {len(rows)} | {latencies(rows)} |")
    parts = [f"{statistics.mean(part):.0f}" for part in np.array_split(resident, 4)]
    print(f"\nresident memory, MB, over each quarter of the time: {', '.join(parts)}")


if __name__ == "__main__":
    main()
