"""Processor seconds of short commands, of one or two checkouts in turns: what a user waits for.

    python tests/benchmarks/startup.py                      this checkout
    python tests/benchmarks/startup.py f1186c7 .            a revision and a folder; ratios first

`musicrl --help`; `generate` of one clip by a system and by a bundle, cold (no compiled function
is kept) and warm (once more); `serve` until it is ready, cold and warm. Seconds are of user and
system, of the process and of what it started, as the kernel counts them. The models have the demo's
sizes and random weights; this checkout makes them.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 4.0  # of a clip


def make_models(folder: Path) -> None:
    """Writes `folder`/policy with its neighbours."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp
    from flax.linen import meta

    from musicrl_jax.core import checkpoint
    from musicrl_jax.inputs import vocabulary
    from musicrl_jax.models.bert import BertConfig
    from musicrl_jax.models.conformer import ConformerConfig
    from musicrl_jax.models.mulan import MuLan, MuLanConfig
    from musicrl_jax.models.musiclm import MusicLM, MusicLMConfig
    from musicrl_jax.models.resnet import ResNetConfig
    from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig
    from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
    from musicrl_jax.models.tokens import TokenLayout
    from musicrl_jax.models.transformer import TransformerConfig
    from musicrl_jax.objectives.mulan import VOCABULARY

    # A tokenizer of few words.
    captions = SimpleNamespace(
        captions=lambda split: ["a slow piano", "a fast reel on a harp"] * 20
    )
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.build(captions, str(folder / "words.model"), 300)
    rate, key = 16_000, jax.random.key(0)
    wav, codes = jnp.zeros((1, rate)), jnp.zeros((1, 4, 8), jnp.int32)
    # Sizes as those of the demo.
    text = BertConfig(layers=1, heads=4, embed=64, mlp=128, positions=64, pieces=1024)
    hearing = ResNetConfig(mels=64, widths=(16, 32, 64, 128), blocks=1)
    temporal = TransformerConfig(4, 160, 4, 448, 0.0)
    depth = TransformerConfig(2, 96, 4, 192, 0.0)
    conformer = ConformerConfig(2, 4, 96, 256)
    layout = TokenLayout(256, 256, 4)
    models = {
        "codec": (
            SoundStream(
                SoundStreamConfig(rate, (8, 5, 4, 2), channels=8, embed=64, levels=8, codes=256)
            ),
            (wav, key),
        ),
        "mulan": (
            MuLan(MuLanConfig(rate, 2.0, hearing, text, 64, embed=64, levels=12, codes=64)),
            (wav, jnp.zeros((1, 64), jnp.int32)),
        ),
        "policy": (
            MusicLM(MusicLMConfig(temporal, depth, layout, 12, 64)),
            (jnp.zeros((1, 1, layout.depth), jnp.int32), jnp.zeros((1, 12), jnp.int32)),
        ),
        "fine": (
            SoundStorm(
                SoundStormConfig(conformer, levels=8, coarse_levels=4, codes=256, first_passes=4)
            ),
            (codes, codes > 0, 4),
        ),
    }
    # Random weights, with the lineage that systems check.
    hashes = {"semantic": "of no model"}
    for name, (module, inputs) in models.items():
        variables = meta.unbox(
            jax.jit(lambda key, module=module, inputs=inputs: module.init(key, *inputs))(key)
        )
        assets = {VOCABULARY: (folder / "words.model").read_bytes()} if name == "mulan" else {}
        if name in ("policy", "fine"):
            assets = {checkpoint.LINEAGE: json.dumps(hashes).encode()}
        hashes[name] = checkpoint.save_model(folder / name, module.config, variables, assets)


def system_flag(root: Path) -> str:
    """Returns the flag of `generate` and `export` that names a system, in that checkout."""
    return "--system" if (root / "musicrl_jax" / "systems").is_dir() else "--checkpoint"


def checkout(name: str, folder: Path) -> Path:
    """Returns a folder as it is, and a git revision unpacked into `folder`."""
    if Path(name).is_dir():
        return Path(name).resolve()
    folder.mkdir()
    archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x"], cwd=folder, input=archive.stdout, check=True)
    return folder


def environment(root: Path, cache: Path) -> dict[str, str]:
    """Returns an environment that imports `root` and caches compiled functions in `cache`."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))
    }
    return inherited | {
        "PYTHONPATH": str(root),
        "XDG_CACHE_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
    }


def processor_seconds(
    root: Path, cache: Path, *arguments: str, until: Callable[[], bool] | None = None
) -> float:
    """Returns the processor seconds of a command of that checkout; ended once `until` is true."""
    command = [sys.executable, "-m", "musicrl_jax.cli", *arguments]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=environment(root, cache),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        stopped = False
        while until is not None and not stopped:
            if stopped := until():
                process.terminate()
            elif os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.2)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode and not stopped:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} in {root}:\n{errors.read().decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def is_ready(port: int) -> bool:
    """Tells whether a service answers that it is ready."""
    try:
        urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
    except (URLError, OSError):
        return False
    return True


def one_turn(root: Path, models: Path) -> Iterator[tuple[str, float]]:
    """Yields what was measured of one checkout, with caches of its own."""
    yield "--help", processor_seconds(root, models, "--help")
    with tempfile.TemporaryDirectory() as folder:
        # A checkout reads no bundle of a later one.
        flag, seconds, bundle = system_flag(root), f"--clip_seconds={SECONDS}", f"{folder}/bundle"
        flags = (
            "export",
            f"{flag}={models / 'policy'}",
            seconds,
            "--platforms=cpu",
            f"--out={bundle}",
        )
        processor_seconds(root, Path(folder, "export"), *flags)
        for number, (kind, source) in enumerate(
            {"system": models / "policy", "bundle": bundle}.items()
        ):
            flags = "generate", f"{flag}={source}", seconds, "--prompt=a slow piano"
            for state in ("cold", "warm"):
                out = f"--out={folder}/{kind}_{state}"
                yield (
                    f"generate by a {kind}, {state}",
                    processor_seconds(root, Path(folder, f"{number}"), *flags, out),
                )
        for state in ("cold", "warm"):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            flags = "serve", f"--bundle={bundle}", f"--port={port}"
            ready = partial(is_ready, port)
            yield (
                f"serve until ready, {state}",
                processor_seconds(root, Path(folder, "serve"), *flags, until=ready),
            )


def report(names: list[str], seconds: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Prints ratios of medians first, then the medians with the lowest and the highest."""
    for what in seconds[names[0]]:
        medians = [statistics.median(seconds[name][what]) for name in names]
        if len(names) == 2:
            print(
                f"{what}: {medians[0] / medians[1]:.2f} times as much in {names[0]} "
                f"as in {names[1]}"
            )
    for what in seconds[names[0]]:
        for name in names:
            each = seconds[name][what]
            print(
                f"{what}, {name}: {statistics.median(each):.2f} s "
                f"[{min(each):.2f}, {max(each):.2f}]"
            )


def main() -> None:
    """Measures the checkouts in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkouts", nargs="*", default=["."], help="one or two folders or git revisions"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json_file", help="keeps every figure")
    flags = parser.parse_args()
    if len(flags.checkouts) > 2:
        parser.error("one or two checkouts are compared")
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in flags.checkouts}
    with tempfile.TemporaryDirectory() as folder:
        roots = {
            name: checkout(name, Path(folder, f"root_{number}"))
            for number, name in enumerate(flags.checkouts)
        }
        models = Path(folder, "models")
        make_models(models)
        for turn in range(flags.turns):
            for name in flags.checkouts if turn % 2 == 0 else flags.checkouts[::-1]:
                for what, value in one_turn(roots[name], models):
                    seconds[name].setdefault(what, []).append(value)
                    print(f"{turn + 1}: {name}: {what}: {value:.2f} s", file=sys.stderr, flush=True)
    report(flags.checkouts, seconds)
    if flags.json_file:
        Path(flags.json_file).write_text(json.dumps(seconds, indent=2) + "\n")


if __name__ == "__main__":
    main()
