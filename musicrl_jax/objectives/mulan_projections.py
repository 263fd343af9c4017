"""Trains a MuLan whose towers are pretrained and stay as they are: only what leads from them to the sphere is learned.

A tower that does not move finds the same in a clip every time, so `Heard` lets each tower look at each clip once, and
training reads what it found. That makes an epoch cost a second where the towers cost minutes.

Legend: B clips, P clips of a split, V windows of a clip, W and D what the audio and the text tower give, L text pieces,
E width of the shared sphere.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import checkpoint
from musicrl_jax.core.files import kept_at
from musicrl_jax.core.manifest import read_regular
from musicrl_jax.core.progress import Progress
from musicrl_jax.inputs import order, pieces, pretrained
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.inputs.tokens import ClipShapes, Shapes
from musicrl_jax.losses import contrastive
from musicrl_jax.models import bert, mulan, musicnn
from musicrl_jax.objectives.mulan import VOCABULARY, MuLanObjective
from musicrl_jax.objectives.objective import Batch, Metrics
from musicrl_jax.systems.system import Tree

HEARD_AT_ONCE = 16  # clips
DROPPED = 0.3  # of what the towers found, in training


@dataclasses.dataclass(frozen=True)
class PretrainedTowers:
    """Pretrained towers: musicnn's and a BERT's safetensors; config.json lies beside the latter."""

    model: mulan.MuLanConfig
    audio_weights: str = dataclasses.field(metadata=checkpoint.PATH)
    text_weights: str = dataclasses.field(metadata=checkpoint.PATH)

    def params(self) -> dict[str, Any]:
        """Parameters of `mulan.Towers`; ValueError where a file does not fit the model's config."""
        if not isinstance(self.model.audio, musicnn.MusicnnConfig):
            raise ValueError(
                "audio_weights are musicnn's: set MuLanConfig.audio to a MusicnnConfig"
            )
        filters, _ = pretrained.read(self.audio_weights)
        layers, settings = pretrained.read(self.text_weights)
        found = bert.sizes(layers, settings, self.text_weights)
        if found != self.model.text:
            raise ValueError(f"{self.text_weights} holds a {found}: set MuLanConfig.text to that")
        return {
            "audio": musicnn.params(self.model.audio, filters, self.audio_weights),
            "text": bert.params(found, layers, self.text_weights),
        }


@dataclasses.dataclass(frozen=True)
class FetchedTowers:
    """What `musicrl fetch` brings of a MuLan with pretrained towers, and packs of it leave out.

    Attributes:
      audio_weights: file of the audio tower, '' if it was not fetched; so are the others.
      text_weights: file of the text tower.
      vocabulary: file that texts are read with.
    """

    audio_weights: str = dataclasses.field(default="", metadata=checkpoint.PATH)
    text_weights: str = dataclasses.field(default="", metadata=checkpoint.PATH)
    vocabulary: str = dataclasses.field(default="", metadata=checkpoint.PATH)

    def __bool__(self) -> bool:
        return bool(self.audio_weights)

    def variables(self, config: Any) -> Tree:
        """Returns the fetched variables of a model; {} of one that is no MuLan."""
        if not isinstance(config, mulan.MuLanConfig):
            return {}
        towers = PretrainedTowers(config, self.audio_weights, self.text_weights)
        return {"params": {"towers": towers.params()}}

    def assets(self, config: Any) -> dict[str, bytes]:
        """Returns the fetched assets of a model; {} of one that is no MuLan."""
        is_mulan = isinstance(config, mulan.MuLanConfig) and self.vocabulary
        return {VOCABULARY: read_regular(self.vocabulary)} if is_mulan else {}


def without_towers(config: Any, paths: Iterable[str]) -> bool:
    """Tells whether arrays, by their paths, are those of a MuLan whose towers were left out."""
    has_towers = any(path.startswith("params/towers/") for path in paths)
    return isinstance(config, mulan.MuLanConfig) and not has_towers


@dataclasses.dataclass(frozen=True)
class Heard:
    """Clips and captions as pretrained towers hear and read them, each once; kept in files.

    Attributes:
        clips: whole clips with a vocabulary.
        towers: what hears and reads.
        folder: where what was found is kept, a file for each split of each set; other clips or weights make others.
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
        """{'audio': f32 [B, V, W], 'text': f32 [B, D], 'pieces': i32 [B, L]}, in a fixed order.

        As with `Clips.batches`, a batch is a pure function of (seed, step). ValueError where `epochs` is None and a
        batch is larger than the split.
        """
        if epochs is None and batch_size > self.count(split):
            raise ValueError(
                f"batch_size {batch_size} is more than the {self.count(split)} clips of split {split!r}: lower it"
            )
        rates = {
            name: rate
            for name, rate in self.clips.datasets.items()
            if split in self.clips.records(name)
        }
        sets = [self.found(name, split) for name in sorted(rates)]
        sizes = [len(found["text"]) for found in sets]
        turns = [rates[name] for name in sorted(rates)] if epochs is None else sizes
        end = None if epochs is None else epochs * sum(sizes)
        for position in order.positions(batch_size, start_step, end, rows):
            places = zip(*order.example_at(seed, position, sizes, turns), strict=True)
            found = [
                {field: values[row] for field, values in sets[component].items()}
                for component, row in places
            ]
            yield {field: np.stack([each[field] for each in found]) for field in found[0]}

    def count(self, split: str) -> int:
        """The number of clips in a split, over all sets."""
        return self.clips.count(split)

    def splits(self) -> list[str]:
        """The splits that have clips."""
        return self.clips.splits()

    def shapes(self, batch_size: int, clip_seconds: float, tokens: ClipShapes) -> Shapes:
        """Returns the shapes of a batch; see `objective.Data`."""
        clips = self.clips.shapes(batch_size, clip_seconds, tokens)
        key, towers = jax.random.key(0), mulan.Towers(self.towers.model)

        def look(wav: jax.Array, text: jax.Array) -> dict[str, jax.Array]:
            heard, _ = towers.init_with_output(key, wav, method=mulan.Towers.audio_features)
            read, _ = towers.init_with_output(key, text, method=mulan.Towers.text_features)
            return {"audio": heard, "text": read}

        return jax.eval_shape(look, clips["audio"], clips["text"]) | {"pieces": clips["text"]}

    def found(self, name: str, split: str) -> dict[str, np.ndarray]:
        """{'audio' [P, V, W], 'text' [P, D], 'pieces' [P, L]} of one set's split, from its file or from the towers.

        Rows stand as `Clips.batches` gives them with seed 0.
        """
        clips = dataclasses.replace(self.clips, datasets={name: 1.0})
        model, towers = self.towers.model, self.towers
        settings = (
            clips,
            clips.captions(split),
            model.sample_rate_hz,
            model.window_seconds,
            model.audio,
            model.text,
            [Path(towers.audio_weights), Path(towers.text_weights)],
        )
        identity = json.dumps(checkpoint.describe(settings), sort_keys=True)
        short = hashlib.sha256(identity.encode()).hexdigest()[:12]
        path = Path(self.folder) / f"{name.replace('/', '.')}-{split}-{short}.npz"
        return kept_at(path, lambda: self._hear(clips, split))

    def _hear(self, clips: Clips, split: str) -> dict[str, np.ndarray]:
        variables = jax.device_put({"params": self.towers.params()})
        parts = []
        batches = clips.batches(split, HEARD_AT_ONCE, seed=0, epochs=1)
        for batch in Progress(batches, f"hear {split}", -(-clips.count(split) // HEARD_AT_ONCE)):
            count = len(batch["audio"])
            wav, text = (
                np.pad(batch[name], ((0, HEARD_AT_ONCE - count), (0, 0)))
                for name in ("audio", "text")
            )
            found = jax.device_get(_look(self.towers.model, variables, wav, text))
            parts.append(
                {name: value[:count] for name, value in found.items()} | {"pieces": batch["text"]}
            )
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@functools.partial(jax.jit, static_argnums=0)
def _look(
    model: mulan.MuLanConfig, variables: Any, wav: jax.Array, text: jax.Array
) -> dict[str, jax.Array]:
    """What the towers find, {'audio' [B, V, W], 'text' [B, D]}."""
    towers = mulan.Towers(model)
    heard = towers.apply(variables, wav, method=mulan.Towers.audio_features)
    return {
        "audio": heard,
        "text": towers.apply(variables, text, method=mulan.Towers.text_features),
    }


@dataclasses.dataclass(frozen=True)
class MuLanProjectionsObjective(MuLanObjective):
    """Contrastive loss over the whole batch, of the projections alone; the finished model is a whole MuLan."""

    data: Heard

    def check(self, batch: Batch) -> None:
        """Raises ValueError as `MuLanObjective.check` does, or if the towers are not the model's."""
        if self.data.towers.model != self.model:
            raise ValueError(
                f"PretrainedTowers.model is {self.data.towers.model}, not the trained {self.model}: make them equal"
            )
        super().check(batch)
        if (size := pieces.size(self.assets()[VOCABULARY])) != self.model.text.pieces:
            raise ValueError(
                f"{self.vocabulary} has {size} pieces, and the pretrained text tower reads {self.model.text.pieces}: "
                "give the vocabulary that it was trained with"
            )

    def init(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """Draws the variables without the towers' weights."""
        return dict(
            mulan.MuLan(self.model).init(
                key, batch["audio"][:1], batch["text"][:1], method=mulan.MuLan.project
            )
        )

    def frozen(self, read: checkpoint.Reader = checkpoint.load_model) -> Any:
        """Returns nothing that the loss needs; says which weights the towers have."""
        print(
            f"MuLan's towers are {self.data.towers.audio_weights} and {self.data.towers.text_weights}, frozen"
        )
        return {}

    def loss(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """See `losses.contrastive`; three tenths of what the towers found are dropped at random."""
        audio_key, text_key = jax.random.split(key)
        audio, text = _dropped(audio_key, batch["audio"]), _dropped(text_key, batch["text"])
        return self._loss(params, state, batch | {"audio": audio, "text": text})

    def evaluate(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> Metrics:
        """Metrics of the loss with nothing dropped."""
        return self._loss(params, state, batch)[1][1]

    def _loss(self, params: Any, state: Any, batch: Batch) -> tuple[jax.Array, tuple[Any, Metrics]]:
        placed = mulan.MuLan(self.model).apply(
            {"params": params, **state}, batch["audio"], batch["text"], method=mulan.MuLan.project
        )
        loss, metrics = contrastive.contrastive(
            *placed, contrastive.identical_rows(batch["pieces"])
        )
        return loss, (state, metrics)

    def finish(
        self,
        variables: dict[str, Any],
        frozen: Any,
        batches: Callable[[], Iterator[dict[str, np.ndarray]]],
    ) -> dict[str, Any]:
        """The towers' weights joined to the parameters, and 'rvq' as in `MuLanObjective.finish`."""
        module = mulan.MuLan(self.model)
        place = jax.jit(
            lambda variables, audio: module.apply(
                variables, audio, method=mulan.MuLan.project_audio
            )
        )
        fitted = self.quantizer(place(variables, batch["audio"]) for batch in batches())
        return (
            variables
            | fitted
            | {"params": {**variables["params"], "towers": self.data.towers.params()}}
        )


def _dropped(key: jax.Array, x: jax.Array) -> jax.Array:
    """X with DROPPED of its entries 0, scaled so that the mean stays."""
    kept = jax.random.bernoulli(key, 1 - DROPPED, x.shape)
    return jnp.where(kept, x / (1 - DROPPED), 0.0)
