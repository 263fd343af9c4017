"""Loads models and systems of a run as shapes, from the stages that will make them or from disk.

A reader (`core.checkpoint.Reader`) that returns shapes replaces `load_model`. Systems, rewards and
objectives then load as they do in a run.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.core import meta

from musicrl_jax.core import checkpoint, shipped, tensors
from musicrl_jax.core.files import json_from
from musicrl_jax.inputs.tokens import Shapes, clip_shapes
from musicrl_jax.objectives.mulan import VOCABULARY
from musicrl_jax.planning.stages import Stage
from musicrl_jax.systems import folder
from musicrl_jax.systems.player import roll_out
from musicrl_jax.systems.system import Sampling, Text, Weights

PLANNED = "planned"  # the content hash of every model
PROMPT = "music"  # every prompt
_WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, PROMPT: 4}
# Assets of models that are not trained yet. Shapes do not depend on a tokenizer's words.
STAND_INS = {
    VOCABULARY: json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
            "model": {"type": "WordLevel", "vocab": _WORDS, "unk_token": "[UNK]"},
        }
    ).encode(),
    checkpoint.LINEAGE: json.dumps(dict.fromkeys(("codec", "semantic", "mulan"), PLANNED)).encode(),
}
# Each verb's argument that names the folder it writes.
OUTPUTS = {
    "train": "model_dir",
    "train_rl": "model_dir",
    "assemble": "out",
    "unpack": "out",
    "encode": "tokens_dir",
    "collect": "votes_dir",
}


class PlannedModels:
    """Models in the folders of a run, or of stages that will write these folders."""

    def __init__(self, stages: Mapping[str, Stage], clip_seconds: float):
        """Records which stage writes which folder."""
        self.clip_seconds = clip_seconds
        self._models: dict[tuple[str, type], checkpoint.Model] = {}
        self._makers: dict[str, Stage] = {}
        for stage in stages.values():
            if stage.verb in OUTPUTS:
                self._makers[os.path.abspath(stage.arguments[OUTPUTS[stage.verb]])] = stage

    def read(self, directory: str | Path, config_class: type) -> checkpoint.Model:
        """Returns a model with shapes for weights, as a `checkpoint.Reader` does.

        Raises ValueError if no stage makes it and none is on disk, or if it is of another kind.
        """
        key = os.path.abspath(directory), config_class
        if key not in self._models:  # tracing a model's init takes about a second
            self._models[key] = self._read(directory, config_class)
        return self._models[key]

    def _read(self, directory: str | Path, config_class: type) -> checkpoint.Model:
        """Returns a model with shapes for weights; raises as `read` does."""
        # Its config, from the stage that writes the folder, or from disk.
        stage, assets = self._maker(directory), STAND_INS
        match stage and stage.verb:
            case "train":
                config = stage.arguments["objective"].model
            case "train_rl":
                base = self._describe(stage.arguments["system"])["parts"]["policy"]["folder"]
                config = self.read(base, config_class).config
            case "assemble":  # a policy may be named by its system
                config = self.read(stage.arguments["parts"]["policy"], config_class).config
            case "unpack":
                config = _packed_config(self._pack(stage, directory), config_class)
            case _ if checkpoint.has_model(directory):
                described = checkpoint.load_description(directory, config_class)
                config, assets = described.config, {**described.assets, **STAND_INS}
            case _:
                config = None
        if not isinstance(config, config_class):
            raise ValueError(
                f"plan: no stage of the run makes a {config_class.__name__} in {directory}, and "
                "the folder has none: add the stage that makes it, or repair the folder"
            )

        # Its weights, as shapes.
        variables = meta.unbox(jax.eval_shape(config.init, jax.random.key(0)))
        assets = {**assets, checkpoint.CLIP: json.dumps({"seconds": self.clip_seconds}).encode()}
        return checkpoint.Model(config, variables, PLANNED, assets)

    def system(self, directory: str, encodes: bool = False) -> folder.LoadedSystem:
        """Returns a system with shapes for weights: the parts that generate, or that encode."""
        described = self._describe(directory)
        kind = folder.system_class(described["kind"], directory)
        parts = kind.ENCODING if encodes else None
        return folder.load(directory, parts, self.read, described)

    def tokens(self, directory: str) -> Mapping[str, Sequence[int]]:
        """Returns the shape of each array of a clip in a folder of tokens."""
        stage = self._maker(directory)
        if stage is None:
            return clip_shapes(directory)
        if stage.verb == "encode":
            loaded = self.system(stage.arguments["system"], encodes=True)
            batch = stage.arguments["data"].shapes(1, self.clip_seconds, self.tokens)
            arrays = jax.eval_shape(loaded.system.encode, loaded.frozen, batch["audio"])
        else:
            loaded = self.system(stage.arguments["system"])
            arrays = _clip_features(loaded, stage.settings["clip_seconds"])
        return {name: array.shape[1:] for name, array in arrays.items()}

    def _maker(self, directory: str | Path) -> Stage | None:
        """Returns the stage that writes a folder, or unpacks it from a pack."""
        place = os.path.abspath(directory)
        unpacking = self._makers.get(os.path.dirname(place))
        if place not in self._makers and unpacking and unpacking.verb == "unpack":
            return unpacking if self._pack(unpacking, place).is_file() else None
        return self._makers.get(place)

    def _pack(self, stage: Stage, directory: str | Path) -> Path:
        return shipped.located(stage.arguments["source"]) / f"{Path(directory).name}.safetensors"

    def _describe(self, directory: str) -> dict[str, Any]:
        """Returns the same description of a system as `folder.describe`, but without hashes."""
        stage = self._maker(directory)
        if stage is None:
            try:
                described = folder.describe(directory)
            except FileNotFoundError as error:
                raise ValueError(
                    f"plan: no stage of the run makes {directory}, and {error}"
                ) from error
        elif stage.verb == "assemble":
            parts = {name: {"folder": part} for name, part in stage.arguments["parts"].items()}
            described = {"kind": stage.arguments["kind"], "parts": parts}
        elif stage.verb == "train_rl":
            described = self._describe(stage.arguments["system"])
            described["parts"]["policy"] = {"folder": directory}
        else:
            parent = Path(directory).parent
            described = folder.describe_neighbours(directory, lambda _, name: str(parent / name))
        for part in described["parts"].values():
            part["hash"] = ""
        return described


def _clip_features(loaded: folder.LoadedSystem, clip_seconds: float) -> Shapes:
    """Returns the shapes of the arrays that one generated clip adds to a data set, [1, ...]."""
    system = loaded.system

    def features(weights: Weights, text: Text) -> dict[str, jax.Array]:
        weights = system.compute_copy(weights, "float32")
        keys = jax.random.split(jax.random.key(0), 1)
        length = system.length(clip_seconds)
        return system.features(roll_out(system, weights, text, keys, length, Sampling()))

    return jax.eval_shape(features, Weights(loaded.policy, loaded.frozen), system.read([PROMPT]))


def _packed_config(path: Path, config_class: type) -> Any:
    """Returns the config in the header of a packed model."""
    where = f"the header of {path}"
    text = tensors.read_metadata(path).get(tensors.HEADER, "{}")
    header = json_from(text.encode(), where, {"config": dict}, "restore the pack")
    return checkpoint.config_from_json(config_class, header["config"], str(path))
