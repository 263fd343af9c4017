"""Checks that verbs that make clips or move models do not import libraries that read data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each verb compiles in a new process
ROOT = Path(__file__).parents[2]
HEAVY = "tensorflow", "tensorflow_datasets", "seqio", "keras", "sklearn"
SCRIPT = """
import json, os, signal, sys, threading, time, urllib.request
from musicrl_jax import cli

def stop_when_ready(port):
    while True:
        time.sleep(0.2)
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
            return os.kill(os.getpid(), signal.SIGTERM)
        except OSError:
            pass

words = sys.argv[1:]
if words[0] == "serve":
    port = words[-1].rpartition("=")[2]
    threading.Thread(target=stop_when_ready, args=[port], daemon=True).start()
assert cli.main(words) == 0
print(json.dumps(sorted(sys.modules)))
"""


def imported(*words):
    """Returns the modules that a process has imported after running a verb."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("verb", ["system", "bundle", "serve", "pack", "export"])
def test_a_verb_imports_no_library_that_reads_data(verb, run, exported, tmp_path):
    words = {
        "system": ["generate", f"--system={run}/policy", "--prompt=a reel"],
        "bundle": ["generate", f"--system={exported[0]}", "--prompt=a reel"],
        "serve": ["serve", f"--bundle={exported[0]}", "--rows=1", "--port=18321"],
        "pack": ["pack", f"--models={{'policy': '{run}/policy'}}", f"--out={tmp_path}/pack"],
        "export": ["export", f"--system={run}/policy", f"--out={tmp_path}/b", "--platforms=cpu"],
    }[verb]
    if words[0] == "generate":
        words += ["--clip_seconds=0.4", f"--out={tmp_path}/clips"]
    if words[0] == "export":
        words += ["--clip_seconds=0.4"]
    assert not imported(*words) & set(HEAVY)
