"""A run compiled for a TPU slice, on a machine that has none: does it fit, how fast can it be, and what limits it.

The jitted functions are those that `train` and `train_rl` run, with the same shardings; only the weights are missing.
Everything printed is the TPU compiler's word or arithmetic on what it compiled, not a measurement.

Legend: B clips of a step over all chips, N samples, F frames, T codec frames, Q codec levels, M MuLan levels.
"""

import dataclasses
import inspect
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from musicrl_jax.core import checkpoint, extras, sharding
from musicrl_jax.core.calls import PLANNED, Call, recorded
from musicrl_jax.core.files import write_json
from musicrl_jax.inputs.clips import Clips, Ratings
from musicrl_jax.inputs.tokens import Tokens
from musicrl_jax.inputs.votes import Votes
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.models.musiclm import MusicLM
from musicrl_jax.models.rewards import Preference, PreferenceConfig, Quality, QualityConfig
from musicrl_jax.models.semantic import SemanticConfig
from musicrl_jax.models.soundstorm import SoundStorm, SoundStormConfig
from musicrl_jax.models.soundstream import SoundStream, SoundStreamConfig
from musicrl_jax.models.tokens import CODEC_FRAMES_PER_FRAME, FRAMES_PER_SECOND
from musicrl_jax.models.transformer import LANES
from musicrl_jax.objectives.mulan import VOCABULARY, MuLanObjective
from musicrl_jax.objectives.step import first_state, training_step
from musicrl_jax.planning.chips import CHIPS, Chip
from musicrl_jax.planning.estimate import bytes_a_chip, estimate, refused
from musicrl_jax.planning.flops import Flops, flops
from musicrl_jax.rl import rollout as rollouts
from musicrl_jax.rl.steps import build

GIB = 1 << 30
AT_ONCE = 3  # functions: the two that take minutes, and the short ones beside them
# libtpu looks for a TPU, for its neighbours and for a place to log to, and takes one process at a time, unless told.
WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
# Without the scheduling of instructions inside an operation, up to a third of the work of compiling: the cycles that it
# expects of one stand before. Only the program itself comes out larger, by 0.2 GiB at most.
UNPACKED = {"xla_jf_vliw_scheduler": "false"}
Stages = Sequence[Mapping[str, Callable[[], Any]]]


@dataclasses.dataclass(frozen=True)
class PlannedData:
    """A data set that is not built yet, as objectives see it.

    Attributes:
      shapes: of a batch, by feature.
      sizes: what `Tokens.layout` says of the codes.
    """

    shapes: dict[str, jax.ShapeDtypeStruct]
    sizes: dict[str, int]

    def layout(self) -> dict[str, int]:
        """As `Tokens.layout`."""
        return self.sizes

    def count(self, split: str) -> int:
        """Enough for any model."""
        return 1 << 40


class PlannedMuLan(MuLanObjective):
    """MuLan's objective without its vocabulary, which nobody has trained yet."""

    def check(self, batch: Any) -> None:
        """Nothing is there to be checked."""


class Planned:
    """The stages of a run as calls, and the models that they will make as shapes.

    Models that other stages read must come from a `train` of the same run.
    """

    def __init__(self, calls: Mapping[str, Call], clip_seconds: float, mesh: Mesh):
        self.calls, self.clip_seconds, self.mesh = calls, clip_seconds, mesh
        self._configs: dict[str, Any] = {}
        for call in calls.values():
            if call.verb == "train":
                self._configs[call.arguments["model_dir"]] = call.arguments["objective"].model
            if call.verb == "train_rl":
                self._configs[call.arguments["model_dir"]] = self._configs.get(call.arguments["base"])

    def load_model(self, folder: str, config_class: type) -> checkpoint.Model:
        """In place of `checkpoint.load_model`: shapes for weights."""
        config = self._configs.get(str(folder))
        if not isinstance(config, config_class):
            raise ValueError(f"plan: no stage of the run trains a {config_class.__name__} in {folder}")
        return _model(config, self.mesh)

    def objective(self, call: Call) -> Any:
        """The objective of a `train`, over data that is not there."""
        objective, batch_size = call.arguments["objective"], call.arguments["batch_size"]
        data = PlannedData(self._batch(objective.data, batch_size), self._layout())
        fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)} | {
            "data": data
        }
        return (PlannedMuLan if type(objective) is MuLanObjective else type(objective))(**fields)

    def _layout(self) -> dict[str, int]:
        codec, semantic, mulan = map(self._config, (SoundStreamConfig, SemanticConfig, MuLanConfig))
        return {
            "sample_rate_hz": codec.sample_rate_hz,
            "acoustic_levels": codec.levels,
            "acoustic_codes": codec.codes,
            "semantic_codes": semantic.codes,
            "mulan_levels": mulan.levels,
            "mulan_codes": mulan.codes,
        }

    def _config(self, kind: type) -> Any:
        found = [config for config in self._configs.values() if isinstance(config, kind)]
        if not found:
            raise ValueError(f"plan: no stage of the run trains a {kind.__name__}, whose sizes others go by")
        return found[0]

    def _batch(self, data: Any, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch of that data."""

        def shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch_size, *sizes), dtype)

        if isinstance(data, Clips | Ratings):
            clips = data if isinstance(data, Clips) else data.clips
            samples = round((clips.crop_seconds or self.clip_seconds) * clips.sample_rate_hz)
            found = {"audio": shape(samples, dtype=jnp.float32)}
            if clips.vocabulary is not None:
                found["text"] = shape(clips.text_length)
            return found | ({"score": shape(dtype=jnp.float32)} if isinstance(data, Ratings) else {})
        frames = round(self.clip_seconds * FRAMES_PER_SECOND)
        pair = (2,) if isinstance(data, Votes) else ()
        if not isinstance(data, Tokens | Votes):
            raise ValueError(f"plan: cannot tell the batches of {type(data).__name__} without its data: leave it out")
        found = {
            "semantic": shape(*pair, frames),
            "acoustic": shape(*pair, frames * CODEC_FRAMES_PER_FRAME, self._config(SoundStreamConfig).levels),
            "mulan": shape(self._config(MuLanConfig).levels),
        }
        return found | ({"vote": shape(dtype=jnp.float32)} if pair else {})


def _model(config: Any, mesh: Mesh) -> checkpoint.Model:
    """A finished model as shapes."""
    policy = config.policy if isinstance(config, PreferenceConfig) else config

    def create(key: jax.Array) -> Any:
        wav = jnp.zeros((1, getattr(config, "sample_rate_hz", 1)), jnp.float32)  # a second
        if isinstance(config, SoundStreamConfig):
            return SoundStream(config).init(key, wav, key)
        if isinstance(config, MuLanConfig):
            return MuLan(config).init(key, wav, jnp.zeros((1, config.text_length), jnp.int32))
        if isinstance(config, QualityConfig):
            return Quality(config).init(key, wav)
        if isinstance(config, SoundStormConfig):
            codes = jnp.zeros((1, CODEC_FRAMES_PER_FRAME, config.levels), jnp.int32)
            return SoundStorm(config).init(key, codes, codes > 0, config.coarse_levels)
        module = (MusicLM if policy is config else Preference)(config)
        tokens = jnp.zeros((1, 1, policy.layout.depth), jnp.int32)
        return module.init(key, tokens, jnp.zeros((1, policy.mulan_levels), jnp.int32))

    shapes, _ = sharding.laid_out(mesh, create, jax.random.key(0))
    lineage = json.dumps(dict.fromkeys(("codec", "semantic", "mulan"), PLANNED)).encode()
    return checkpoint.Model(config, shapes, PLANNED, {checkpoint.LINEAGE: lineage, VOCABULARY: b""})


class Program(NamedTuple):
    """A jitted function of a stage, what it is to be compiled for, and what is alive beside its arguments."""

    stage: str
    name: str
    function: Any
    arguments: tuple[Any, ...]
    clips: int
    beside: Any = ()


def _struct(shapes: Any, shardings: Any) -> Any:
    """Shapes with their layout; one sharding is that of all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def _supervised(planned: Planned, stage: str, mesh: Mesh) -> Iterator[Program]:
    """The step of a `train`."""
    call = planned.calls[stage].arguments
    objective, transform = planned.objective(planned.calls[stage]), call["optimiser"].build(call["steps"])
    batch = _struct(objective.data.shapes, sharding.batch_sharding(mesh))
    sharding.rows_a_shard(mesh, call["batch_size"])
    frozen = objective.frozen()
    state, shardings = sharding.laid_out(mesh, partial(first_state, objective, transform), jax.random.key(0), batch)
    step = training_step(objective, transform, call["seed"], mesh, shardings)
    frozen = _struct(frozen, sharding.spread(mesh, frozen))
    yield Program(stage, "step", step, (_struct(state, shardings), frozen, batch), call["batch_size"])


def _reinforced(planned: Planned, stage: str, mesh: Mesh) -> Iterator[Program]:
    """Rollout, reward and update of a `train_rl`."""
    call = planned.calls[stage].arguments
    batch_size = call["batch_size"]
    loaded = rollouts.load(*(call[name] for name in ("base", "fine", "codec", "mulan")))
    musiclm = MusicLM(loaded.studio.musiclm.config, lanes=LANES["tpu"])
    loaded = dataclasses.replace(loaded, studio=dataclasses.replace(loaded.studio, musiclm=musiclm))
    mixture = call["rewards"].load()
    settings = {
        name: call[name]
        for name, about in inspect.signature(build).parameters.items()
        if about.kind == about.KEYWORD_ONLY
    }
    _, steps = build(loaded, mixture, mesh, **settings)
    by_row, zero = sharding.batch_sharding(mesh), jax.ShapeDtypeStruct((), jnp.int32)
    state = _struct(steps.shapes, steps.shardings)
    frozen, scorers = (_struct(tree, sharding.spread(mesh, tree)) for tree in (loaded.frozen, mixture.variables))
    text = jax.ShapeDtypeStruct((batch_size, call["prompts"].text_length), jnp.int32, sharding=by_row)
    keys = _struct(jax.eval_shape(steps.keys, zero, zero, zero), by_row)
    whole = partial(_struct, shardings=sharding.replicated(mesh))
    policy, others = jax.eval_shape(steps.gather, state.policy, frozen)
    policy, others = _struct(policy, steps.drawing), whole(others)
    embedding, mulan = _struct(jax.eval_shape(steps.read, others["mulan"], text), by_row)
    drawn = _struct(jax.eval_shape(steps.draw, policy, mulan, keys), by_row)
    acoustic = _struct(jax.eval_shape(steps.fill, others["soundstorm"], drawn.tokens, keys), by_row)
    wav = _struct(jax.eval_shape(steps.sound, others["soundstream"], acoustic), by_row)
    rollout = rollouts.Rollout(text, embedding, mulan, *drawn, acoustic, wav)
    units = {term.name: (0.0, 1.0) for term in call["rewards"].terms}
    reward = jax.ShapeDtypeStruct((batch_size,), jnp.float32, sharding=by_row)
    moments = state.policy_opt, state.value_opt
    anchor = state.policy
    learning = _struct(jax.eval_shape(steps.gather_learner, state, anchor), steps.learning)
    resting = state, anchor, frozen, scorers
    idle = {name: [tree for other, tree in others.items() if other != name] for name in others}
    for name, function, arguments, beside in (
        ("gather", steps.gather, (state.policy, frozen), (anchor, state.value, moments, scorers)),
        ("read", steps.read, (others["mulan"], text), (resting, policy, idle["mulan"])),
        ("draw", steps.draw, (policy, mulan, keys), (resting, others)),
        ("fill", steps.fill, (others["soundstorm"], drawn.tokens, keys), (resting, policy, idle["soundstorm"], drawn)),
        ("sound", steps.sound, (others["soundstream"], acoustic), (resting, policy, idle["soundstream"], drawn)),
        ("gather scorers", steps.gather_scorers, (scorers,), (state, anchor, frozen, rollout)),
        ("reward", steps.reward, (whole(scorers), rollout, units), (state, anchor, frozen, scorers)),
        ("gather learner", steps.gather_learner, (state, anchor), (frozen, scorers, rollout)),
        ("update", steps.update, (state, learning, rollout, reward), (anchor, frozen, scorers)),
    ):
        yield Program(stage, name, function, arguments, batch_size, beside)


def plan(
    stages: Stages,
    clip_seconds: float,
    topology: str,
    slices: int = 1,
    only: str = "",
    search: bool = False,
    json_file: str = "",
) -> None:
    """Compiles every function of the stages that train for TPU slices, and prints what each takes.

    Needs libtpu (the extra `plan`) and no TPU, no data, no checkpoint. A table says of each function
    how much HBM a chip needs, the time of a call at the limits of the matrix units, of the memory and of the network,
    and by the compiler's schedule, and which limit is the highest; then how many clips a second a step of RL makes.
    All of it is the compiler's estimate.

    Args:
      stages: of the run.
      clip_seconds: length of the clips.
      topology: of a slice, such as v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:8x8.
      slices: how many of them.
      only: names of stages, separated by commas; all that train by default.
      search: doubles the batch of each stage as long as it fits, and prints the largest.
      json_file: where all figures go, if anywhere.

    Raises:
      ValueError: where something does not fit, a setting is out of range or the topology is unknown.
    """
    mesh_of, chip = _topology(topology, slices)
    with recorded():
        calls = {name: stage() for group in stages for name, stage in group.items()}
    wanted = [name for name in only.split(",") if name] or list(calls)
    if unknown := sorted(set(wanted) - set(calls)):
        raise ValueError(f"plan.only: {unknown[0]!r} is none of the stages {', '.join(calls)}")
    print(f"{slices} x {topology}, by the TPU compiler's estimate; nothing here was measured", flush=True)
    rows: list[dict[str, Any]] = []
    for name, call in calls.items():
        if name not in wanted or call.verb not in ("train", "train_rl"):
            continue
        found = _stage(calls, name, clip_seconds, mesh_of, chip)
        while search and all(row["fits"] for row in found):
            larger = call._replace(arguments={**call.arguments, "batch_size": 2 * call.arguments["batch_size"]})
            tried = _stage({**calls, name: larger}, name, clip_seconds, mesh_of, chip)
            if not all(row["fits"] for row in tried):
                print(
                    f"{name}: of batches doubled, {call.arguments['batch_size']} is the largest that fits", flush=True
                )
                break
            call, found = larger, tried
        rows += found
    if json_file:
        told = {"topology": topology, "slices": slices, "chip": dataclasses.asdict(chip), "functions": rows}
        write_json(json_file, told)
    if short := [f"{row['stage']}/{row['name']}" for row in rows if not row["fits"]]:
        raise ValueError(
            f"{', '.join(short)} need more than the {chip.memory / GIB:.2f} GiB of a chip: raise fsdp or microbatches, "
            "set remat, lower batch_size, or take more chips"
        )


def _topology(topology: str, slices: int) -> tuple[Callable[[int, int], Mesh], Chip]:
    """(a mesh over its chips for sizes of fsdp and tensor, what a chip can do)."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape) or slices < 1:
        raise ValueError(
            f"plan.topology={topology!r}, plan.slices={slices}: give one such as v5e:4x4 or v5p:4x4x4, of "
            f"{', '.join(CHIPS)}, and 1 slice or more"
        )
    extras.check("plan", "plan", "libtpu")
    chips = math.prod(map(int, shape.split("x")))
    accelerator = {"v5e": f"v5litepod-{chips}", "v4": f"v4-{2 * chips}", "v5p": f"v5p-{2 * chips}"}
    os.environ.update({**WITHOUT_TPU, "TPU_ACCELERATOR_TYPE": accelerator.get(kind, f"{kind}-{chips}"), **os.environ})
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    described = topologies.get_topology_desc(topology, platform="tpu", **options)
    return lambda fsdp, tensor: sharding.make_mesh(fsdp, tensor, described.devices), CHIPS[kind]


def _stage(
    calls: Mapping[str, Call], name: str, clip_seconds: float, mesh_of: Callable[[int, int], Mesh], chip: Chip
) -> list[dict[str, Any]]:
    """The functions of a stage, compiled side by side and printed: figures of each, by name."""
    mesh = mesh_of(calls[name].arguments["fsdp"], calls[name].arguments["tensor"])
    planned = Planned(calls, clip_seconds, mesh)
    described = _supervised if calls[name].verb == "train" else _reinforced
    absent = mock.patch.object(checkpoint, "load_model", planned.load_model)  # models that are not there yet
    with absent, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        programs = list(described(planned, name, mesh))
        traces = [program.function.trace(*program.arguments) for program in programs]
    works = [flops(traced.jaxpr) for traced in traces]

    def compiled(program: Program, traced: Any, work: Flops) -> dict[str, Any]:
        start, beside = time.monotonic(), bytes_a_chip(program.beside)
        try:
            found = estimate(traced.lower().compile(compiler_options=UNPACKED), work, mesh.size, chip, beside)
        except jax.errors.JaxRuntimeError as error:
            found = refused(error, chip, beside)
        about = {"stage": name, "name": program.name, "clips": program.clips}
        return {**about, "compile_seconds": time.monotonic() - start, **found.told()}

    print(HEAD, flush=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        # What computes most takes longest: it starts first, so that little is left to compile alone at the end.
        by_work = sorted(range(len(programs)), key=lambda place: -works[place].matmul)
        futures = {place: pool.submit(compiled, programs[place], traces[place], works[place]) for place in by_work}
        for future in as_completed(futures.values()):  # what does not fit is known in seconds
            print(_line(future.result()), flush=True)
    rows = [futures[place].result() for place in range(len(programs))]
    if all(row["fits"] for row in rows):
        seconds, clips = sum(row["seconds"] for row in rows), programs[0].clips
        print(
            f"{name}: {seconds:.2f} s a step of {clips} clips, {clips / seconds:.2f} clips a second, "
            f"{3600 * clips / seconds / mesh.size:.0f} a chip-hour, where nothing overlaps\n",
            flush=True,
        )
    return rows


HEAD = (
    f"{'':>20} {'GiB a chip':>14} {'TFLOP':>8} {'GB moved':>9} {'MB sent':>9} | {'matrix':>8} {'memory':>8} "
    f"{'network':>8} {'compiler':>8}  seconds, and what limits"
)


def _line(row: dict[str, Any]) -> str:
    """A row of the table."""
    space = f"{row['needed'] / GIB:.2f} of {row['memory'] / GIB:.2f}"
    start = f"{row['stage'] + '/' + row['name']:>20} {space:>14}"
    if not row["fits"]:
        return f"{start} does not fit"
    sent = (sum(row["wire"].values()) + row["between_slices"]) / 1e6
    seconds = " ".join(f"{row[f'{limit}_seconds']:8.3f}" for limit in ("matrix", "memory", "network", "compiler"))
    amounts = f"{row['matmul'] / 1e12:8.2f} {row['moved'] / 1e9:9.1f} {sent:9.1f}"
    unknown = f", but for {len(row['unknown_loops'])} loops of unknown length" if row["unknown_loops"] else ""
    return f"{start} {amounts} | {seconds}  {row['limit']}{unknown}"
