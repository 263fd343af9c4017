"""launch/tpu_rl.sh over a fake gcloud, which runs here what workers are told to run; and launch/jobset.yaml."""

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
SETTINGS = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "TPU_NAME": "rl",
    "ACCELERATOR_TYPE": "v5p-16",
    "MODEL_DIR": "gs://my-bucket/it's a run",
    "PAUSE_SECONDS": "0",
    "MAX_ATTEMPTS": "9",
}
# What workers and this machine have in place of their own: each line a command and what it does.
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
SETUP = """#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/.."
echo "$PWD $*" >> "$FAKE/setups"
mkdir -p .venv/bin
cp "$FAKE/musicrl" .venv/bin/musicrl
"""
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
    """A checkout to launch from, and the TPUs that its gcloud has."""

    def __init__(self, folder, processes=None):
        self.processes = processes
        self.fake, self.checkout, self.home = (
            folder / "fake",
            folder / "a checkout",
            folder / "home",
        )
        if not folder.exists():
            self.make()

    def make(self):
        for name in ("bin", "nodes", "queued", "argv", "workers"):
            (self.fake / name).mkdir(parents=True)
        for name, does in COMMANDS.items():
            self.write(self.fake / "bin" / name, f"#!/usr/bin/env bash\n{does}\n")
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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def git(self, *words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(
            ["git", *who, *words], cwd=self.checkout, check=True, env={"PATH": os.environ["PATH"]}
        )

    def commit(self):
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "x")

    def ends_as(self, *attempts, hosts=2, **more):
        """How each attempt ends: a status or what else befalls it, of all workers or of each."""
        script = {"attempts": attempts, "hosts": hosts, **more}
        (self.fake / "script.json").write_text(json.dumps(script))

    def has(self, state="READY", queued="ACTIVE", nodes=("rl",)):
        """TPUs that are there before; None for one that was never asked for."""
        for name in nodes:
            (self.fake / "nodes" / name).write_text(state)
            for number in range(json.loads((self.fake / "script.json").read_text())["hosts"]):
                (self.fake / f"workers/{name}-w-{number}/tmp").mkdir(parents=True)
        if queued:
            asked = {"states": [queued], "nodes": nodes, "made": True}
            (self.fake / "queued/rl").write_text(json.dumps(asked))

    def start(self, *arguments, before=(), **settings):
        path = f"{self.fake / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.home), "FAKE": str(self.fake), "HOST": "here"}
        environment |= {
            name: value for name, value in (SETTINGS | settings).items() if value is not None
        }
        command = [
            *before,
            str(self.checkout / "launch/tpu_rl.sh"),
            *(arguments or (f"--gin_file={GIN_FILE}",)),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return self.processes.start(command, env=environment, cwd=self.home, **pipes)

    def run(self, *arguments, **settings):
        """The exit status, and what it said on both streams."""
        process = self.start(*arguments, **settings)
        out, err = process.communicate(timeout=30)
        self.out, self.err = out, err
        return process.returncode

    def calls(self):
        """What gcloud was asked for, in this order; without what changes nothing."""
        calls = []
        for line in self.lines("calls.jsonl"):
            _, _, kind, verb, *rest = json.loads(line)
            if verb != "ssh":
                calls += [f"{kind} {verb}"] * (verb != "describe")
            elif found := re.search(r"tpu_worker.sh (\w+)", " ".join(rest)):
                calls.append(found[1])
        return calls

    def lines(self, name):
        path = self.fake / name
        return path.read_text().splitlines() if path.exists() else []

    def call(self, verb):
        """All words of the first call of this verb."""
        return next(
            words for words in map(json.loads, self.lines("calls.jsonl")) if words[3] == verb
        )

    def argv(self):
        """What each start of musicrl was given, in their order, with the worker's name."""
        paths = sorted((self.fake / "argv").iterdir())
        return [
            (path.name.split("-", 1)[1][:-4], path.read_text().split("\0")[:-1]) for path in paths
        ]

    def log(self, number):
        return (self.checkout / f"runs/tpu_rl/rl/attempt-{number:03}.log").read_text()


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return Cloud(tmp_path_factory.mktemp("made") / "cloud").fake.parent


@pytest.fixture
def cloud(made, tmp_path, processes):
    return Cloud(shutil.copytree(made, tmp_path / "cloud", symlinks=True), processes)


NEW = ["queued-resources create", "tpu-vm scp", "setup"]


def test_a_fresh_run(cloud):
    cloud.ends_as(0, queue=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert cloud.run(SPOT="1", CREATE_FLAGS="--network=mine --labels=a=b") == 0, cloud.err
    assert cloud.calls() == [*NEW, "run"]
    created = cloud.call("create")
    assert {"--spot", "--network=mine", "--labels=a=b", "--runtime-version=v2-alpha-tpuv5"} < set(
        created
    )
    assert {"--accelerator-type=v5p-16", "--node-id=rl", "--project=my-project"} < set(created)
    told = [line.split(" ", 2)[-1] for line in cloud.out.splitlines()]
    order = ["Plan of the run on 1 x v5p:2x2x2", "rl is MISSING", "Creating rl: 1 x v5p-16"]
    order += ["rl is WAITING_FOR_RESOURCES", "rl is PROVISIONING", "rl is READY"]
    assert [line for line in told if line in order] == order
    assert "Done: gs://my-bucket/it's a run" in told[-3]
    assert cloud.out.splitlines()[-1].startswith(
        "gcloud compute tpus queued-resources delete rl --project=my-project"
    )
    assert sorted(worker for worker, _ in cloud.argv()) == ["rl-w-0", "rl-w-1"]
    mounted = f"{cloud.fake}/workers/rl-w-0/gcs/my-bucket/it\\'s a run"
    argv = next(words for worker, words in cloud.argv() if worker == "rl-w-0")
    assert argv == ["run", f"--gin_file={GIN_FILE}", f"--gin.MODEL_DIR='{mounted}'"]
    mounts = cloud.lines("mounts")
    assert (
        len(mounts) == 2
        and "--implicit-dirs --rename-dir-limit" in mounts[0]
        and " my-bucket " in mounts[0]
    )
    assert (
        "rl-w-1: step 1" in cloud.log(1).splitlines()
        and "musicrl-exit rl-w-1 0" in cloud.log(1).splitlines()
    )


def test_an_image_is_pulled_once_and_runs_the_commands(cloud):
    cloud.ends_as(75, 0)
    assert cloud.run(IMAGE="my/image") == 0, cloud.err
    assert cloud.calls() == [*NEW, "run", "run"] and not cloud.lines("setups")[1:]
    pulls = [line for line in cloud.lines("docker") if " pull " in line]
    assert sorted(pulls) == [f"rl-w-{worker} pull --quiet my/image" for worker in (0, 1)]
    home = cloud.fake / "workers/rl-w-0"
    runs = [line for line in cloud.lines("docker") if line.startswith("rl-w-0 run")]
    assert len(runs) == 2
    assert f"--volume={home}:{home} --workdir={home}/musicrl my/image run --gin_file=" in runs[0]
    argv = next(words for worker, words in cloud.argv() if worker == "rl-w-0")
    assert argv[:2] == ["run", f"--gin_file={GIN_FILE}"]


def test_another_image_is_pulled_on_a_ready_tpu(cloud):
    cloud.ends_as(0, 0, 0)
    assert cloud.run(IMAGE="my/image") == 0
    assert cloud.run(IMAGE="my/image") == 0
    assert len([line for line in cloud.lines("docker") if " pull " in line]) == 2
    assert cloud.run(IMAGE="") == 0
    assert len(cloud.lines("setups")) == 5, "one for the plan of each, then one a worker"


def test_a_ready_tpu_with_this_commit_is_used_as_it_is(cloud):
    cloud.ends_as(0, 0, 0)
    cloud.has()
    assert cloud.run() == 0
    assert cloud.calls() == ["tpu-vm scp", "setup", "run"]
    assert cloud.run() == 0
    assert cloud.calls()[3:] == ["run"]
    (cloud.checkout / GIN_FILE).rename(cloud.checkout / "gin/other.gin")
    cloud.commit()
    assert cloud.run("--gin_file", "gin/other.gin") == 0
    assert cloud.calls()[4:] == ["tpu-vm scp", "setup", "run"]
    there = {path.name for path in (cloud.fake / "workers/rl-w-1/musicrl/gin").iterdir()}
    assert there == {"other.gin"}  # what the commit lacks is gone
    assert [len(cloud.log(number)) > 0 for number in (1, 2, 3)] == [True] * 3


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
    assert cloud.run(ACCELERATOR_TYPE="v5litepod-8") == 0, cloud.out + cloud.err
    assert cloud.calls()[: len(expected)] == expected
    assert f"rl is {state.split()[0] if queued == 'ACTIVE' else queued}" in cloud.out


def test_a_vm_is_created_at_once(cloud):
    cloud.ends_as("preempted", 0, hosts=1)
    assert cloud.run(PROVISION="vm", ACCELERATOR_TYPE="v6e-8", DELETE_WHEN_DONE="1") == 0
    new = ["tpu-vm create", "tpu-vm scp", "setup", "run"]
    assert cloud.calls() == [*new, "tpu-vm delete", *new, "tpu-vm delete"]
    assert "--version=v2-alpha-tpuv6e" in cloud.call("create")
    assert "until it is deleted" not in cloud.out


def test_two_pre_emptions(cloud):
    """One told by the TPU's state; one only by workers that lost another."""
    cloud.ends_as([134, "preempted"], ["unheard", 134], 0)
    assert cloud.run() == 0
    new = [*NEW, "run"]
    assert cloud.calls() == [
        *new,
        "queued-resources delete",
        *new,
        "join",
        "queued-resources delete",
        *new,
    ]
    folders = {words[-1].split("gcs/")[1] for _, words in cloud.argv()}
    assert folders == {"my-bucket/it\\'s a run'"}
    assert (
        "Lost: status 255, and rl is PREEMPTED" in cloud.out
        and "Lost: a worker left with status 255" in cloud.out
    )
    assert [cloud.log(number).count("musicrl-exit") for number in (1, 2, 3)] == [1, 3, 2]


def test_a_run_that_saved_is_resumed_in_place(cloud):
    cloud.ends_as(75, [75, 0], 0)
    assert cloud.run() == 0
    assert cloud.calls() == [*NEW, "run", "run", "run"]
    assert cloud.out.count("Resuming on the same TPU") == 2


def test_a_mistake_ends_it_after_three(cloud):
    """Also where the other workers were lost by it."""
    cloud.ends_as(3, [134, 3], 3)
    assert cloud.run() == 3
    assert cloud.calls() == [*NEW, "run", "run", "run"]
    assert "A mistake, 3 of 3: status 3" in cloud.out and "until it is deleted" in cloud.out
    assert "rl-w-0: step 1" in cloud.err


def test_mistakes_count_anew_after_an_attempt_that_saved(cloud):
    cloud.ends_as(1, 139, 75, 1, 0, hosts=1)
    assert cloud.run(ACCELERATOR_TYPE="v5litepod-8") == 0, cloud.out + cloud.err


def test_workers_that_cannot_be_set_up_are_a_mistake(cloud):
    cloud.write(
        cloud.checkout / "launch/setup.sh",
        SETUP.replace("mkdir", '[ "$HOST" = here ] || exit 5\nmkdir'),
    )
    cloud.commit()
    assert cloud.run() == 1
    assert cloud.calls() == [*NEW, "tpu-vm scp", "setup", "tpu-vm scp", "setup"]
    assert cloud.out.count("The workers could not be set up") == 3


def test_attempts_have_an_end(cloud):
    cloud.ends_as(75, 75, hosts=1)
    assert cloud.run(MAX_ATTEMPTS="2", ACCELERATOR_TYPE="v5litepod-8") == 75
    assert "MAX_ATTEMPTS=2 are over" in cloud.out


def test_a_tpu_that_cannot_be_created_is_given_up(cloud):
    cloud.ends_as(create_fails=True)
    assert cloud.run() == 1
    assert cloud.calls() == ["queued-resources create"] * 3
    assert "no more capacity" in cloud.err and "could not be created in three tries" in cloud.err


def test_without_an_answer_nothing_is_created(cloud):
    cloud.ends_as(offline=True)
    assert cloud.run() == 1
    assert cloud.calls() == [] and len(cloud.lines("calls.jsonl")) == 3
    assert (
        "gcloud cannot say in which state rl is: ERROR: (gcloud) There was a problem refreshing"
        in cloud.err
    )


def test_a_broken_connection_does_not_start_the_run_twice(cloud):
    cloud.ends_as([0, "breaks"])
    cloud.has()
    assert cloud.run() == 0, cloud.out
    assert len(cloud.argv()) == 2
    assert "Retrying" in cloud.log(1) and "rl-w-1: step 2" in cloud.log(1)


def test_a_run_is_not_given_up_for_a_connection_that_gcloud_gives_up(cloud):
    cloud.ends_as([0, "drops"])
    cloud.has()
    assert cloud.run() == 0, cloud.out
    assert cloud.calls() == ["tpu-vm scp", "setup", "run", "join"]
    assert (
        len(cloud.argv()) == 2
        and "Told how they ended: 1 of 2 workers. Connecting again" in cloud.out
    )


def test_an_older_run_is_stopped_before_another(cloud):
    """Such as one whose launcher is gone."""
    cloud.ends_as("waits", 0, hosts=1)
    first = cloud.start(ACCELERATOR_TYPE="v5litepod-8")
    wait_for(cloud.fake / "waits-rl-w-0")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert cloud.run(ACCELERATOR_TYPE="v5litepod-8") == 0, cloud.out + cloud.err
    kept = list((cloud.fake / "workers/rl-w-0/tmp/musicrl-attempts").glob("*-001-*"))
    assert (kept[0] / "status").read_text() == "75\n" and "saved" in (kept[0] / "log").read_text()


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize(("by", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_run_and_keeps_the_tpu(by, status, cloud):
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
    assert (
        f"Told to stop by {by.name}: the workers save" in out and "The same command goes on" in out
    )
    assert out.splitlines()[-1].startswith("gcloud compute tpus queued-resources delete rl ")


def test_started_where_sigint_is_ignored_it_stops_by_sigterm_and_says_so(cloud):
    """As nohup, cron and `&` of a script start it."""
    cloud.ends_as("waits")
    cloud.has()
    process = cloud.start(before=["bash", "-c", "trap '' INT; exec \"$@\"", "bash"])
    for number in range(2):
        wait_for(cloud.fake / f"waits-rl-w-{number}")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "Told to stop by SIGTERM" in out, out + err
    assert (
        f"SIGINT is ignored here, as nohup, cron and & have it: stop with kill -TERM {process.pid}"
        in out
    )
    assert cloud.run("--help") == 0 and "SIGTERM" in cloud.out


def test_a_signal_before_there_is_a_tpu(cloud):
    """While it asks for the state, and while it waits for another one."""
    cloud.ends_as(describe_takes=0.5, queue=["WAITING_FOR_RESOURCES"])
    process = cloud.start()
    wait_for(cloud.fake / "calls.jsonl")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143 and cloud.calls() == []
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
    assert "LOG_DIR=runs/tpu_rl/rl is another launcher's, which runs" in cloud.err
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=20)


@pytest.mark.parametrize(("mounts", "status"), [("nfs /mnt/nfs\n", 0), ("", 1)])
def test_a_shared_folder_must_be_mounted(mounts, status, cloud):
    """Else each worker would write to a disk of its own."""
    cloud.ends_as(0, 0, 0)
    (cloud.fake / "mounts").write_text(mounts)
    assert cloud.run(MODEL_DIR="/mnt/nfs/a run", SHARED_DIR="/mnt/nfs/") == status
    if status == 0:
        assert [words[-1] for _, words in cloud.argv()] == ["--gin.MODEL_DIR='/mnt/nfs/a run'"] * 2
    else:
        assert cloud.argv() == [] and "SHARED_DIR=/mnt/nfs is no mount point on rl-w-" in cloud.err


def test_several_slices(cloud):
    cloud.ends_as(75, 0)
    assert cloud.run(SLICES="2") == 0, cloud.err
    assert {"--node-count=2", "--node-prefix=rl"} < set(cloud.call("create"))
    assert cloud.calls() == [NEW[0], *["tpu-vm scp"] * 2, *["setup"] * 2, *["run"] * 4]
    assert {worker for worker, _ in cloud.argv()} == {
        f"rl-{n}-w-{m}" for n in range(2) for m in range(2)
    }
    assert (cloud.fake / "plan").read_text().split("\0")[-3:-1] == [
        "--topology=v5p:2x2x2",
        "--slices=2",
    ]


ODD = ["--gin.A='it''s'", '--gin.B="$HOME `id` \\n"', "--gin.C={'x  y': 1}"]
ODD += ["--skip=a b", "--gin.D", "'*'", "--gin.E=\n", ""]


def test_arguments_reach_the_workers_as_they_are(cloud, tmp_path):
    cloud.ends_as(0, hosts=1)
    files = [
        f"--gin_file={GIN_FILE}",
        "--gin_file",
        GIN_FILE,
        "--gin.DATA_DIR='gs://other.bucket/its data'",
    ]
    settings = {
        "ACCELERATOR_TYPE": "v4-8",
        "MODEL_DIR": "runs/$HOME \\'",
        "LOG_DIR": str(tmp_path / "the logs"),
    }
    assert cloud.run("--", *files, *ODD, **settings) == 0, cloud.err
    data = f"--gin.DATA_DIR='{cloud.fake}/workers/rl-w-0/gcs/other.bucket/its data'"
    expected = ["run", *files[:3], data, *ODD, "--gin.MODEL_DIR='runs/$HOME \\\\\\''"]
    assert cloud.argv() == [("rl-w-0", expected)]
    assert "other.bucket" in cloud.lines("mounts")[0]
    assert (tmp_path / "the logs/attempt-001.log").exists()
    planned = (cloud.fake / "plan").read_text().split("\0")[:-1]
    assert planned == ["plan", *files, *ODD[:3], *ODD[4:], "--topology=v4:2x2x1"]
    assert "where the TPU is lost, the run starts from nothing" in cloud.out


def test_the_launcher_is_as_good_at_spaces_in_what_it_prints(cloud):
    """A line of the dry run, pasted into a shell, is the call of the run."""
    assert cloud.run("--dry-run", f"--gin_file={GIN_FILE}", *ODD) == 0
    text = cloud.out[cloud.out.index("gcloud compute tpus tpu-vm ssh") :]
    pasted = text[text.rindex("gcloud compute tpus tpu-vm ssh") : text.index("# Until")]
    cloud.ends_as(0)
    cloud.has()
    for home in cloud.fake.glob("workers/*"):
        shutil.copytree(cloud.checkout, home / "musicrl", ignore=shutil.ignore_patterns(".git"))
        cloud.write(home / "musicrl/.venv/bin/musicrl", MUSICRL)
    path = f"{cloud.fake / 'bin'}:{os.environ['PATH']}"
    cloud.processes.run(
        ["bash", "-c", pasted], env={"PATH": path, "FAKE": str(cloud.fake)}, check=True
    )
    assert all(words[1:-1] == [f"--gin_file={GIN_FILE}", *ODD] for _, words in cloud.argv())
    assert len(cloud.argv()) == 2


GOLDEN = {
    "queued": {"ACCELERATOR_TYPE": "v5litepod-16"},
    "slices": {
        "SLICES": "2",
        "ACCELERATOR_TYPE": "v5p-128",
        "SPOT": "1",
        "CREATE_FLAGS": "--reserved",
    },
    "vm": {
        "PROVISION": "vm",
        "ACCELERATOR_TYPE": "v6e-8",
        "MODEL_DIR": "/mnt/nfs/a run",
        "SHARED_DIR": "/mnt/nfs/",
    },
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_dry_run_prints_what_it_would_do_and_does_nothing(name, cloud):
    before = sorted(cloud.checkout.parent.rglob("*"))
    assert (
        cloud.run("--dry-run", f"--gin_file={GIN_FILE}", "--gin.RLConfig.steps=20", **GOLDEN[name])
        == 0
    )
    assert cloud.calls() == [] and cloud.lines("calls.jsonl") == [] and not cloud.err
    assert sorted(cloud.checkout.parent.rglob("*")) == before
    printed = re.sub(r"\b[0-9a-f]{40}\b", "TREE", cloud.out)
    path = HERE / f"golden/{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(printed)
    assert printed == path.read_text(), "UPDATE_GOLDEN=1 writes it anew"


@pytest.mark.parametrize("name", ["PROJECT", "ZONE", "TPU_NAME", "ACCELERATOR_TYPE", "MODEL_DIR"])
def test_a_missing_setting_is_named(name, cloud):
    assert cloud.run(**{name: None}) == 1
    assert f"{name} is not set: give the" in cloud.err or f"{name} is not set: give a" in cloud.err
    assert cloud.run("--dry-run", f"--gin_file={GIN_FILE}", **{name: ""}) == 1
    assert cloud.lines("calls.jsonl") == []


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"ACCELERATOR_TYPE": "v3-8"},
            "ACCELERATOR_TYPE=v3-8 must be v4-N, v5litepod-N, v5p-N or v6e-N",
        ),
        ({"ACCELERATOR_TYPE": "v5p"}, "'v5p' is no size; v5p-16 is a type"),
        ({"ACCELERATOR_TYPE": "v5p-x"}, "'x' is no size; v5p-16 is a type"),
        ({"ACCELERATOR_TYPE": "v5p-96"}, "known ( v5p-8 v5p-16 v5p-32"),
        ({"ACCELERATOR_TYPE": "v5p-96"}, "set TOPOLOGY=v5p:AxB or AxBxC, or SKIP_PLAN=1"),
        (
            {"MODEL_DIR": "/data/run"},
            "MODEL_DIR=/data/run is a folder of each of the 2 hosts, who need one in",
        ),
        ({"MODEL_DIR": "/data/run", "SHARED_DIR": "/dat"}, "or SHARED_DIR to a folder above it"),
        ({"MODEL_DIR": "/data/run", "ACCELERATOR_TYPE": "v5litepod-16"}, "each of the 4 hosts"),
        (
            {"MODEL_DIR": "/data/run", "ACCELERATOR_TYPE": "v6e-8", "SLICES": "2"},
            "each of the 2 hosts",
        ),
        (
            {"MODEL_DIR": "gs://my-bucket"},
            "MODEL_DIR=gs://my-bucket must be of the form gs://BUCKET/FOLDER",
        ),
        ({"MODEL_DIR": "gs:/my-bucket/x"}, "must be of the form gs://BUCKET/FOLDER"),
        ({"TPU_NAME": "my tpu"}, "TPU_NAME=my tpu must be of a-z, 0-9 and hyphens"),
        ({"PROVISION": "fast"}, "PROVISION=fast must be one of: queued vm"),
        ({"SLICES": "0"}, "SLICES=0 must be a whole number of at least 1"),
        ({"SLICES": "2", "PROVISION": "vm"}, "only a queued resource holds several slices"),
        ({"SPOT": "yes"}, "SPOT=yes must be 1, or not set"),
        ({"PAUSE_SECONDS": "1m"}, "PAUSE_SECONDS=1m must be a whole number"),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_the_mend(settings, complaint, cloud):
    assert cloud.run(**settings) == 1
    assert complaint in cloud.err
    assert cloud.lines("calls.jsonl") == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--"], "say what to run: --gin_file="),
        (["--gin.MODEL_DIR='/x'"], "set MODEL_DIR=..."),
        (["--gin.A=1", "--dry-run"], "--dry-run must come first"),
        (
            ["--gin_file=gin/mine.gin"],
            "--gin_file=gin/mine.gin is not in the commit that the workers get",
        ),
        (["--gin_file", "/x/mine.gin"], "--gin_file=/x/mine.gin is not in the commit"),
    ],
)
def test_bad_arguments_are_refused(arguments, complaint, cloud):
    assert cloud.run(*arguments) == 1
    assert complaint in cloud.err
    assert cloud.lines("calls.jsonl") == []


def test_a_checkout_with_changes_is_refused(cloud):
    (cloud.checkout / GIN_FILE).write_text("A = 1\n")
    assert cloud.run() == 1
    assert "changes that are not committed" in cloud.err and "(gin/a run.gin, ...)" in cloud.err


def test_what_does_not_fit_is_refused_before_anything_is_created(cloud):
    (cloud.fake / "plan_status").write_text("1")
    assert cloud.run() == 1
    assert (
        "4 functions of train_rl" in cloud.out
        and "does not fit ACCELERATOR_TYPE=v5p-16" in cloud.err
    )
    assert cloud.lines("calls.jsonl") == []
    assert cloud.run(SKIP_PLAN="1") == 0
    assert "No plan: SKIP_PLAN=1" in cloud.out


def test_flags_that_musicrl_does_not_take_are_refused_before_anything_is_created(cloud):
    (cloud.fake / "config_status").write_text("1")
    assert cloud.run() == 1
    assert "does not take these flags: what is wrong with it" in cloud.err
    assert cloud.lines("calls.jsonl") == []


def test_help_is_its_heading(cloud):
    assert cloud.run("--help") == 0
    for name in set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "launch/tpu_rl.sh").read_text())):
        assert name in cloud.out, f"{name} is a setting that the heading leaves out"


SHAPES = re.search(
    r'TOPOLOGIES="\n(.*?)\n"', (ROOT / "launch/tpu_rl.sh").read_text(), flags=re.DOTALL
)[1].splitlines()


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: row.split()[0])
def test_shapes_have_as_many_chips_as_their_names_say(row):
    generation, _, *sizes = row.split()
    for size in sizes:
        name, shape = size.split("=")
        chips = int(name) // (2 if generation in ("v4", "v5p") else 1)
        assert chips == eval(shape.replace("x", "*")), size
        assert shape.count("x") == (2 if generation in ("v4", "v5p") else 1)


def test_shapes_are_those_that_jax_knows(processes):
    """In a process of their own: libtpu writes to its streams, and looks for TPUs."""
    pytest.importorskip("libtpu")
    names = [f"{row.split()[1]}:{size.split('=')[1]}" for row in SHAPES for size in row.split()[2:]]
    code = "import sys\nfrom jax.experimental import topologies\n"
    code += "for name in sys.argv[1:]: topologies.get_topology_desc(name, platform='tpu')"
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    processes.run(
        [sys.executable, "-c", code, *names], env=os.environ | environment, check=True, timeout=60
    )


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_clean(path, processes):
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("no shellcheck: launch/setup.sh installs it")
    found = processes.run([shellcheck, str(path)], capture_output=True)
    assert found.returncode == 0, found.stdout


def test_the_job_set_restarts_as_the_launcher_does():
    manifest = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 2  # three attempts
    free = {
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    assert policy["rules"] == [free]
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
    assert codes["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [75, 134, 137, 143],
    }
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert codes["action"] == disruption["action"] == "FailJob"
    assert pod["terminationGracePeriodSeconds"] >= 60
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


def test_the_job_set_runs_the_image_as_it_is_built():
    """No root, a read-only root file system, and a volume where the image writes."""
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
