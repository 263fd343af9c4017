"""Peak memory and time of a build of many short files, with Apache Beam and without it.

    .venv-beam/bin/python tests/benchmarks/build.py --files=10000

Builds 1,000 files, then as many as asked for: wav files of noise, one clip each. Prints the peak of
the process that builds and of the largest process that it started, ratios first. Each build is a
process of its own. Without Beam (`launch/setup.sh beam`) only the other engine is measured.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RATE_HZ = 16000
FEW = 1000


def main() -> None:
    """Measures each engine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=10_000, help="files of the larger build")
    parser.add_argument("--clip_seconds", type=float, default=0.1, help="length of each file")
    parser.add_argument("--engines", default="threads,beam", help="comma-separated")
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        build_one(*flags.one, flags.clip_seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        for count in (FEW, flags.files):
            write_music(Path(folder) / str(count), count, flags.clip_seconds)
        for engine in flags.engines.split(","):
            few, many = (
                measured(engine, Path(folder) / str(count), flags.clip_seconds)
                for count in (FEW, flags.files)
            )
            print(f"{engine}: {flags.files} files take {many[0] / few[0]:.2f} times the memory of")
            print(f"  {FEW} files in the process that builds, {many[1] / few[1]:.2f} in others")
            for count, (own, others, seconds) in ((FEW, few), (flags.files, many)):
                print(f"  {count:7} files: {own:6.0f} MB, {others:6.0f} MB, {seconds:5.0f} s")


def write_music(folder: Path, count: int, seconds: float) -> None:
    """Writes a folder of short recordings, each another noise, and its captions."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        noise = rng.integers(-9999, 9999, round(seconds * RATE_HZ), np.int16)
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
            file.writeframes(noise.tobytes())
        rows.append(json.dumps({"file": f"{number}.wav", "caption": f"noise {number}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))


def measured(engine: str, folder: Path, seconds: float) -> tuple[float, float, float]:
    """Builds in a process of its own. Returns its peak and that of others in MB, and seconds."""
    command = [sys.executable, __file__, f"--clip_seconds={seconds}", "--one", engine, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def build_one(engine: str, folder: str, seconds: float) -> None:
    """Builds a folder's data set and prints the figures of `measured`."""
    sys.path.insert(0, str(ROOT))
    from musicrl_jax.inputs import build, pipelines

    start = time.monotonic()
    config = {"name": "mine", "folder": folder, "captions": f"{folder}/captions.jsonl"}
    with (
        tempfile.TemporaryDirectory() as data_dir,
        mock.patch.object(pipelines, "is_installed", lambda: engine == "beam"),
    ):
        build.prepare("data/audio_folder", config | {"clip_seconds": seconds}, data_dir)
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    peaks = [resource.getrusage(kind).ru_maxrss / 1024 for kind in kinds]
    print(json.dumps([*peaks, time.monotonic() - start]))


if __name__ == "__main__":
    main()
