"""Two small clip sets, built once by a TFDS builder that is written here."""

import pytest

from musicrl_jax.inputs import build, vocabulary
from musicrl_jax.inputs.clips import Clips

BUILDER = """
import dataclasses
import json

import numpy as np
import tensorflow_datasets as tfds


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
    BUILDER_CONFIGS = [RampConfig(name="ten", train=10), RampConfig(name="five", train=5, validation=0)]

    def _info(self):
        config = self.builder_config
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({
                "audio": tfds.features.Tensor(shape=(config.samples,), dtype=np.int16, encoding="bytes"),
                "caption": tfds.features.Text(),
                "id": tfds.features.Text(),
                "attributes": tfds.features.Text(),
            }),
            metadata=tfds.core.MetadataDict(sample_rate_hz=config.sample_rate_hz),
        )

    def _split_generators(self, dl_manager):
        splits = [split for split in ("train", "validation", "test") if getattr(self.builder_config, split)]
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split):
        if self.builder_config.full:
            raise OSError(28, "No space left on device")
        for i in range(getattr(self.builder_config, split)):
            name = f"{self.builder_config.name}-{split}-{i}"
            # Sample n is n + lowest, so that a crop tells where it starts. Captions repeat: three words in turn.
            yield name, {
                "audio": np.arange(self.builder_config.samples, dtype=np.int16) + self.builder_config.lowest,
                "caption": f"A {('slow', 'fast', 'lively')[i % 3]} jig for {split if i >= 3 else 'all'}, größer",
                "id": name,
                "attributes": json.dumps({"number": i}),
            }
"""


@pytest.fixture(scope="session")
def ramp_builder(tmp_path_factory):
    """The folder of a builder of clips [400] at 100 Hz whose sample n is n - 200."""
    folder = tmp_path_factory.mktemp("sources") / "music" / "ramp"
    folder.mkdir(parents=True)
    (folder / "ramp_dataset_builder.py").write_text(BUILDER)
    return str(folder)


@pytest.fixture(scope="session")
def data_dir(ramp_builder, tmp_path_factory):
    """Where 'ramp/ten' (10, 3, 6 clips) and 'ramp/five' (5, 0, 6 clips) are prepared."""
    folder = str(tmp_path_factory.mktemp("prepared"))
    assert [build.prepare(ramp_builder, name, folder) for name in ("ten", "five")] == [
        "ramp/ten",
        "ramp/five",
    ]
    return folder


@pytest.fixture(scope="session")
def vocabulary_path(data_dir, tmp_path_factory):
    """A vocabulary of the captions of 'ramp/ten'."""
    path = str(tmp_path_factory.mktemp("vocabulary") / "deep" / "vocabulary.model")
    vocabulary.build(Clips({"ramp/ten": 1.0}, data_dir, 100), path, size=400)
    return path
