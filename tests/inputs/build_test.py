"""Building through a TFDS builder in a folder."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from musicrl_jax.core import extras
from musicrl_jax.inputs import build, pipelines
from musicrl_jax.inputs.clips import Clips


def test_fields_make_a_config_and_a_finished_set_is_not_built_again(ramp_builder, tmp_path):
    fields = {"name": "mine", "train": 2, "validation": 1, "test": 1, "samples": 50}
    assert build.prepare(ramp_builder, fields, str(tmp_path)) == "ramp/mine"
    folder = tmp_path / "ramp" / "mine" / "1.0.0"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert any(".array_record-" in name for name in times)
    # TFDS's name of an unfinished set.
    killed = folder.with_name("incomplete.ABCDEF_1.0.0")
    killed.mkdir()
    os.utime(killed, (0, 0))
    build.prepare(ramp_builder, fields, str(tmp_path))
    assert not killed.exists()
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
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
    versions = {"1.9.0": "five", "1.10.0": "ten", "1.11.0.incompleteAB": "five"}
    for version, source in versions.items():
        (sets / version).symlink_to(f"{data_dir}/ramp/{source}/1.0.0")
    assert Clips({"ramp/ten": 1.0}, str(tmp_path), 100).count("train") == 10


def test_a_set_without_a_sample_rate_is_refused(data_dir, tmp_path):
    shutil.copytree(f"{data_dir}/ramp/ten", tmp_path / "ramp" / "ten")
    (tmp_path / "ramp" / "ten" / "1.0.0" / "metadata.json").unlink()
    with pytest.raises(ValueError, match="the metadata of 'ramp/ten' lack sample_rate_hz"):
        Clips({"ramp/ten": 1.0}, str(tmp_path), 100).samples()


def test_a_set_without_audio_is_refused(tmp_path):
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
        ("eleven", r"config 'eleven' of .* does not exist: choose one of \['five', 'ten'\]"),
        ({"name": "mine", "train": 1, "trian": 2}, r"config: .*'trian'; the fields of RampConfig"),
        ({"name": "mine"}, "config: missing .*'train'; the fields of RampConfig are"),
        ({"name": "mine", "train": "1"}, "config: train = '1' must be of type int"),
        ({"name": "mine", "train": True}, "config: train = True must be of type int"),
        ({"name": "a/b", "train": 1}, "config: name = 'a/b' must be the name of a folder"),
    ],
)
def test_unknown_configs_and_fields_are_refused(ramp_builder, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        build.prepare(ramp_builder, config, str(tmp_path))


def test_a_missing_builder_is_refused(tmp_path):
    message = r"builder: '.*/tunes' is no TFDS builder: .*tunes_dataset_builder.py"
    with pytest.raises(FileNotFoundError, match=message):
        build.prepare(str(tmp_path / "tunes"), "ten", str(tmp_path))


def test_a_full_disk_is_named_and_leaves_no_set(ramp_builder, tmp_path):
    with pytest.raises(OSError, match=r"data_dir: no space left for .*free some"):
        build.prepare(ramp_builder, {"name": "big", "train": 1, "full": True}, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no prepared data set 'ramp/big'"):
        Clips({"ramp/big": 1.0}, str(tmp_path), 100).count("train")


def test_a_folder_of_recordings_can_be_built_and_read(tmp_path):
    """The builder in data/audio_folder writes clip sets that Clips reads."""
    (tmp_path / "music").mkdir()
    tones = [0.1 * np.sin(np.arange(8000) * (0.1 + 0.01 * i)) for i in range(6)]
    for i, tone in enumerate(tones):
        soundfile.write(tmp_path / "music" / f"{i}.wav", tone, 8000, subtype="PCM_16")
    rows = "".join(f"{i}.wav,tone {i}\n" for i in range(6))
    (tmp_path / "captions.csv").write_text("file,caption\n" + rows)
    config = {
        "name": "mine",
        "folder": str(tmp_path / "music"),
        "captions": str(tmp_path / "captions.csv"),
        "clip_seconds": 0.5,
        "sample_rate_hz": 8000,
    }
    builder = str(Path(__file__).parents[2] / "data/audio_folder")
    name = build.prepare(builder, config, str(tmp_path / "data"))
    clips = Clips({name: 1.0}, str(tmp_path / "data"), 8000, with_captions=True)
    assert sum(clips.count(split) for split in clips.splits()) == 12
    for batch in clips.batches("train", 1, seed=0, epochs=1):
        tone = tones[int(batch["caption"][0].removeprefix("tone "))]
        start = 4000 * int(np.abs(batch["audio"][0] - tone[:4000]).max() > 1e-3)
        np.testing.assert_allclose(batch["audio"][0], tone[start : start + 4000], atol=1e-4)


def test_a_shipped_builder_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = "data.score_clips.score_clips_dataset_builder"
    assert build._module("data/score_clips").__name__ == name


def test_a_missing_package_of_a_builder_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine" / "lacking"
    folder.mkdir(parents=True)
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    lacking = "building data needs music21: pip install"
    for missing, message in (("music21", lacking), ("mine_too", "mine_too")):
        (folder / "lacking_dataset_builder.py").write_text(f"import {missing}\n")
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ModuleNotFoundError, match=message):
            build._module("mine/lacking")


@pytest.mark.skipif(pipelines.is_installed(), reason="Beam is installed")
def test_options_of_beam_need_its_extra(ramp_builder, tmp_path):
    message = r"beam_pipeline_options needs apache_beam: pip install --editable '.\[beam\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        build.prepare(ramp_builder, "ten", str(tmp_path), "direct_num_workers=4")
    assert not any(tmp_path.iterdir())
