"""Trains MuLan's projections on pretrained towers, which stay frozen.

The outputs of frozen towers never change. `TowerOutputs` computes them once for each clip and
stores them, so that an epoch of training takes a second in place of minutes.

Legend: B clips, P clips of a split, V windows of a clip, W and D widths of the audio and the text
tower's outputs, L text pieces.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import checkpoint
from musicrl_jax.core.files import cached_at
from musicrl_jax.core.manifest import read_regular
from musicrl_jax.core.progress import Progress
from musicrl_jax.inputs import order, pieces, pretrained
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.inputs.tokens import ClipShapes, Shapes
from musicrl_jax.losses.contrastive import contrastive, identical_rows
from musicrl_jax.models import bert, musicnn
from musicrl_jax.models.mulan import MuLan, MuLanConfig, Towers
from musicrl_jax.objectives.mulan import VOCABULARY, MuLanObjective
from musicrl_jax.objectives.objective import Batch, Epoch, Loss, Metrics, Variables
from musicrl_jax.systems.system import Tree

TOWER_BATCH = 16  # clips
DROPOUT = 0.3  # of the towers' outputs


# --- the towers ---


@dataclasses.dataclass(frozen=True)
class PretrainedTowers:
    """Pretrained towers: safetensors of musicnn and of a BERT, with BERT's config.json beside."""

    model: MuLanConfig
    audio_weights: str = dataclasses.field(metadata=checkpoint.PATH)
    text_weights: str = dataclasses.field(metadata=checkpoint.PATH)

    def params(self) -> dict[str, Any]:
        """Returns the parameters of `mulan.Towers`; ValueError if a file does not fit the model."""
        if not isinstance(self.model.audio, musicnn.MusicnnConfig):
            raise ValueError(
                "audio_weights are musicnn's: set MuLanConfig.audio to a MusicnnConfig"
            )
        # The text config is read from the weights, to compare it with the model's.
        filters, _ = pretrained.read(self.audio_weights)
        layers, settings = pretrained.read(self.text_weights)
        text_config = bert.sizes(layers, settings, self.text_weights)
        if text_config != self.model.text:
            raise ValueError(
                f"{self.text_weights} holds a {text_config}: set MuLanConfig.text to that"
            )
        return {
            "audio": musicnn.params(self.model.audio, filters, self.audio_weights),
            "text": bert.params(text_config, layers, self.text_weights),
        }


@dataclasses.dataclass(frozen=True)
class FetchedTowers:
    """The parts of a pretrained MuLan that `musicrl fetch` downloads, and that packs leave out.

    Attributes:
      audio_weights: file of the audio tower; '' if it was not fetched, as for the other files.
      text_weights: file of the text tower.
      vocabulary: vocabulary of the text tower.
    """

    audio_weights: str = dataclasses.field(default="", metadata=checkpoint.PATH)
    text_weights: str = dataclasses.field(default="", metadata=checkpoint.PATH)
    vocabulary: str = dataclasses.field(default="", metadata=checkpoint.PATH)

    def __bool__(self) -> bool:
        return bool(self.audio_weights)

    def variables(self, config: Any) -> Tree:
        """Returns the fetched variables of a model; {} if it is no MuLan."""
        if not isinstance(config, MuLanConfig):
            return {}
        towers = PretrainedTowers(config, self.audio_weights, self.text_weights)
        return {"params": {"towers": towers.params()}}

    def assets(self, config: Any) -> dict[str, bytes]:
        """Returns the fetched assets of a model; {} if it is no MuLan."""
        is_mulan = isinstance(config, MuLanConfig) and self.vocabulary
        return {VOCABULARY: read_regular(self.vocabulary)} if is_mulan else {}


def without_towers(config: Any, paths: Iterable[str]) -> bool:
    """Tells whether paths of arrays are those of a MuLan without its towers."""
    has_towers = any(path.startswith("params/towers/") for path in paths)
    return isinstance(config, MuLanConfig) and not has_towers


# --- their outputs ---


@partial(jax.jit, static_argnums=0)
def _apply_towers(
    model: MuLanConfig, variables: Tree, wav: jax.Array, text: jax.Array
) -> dict[str, jax.Array]:
    """Returns the towers' outputs, {'audio': f32 [B, V, W], 'text': f32 [B, D]}."""
    apply = partial(Towers(model).apply, variables)
    return {
        "audio": apply(wav, method=Towers.audio_features),
        "text": apply(text, method=Towers.text_features),
    }


@dataclasses.dataclass(frozen=True)
class TowerOutputs:
    """Outputs of pretrained towers for clips and captions, computed once and stored in files.

    Attributes:
      clips: the data sets; `vocabulary` must be set, so that batches have text.
      towers: the pretrained towers.
      folder: where outputs are stored, one file per set and split. File names change with clips
        and weights.
    """

    clips: Clips
    towers: PretrainedTowers
    folder: str = dataclasses.field(metadata=checkpoint.NO_IDENTITY)

    def batches(
        self,
        split: str,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        epochs: int | None = None,
        rows: np.ndarray | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields {'audio': f32 [B, V, W], 'text': f32 [B, D], 'pieces': i32 [B, L]}.

        As in `Clips.batches`, a batch is a pure function of (seed, step). Raises ValueError if
        `epochs` is None and a batch is larger than the split.
        """
        if epochs is None and batch_size > self.count(split):
            raise ValueError(
                f"batch_size {batch_size} is more than the {self.count(split)} clips of split "
                f"{split!r}: lower it"
            )
        # Sets that have this split, and their sampling rates.
        clips = self.clips
        names = sorted(name for name in clips.datasets if split in clips.records(name))
        sets = [self.read(name, split) for name in names]
        sizes = [len(arrays["text"]) for arrays in sets]
        rates = [clips.datasets[name] for name in names] if epochs is None else sizes
        end = None if epochs is None else epochs * sum(sizes)

        for position in order.positions(batch_size, start_step, end, rows):
            places = list(zip(*order.example_at(seed, position, sizes, rates), strict=True))
            yield {
                field: np.stack([sets[component][field][row] for component, row in places])
                for field in sets[0]
            }

    def count(self, split: str) -> int:
        """Returns the number of clips in a split, over all sets."""
        return self.clips.count(split)

    def splits(self) -> list[str]:
        """Returns the splits that have clips."""
        return self.clips.splits()

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch; see `objective.Data`."""
        clips = self.clips.shapes(batch_size, clip_seconds, tokens)
        module, key = Towers(self.towers.model), jax.random.key(0)

        def outputs(wav: jax.Array, text: jax.Array) -> dict[str, jax.Array]:
            audio, _ = module.init_with_output(key, wav, method=Towers.audio_features)
            return {
                "audio": audio,
                "text": module.init_with_output(key, text, method=Towers.text_features)[0],
            }

        return jax.eval_shape(outputs, clips["audio"], clips["text"]) | {"pieces": clips["text"]}

    def read(self, name: str, split: str) -> dict[str, np.ndarray]:
        """Returns {'audio' [P, V, W], 'text' [P, D], 'pieces' [P, L]} of a split of one set.

        They come from the set's file or, without one, from the towers. The order of the rows is
        that of `Clips.batches` with seed 0.
        """
        # All that the outputs depend on is hashed into the file's name.
        clips, towers = dataclasses.replace(self.clips, datasets={name: 1.0}), self.towers
        settings = (
            clips,
            clips.captions(split),
            towers.model.sample_rate_hz,
            towers.model.window_seconds,
            towers.model.audio,
            towers.model.text,
            [Path(towers.audio_weights), Path(towers.text_weights)],
        )
        identity = json.dumps(checkpoint.describe(settings), sort_keys=True)
        short = hashlib.sha256(identity.encode()).hexdigest()[:12]
        path = Path(self.folder) / f"{name.replace('/', '.')}-{split}-{short}.npz"
        return cached_at(path, lambda: self._compute(clips, split))

    def _compute(self, clips: Clips, split: str) -> dict[str, np.ndarray]:
        """Returns the towers' outputs for all clips of a split, [P, ...] each."""
        variables = jax.device_put({"params": self.towers.params()})
        parts = []
        batches = clips.batches(split, TOWER_BATCH, seed=0, epochs=1)
        for batch in Progress(batches, f"towers on {split}", -(-clips.count(split) // TOWER_BATCH)):
            # The last batch may be smaller: padding keeps one compiled shape.
            count = len(batch["audio"])
            pad = partial(np.pad, pad_width=((0, TOWER_BATCH - count), (0, 0)))
            inputs = pad(batch["audio"]), pad(batch["text"])
            outputs = jax.device_get(_apply_towers(self.towers.model, variables, *inputs))
            outputs = {field: array[:count] for field, array in outputs.items()}
            parts.append(outputs | {"pieces": batch["text"]})
        return {field: np.concatenate([part[field] for part in parts]) for field in parts[0]}


# --- training on the outputs ---


@dataclasses.dataclass(frozen=True)
class MuLanProjectionsObjective(MuLanObjective):
    """Contrastive loss over the whole batch, of the projections alone.

    The finished model is a whole MuLan.
    """

    data: TowerOutputs

    def check(self, batch: Batch) -> None:
        """Raises ValueError if data, vocabulary or towers do not fit the model."""
        if self.data.towers.model != self.model:
            raise ValueError(
                f"PretrainedTowers.model is {self.data.towers.model}, not the trained "
                f"{self.model}: make them equal"
            )
        super().check(batch)
        if (size := pieces.size(self.assets()[VOCABULARY])) != self.model.text.pieces:
            raise ValueError(
                f"{self.vocabulary} has {size} pieces, and the pretrained text tower reads "
                f"{self.model.text.pieces}: give the vocabulary that it was trained with"
            )

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns random variables, without those of the towers."""
        # Batches are outputs of the towers, so no weights of theirs are created.
        outputs = batch["audio"][:1], batch["text"][:1]
        return dict(MuLan(self.model).init(key, *outputs, method=MuLan.project))

    def frozen(self, read: checkpoint.Reader = checkpoint.load_model) -> Any:
        """Returns {}, and prints which weights the towers have."""
        towers = self.data.towers
        print(f"MuLan's towers are {towers.audio_weights} and {towers.text_weights}, frozen")
        return {}

    def loss(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        """Returns the loss of `losses.contrastive`, with dropout on the towers' outputs."""
        # Dropout is all that is random here.
        audio_key, text_key = jax.random.split(key)
        audio, text = _dropout(audio_key, batch["audio"]), _dropout(text_key, batch["text"])
        return self._loss(params, state, batch | {"audio": audio, "text": text})

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """Returns the loss's metrics without dropout."""
        return self._loss(params, state, batch)[1][1]

    def _loss(self, params: Any, state: Any, batch: Batch) -> Loss:
        """Returns the contrastive loss of a batch of tower outputs."""
        outputs = MuLan(self.model).apply(
            {"params": params, **state}, batch["audio"], batch["text"], method=MuLan.project
        )
        loss, metrics = contrastive(*outputs, identical_rows(batch["pieces"]))
        return loss, (state, metrics)

    def finish(self, variables: Variables, frozen: Any, batches: Epoch) -> Variables:
        """Adds the towers' weights, and fills 'rvq' as `MuLanObjective.finish` does."""
        apply = jax.jit(MuLan(self.model).apply, static_argnames="method")
        fitted = self.quantizer(
            apply(variables, batch["audio"], method=MuLan.project_audio) for batch in batches()
        )
        params = {**variables["params"], "towers": self.data.towers.params()}
        return variables | fitted | {"params": params}


def _dropout(key: jax.Array, x: jax.Array) -> jax.Array:
    """Zeroes a share DROPOUT of x, and scales the rest so that the mean stays."""
    keep = jax.random.bernoulli(key, 1 - DROPOUT, x.shape)
    return jnp.where(keep, x / (1 - DROPOUT), 0.0)
