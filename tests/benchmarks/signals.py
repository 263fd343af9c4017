"""Sends SIGTERM at random moments to every verb, and checks exits, their time and lost work.

    python tests/benchmarks/signals.py FOLDER [--signals=60] [--minutes=10] [--seed=0]

The tiny run (gin/runs/tiny.gin) is made once in FOLDER/whole. Then each verb does its stage again
in a copy: it starts, gets SIGTERM at a random moment after its first progress line, and starts
again in the same folder, until it finishes. Its work is then compared with the whole run. Every
signal is a line of FOLDER/signals.jsonl; another call continues from there. At the end every
interrupted verb is run to its end.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from musicrl_jax.core import checkpoint, hosts

ROOT = Path(__file__).parents[2]
# What each stage of the run writes in the run's folder.
TRAINED = {
    name: name
    for name in ("codec", "semantic", "mulan", "quality", "policy", "fine", "preference", "r", "ru")
}
STAGES = {
    "vocabulary": "vocabulary.model",
    "encode": "tokens",
    **TRAINED,
    "votes": "votes",
    "evaluate": "evaluation",
}
OTHERS = "build", "generate", "pack", "unpack", "export"
MODELS = "{'codec': '%s/codec', 'semantic': '%s/semantic', 'policy': '%s/policy'}"
PROMPTS = "\n".join(
    f"{mood} music with {what}" for mood in ("slow", "loud", "sad") for what in ("drums", "a flute")
)
LONGEST_EXIT, LONGEST_START, LONGEST_RUN = 120.0, 300.0, 600.0
LATEST = 20.0  # seconds from the first progress line to the signal
NOISE = re.compile(r"$|WARNING|[IWEF]\d{4} ")  # of libraries, before a verb says anything


def command(verb, folder):
    """Returns a verb's command; it writes to `folder`/out, a stage to its place in `folder`."""
    run = [sys.executable, "-u", "-m", "musicrl_jax.cli"]
    whole, out = folder.parent / "whole", folder / "out"
    places = [f"--gin.MODEL_DIR='{folder}'", f"--gin.DATA_DIR='{folder.parent / 'data'}'"]
    if verb in STAGES:
        return [*run, "run", f"--only={verb}", "--gin_file=gin/runs/tiny.gin", *places]
    arguments = {
        "build": ["--builder=data/score_clips", "--config=tiny", f"--data_dir={out}"],
        "generate": [
            f"--system={whole / 'r'}",
            f"--prompts_file={folder / 'prompts.txt'}",
            f"--out={out}",
            "--clip_seconds=1.0",
        ],
        "pack": [f"--gin.pack.models={MODELS % (whole, whole, whole)}", f"--out={out}"],
        "unpack": [f"--source={folder / 'packed'}", f"--out={out}"],
        "export": [
            f"--system={whole / 'r'}",
            f"--out={out}",
            "--clip_seconds=1.0",
            "--platforms=['cpu']",
        ],
    }
    return [*run, verb, *arguments[verb]]


def prepare(verb, folder):
    """Makes a folder that has all inputs of a verb, and none of its outputs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    whole = folder.parent / "whole"
    if verb in STAGES:
        own = STAGES[verb]
        for path in whole.iterdir():
            if path.is_dir() and path.name != own:
                (folder / path.name).symlink_to(path)
            elif path.is_file() and not path.name.startswith(own):
                shutil.copy(path, folder)
    if verb == "generate":
        (folder / "prompts.txt").write_text(PROMPTS)
    if verb == "unpack":
        (folder / "packed").symlink_to(folder.parent / "pack-whole/out")


def written(verb, folder):
    """Returns a text of a verb's finished work, equal for equal work; None if it is not there."""
    place = folder / STAGES.get(verb, "out")
    if verb in TRAINED:
        if not checkpoint.has_model(place):
            return None
        steps = [
            json.loads(line)["step"] for line in (place / "metrics.jsonl").read_text().splitlines()
        ]
        return json.dumps([checkpoint.model_hash(place), steps])
    if verb == "unpack":
        models = {
            path.parent.name: checkpoint.model_hash(path.parent) for path in place.glob("*/model")
        }
        return json.dumps(models) if models else None
    if verb == "evaluate":
        if not (place / "summary.json").exists():
            return None
        summary = json.loads((place / "summary.json").read_text())
        return json.dumps(
            {name: summary[name] for name in ("rewards", "gains", "kl", "pairs", "mos")}
        )
    patterns = {
        "vocabulary": "vocabulary.model",
        "encode": "tokens/manifest.json",
        "votes": "votes/votes.jsonl",
        "build": "out/**/*.array_record*",
        "generate": "out/*.wav",
        "pack": "out/*.safetensors",
        "export": "out/weights/*",
    }[verb]
    files = sorted(path for path in folder.glob(patterns) if "incomplete" not in str(path))
    return (
        json.dumps([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
        if files
        else None
    )


def start(verb, folder):
    """Starts a verb and returns (process, event of its first progress line, all lines)."""
    begun, lines = threading.Event(), []
    process = subprocess.Popen(
        command(verb, folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )

    def read():
        for line in process.stdout:
            lines.append(line)
            if not NOISE.match(line):
                begun.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return process, begun, lines


def finished(verb, folder):
    """Runs a verb to its end; returns its exit status, and its last lines if that is not 0."""
    process, _, lines = start(verb, folder)
    try:
        status = process.wait(LONGEST_RUN)
    finally:
        process.kill()
    return status, "" if status == 0 else "".join(lines[-5:])


def attempt(verb, folder, delay):
    """Starts a verb, sends one signal, and returns a line of the log."""
    process, begun, lines = start(verb, folder)
    try:
        deadline = time.monotonic() + LONGEST_START
        while not begun.wait(0.1) and process.poll() is None and time.monotonic() < deadline:
            pass
        ends = time.monotonic() + delay
        while time.monotonic() < ends and process.poll() is None:
            time.sleep(0.02)
        signal_sent = (
            begun.is_set() and process.poll() is None
        )  # before that it may die by the signal
        sent = time.monotonic()
        if signal_sent:
            process.send_signal(signal.SIGTERM)
        status = process.wait(LONGEST_EXIT)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        process.kill()
    seconds = time.monotonic() - sent
    words = "" if status in (0, hosts.AGAIN, -signal.SIGTERM) else "".join(lines[-8:])
    return {
        "verb": verb,
        "told": signal_sent,
        "status": status,
        "delay": delay,
        "seconds": seconds,
        "words": words,
    }


def trial(verb, folder, log, delay):
    """Sends one signal. A finished verb is compared, and starts anew in the next trial."""
    if not folder.exists():
        prepare(verb, folder)
    line = attempt(verb, folder, delay)
    if line["status"] == 0:
        line["whole"] = compare(verb, folder)
    log(line)


def compare(verb, folder):
    """Tells whether a verb has written the same as the whole run; clears the folder."""
    expected, actual = reference(verb, folder.parent), written(verb, folder)
    equal = actual == expected
    if equal:
        shutil.rmtree(folder)
    else:
        folder.rename(folder.with_name(f"{folder.name}-lost-{time.time():.0f}"))
    return equal


def reference(verb, root):
    """Returns what the whole run has written; a verb that is no stage runs once for it."""
    if verb in STAGES:
        return written(verb, root / "whole")
    folder = root / f"{verb}-whole"
    if written(verb, folder) is None:
        prepare(verb, folder)
        status, words = finished(verb, folder)
        assert status == 0, (verb, words)
    return written(verb, folder)


def report(lines):
    """Prints exits, their seconds and the compared work of each verb."""
    print(
        "| verb | signals | exits | seconds to exit: median, longest | work compared: equal, not |"
    )
    print("|---|---|---|---|---|")
    by_verb = collections.defaultdict(list)
    for line in lines:
        by_verb[line["verb"]].append(line)
    for verb, each in [*sorted(by_verb.items()), ("all", lines)]:
        signals = [line for line in each if line["told"]]
        exits = collections.Counter(str(line["status"]) for line in signals)
        took = sorted(line["seconds"] for line in signals) or [0.0]
        wholes = [line["whole"] for line in each if "whole" in line]
        said = ", ".join(f"{count} x {status}" for status, count in sorted(exits.items()))
        middle, longest = took[len(took) // 2], took[-1]
        print(
            f"| {verb} | {len(signals)} | {said} | {middle:.1f}, {longest:.1f} "
            f"| {sum(wholes)}, {wholes.count(False)} |"
        )
    for line in lines:
        if line["words"]:
            print(f"\n{line['verb']}, status {line['status']}:\n{line['words']}")


def main():
    """Sends the signals that are still due, finishes interrupted verbs, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--signals", type=int, default=60, help="over all verbs and all calls")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="in which new signals are sent, in this call"
    )
    parser.add_argument("--parallel", type=int, default=2, help="verbs at a time")
    parser.add_argument("--verbs", default=",".join([*OTHERS, *STAGES]))
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    root = flags.folder.absolute()
    verbs = flags.verbs.split(",")
    root.mkdir(parents=True, exist_ok=True)
    path = root / "signals.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    write = threading.Lock()

    def log(line):
        with write, path.open("a") as file:
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            print(
                line["verb"],
                line["status"],
                f"{line['seconds']:.1f} s",
                line.get("whole", ""),
                flush=True,
            )

    if not (root / "whole/summary.json").exists():
        places = [f"--gin.MODEL_DIR='{root / 'whole'}'", f"--gin.DATA_DIR='{root / 'data'}'"]
        run = [
            sys.executable,
            "-m",
            "musicrl_jax.cli",
            "run",
            "--gin_file=gin/runs/tiny.gin",
            *places,
        ]
        subprocess.run(run, check=True, cwd=ROOT)
    for verb in OTHERS:
        if verb in verbs or (verb == "pack" and "unpack" in verbs):
            reference(verb, root)
    deadline = time.monotonic() + 60 * flags.minutes
    rng = random.Random(f"{flags.seed} {len(lines)}")

    def work(number):
        mine = verbs[number :: flags.parallel]
        while time.monotonic() < deadline and sum(line["told"] for line in lines) < flags.signals:
            starts = collections.Counter(line["verb"] for line in lines)
            verb = min(mine, key=lambda name: (starts[name], verbs.index(name)))
            # A verb that was done before its signal gets the next one earlier.
            missed = sum(line["verb"] == verb and not line["told"] for line in lines)
            trial(verb, root / f"at-{verb}", log, rng.uniform(0, LATEST / 2**missed))
        for verb in mine:
            folder = root / f"at-{verb}"
            if folder.exists():
                began = time.monotonic()
                status, words = finished(verb, folder)
                line = {
                    "verb": verb,
                    "told": False,
                    "status": status,
                    "seconds": time.monotonic() - began,
                }
                log({**line, "words": words, "whole": status == 0 and compare(verb, folder)})

    with concurrent.futures.ThreadPoolExecutor(flags.parallel) as pool:
        list(pool.map(work, range(flags.parallel)))
    report(lines)


if __name__ == "__main__":
    main()
