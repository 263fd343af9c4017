"""Lists the jitted functions of each verb with the shapes that the verb calls them with.

Legend: B clips of a batch over all chips, C channels, N samples.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from musicrl_jax.core import sharding
from musicrl_jax.objectives.step import first_state, training_step
from musicrl_jax.planning.models import PROMPT, PlannedModels
from musicrl_jax.planning.stages import Stage
from musicrl_jax.rl.steps import Run
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import LITTLE_EFFORT, Player
from musicrl_jax.systems.system import Rollout, Tree, Weights


class Program(NamedTuple):
    """A jitted function and the arrays that are in memory when it runs.

    Attributes:
      name: of the function.
      function: jitted.
      arguments: shapes with shardings.
      clips: B.
      beside: shapes with shardings of what is in memory beside the arguments.
      once: whether it runs once, instead of once for every batch.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    clips: int
    beside: Tree = ()
    once: bool = False


Programs = Generator[Program, None, Any]


def programs(models: PlannedModels, stage: Stage, mesh: Mesh) -> list[Program]:
    """Returns the functions of a stage in order; raises ValueError if it cannot run."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return list(VERBS[stage.verb](models, stage.arguments, mesh))


def amount(stage: Stage, rows: int) -> tuple[int, str]:
    """Returns (number of batches of `rows` clips in a stage, a description of all of them).

    The time of listeners and of encoding real clips is not included.
    """
    config = stage.arguments.get("config")
    match stage.verb:
        case "collect":
            batches = sum(-(-2 * pairs // rows) for pairs in config.counts.values())
            return batches, f"{config.pairs} pairs"
        case "evaluate":
            clips = config.count * config.seeds
            best_of = config.best_of if config.best_of > 1 else 0
            plays = len(stage.arguments["systems"]) + best_of
            return plays * -(-clips // rows), f"{plays} x {clips} clips"
        case _:
            return stage.settings["steps"], f"{stage.settings['steps']} steps"


def _train(models: PlannedModels, arguments: Mapping[str, Any], mesh: Mesh) -> Iterator[Program]:
    """Yields the step of `train`."""
    objective, batch_size = arguments["objective"], arguments["batch_size"]
    if not hasattr(objective.data, "shapes"):
        raise ValueError(
            f"plan: {type(objective.data).__name__} does not have the shapes of its batches: give "
            "it a method `shapes`, as inputs.Clips has, or leave the stage out"
        )
    sharding.rows_a_shard(mesh, batch_size)
    batch = objective.data.shapes(batch_size, models.clip_seconds, models.tokens)
    batch = _struct(batch, sharding.batch_sharding(mesh))
    transform = arguments["optimiser"].build(arguments["steps"])
    create = partial(first_state, objective, transform)
    state, shardings = sharding.shapes_and_shardings(mesh, create, jax.random.key(0), batch)
    step = training_step(objective, transform, arguments["seed"], mesh, shardings)
    frozen = _at_rest(mesh, objective.frozen(models.read))
    yield Program("step", step, (_struct(state, shardings), frozen, batch), batch_size)


def _train_rl(models: PlannedModels, arguments: Mapping[str, Any], mesh: Mesh) -> Iterator[Program]:
    """Yields rollout, reward and update of `train_rl`."""
    config = arguments["config"]
    loaded, mixture = models.system(arguments["system"]), arguments["rewards"].load(models.read)
    run = Run(loaded, mixture, config, mesh)
    player, clips = run.player, config.batch_size
    state = _struct(run.shapes, run.shardings)
    anchor, moments = state.policy, (state.policy_opt, state.value_opt)
    frozen, scorers = _at_rest(mesh, loaded.frozen), _at_rest(mesh, mixture.variables)

    # Rollout and reward.
    beside = (anchor, state.value, moments, scorers)
    weights = yield from _compute_copy(player, Weights(state.policy, frozen), beside)
    resting = (state, anchor, frozen, scorers)
    rollout = yield from _rollout(player, weights, resting)
    yield from _reward(player, scorers, rollout, (state, anchor, frozen))

    # Update.
    copy = _struct(jax.eval_shape(run.compute_copy, state, anchor), run.copy_shardings)
    beside = (frozen, scorers, rollout)
    yield Program("learner's compute copy", run.compute_copy, (state, anchor), clips, beside)
    reward = _rows(player, jax.ShapeDtypeStruct((1,), jnp.float32))
    beside = (anchor, frozen, scorers)
    yield Program("update", run.update, (state, copy, rollout, reward), clips, beside)


def _collect(models: PlannedModels, arguments: Mapping[str, Any], mesh: Mesh) -> Iterator[Program]:
    """Yields the functions of `collect` that generate the two clips of each pair."""
    config = arguments["config"]
    loaded = models.system(arguments["system"])
    player = _player(loaded, mesh, 2 * config.batch_size, config)
    weights = yield from _place(player, loaded)
    rollout = yield from _rollout(player, weights, ())
    features = jax.jit(player.system.features, out_shardings=sharding.batch_sharding(mesh))
    yield Program("features", features, (rollout,), player.rows, weights)


def _evaluate(models: PlannedModels, arguments: Mapping[str, Any], mesh: Mesh) -> Iterator[Program]:
    """Yields the functions of `evaluate` for the clips of the base system.

    The other systems are of its kind, and take as long.
    """
    # The system, its rewards and the encoder of features.
    config = arguments["config"]
    loaded = models.system(next(iter(arguments["systems"].values())))
    mixture = arguments["rewards"].load(models.read)
    player = _player(loaded, mesh, config.batch_size, config, mixture)
    scorers = _at_rest(mesh, mixture.variables)
    encoder = arguments["features"].load(models.read)
    variables = _at_rest(mesh, encoder.variables)

    # Rollout, reward, and the distance from the base and from real clips.
    weights = yield from _place(player, loaded)
    base = weights.policy
    rollout = yield from _rollout(player, weights, (base, scorers, variables))
    yield from _reward(player, scorers, rollout, (weights, base, variables))
    beside = (scorers, weights.frozen, variables)
    yield Program("kl", player.kl, (weights.policy, base, rollout), player.rows, beside)
    features = jax.jit(
        partial(arguments["features"].features, encoder.config),
        out_shardings=sharding.batch_sharding(mesh),
        compiler_options=LITTLE_EFFORT.get(_platform(mesh)),
    )
    mono = _rows(player, jax.eval_shape(lambda rollout: rollout.mono, rollout))
    beside = (scorers, weights, base, rollout)
    yield Program("features", features, (variables, mono), player.rows, beside)


VERBS: Mapping[str, Callable[[PlannedModels, Mapping[str, Any], Mesh], Iterator[Program]]] = {
    "train": _train,
    "train_rl": _train_rl,
    "collect": _collect,
    "evaluate": _evaluate,
}


# --- the player's functions ---


def _player(
    loaded: LoadedSystem, mesh: Mesh, rows: int, config: Any, mixture: Any = None
) -> Player:
    """Returns the player of a verb that trains nothing; rows are rounded up to whole shards."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-rows // shards) * shards
    system = loaded.system.tuned(_platform(mesh))
    return Player(system, mesh, rows, config.clip_seconds, config.sampling, mixture=mixture)


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def _place(player: Player, loaded: LoadedSystem) -> Programs:
    """Yields the functions of `Player.place`; returns the weights that generate clips."""
    weights = Weights(loaded.policy, loaded.frozen)
    weights = _struct(weights, sharding.replicated(player.mesh))
    return (yield from _compute_copy(player, weights, (), once=True))


def _compute_copy(player: Player, weights: Weights, beside: Tree, once: bool = False) -> Programs:
    """Yields the compute copy of the weights, and returns it."""
    yield Program("compute copy", player.compute_copy, (weights,), player.rows, beside, once)
    copy = jax.eval_shape(player.compute_copy, weights)
    frozen = _struct(copy.frozen, sharding.replicated(player.mesh))
    return Weights(_struct(copy.policy, player.policy_sharding), frozen)


def _rollout(player: Player, weights: Weights, resting: Tree) -> Programs:
    """Yields the four functions of a rollout, and returns it; `resting` stays in memory."""
    policy, frozen = weights
    text = _rows(player, player.system.read([PROMPT]))
    keys = _rows(player, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)))

    def program(name: str, *arguments: Any, beside: Tree) -> Programs:
        """Yields a function that takes frozen parts, and returns its result."""
        arguments = (player.used(frozen, name), *arguments)
        idle = {part: tree for part, tree in frozen.items() if part not in arguments[0]}
        beside = (resting, policy, idle, beside)
        yield Program(name, player.jitted[name], arguments, player.rows, beside)
        return _rows(player, jax.eval_shape(player.jitted[name], *arguments))

    condition = yield from program("condition", text, beside=())
    arguments = (policy, condition, keys)
    yield Program("sample", player.sample, arguments, player.rows, (resting, frozen))
    sampled = _rows(player, jax.eval_shape(player.sample, *arguments))
    codes = yield from program("codes", sampled.tokens, keys, beside=sampled)
    wav = yield from program("decode", codes, beside=sampled)
    return Rollout(condition, sampled, codes, wav)


def _reward(player: Player, scorers: Tree, rollout: Rollout, resting: Tree) -> Iterator[Program]:
    """Yields the functions of `Player.score`."""
    beside = (resting, rollout)
    yield Program("gather scorers", player.gather_scorers, (scorers,), player.rows, beside)
    whole = _struct(scorers, sharding.replicated(player.mesh))
    texts = _rows(player, player.mixture.read([PROMPT]))
    units = dict.fromkeys(player.mixture.names, (0.0, 1.0))
    arguments = (whole, rollout, texts, units)
    yield Program("reward", player.reward, arguments, player.rows, (resting, scorers))


# --- shapes with shardings ---


def _struct(shapes: Tree, shardings: Any) -> Tree:
    """Returns shapes with their shardings; a single sharding is that of all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings
    )


def _at_rest(mesh: Mesh, weights: Tree) -> Tree:
    """Returns the shapes of frozen weights, sharded as a run holds them between uses."""
    return _struct(weights, sharding.spread(mesh, weights))


def _rows(player: Player, arrays: Tree) -> Tree:
    """Returns the shapes with the first axis, 1 or B, set to B and sharded by row."""
    by_row = sharding.batch_sharding(player.mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((player.rows, *x.shape[1:]), x.dtype, sharding=by_row),
        arrays,
    )
