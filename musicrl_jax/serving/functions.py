"""Exports the functions of a bundle, which draw and score clips, from a system and its rewards.

Legend: B clips, S tokens of a clip, F frames, K tokens of a frame, L text pieces.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.sharding import Mesh

from musicrl_jax.core import sharding
from musicrl_jax.core.precision import in_dtype
from musicrl_jax.serving.bundle import DRAW, FIRST_CHUNK, NEXT_CHUNK, SCORE
from musicrl_jax.systems.folder import LoadedSystem
from musicrl_jax.systems.player import Scorer, keys_by_seed, roll_out
from musicrl_jax.systems.system import (
    Beginning,
    MusicSystem,
    Rollout,
    SampledTokens,
    Sampling,
    Tree,
    Weights,
)

BACKENDS = {"cuda": "gpu"}  # JAX's name of a platform, if a bundle's folder has another name


class Golden(NamedTuple):
    """Reference clips from the model code, to verify a bundle against."""

    arguments: tuple[Any, ...]  # of the draw function, after the weights
    rollout: Rollout
    outputs: dict[str, jax.Array]  # of the draw function, in order
    arrays: dict[str, np.ndarray]  # what the bundle stores


@dataclasses.dataclass(frozen=True)
class Functions:
    """The functions of a bundle, with their weights.

    Attributes:
      system: draws the clips.
      mixture: scores them, if not None.
      trees: weights of each function, by its name.
      shardings: of these weights: the policy's by its axis names, the others replicated.
      text_name: the system's name for text pieces.
      frames: F.
      top_k: of the policy's sampling.
    """

    system: MusicSystem
    mixture: Scorer | None
    trees: Mapping[str, Tree]
    shardings: Mapping[str, Tree]
    text_name: str
    frames: int
    top_k: int | None

    # --- weights ---

    @classmethod
    def of(
        cls, loaded: LoadedSystem, mixture: Scorer | None, dtype: str, chips: int, *sizes: Any
    ) -> "Functions":
        """Prepares the weights, which are the same for all platforms.

        Args:
          loaded: the system.
          mixture: the rewards, if any.
          dtype: of the token models' large products.
          chips: devices that share the policy. Raises ValueError if they do not divide its axes.
          sizes: `text_name`, `frames` and `top_k`.
        """
        # Any platform computes with the copy for a GPU: layers and their weights are separate.
        plain = loaded.system.tuned("gpu")
        policy = Weights(in_dtype(loaded.policy, dtype), loaded.frozen)
        weights = plain.compute_copy(policy, dtype)

        # `Bundle` makes the same mesh.
        mesh = Mesh(np.array(jax.local_devices()[:chips]), ("tensor",))
        whole = sharding.replicated(mesh)
        split = _policy_sharding(plain, mesh, weights.policy, dtype)
        shardings = {DRAW: Weights(split, jax.tree.map(lambda _: whole, weights.frozen))}
        trees = {DRAW: weights} | ({} if mixture is None else {SCORE: mixture.variables})
        return cls(loaded.system, mixture, trees, {**shardings, SCORE: whole}, *sizes)

    # --- by the model code ---

    def draw(self, platform: str, weights: Weights, *arguments: jax.Array) -> Rollout:
        """Draws clips; the arguments after the weights are those of `Bundle.draw`."""
        text, seeds, candidates, temperatures, tokens, beginning_frames = arguments
        system = self.system.tuned(BACKENDS.get(platform, platform))
        length = self.frames * system.frame_tokens
        beginning = Beginning(tokens.reshape(-1, length), beginning_frames * system.frame_tokens)
        keys = keys_by_seed(seeds, candidates)
        sampling = Sampling(temperatures[:, None], self.top_k)
        return roll_out(system, weights, {self.text_name: text}, keys, length, sampling, beginning)

    def outputs(self, rollout: Rollout, text: jax.Array) -> dict[str, jax.Array]:
        """Returns the outputs of the draw function, by name and in order."""
        tokens, wav = rollout.sampled.tokens, rollout.wav
        return {
            "text": text,
            "tokens": tokens.reshape(-1, self.frames, self.system.frame_tokens),
            "wav": wav[:, 0] if wav.shape[1] == 1 else wav,
            **named({"condition": rollout.condition, "codes": rollout.codes}),
        }

    def score(
        self, like: Rollout, scorers: Mapping[str, Tree], outputs: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Returns each term and 'total', f32 [B].

        Args:
          like: a rollout with the structure of condition and codes.
          scorers: the rewards' weights.
          outputs: of the draw function.
        """
        # Rebuild the rollout from the function's outputs.
        inner = _tree({"condition": like.condition, "codes": like.codes}, outputs)
        tokens = outputs["tokens"].reshape(-1, self.frames * self.system.frame_tokens)
        sampled, wav = SampledTokens(tokens, None, None), outputs["wav"]
        wav = wav[:, None] if wav.ndim == 2 else wav
        rollout = Rollout(inner["condition"], sampled, inner["codes"], wav)

        # Its scores, as they are.
        texts = {term: {self.text_name: outputs["text"]} for term in scorers}
        terms = self.mixture.score(scorers, rollout, texts)
        return {**terms, "total": self.mixture.total(terms, dict.fromkeys(terms, (0.0, 1.0)))}

    def draw_golden(self, text: np.ndarray, temperature: float, folder: str) -> Golden:
        """Draws and scores the golden clips by the model code.

        Args:
          text: int32 [B, L]. The last clip continues half a clip of zeros.
          temperature: of the policy.
          folder: of the system, for ValueError if clips or rewards are not finite.
        """
        # The clips.
        rows, whole = len(text), self.shardings[SCORE]
        seeds = jnp.arange(rows, dtype=jnp.uint32)
        beginning_frames = jnp.zeros(rows, jnp.int32).at[-1].set(self.frames // 2)
        tokens = jnp.zeros((rows, self.frames, self.system.frame_tokens), jnp.int32)
        temperatures = jnp.full(rows, temperature, jnp.float32)
        arguments = text, seeds, jnp.zeros_like(seeds), temperatures, tokens, beginning_frames
        draw = jax.jit(
            partial(self.draw, jax.default_backend()),
            in_shardings=(self.shardings[DRAW], *[whole] * len(arguments)),
            out_shardings=whole,
        )
        rollout = draw(self.trees[DRAW], *arguments)
        outputs = self.outputs(rollout, text)

        # A bundle must draw the same tokens and codes, and nearly the same samples and rewards.
        arrays = {"text": text, "seeds": seeds, "given_frames": beginning_frames}
        for name, array in outputs.items():
            is_code = name.startswith("codes") and array.dtype.kind in "iu"
            if is_code or name in ("tokens", "wav"):
                arrays[name] = array
        if self.mixture is not None:
            arrays |= jax.jit(partial(self.score, rollout))(self.trees[SCORE], outputs)
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError(f"{folder} draws clips or rewards that are not finite: train it again")
        return Golden(arguments, rollout, outputs, arrays)

    # --- exported ---

    def exported(self, platform: str, golden: Golden) -> Iterator[tuple[str, export.Exported]]:
        """Yields the functions for a platform: of weights by name and of any number of rows."""

        def draw(weights: Mapping[str, jax.Array], *arguments: jax.Array) -> tuple[jax.Array, ...]:
            rollout = self.draw(platform, _tree(self.trees[DRAW], weights), *arguments)
            return tuple(self.outputs(rollout, arguments[0]).values())

        def score(weights: Mapping[str, jax.Array], *clips: jax.Array) -> dict[str, jax.Array]:
            outputs = dict(zip(golden.outputs, clips, strict=True))
            return self.score(golden.rollout, _tree(self.trees[SCORE], weights), outputs)

        # Any number of rows b has the shapes of the golden clips.
        calls = {DRAW: (draw, golden.arguments), SCORE: (score, golden.outputs.values())}
        for name in self.trees:
            function, examples = calls[name]
            (rows,) = export.symbolic_shape("b")
            arguments = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in examples]
            yield name, self._export(function, name, arguments, platform)

    def exported_stream(
        self, platform: str, golden: Golden
    ) -> Iterator[tuple[str, export.Exported]]:
        """Yields the functions of a stream for a platform, of one row; none if it cannot stream."""
        # A system need not stream.
        system = self.system.tuned(BACKENDS.get(platform, platform))
        if not system.STREAM_FRAMES:
            return
        chunks, length = system.stream_chunks(self.frames), self.frames * system.frame_tokens

        # Any chunk of one clip.
        def chunk(
            weights: Weights, state: Tree, row: tuple[jax.Array, ...], *position: Any
        ) -> tuple[jax.Array, jax.Array, Tree]:
            seeds, candidates, temperatures = row
            keys = keys_by_seed(seeds, candidates)
            sampling = Sampling(temperatures[:, None], self.top_k)
            tokens, wav, state = system.stream(weights, state, keys, position, length, sampling)
            tokens = tokens.reshape(1, -1, system.frame_tokens)
            return tokens, wav[:, 0] if wav.shape[1] == 1 else wav, state

        def first_chunk(by_name: Mapping[str, jax.Array], text: jax.Array, *row: jax.Array) -> Any:
            weights = _tree(self.trees[DRAW], by_name)
            condition = system.condition(weights.frozen, {self.text_name: text})
            state = system.start_stream(weights.policy, condition, length)
            return chunk(weights, state, row, jnp.int32(0), chunks[0])

        # The first chunk.
        row = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in golden.arguments[:4]]
        exported = self._export(first_chunk, DRAW, row, platform)
        yield FIRST_CHUNK, exported

        # The next one takes the state of the one before.
        def next_chunk(
            by_name: Mapping[str, jax.Array], state: Tree, first: jax.Array, *row: jax.Array
        ) -> Any:
            return chunk(_tree(self.trees[DRAW], by_name), state, row, first, chunks[1])

        if len(chunks) > 1:
            shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in exported.out_avals]
            _, _, state = jax.tree.unflatten(exported.out_tree, shapes)
            first = jax.ShapeDtypeStruct((), jnp.int32)
            yield NEXT_CHUNK, self._export(next_chunk, DRAW, [state, first, *row[1:]], platform)

    def _export(
        self, function: Callable, tree: str, arguments: Sequence[Any], platform: str
    ) -> export.Exported:
        """Exports a function of the weights of a tree, named one by one, and of arguments."""
        # The shape and the sharding of each weight; all else is replicated.
        leaves, whole = named(self.trees[tree]).items(), self.shardings[SCORE]
        weights = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in leaves}
        by_leaf = jax.tree.leaves(jax.tree.broadcast(self.shardings[tree], self.trees[tree]))
        weight_shardings = dict(zip(weights, by_leaf, strict=True))
        jitted = jax.jit(
            function,
            in_shardings=(weight_shardings, *[whole] * len(arguments)),
            out_shardings=whole,
        )
        return export.export(jitted, platforms=[platform])(weights, *arguments)


def _policy_sharding(system: MusicSystem, mesh: Mesh, policy: Tree, dtype: str) -> Tree:
    """Returns the sharding of a policy's weights; ValueError if the chips do not divide an axis."""

    def create(key: jax.Array) -> Tree:
        return system.compute_copy(Weights(system.init(key), {}), dtype).policy

    # The axis names are known only while weights are created, which here is traced and not run.
    key, rules = jax.random.key(0), sharding.SAMPLING_RULES
    split = sharding.shapes_and_shardings(mesh, create, key, rules=rules)[1]
    by_name = named(split)
    for name, array in named(policy).items():
        for size, mesh_axis in zip(array.shape, by_name[name].spec, strict=False):
            if mesh_axis and size % mesh.size:
                raise ValueError(
                    f"export.chips={mesh.size} cannot share the policy's {name} of shape "
                    f"{array.shape}: choose chips that divide {size}"
                )
    return split


def named(tree: Tree) -> dict[str, Any]:
    """Returns the leaves by their path, such as 'policy/trunk/bridge'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _tree(like: Tree, by_name: Mapping[str, Any]) -> Tree:
    """Returns the inverse of `named`."""
    return jax.tree.unflatten(jax.tree.structure(like), [by_name[name] for name in named(like)])
