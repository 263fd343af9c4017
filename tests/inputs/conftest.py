"""Two small clip sets, built once by a TFDS builder that is written here."""

import pytest

from musicrl_jax.inputs import build, vocabulary
from musicrl_jax.inputs.clips import Clips

BUILDER = """
import dataclasses
import json

import numpy as np
import tensorflow_datasets as tfds

SPLITS = "train", "validation", "test"


@dataclasses.dataclass(eq=False, kw_only=True)
class RampConfig(tfds.core.BuilderConfig):
    train: int
    validation: int = 3
    test: int = 6
    sample_rate_hz: int = 100
    samples: int = 400
    full: bool = False
    lowest: int = -200


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        RampConfig(name="ten", train=10),
        RampConfig(name="five", train=5, validation=0),
    ]

    def _info(self):
        config = self.builder_config
        shape = (config.samples,)
        features = {name: tfds.features.Text() for name in ("caption", "id", "attributes")}
        features["audio"] = tfds.features.Tensor(shape=shape, dtype=np.int16, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(sample_rate_hz=config.sample_rate_hz),
        )

    def _split_generators(self, dl_manager):
        counts = {split: getattr(self.builder_config, split) for split in SPLITS}
        return {split: self._generate_examples(split, n) for split, n in counts.items() if n}

    def _generate_examples(self, split, count):
        config = self.builder_config
        if config.full:
            raise OSError(28, "No space left on device")
        for i in range(count):
            name = f"{config.name}-{split}-{i}"
            # Sample n is n + lowest, so a crop shows where it starts. Three captions repeat.
            kind, whom = ("slow", "fast", "lively")[i % 3], split if i >= 3 else "all"
            yield name, {
                "audio": np.arange(config.samples, dtype=np.int16) + config.lowest,
                "caption": f"A {kind} jig for {whom}, größer",
                "id": name,
                "attributes": json.dumps({"number": i}),
            }
"""


@pytest.fixture(scope="session")
def ramp_builder(tmp_path_factory):
    """Writes a builder of clips [400] at 100 Hz with sample n = n - 200; returns its folder."""
    folder = tmp_path_factory.mktemp("sources") / "music" / "ramp"
    folder.mkdir(parents=True)
    (folder / "ramp_dataset_builder.py").write_text(BUILDER)
    return str(folder)


@pytest.fixture(scope="session")
def data_dir(ramp_builder, tmp_path_factory):
    """Builds 'ramp/ten' (10, 3, 6 clips) and 'ramp/five' (5, 0, 6 clips); returns their folder."""
    folder = str(tmp_path_factory.mktemp("prepared"))
    names = [build.prepare(ramp_builder, name, folder) for name in ("ten", "five")]
    assert names == ["ramp/ten", "ramp/five"]
    return folder


@pytest.fixture(scope="session")
def ten(data_dir):
    """Returns the clips of 'ramp/ten'."""
    return Clips({"ramp/ten": 1.0}, data_dir, 100)


@pytest.fixture(scope="session")
def vocabulary_path(ten, tmp_path_factory):
    """Trains a vocabulary on the captions of 'ramp/ten' and returns its path."""
    path = str(tmp_path_factory.mktemp("vocabulary") / "deep" / "vocabulary.model")
    vocabulary.build(ten, path, size=400)
    return path
