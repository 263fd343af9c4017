"""Tests of launch/jobset.yaml, and of launch/tpu_rl.sh with a fake gcloud.

The fake runs the commands of workers on this machine.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GIN_FILE = "gin/a run.gin"
ONE_HOST = {"ACCELERATOR_TYPE": "v5litepod-8"}  # for `ends_as(hosts=1)`
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "TPU_NAME": "rl",
    "ACCELERATOR_TYPE": "v5p-16",
    "MODEL_DIR": "gs://my-bucket/it's a run",
    "PAUSE_SECONDS": "0",
    "MAX_ATTEMPTS": "9",
}
# --- fakes ---

# Commands on the PATH, and their scripts.
COMMANDS = {
    "hostname": 'echo "$HOST"',
    "gcsfuse": 'echo "$@" >> "$FAKE/mounts"',
    "mountpoint": 'grep -qs -- " ${@: -1}$" "$FAKE/mounts"',
    "sudo": '[ "$1" = docker ] && exec "$@"; exit 1',
    "docker": """echo "$HOST $*" >> "$FAKE/docker"
[ "$1" = run ] || exit 0
while [ "$1" != my/image ]; do shift; done
exec "$FAKE/musicrl" "${@:2}\"""",
}
# launch/setup.sh: installs `musicrl`.
SETUP = """#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/.."
echo "$PWD $*" >> "$FAKE/setups"
mkdir -p .venv/bin
cp "$FAKE/musicrl" .venv/bin/musicrl
"""
# `musicrl`: records its arguments, and ends as $END says.
MUSICRL = """#!/usr/bin/env bash
case "$1 ${@: -1}" in
  plan*)
    printf '%s\\0' "$@" > "$FAKE/plan"
    echo "4 functions of train_rl"
    exit "$(cat "$FAKE/plan_status")"
    ;;
  *--dry_run) echo "what is wrong with it"; exit "$(cat "$FAKE/config_status")" ;;
esac
printf '%s\\0' "$@" > "$(mktemp "$FAKE/argv/$(date +%s%N)-$HOST-XXX")"
echo "step 1"
case $END in
  breaks | drops) sleep 0.5; echo "step 2"; exit 0 ;;
  waits)
    trap 'echo saved; exit 75' TERM
    touch "$FAKE/waits-$HOST"
    while :; do sleep 0.05; done
    ;;
  *) exit "$END" ;;
esac
"""


class Cloud:
    """A checkout to launch from, and the state of its fake gcloud."""

    def __init__(self, folder, processes=None):
        self.processes = processes
        self.fake, self.home = folder / "fake", folder / "home"
        self.checkout = folder / "a checkout"
        if not folder.exists():
            self.make()

    def make(self):
        """Writes the fake commands, and commits a checkout."""
        for name in ("bin", "nodes", "queued", "argv", "workers"):
            (self.fake / name).mkdir(parents=True)
        for name, script in COMMANDS.items():
            self.write(self.fake / "bin" / name, f"#!/usr/bin/env bash\n{script}\n")
        (self.fake / "bin/gcloud").symlink_to(HERE / "gcloud")
        (self.fake / "bin/python3").symlink_to(sys.executable)
        self.write(self.fake / "musicrl", MUSICRL)
        self.home.mkdir()
        self.ends_as(0)
        (self.fake / "plan_status").write_text("0")
        (self.fake / "config_status").write_text("0")
        for name in ("tpu_rl.sh", "tpu_worker.sh"):
            self.write(self.checkout / "launch" / name, (ROOT / "launch" / name).read_text())
        self.write(self.checkout / "launch/setup.sh", SETUP)
        self.write(self.checkout / GIN_FILE, "")
        self.write(self.checkout / ".gitignore", ".venv/\n/runs/\n")
        self.git("init", "--quiet")
        self.commit()

    @staticmethod
    def write(path, text):
        """Writes an executable file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def git(self, *words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        environment = {"PATH": os.environ["PATH"]}
        subprocess.run(command, cwd=self.checkout, check=True, env=environment)

    def commit(self):
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "x")

    def ends_as(self, *attempts, hosts=2, **more):
        """Sets how each attempt ends: a status or an event, for all workers or a list of them."""
        script = {"attempts": attempts, "hosts": hosts, **more}
        (self.fake / "script.json").write_text(json.dumps(script))

    def has(self, state="READY", queued="ACTIVE", nodes=("rl",)):
        """Makes existing TPUs. `queued` is the state of their queued resource, or None."""
        for name in nodes:
            (self.fake / "nodes" / name).write_text(state)
            for number in range(json.loads((self.fake / "script.json").read_text())["hosts"]):
                (self.fake / f"workers/{name}-w-{number}/tmp").mkdir(parents=True)
        if queued:
            resource = {"states": [queued], "nodes": nodes, "made": True}
            (self.fake / "queued/rl").write_text(json.dumps(resource))

    def start(self, *arguments, before=(), **settings):
        """Starts the launcher; returns its process."""
        path = f"{self.fake / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.home), "FAKE": str(self.fake), "HOST": "here"}
        settings = SETTINGS | settings
        environment |= {name: value for name, value in settings.items() if value is not None}
        arguments = arguments or (f"--gin_file={GIN_FILE}",)
        command = [*before, str(self.checkout / "launch/tpu_rl.sh"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return self.processes.start(command, env=environment, cwd=self.home, **pipes)

    def run(self, *arguments, **settings):
        """Runs the launcher; returns its exit status. Its streams are in `out` and `err`."""
        process = self.start(*arguments, **settings)
        self.out, self.err = process.communicate(timeout=30)
        return process.returncode

    def calls(self):
        """Returns gcloud's calls in order: of ssh the worker's command, of describe none."""
        calls = []
        for line in self.lines("calls.jsonl"):
            _, _, kind, verb, *rest = json.loads(line)
            if verb != "ssh":
                calls += [f"{kind} {verb}"] * (verb != "describe")
            elif match := re.search(r"tpu_worker.sh (\w+)", " ".join(rest)):
                calls.append(match[1])
        return calls

    def lines(self, name):
        path = self.fake / name
        return path.read_text().splitlines() if path.exists() else []

    def call(self, verb):
        """Returns the words of the first call with this verb."""
        calls = map(json.loads, self.lines("calls.jsonl"))
        return next(words for words in calls if words[3] == verb)

    def argv(self):
        """Returns (worker, arguments) of each start of musicrl, in order."""
        starts = []
        for path in sorted((self.fake / "argv").iterdir()):
            worker = path.name.split("-", 1)[1][:-4]
            starts.append((worker, path.read_text().split("\0")[:-1]))
        return starts

    def pulls(self):
        """Returns the calls of `docker pull`."""
        return [line for line in self.lines("docker") if " pull " in line]

    def log(self, number):
        return (self.checkout / f"runs/tpu_rl/rl/attempt-{number:03}.log").read_text()


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    return Cloud(tmp_path_factory.mktemp("template") / "cloud").fake.parent


@pytest.fixture
def cloud(template, tmp_path, processes):
    return Cloud(shutil.copytree(template, tmp_path / "cloud", symlinks=True), processes)


# --- runs ---

NEW = ["queued-resources create", "tpu-vm scp", "setup"]


def test_a_fresh_run_creates_sets_up_and_runs(cloud):
    cloud.ends_as(0, queue=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert cloud.run(SPOT="1", CREATE_FLAGS="--network=mine --labels=a=b") == 0, cloud.err
    assert cloud.calls() == [*NEW, "run"]
    flags = {"--spot", "--network=mine", "--labels=a=b", "--runtime-version=v2-alpha-tpuv5"}
    flags |= {"--accelerator-type=v5p-16", "--node-id=rl", "--project=my-project"}
    assert flags < set(cloud.call("create"))

    # Messages.
    printed = cloud.out.splitlines()
    messages = [line.split(" ", 2)[-1] for line in printed]
    order = ["Plan of the run on 1 x v5p:2x2x2", "rl is MISSING", "Creating rl: 1 x v5p-16"]
    order += ["rl is WAITING_FOR_RESOURCES", "rl is PROVISIONING", "rl is READY"]
    assert [message for message in messages if message in order] == order
    assert "Done: gs://my-bucket/it's a run" in messages[-3]
    delete = "gcloud compute tpus queued-resources delete rl --project=my-project"
    assert printed[-1].startswith(delete)

    # Workers.
    assert sorted(worker for worker, _ in cloud.argv()) == ["rl-w-0", "rl-w-1"]
    mounted = f"{cloud.fake}/workers/rl-w-0/gcs/my-bucket/it\\'s a run"
    argv = next(words for worker, words in cloud.argv() if worker == "rl-w-0")
    assert argv == ["run", f"--gin_file={GIN_FILE}", f"--gin.MODEL_DIR='{mounted}'"]
    mount, _ = cloud.lines("mounts")
    assert "--implicit-dirs --rename-dir-limit" in mount and " my-bucket " in mount
    assert {"rl-w-1: step 1", "musicrl-exit rl-w-1 0"} < set(cloud.log(1).splitlines())


def test_an_image_is_pulled_once_and_runs_the_commands(cloud):
    cloud.ends_as(75, 0)
    assert cloud.run(IMAGE="my/image") == 0, cloud.err
    assert cloud.calls() == [*NEW, "run", "run"] and not cloud.lines("setups")[1:]
    assert sorted(cloud.pulls()) == [f"rl-w-{worker} pull --quiet my/image" for worker in (0, 1)]
    home = cloud.fake / "workers/rl-w-0"
    runs = [line for line in cloud.lines("docker") if line.startswith("rl-w-0 run")]
    assert len(runs) == 2
    assert f"--volume={home}:{home} --workdir={home}/musicrl my/image run --gin_file=" in runs[0]
    argv = next(words for worker, words in cloud.argv() if worker == "rl-w-0")
    assert argv[:2] == ["run", f"--gin_file={GIN_FILE}"]


def test_another_image_is_pulled_on_a_ready_tpu(cloud):
    cloud.ends_as(0, 0, 0, hosts=1)
    assert cloud.run(IMAGE="my/image", **ONE_HOST) == 0
    assert cloud.run(IMAGE="my/image", **ONE_HOST) == 0
    assert len(cloud.pulls()) == 1
    assert cloud.run(IMAGE="", **ONE_HOST) == 0
    assert len(cloud.lines("setups")) == 4, "one for each plan, then one on the worker"


def test_a_ready_tpu_with_this_commit_is_reused(cloud):
    cloud.ends_as(0, 0, 0, hosts=1)
    cloud.has()
    assert cloud.run(**ONE_HOST) == 0
    assert cloud.calls() == ["tpu-vm scp", "setup", "run"]
    assert cloud.run(**ONE_HOST) == 0
    assert cloud.calls()[3:] == ["run"]
    (cloud.checkout / GIN_FILE).rename(cloud.checkout / "gin/other.gin")
    cloud.commit()
    assert cloud.run("--gin_file", "gin/other.gin", **ONE_HOST) == 0
    assert cloud.calls()[4:] == ["tpu-vm scp", "setup", "run"]
    files = (cloud.fake / "workers/rl-w-0/musicrl/gin").iterdir()
    assert [path.name for path in files] == ["other.gin"]  # others are not in the commit
    assert [len(cloud.log(number)) > 0 for number in (1, 2, 3)] == [True] * 3


# --- states of the TPU, lost workers and mistakes ---


@pytest.mark.parametrize(
    ("state", "queued", "expected"),
    [
        ("STOPPED", "ACTIVE", ["tpu-vm start", "tpu-vm scp"]),
        ("STARTING READY", "ACTIVE", ["tpu-vm scp"]),
        ("PREEMPTED", "ACTIVE", ["queued-resources delete", "queued-resources create"]),
        ("PREEMPTED", "SUSPENDED", ["queued-resources delete", "queued-resources create"]),
        ("READY", "FAILED", ["queued-resources delete", "queued-resources create"]),
    ],
)
def test_a_tpu_in_another_state_is_brought_up(state, queued, expected, cloud):
    cloud.ends_as(0, hosts=1)
    cloud.has(state, queued)
    assert cloud.run(**ONE_HOST) == 0, cloud.out + cloud.err
    assert cloud.calls()[: len(expected)] == expected
    assert f"rl is {state.split()[0] if queued == 'ACTIVE' else queued}" in cloud.out


def test_a_vm_is_created_at_once(cloud):
    cloud.ends_as("preempted", 0, hosts=1)
    assert cloud.run(PROVISION="vm", ACCELERATOR_TYPE="v6e-8", DELETE_WHEN_DONE="1") == 0
    new = ["tpu-vm create", "tpu-vm scp", "setup", "run"]
    assert cloud.calls() == [*new, "tpu-vm delete", *new, "tpu-vm delete"]
    assert "--version=v2-alpha-tpuv6e" in cloud.call("create")
    assert "until it is deleted" not in cloud.out


def test_a_run_survives_two_pre_emptions(cloud):
    """The TPU's state shows one. Only workers that lost another worker show the second one."""
    cloud.ends_as([134, "preempted"], ["unheard", 134], 0)
    assert cloud.run() == 0
    new, delete = [*NEW, "run"], "queued-resources delete"
    assert cloud.calls() == [*new, delete, *new, "join", delete, *new]
    folders = {words[-1].split("gcs/")[1] for _, words in cloud.argv()}
    assert folders == {"my-bucket/it\\'s a run'"}
    assert "Lost: status 255, and rl is PREEMPTED" in cloud.out
    assert "Lost: a worker left with status 255" in cloud.out
    assert [cloud.log(number).count("musicrl-exit") for number in (1, 2, 3)] == [1, 3, 2]


def test_a_run_that_saved_is_resumed_in_place(cloud):
    cloud.ends_as(75, [75, 0], 0)
    assert cloud.run() == 0
    assert cloud.calls() == [*NEW, "run", "run", "run"]
    assert cloud.out.count("Resuming on the same TPU") == 2


def test_three_mistakes_end_the_run(cloud):
    """Also if a mistake of one worker makes the others lose it."""
    cloud.ends_as(3, [134, 3], 3)
    assert cloud.run() == 3
    assert cloud.calls() == [*NEW, "run", "run", "run"]
    assert "A mistake, 3 of 3: status 3" in cloud.out and "until it is deleted" in cloud.out
    assert "rl-w-0: step 1" in cloud.err


def test_an_attempt_that_saves_resets_the_count_of_mistakes(cloud):
    cloud.ends_as(1, 139, 75, 1, 0, hosts=1)
    assert cloud.run(**ONE_HOST) == 0, cloud.out + cloud.err


def test_workers_that_cannot_be_set_up_are_a_mistake(cloud):
    cloud.ends_as(hosts=1)
    script = SETUP.replace("mkdir", '[ "$HOST" = here ] || exit 5\nmkdir')
    cloud.write(cloud.checkout / "launch/setup.sh", script)
    cloud.commit()
    assert cloud.run(**ONE_HOST) == 1
    assert cloud.calls() == [*NEW, "tpu-vm scp", "setup", "tpu-vm scp", "setup"]
    assert cloud.out.count("The workers could not be set up") == 3


def test_attempts_end_at_their_maximum(cloud):
    cloud.ends_as(75, 75, hosts=1)
    assert cloud.run(MAX_ATTEMPTS="2", **ONE_HOST) == 75
    assert "MAX_ATTEMPTS=2 are over" in cloud.out


def test_three_failed_creations_end_the_run(cloud):
    cloud.ends_as(create_fails=True)
    assert cloud.run() == 1
    assert cloud.calls() == ["queued-resources create"] * 3
    assert "no more capacity" in cloud.err and "could not be created in three tries" in cloud.err


def test_nothing_is_created_if_gcloud_cannot_describe_the_tpu(cloud):
    cloud.ends_as(offline=True)
    assert cloud.run() == 1
    assert cloud.calls() == [] and len(cloud.lines("calls.jsonl")) == 3
    message = (
        "gcloud cannot say in which state rl is: ERROR: (gcloud) There was a problem refreshing"
    )
    assert message in cloud.err


def test_a_broken_connection_does_not_start_the_run_twice(cloud):
    cloud.ends_as([0, "breaks"])
    cloud.has()
    assert cloud.run() == 0, cloud.out
    assert len(cloud.argv()) == 2
    assert "Retrying" in cloud.log(1) and "rl-w-1: step 2" in cloud.log(1)


def test_a_lost_connection_is_opened_again(cloud):
    cloud.ends_as([0, "drops"])
    cloud.has()
    assert cloud.run() == 0, cloud.out
    assert cloud.calls() == ["tpu-vm scp", "setup", "run", "join"]
    assert len(cloud.argv()) == 2
    assert "Workers that reported their end: 1 of 2. Connecting again" in cloud.out


def test_a_run_whose_launcher_died_is_stopped_before_another(cloud):
    cloud.ends_as("waits", 0, hosts=1)
    first = cloud.start(**ONE_HOST)
    wait_for(cloud.fake / "waits-rl-w-0")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert cloud.run(**ONE_HOST) == 0, cloud.out + cloud.err
    (attempt,) = (cloud.fake / "workers/rl-w-0/tmp/musicrl-attempts").glob("*-001-*")
    assert (attempt / "status").read_text() == "75\n"
    assert "saved" in (attempt / "log").read_text()


# --- signals and other launchers ---


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize(("by", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_but_not_the_tpu(by, status, cloud):
    cloud.ends_as("waits")
    cloud.has()
    process = cloud.start()
    for number in range(2):
        wait_for(cloud.fake / f"waits-rl-w-{number}")
    process.send_signal(by)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status, out + err
    assert cloud.calls() == ["tpu-vm scp", "setup", "run", "stop"]
    for number in range(2):
        saved = cloud.fake.glob(f"workers/rl-w-{number}/tmp/musicrl-attempts/*/status")
        assert [path.read_text() for path in saved] == ["75\n"]
    assert f"Stopping by {by.name}: the workers save" in out and "The same command resumes" in out
    assert out.splitlines()[-1].startswith("gcloud compute tpus queued-resources delete rl ")


def test_a_launcher_started_with_sigint_ignored_says_that_sigterm_stops_it(cloud):
    """nohup, cron and `&` in a script ignore SIGINT."""
    cloud.ends_as("waits")
    cloud.has()
    process = cloud.start(before=["bash", "-c", "trap '' INT; exec \"$@\"", "bash"])
    for number in range(2):
        wait_for(cloud.fake / f"waits-rl-w-{number}")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "Stopping by SIGTERM" in out, out + err
    assert f"nohup, cron or & ignores SIGINT: stop with kill -TERM {process.pid}" in out
    assert cloud.run("--help") == 0 and "SIGTERM" in cloud.out


def test_a_signal_stops_the_launcher_before_there_is_a_tpu(cloud):
    # While it asks for the state.
    cloud.ends_as(describe_takes=0.5, queue=["WAITING_FOR_RESOURCES"])
    process = cloud.start()
    wait_for(cloud.fake / "calls.jsonl")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143 and cloud.calls() == []

    # While it waits for another state.
    cloud.ends_as(queue=["WAITING_FOR_RESOURCES"])
    process = cloud.start(PAUSE_SECONDS="60")
    while "WAITING" not in process.stdout.readline():
        pass
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 143 and "until it is deleted" in out


def test_two_launchers_do_not_share_a_tpu(cloud):
    cloud.ends_as(describe_takes=1)
    first = cloud.start()
    wait_for(cloud.fake / "calls.jsonl")
    assert cloud.run() == 1
    assert "another launcher runs with LOG_DIR=runs/tpu_rl/rl" in cloud.err
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=20)


@pytest.mark.parametrize(("mounts", "status"), [("nfs /mnt/nfs\n", 0), ("", 1)])
def test_a_shared_folder_must_be_mounted(mounts, status, cloud):
    """Otherwise each worker would write to its own disk."""
    cloud.ends_as(0, 0, 0)
    (cloud.fake / "mounts").write_text(mounts)
    assert cloud.run(MODEL_DIR="/mnt/nfs/a run", SHARED_DIR="/mnt/nfs/") == status
    if status == 0:
        assert [words[-1] for _, words in cloud.argv()] == ["--gin.MODEL_DIR='/mnt/nfs/a run'"] * 2
    else:
        assert cloud.argv() == [] and "SHARED_DIR=/mnt/nfs is no mount point on rl-w-" in cloud.err


def test_a_run_on_several_slices(cloud):
    cloud.ends_as(75, 0)
    assert cloud.run(SLICES="2") == 0, cloud.err
    assert {"--node-count=2", "--node-prefix=rl"} < set(cloud.call("create"))
    assert cloud.calls() == [NEW[0], *["tpu-vm scp"] * 2, *["setup"] * 2, *["run"] * 4]
    workers = {worker for worker, _ in cloud.argv()}
    assert workers == {"rl-0-w-0", "rl-0-w-1", "rl-1-w-0", "rl-1-w-1"}
    planned = (cloud.fake / "plan").read_text().split("\0")[:-1]
    assert planned[-2:] == ["--topology=v5p:2x2x2", "--slices=2"]


# --- arguments and the dry run ---

ODD = ["--gin.A='it''s'", '--gin.B="$HOME `id` \\n"', "--gin.C={'x  y': 1}"]
ODD += ["--skip=a b", "--gin.D", "'*'", "--gin.E=\n", ""]


def test_arguments_reach_the_workers_unchanged(cloud, tmp_path):
    cloud.ends_as(0, hosts=1)
    files = [f"--gin_file={GIN_FILE}", "--gin_file", GIN_FILE]
    files += ["--gin.DATA_DIR='gs://other.bucket/its data'"]
    settings = {"ACCELERATOR_TYPE": "v4-8", "MODEL_DIR": "runs/$HOME \\'"}
    settings["LOG_DIR"] = str(tmp_path / "the logs")
    assert cloud.run("--", *files, *ODD, **settings) == 0, cloud.err
    data = f"--gin.DATA_DIR='{cloud.fake}/workers/rl-w-0/gcs/other.bucket/its data'"
    expected = ["run", *files[:3], data, *ODD, "--gin.MODEL_DIR='runs/$HOME \\\\\\''"]
    assert cloud.argv() == [("rl-w-0", expected)]
    assert "other.bucket" in cloud.lines("mounts")[0]
    assert (tmp_path / "the logs/attempt-001.log").exists()
    planned = (cloud.fake / "plan").read_text().split("\0")[:-1]
    assert planned == ["plan", *files, *ODD[:3], *ODD[4:], "--topology=v4:2x2x1"]
    assert "if the TPU is lost, the run starts from nothing" in cloud.out


def test_a_line_of_the_dry_run_pasted_into_a_shell_is_the_call_of_the_run(cloud):
    assert cloud.run("--dry-run", f"--gin_file={GIN_FILE}", *ODD) == 0
    # The line.
    text = cloud.out[cloud.out.index("gcloud compute tpus tpu-vm ssh") :]
    pasted = text[text.rindex("gcloud compute tpus tpu-vm ssh") : text.index("# Repeat")]

    # The workers, as the launcher would have set them up.
    cloud.ends_as(0)
    cloud.has()
    for home in cloud.fake.glob("workers/*"):
        shutil.copytree(cloud.checkout, home / "musicrl", ignore=shutil.ignore_patterns(".git"))
        cloud.write(home / "musicrl/.venv/bin/musicrl", MUSICRL)
    environment = {"PATH": f"{cloud.fake / 'bin'}:{os.environ['PATH']}", "FAKE": str(cloud.fake)}
    cloud.processes.run(["bash", "-c", pasted], env=environment, check=True)
    assert all(words[1:-1] == [f"--gin_file={GIN_FILE}", *ODD] for _, words in cloud.argv())
    assert len(cloud.argv()) == 2


GOLDEN = {
    "queued": {"ACCELERATOR_TYPE": "v5litepod-16"},
    "slices": {"SLICES": "2", "ACCELERATOR_TYPE": "v5p-128"}
    | {"SPOT": "1", "CREATE_FLAGS": "--reserved"},
    "vm": {"PROVISION": "vm", "ACCELERATOR_TYPE": "v6e-8"}
    | {"MODEL_DIR": "/mnt/nfs/a run", "SHARED_DIR": "/mnt/nfs/"},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_dry_run_prints_commands_and_does_nothing(name, cloud):
    before = sorted(cloud.checkout.parent.rglob("*"))
    arguments = ("--dry-run", f"--gin_file={GIN_FILE}", "--gin.RLConfig.steps=20")
    assert cloud.run(*arguments, **GOLDEN[name]) == 0
    assert cloud.calls() == [] and cloud.lines("calls.jsonl") == [] and not cloud.err
    assert sorted(cloud.checkout.parent.rglob("*")) == before
    printed = re.sub(r"\b[0-9a-f]{40}\b", "TREE", cloud.out)
    path = HERE / f"golden/{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(printed)
    assert printed == path.read_text(), "UPDATE_GOLDEN=1 updates it"


# --- errors before anything is created ---


def assert_refused(cloud, complaint, *arguments, **settings):
    assert cloud.run(*arguments, **settings) == 1
    assert complaint in cloud.err
    assert cloud.lines("calls.jsonl") == []


@pytest.mark.parametrize("name", ["PROJECT", "ZONE", "TPU_NAME", "ACCELERATOR_TYPE", "MODEL_DIR"])
def test_a_missing_setting_is_named(name, cloud):
    assert_refused(cloud, f"{name} is not set: give ", **{name: None})
    assert_refused(cloud, f"{name} is not set: give ", "--dry-run", "--gin.A=1", **{name: ""})


# Settings, and a part of the error.
BAD_SETTINGS = [
    ("ACCELERATOR_TYPE=v3-8", "=v3-8 must be v4-N, v5litepod-N, v5p-N or v6e-N"),
    ("ACCELERATOR_TYPE=v5p", "'v5p' is no size; v5p-16 is a type"),
    ("ACCELERATOR_TYPE=v5p-x", "'x' is no size; v5p-16 is a type"),
    ("ACCELERATOR_TYPE=v5p-96", "known ( v5p-8 v5p-16 v5p-32"),
    ("ACCELERATOR_TYPE=v5p-96", "set TOPOLOGY=v5p:AxB or AxBxC, or SKIP_PLAN=1"),
    ("MODEL_DIR=/data/run", "=/data/run is on the own disk of each of the 2 hosts, which need one"),
    ("MODEL_DIR=/data/run, SHARED_DIR=/dat", "or SHARED_DIR to a folder above it"),
    ("MODEL_DIR=/data/run, ACCELERATOR_TYPE=v5litepod-16", "each of the 4 hosts"),
    ("MODEL_DIR=/data/run, ACCELERATOR_TYPE=v6e-8, SLICES=2", "each of the 2 hosts"),
    ("MODEL_DIR=gs://my-bucket", "=gs://my-bucket must be of the form gs://BUCKET/FOLDER"),
    ("MODEL_DIR=gs:/my-bucket/x", "must be of the form gs://BUCKET/FOLDER"),
    ("TPU_NAME=my tpu", "TPU_NAME=my tpu must be of a-z, 0-9 and hyphens"),
    ("PROVISION=fast", "PROVISION=fast must be one of: queued vm"),
    ("SLICES=0", "SLICES=0 must be a whole number of at least 1"),
    ("SLICES=2, PROVISION=vm", "only a queued resource has several slices"),
    ("SPOT=yes", "SPOT=yes must be 1, or not set"),
    ("PAUSE_SECONDS=1m", "PAUSE_SECONDS=1m must be a whole number"),
]


@pytest.mark.parametrize(("settings", "complaint"), BAD_SETTINGS)
def test_an_invalid_setting_is_named_with_value_and_remedy(settings, complaint, cloud):
    settings = dict(word.split("=", 1) for word in settings.split(", "))
    assert_refused(cloud, complaint, **settings)
    assert next(iter(settings)) in cloud.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--"], "say what to run: --gin_file="),
        (["--gin.MODEL_DIR='/x'"], "set MODEL_DIR=..."),
        (["--gin.A=1", "--dry-run"], "--dry-run must come first"),
        (["--gin_file=gin/mine.gin"], "=gin/mine.gin is not in the commit that the workers get"),
        (["--gin_file", "/x/mine.gin"], "--gin_file=/x/mine.gin is not in the commit"),
    ],
)
def test_invalid_arguments_end_the_launcher(arguments, complaint, cloud):
    assert_refused(cloud, complaint, *arguments)


def test_a_checkout_with_changes_ends_the_launcher(cloud):
    (cloud.checkout / GIN_FILE).write_text("A = 1\n")
    assert_refused(cloud, "changes that are not committed")
    assert "(gin/a run.gin, ...)" in cloud.err


def test_a_run_that_does_not_fit_ends_before_anything_is_created(cloud):
    (cloud.fake / "plan_status").write_text("1")
    assert_refused(cloud, "does not fit ACCELERATOR_TYPE=v5p-16")
    assert "4 functions of train_rl" in cloud.out
    assert cloud.run(SKIP_PLAN="1") == 0
    assert "No plan: SKIP_PLAN=1" in cloud.out


def test_flags_that_musicrl_rejects_end_the_launcher_before_anything_is_created(cloud):
    (cloud.fake / "config_status").write_text("1")
    assert_refused(cloud, "rejects these flags: what is wrong with it")


def test_help_names_every_setting(cloud):
    assert cloud.run("--help") == 0
    for name in set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "launch/tpu_rl.sh").read_text())):
        assert name in cloud.out, f"the head of the script does not explain {name}"


# --- files: shapes, scripts and the job set ---

LAUNCHER = (ROOT / "launch/tpu_rl.sh").read_text()
SHAPES = re.search(r'TOPOLOGIES="\n(.*?)\n"', LAUNCHER, flags=re.DOTALL)[1].splitlines()


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: row.split()[0])
def test_shapes_have_the_chips_of_their_names(row):
    generation, _, *sizes = row.split()
    for size in sizes:
        name, shape = size.split("=")
        chips = int(name) // (2 if generation in ("v4", "v5p") else 1)
        assert chips == eval(shape.replace("x", "*")), size
        assert shape.count("x") == (2 if generation in ("v4", "v5p") else 1)


def test_jax_supports_the_shapes(processes):
    """A process of its own: libtpu writes to its streams and looks for TPUs."""
    pytest.importorskip("libtpu")
    names = [f"{row.split()[1]}:{size.split('=')[1]}" for row in SHAPES for size in row.split()[2:]]
    code = "import sys\nfrom jax.experimental import topologies\n"
    code += "for name in sys.argv[1:]: topologies.get_topology_desc(name, platform='tpu')"
    environment = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment |= os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    processes.run([sys.executable, "-c", code, *names], env=environment, check=True, timeout=60)


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path, processes):
    folders = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=folders)
    if shellcheck is None:
        pytest.skip("no shellcheck: launch/setup.sh installs it")
    done = processes.run([shellcheck, str(path)], capture_output=True)
    assert done.returncode == 0, done.stdout


def test_the_job_set_restarts_as_the_launcher_does():
    # Restarts: three attempts, and any number after statuses that mean "saved" or "lost".
    manifest = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 2
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"] and len(rule) == 2

    # Pods: one a host.
    (slices,) = manifest["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 1 and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = eval(pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].replace("x", "*"))
    limit = container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"] == chips // limit
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    codes, disruption = job["podFailurePolicy"]["rules"]
    statuses = {"operator": "In", "values": [75, 134, 137, 143]}
    assert codes["onExitCodes"] == {"containerName": container["name"], **statuses}
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert codes["action"] == disruption["action"] == "FailJob"
    assert pod["terminationGracePeriodSeconds"] >= 60

    # The bucket, and the arguments.
    (volume,) = (volume for volume in pod["volumes"] if "csi" in volume)
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    model_dir = f"--gin.MODEL_DIR='{mounts[volume['name']]}/"
    assert any(word.startswith(model_dir) for word in container["args"])
    assert manifest["spec"]["network"]["enableDNSHostnames"]
    files = [word.partition("=")[2] for word in container["args"] if word.startswith("--gin_file=")]
    assert files[-1:] == ["YOUR_RUN"]
    assert all((ROOT / "gin" / file).exists() for file in files[:-1])


def test_the_job_set_suits_the_image():
    """The user is not root, the root file system is read-only, and a volume is where it writes."""
    pod = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())["spec"]["replicatedJobs"][0]
    pod = pod["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    image = (ROOT / "launch/Dockerfile").read_text()
    user = int(re.search(r"^USER (\d+)$", image, re.M)[1])
    security = container["securityContext"]
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert security["runAsUser"] == pod["securityContext"]["fsGroup"] == user > 0
    assert 'ENTRYPOINT ["musicrl"]' in image and "command" not in container
    (volume,) = re.findall(r"^VOLUME (\S+)$", image, re.M)
    assert volume in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert f"HOME={volume}" in image
