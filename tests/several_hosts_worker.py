"""One process of a run over several, for several_hosts_test.py: VERB FOLDER DEVICES DIES_AT."""

import os
import sys
from pathlib import Path

verb, folder, devices, dies_at = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import conftest  # noqa: F401  strict dtypes, no optimisation by LLVM

os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")

import hashlib
import json
import signal
import time

import jax

from musicrl_jax.core import hosts, sharding
from musicrl_jax.core import metrics as metric_files

STEPS = 8
WRITE = metric_files.MetricWriter.write


def write(self, step, metrics, prefix=""):
    """Writes metrics. At step DIES_AT the last process dies; at -DIES_AT it waits for SIGTERM."""
    WRITE(self, step, metrics, prefix)
    if step == dies_at and jax.process_index() == jax.process_count() - 1 > 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == -dies_at:
        (folder / f"here-{jax.process_index()}").touch()
        time.sleep(1)


# --- Verbs, as their tests run them. ---


def train():
    import train_test

    train_test.run(folder, steps=STEPS, batch_size=8, fsdp=2)


def train_rl():
    import train_rl_test

    from musicrl_jax.core.keys import Stream
    from musicrl_jax.rl.steps import Run
    from musicrl_jax.systems import tiny

    tiny.write(folder / "base")  # the hosts share it
    (folder / "one.txt").write_text("a tune")
    train_rl_test.files = lambda: (folder, None)
    draw = Run.draw

    def draw_and_note(self, policy, prompts, step, stream):
        """Draws a rollout, and appends a hash of it to a file."""
        rollout = draw(self, policy, prompts, step, stream)
        if stream == Stream.ROLLOUT:
            tokens, wav = sharding.fetch((rollout.sampled.tokens, rollout.wav))
            content = hashlib.sha256(tokens.tobytes() + wav.tobytes()).hexdigest()
            with (folder / f"rollouts-{jax.process_index()}.jsonl").open("a") as file:
                file.write(json.dumps(content) + "\n")
        return rollout

    Run.draw = draw_and_note
    train_rl_test.loop(folder, steps=STEPS, save_every=2, saves=True, normalise=True, fsdp=2)


def collect():
    import collect_test

    measure = collect_test.Pitch.measure

    def measure_and_count(ears, wav, measurements):
        if count_rows(1) == dies_at and jax.process_index() == jax.process_count() - 1 > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(ears, wav, measurements)

    collect_test.Pitch.measure = measure_and_count
    collect_test.collected(folder)


def encode():
    import encode_test

    fetch = sharding.fetch

    def fetch_and_count(tree):
        count_rows(len(sharding.local_rows(tree["tokens"])))
        return fetch(tree)

    sharding.fetch = fetch_and_count
    encode_test.encode_tones(folder)


def count_rows(rows):
    """Adds `rows` to this process's count over all attempts, and returns the count."""
    path = folder / f"rows-{jax.process_index()}.txt"
    count = rows + (int(path.read_text()) if path.exists() else 0)
    path.write_text(f"{count}")
    return count


def main():
    hosts.join()
    metric_files.MetricWriter.write = write
    {"train": train, "train_rl": train_rl, "collect": collect, "encode": encode}[verb]()


try:
    main()
except jax.errors.JaxRuntimeError as error:
    if not hosts.is_lost_host(error):
        raise
    print("lost", error, flush=True)
    os._exit(hosts.LOST)
