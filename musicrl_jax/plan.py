"""The verb `plan`: compiles a run for TPU slices, on a machine without any.

It answers whether the run fits, how fast it can be, and what limits it. The jitted functions and
shardings are those of the verbs; only the weights are shapes. All figures are the TPU compiler's
estimates, or arithmetic on what it compiled; none is measured.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
from jax.sharding import Mesh

from musicrl_jax.core.files import write_json
from musicrl_jax.planning import slices as topologies
from musicrl_jax.planning.chips import Chip
from musicrl_jax.planning.estimate import bytes_a_chip, estimate, refused
from musicrl_jax.planning.flops import flops
from musicrl_jax.planning.models import PlannedModels
from musicrl_jax.planning.programs import VERBS, amount, programs
from musicrl_jax.planning.stages import Stage

GIB = 1 << 30
AT_ONCE = 3  # functions compiled at once: two take minutes, the others run beside them
# Leaves out the scheduling of instructions inside an operation, up to a third of the compilation.
# Cycles are estimated before it. Programs become up to 0.2 GiB larger.
UNPACKED = {"xla_jf_vliw_scheduler": "false"}
LIMITS = ("matrix", "memory", "network", "compiler")
HEAD = (
    f"{'':>29} {'GiB a chip':>14} {'TFLOP':>8} {'GB moved':>9} {'MB sent':>9} | {'matrix':>8} "
    f"{'memory':>8} {'network':>8} {'compiler':>8}  seconds, and what limits"
)
Row = dict[str, Any]  # a function's figures, by name


def plan(
    stages: Sequence[Mapping[str, Callable[..., Any]]],
    clip_seconds: float,
    topology: str,
    slices: int = 1,
    only: str = "",
    search: bool = False,
    json_file: str = "",
) -> None:
    """Compiles every jitted function of a run for TPU slices, and prints its memory and time.

    It needs libtpu (the extra `plan`), but no TPU, data or checkpoint. For each function, a table
    has the HBM that a chip needs; the time of a call at the limits of matrix units, memory and
    network, and by the compiler's schedule; and the limit that takes longest. For each stage, it
    prints clips a second and total time. All figures are the compiler's estimates.

    Args:
      stages: of the run.
      clip_seconds: length of the clips.
      topology: of a slice, such as v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:8x8.
      slices: number of slices.
      only: names of stages, separated by commas; by default all of train, train_rl, collect and
        evaluate.
      search: whether to double the batch of each stage until it does not fit, and print the largest
        that does.
      json_file: file for all figures; '' writes none.

    Raises:
      ValueError: something does not fit, a setting is out of range or the topology is unknown.
    """
    # The slices and the stages.
    mesh_of, chip = topologies.describe(topology, slices)
    described: dict[str, Stage] = {}
    for group in stages:
        for name, stage in group.items():
            described[name] = stage(describe=True)
    selected = [name for name in only.split(",") if name] or list(described)
    if unknown := sorted(set(selected) - set(described)):
        raise ValueError(f"plan.only: {unknown[0]!r} is none of the stages {', '.join(described)}")
    _print(f"{slices} x {topology}, by the TPU compiler's estimate; nothing here was measured")

    # Each stage, and with `search` its larger batches.
    models = PlannedModels(described, clip_seconds)
    rows: list[Row] = []
    for name, stage in described.items():
        if name not in selected or stage.verb not in VERBS:
            continue
        functions = _plan_stage(models, name, stage, mesh_of, chip)
        while search and all(row["fits"] for row in functions):
            batch_size = stage.settings["batch_size"]
            stage = stage.with_batch(2 * batch_size)
            larger = _plan_stage(models, name, stage, mesh_of, chip)
            if not all(row["fits"] for row in larger):
                _print(f"{name}: the largest doubled batch that fits is {batch_size}")
                break
            functions = larger
        rows += functions

    if json_file:
        target = {"topology": topology, "slices": slices, "chip": dataclasses.asdict(chip)}
        write_json(json_file, {**target, "functions": rows})
    if short := [f"{row['stage']}/{row['name']}" for row in rows if not row["fits"]]:
        raise ValueError(
            f"{', '.join(short)} need more than the {chip.memory / GIB:.2f} GiB of a chip: raise "
            "fsdp or microbatches, set remat, lower batch_size, or use more chips"
        )


def _plan_stage(
    models: PlannedModels, name: str, stage: Stage, mesh_of: Callable[[int, int], Mesh], chip: Chip
) -> list[Row]:
    """Compiles the functions of a stage in parallel, and prints and returns their figures."""
    # Trace every function, and count its operations.
    mesh = mesh_of(stage.settings.get("fsdp", 1), stage.settings.get("tensor", 1))
    functions = programs(models, stage, mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traces = [program.function.trace(*program.arguments) for program in functions]
    works = [flops(traced.jaxpr) for traced in traces]

    def compile_one(place: int) -> Row:
        program = functions[place]
        start, beside = time.monotonic(), bytes_a_chip(program.beside)
        try:
            executable = traces[place].lower().compile(compiler_options=UNPACKED)
            figures = estimate(executable, works[place], mesh.size, chip, beside)
        except jax.errors.JaxRuntimeError as error:
            figures = refused(error, chip, beside)
        row = {"stage": name, "name": program.name, "clips": program.clips, "once": program.once}
        return {**row, "compile_seconds": time.monotonic() - start, **figures.as_json()}

    # The largest takes longest to compile, so it starts first.
    _print(HEAD)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        by_work = sorted(range(len(functions)), key=lambda place: -works[place].matmul)
        futures = {place: pool.submit(compile_one, place) for place in by_work}
        for future in as_completed(futures.values()):  # the compiler refuses in seconds
            _print(_line(future.result()))
    rows = [futures[place].result() for place in range(len(functions))]
    if all(row["fits"] for row in rows):
        _print(_summary(name, stage, rows, mesh.size))
    return rows


def _print(text: str) -> None:
    """Prints at once, since what follows may take minutes."""
    print(text, flush=True)


def _line(row: Row) -> str:
    """Returns a row of the table."""
    space = f"{row['needed'] / GIB:.2f} of {row['memory'] / GIB:.2f}"
    start = f"{row['stage'] + '/' + row['name']:>29} {space:>14}"
    if not row["fits"]:
        return f"{start} does not fit"
    sent = (sum(row["wire"].values()) + row["between_slices"]) / 1e6
    seconds = " ".join(f"{row[f'{limit}_seconds']:8.3f}" for limit in LIMITS)
    amounts = f"{row['matmul'] / 1e12:8.2f} {row['moved'] / 1e9:9.1f} {sent:9.1f}"
    loops = row["unknown_loops"]
    unknown = f", but for {len(loops)} loops of unknown length" if loops else ""
    return f"{start} {amounts} | {seconds}  {row['limit']}{unknown}"


def _summary(name: str, stage: Stage, rows: Sequence[Row], chips: int) -> str:
    """Returns the time of one batch of a stage, and of all of them."""
    seconds, clips = sum(row["seconds"] for row in rows if not row["once"]), rows[0]["clips"]
    batches, work = amount(stage, clips)
    return (
        f"{name}: {seconds:.2f} s a step of {clips} clips, {clips / seconds:.2f} clips a second, "
        f"{3600 * clips / seconds / chips:.0f} a chip-hour, if nothing overlaps; {work} in "
        f"{batches * seconds / 3600:.2f} hours\n"
    )
