"""SIGTERM at random moments of every verb: how each leaves, how fast, and whether anything is lost.

    python tests/benchmarks/signals.py FOLDER [--signals=60] [--minutes=10] [--parallel=2] [--seed=0]

The tiny run (gin/runs/tiny.gin) is made once, whole, in FOLDER/whole. Then each verb does its stage
again in a copy: it is started, gets SIGTERM at a random moment after its first progress line, and is started again in
the same folder, until one start gets to the end. What it then has written is compared with the whole run. Every signal
is a line of FOLDER/signals.jsonl; called again, the script goes on from there. At the end every verb that was cut off
is run to its end once more.
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
    """The command of a verb whose results go to `folder`/out, or for a stage to its place in `folder`."""
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
    """A folder where nothing but the verb's own work is missing."""
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
    """What a verb has written to its end, so that equal work has equal text; None where it is not there."""
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
        told = json.loads((place / "summary.json").read_text())
        return json.dumps({name: told[name] for name in ("rewards", "gains", "kl", "pairs", "mos")})
    kept = {
        "vocabulary": "vocabulary.model",
        "encode": "tokens/manifest.json",
        "votes": "votes/votes.jsonl",
        "build": "out/**/*.array_record*",
        "generate": "out/*.wav",
        "pack": "out/*.safetensors",
        "export": "out/weights/*",
    }[verb]
    files = sorted(path for path in folder.glob(kept) if "incomplete" not in str(path))
    return (
        json.dumps([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
        if files
        else None
    )


def start(verb, folder):
    """(process, event of its first progress line, all lines)"""
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
    """Runs a verb to its end; its exit status, and its last words where that is not 0."""
    process, _, lines = start(verb, folder)
    try:
        status = process.wait(LONGEST_RUN)
    finally:
        process.kill()
    return status, "" if status == 0 else "".join(lines[-5:])


def attempt(verb, folder, delay):
    """One start with one signal: a line of the log."""
    process, begun, lines = start(verb, folder)
    try:
        deadline = time.monotonic() + LONGEST_START
        while not begun.wait(0.1) and process.poll() is None and time.monotonic() < deadline:
            pass
        ends = time.monotonic() + delay
        while time.monotonic() < ends and process.poll() is None:
            time.sleep(0.02)
        told = begun.is_set() and process.poll() is None  # before that it may die by the signal
        sent = time.monotonic()
        if told:
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
        "told": told,
        "status": status,
        "delay": delay,
        "seconds": seconds,
        "words": words,
    }


def trial(verb, folder, log, delay):
    """One signal; where the verb got to its end, its work is compared, and the next trial begins anew."""
    if not folder.exists():
        prepare(verb, folder)
    line = attempt(verb, folder, delay)
    if line["status"] == 0:
        line["whole"] = compare(verb, folder)
    log(line)


def compare(verb, folder):
    """Whether the verb has written what the whole run has; the folder is emptied for the next."""
    wanted, found = reference(verb, folder.parent), written(verb, folder)
    equal = found == wanted
    if equal:
        shutil.rmtree(folder)
    else:
        folder.rename(folder.with_name(f"{folder.name}-lost-{time.time():.0f}"))
    return equal


def reference(verb, root):
    """What the whole run has written, for a verb that is no stage by running it once."""
    if verb in STAGES:
        return written(verb, root / "whole")
    folder = root / f"{verb}-whole"
    if written(verb, folder) is None:
        prepare(verb, folder)
        status, words = finished(verb, folder)
        assert status == 0, (verb, words)
    return written(verb, folder)


def report(lines):
    """A table: for each verb its exits, the seconds that they took, and whether what it made was whole."""
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
            f"| {verb} | {len(signals)} | {said} | {middle:.1f}, {longest:.1f} | {sum(wholes)}, {wholes.count(False)} |"
        )
    for line in lines:
        if line["words"]:
            print(f"\n{line['verb']}, status {line['status']}:\n{line['words']}")


def main():
    """Makes the whole run, sends the signals that are still due, finishes what was cut off, and prints the table."""
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
    given = parser.parse_args()
    root = given.folder.absolute()
    verbs = given.verbs.split(",")
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
    deadline = time.monotonic() + 60 * given.minutes
    rng = random.Random(f"{given.seed} {len(lines)}")

    def work(number):
        mine = verbs[number :: given.parallel]
        while time.monotonic() < deadline and sum(line["told"] for line in lines) < given.signals:
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

    with concurrent.futures.ThreadPoolExecutor(given.parallel) as pool:
        list(pool.map(work, range(given.parallel)))
    report(lines)


if __name__ == "__main__":
    main()
