"""Building through a TFDS builder in a folder."""

import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from musicrl_jax.inputs import build
from musicrl_jax.inputs.clips import Clips


def test_fields_make_a_config_and_a_finished_set_is_kept(ramp_builder, tmp_path):
    fields = {"name": "mine", "train": 2, "validation": 1, "test": 1, "samples": 50}
    assert build.prepare(ramp_builder, fields, str(tmp_path)) == "ramp/mine"
    folder = tmp_path / "ramp" / "mine" / "1.0.0"
    times = {p.name: os.stat(p).st_mtime_ns for p in folder.iterdir()}
    assert any(".array_record-" in name for name in times)
    build.prepare(ramp_builder, fields, str(tmp_path))
    assert {p.name: os.stat(p).st_mtime_ns for p in folder.iterdir()} == times
    clips = Clips({"ramp/mine": 1.0}, str(tmp_path), 100)
    assert (clips.count("train"), clips.samples()) == (2, 50)


def test_clips_of_several_lengths_need_a_crop(ramp_builder, data_dir, tmp_path):
    build.prepare(ramp_builder, {"name": "short", "train": 2, "samples": 50}, str(tmp_path))
    (tmp_path / "ramp" / "ten").symlink_to(f"{data_dir}/ramp/ten")
    both = {"ramp/ten": 1.0, "ramp/short": 1.0}
    with pytest.raises(ValueError, match=r"crop_seconds: clips have different lengths"):
        Clips(both, str(tmp_path), 100).samples()
    with pytest.raises(ValueError, match=r"at most 0.5, the length of the clips of 'ramp/short'"):
        Clips(both, str(tmp_path), 100, crop_seconds=0.6).samples()
    batch = next(Clips(both, str(tmp_path), 100, crop_seconds=0.5).batches("train", 4, seed=0))
    assert batch["audio"].shape == (4, 50)


def test_the_newest_version_is_read(data_dir, tmp_path):
    sets = tmp_path / "ramp" / "ten"
    sets.mkdir(parents=True)
    for version, source in {"1.9.0": "five", "1.10.0": "ten", "1.11.0.incompleteAB": "five"}.items():
        (sets / version).symlink_to(f"{data_dir}/ramp/{source}/1.0.0")
    assert Clips({"ramp/ten": 1.0}, str(tmp_path), 100).count("train") == 10


def test_a_set_that_does_not_say_its_rate_is_refused(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/ramp/ten", tmp_path / "ramp" / "ten")
    (tmp_path / "ramp" / "ten" / "1.0.0" / "metadata.json").unlink()
    with pytest.raises(ValueError, match="metadata of 'ramp/ten' do not say its sample_rate_hz"):
        Clips({"ramp/ten": 1.0}, str(tmp_path), 100).samples()


def test_what_is_no_clip_set_is_refused(tmp_path):
    tfds.dataset_builders.store_as_tfds_dataset(
        name="numbers",
        version="1.0.0",
        features=tfds.features.FeaturesDict({"number": tfds.features.Scalar(np.int64)}),
        split_datasets={"train": [(0, {"number": 1})]},
        data_dir=str(tmp_path),
        file_format="array_record",
    )
    with pytest.raises(ValueError, match="'numbers' is no clip set; `audio` must be int16"):
        Clips({"numbers": 1.0}, str(tmp_path), 100).batches("train", 1, seed=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("eleven", r"config 'eleven' of .* does not exist; there are \['five', 'ten'\]"),
        ({"name": "mine", "train": 1, "trian": 2}, "config has no field trian; RampConfig has"),
        ({"name": "mine"}, "config lacks train, which RampConfig needs"),
    ],
)
def test_unknown_configs_and_fields_are_refused(ramp_builder, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        build.prepare(ramp_builder, config, str(tmp_path))


def test_a_missing_builder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"builder: '.*/tunes' is no TFDS builder; .*tunes_dataset_builder.py"):
        build.prepare(str(tmp_path / "tunes"), "ten", str(tmp_path))


def test_a_full_disk_is_named_and_leaves_nothing_prepared(ramp_builder, tmp_path):
    with pytest.raises(OSError, match=r"data_dir: no space left for .*free some"):
        build.prepare(ramp_builder, {"name": "big", "train": 1, "full": True}, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no prepared data set 'ramp/big'"):
        Clips({"ramp/big": 1.0}, str(tmp_path), 100).count("train")
