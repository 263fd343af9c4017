"""A bundle under load, by locust: batches against one clip at a time, and four times as much as it can.

    python tests/benchmarks/serve.py --bundle=bundle             half an hour with the demo's bundle on two CPU cores

1. Clips a second, p50 and p99 of `musicrl serve` with --rows=1 and with --rows=8, in turns, with as many clients as
   keep each busy; the ratio is what batching brings.
2. The latter again with four times as many requests a second as it answered: what they were answered with, how long
   the slowest took, and how the process's memory grew from the first tenth of the time to the last.
"""

import argparse
import csv
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

CLIENT = """
import random
from locust import FastHttpUser, constant_throughput, task

class Client(FastHttpUser):
    wait_time = constant_throughput({pace})
    network_timeout = connection_timeout = 300.0

    @task
    def clip(self):
        asked = {{"prompt": random.choice(["upbeat jazz", "a slow piano", "a reel on a harp"])}}
        with self.client.post("/v1/clips", json=asked, catch_response=True) as answer:
            answer.request_meta["name"] = str(answer.status_code)
            answer.success()
"""


@contextmanager
def service(bundle: str, *flags: str):
    """(address, process) of `musicrl serve`, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "musicrl_jax.cli", "serve", f"--bundle={bundle}", f"--port={port}", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urlopen(f"{address}/readyz", timeout=5).close()
                break
            except (URLError, OSError):
                if process.poll() is not None:
                    raise SystemExit(f"musicrl serve ended with {process.returncode}: {' '.join(command)}") from None
                time.sleep(0.5)
        yield address, process
    finally:
        process.terminate()
        process.wait()


def memory(process: subprocess.Popen) -> float:
    """MB that are resident."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def load(address: str, clients: int, pace: float, seconds: float, process: subprocess.Popen) -> dict[str, dict]:
    """Answers by status: how many, p50, p99 and the slowest in seconds; under 'memory' what was resident, MB."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "client.py").write_text(CLIENT.format(pace=pace))
        command = [sys.executable, "-m", "locust", "-f", f"{folder}/client.py", "--headless", f"--host={address}"]
        command += [f"-u{clients}", f"-r{clients}", f"-t{seconds:.0f}s", f"--csv={folder}/found", "--stop-timeout=300"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = []
        while run.poll() is None:
            seen.append(memory(process))
            time.sleep(0.5)
        rows = list(csv.DictReader(Path(folder, "found_stats.csv").read_text().splitlines()))
    found = {
        row["Name"]: {
            "count": int(row["Request Count"]),
            "p50": float(row["50%"]) / 1e3,
            "p99": float(row["99%"]) / 1e3,
            "slowest": float(row["Max Response Time"]) / 1e3,
        }
        for row in rows
        if row["Name"] != "Aggregated"
    }
    tenth = max(1, len(seen) // 10)
    return {**found, "memory": {"first": statistics.mean(seen[:tenth]), "last": statistics.mean(seen[-tenth:])}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
                told = load(address, 2 * rows, 1000.0, asked.seconds, process)
                found[rows].append(told["200"])
    print("| --rows | clips a second | p50 s | p99 s |\n|---|---|---|---|")
    pace = {}
    for rows, turns in found.items():
        pace[rows] = statistics.median(turn["count"] for turn in turns) / asked.seconds
        p50, p99 = (statistics.median(turn[name] for turn in turns) for name in ("p50", "p99"))
        print(f"| {rows} | {pace[rows]:.2f} | {p50:.2f} | {p99:.2f} |", flush=True)
    print(f"\nbatches over one at a time: {pace[asked.rows] / pace[1]:.2f}\n", flush=True)
    offered = 4 * pace[asked.rows]
    clients = 400
    with service(asked.bundle, f"--rows={asked.rows}") as (address, process):
        told = load(address, clients, offered / clients, asked.requests / offered, process)
    resident = told.pop("memory")
    print(
        f"{offered:.1f} requests a second\n\n| answer | requests | p50 s | p99 s | slowest s |\n|---|---|---|---|---|"
    )
    for status, row in told.items():
        print(f"| {status} | {row['count']} | {row['p50']:.2f} | {row['p99']:.2f} | {row['slowest']:.2f} |")
    print(f"\nmemory: {resident['first']:.0f} MB at first, {resident['last']:.0f} MB at last")


if __name__ == "__main__":
    main()
