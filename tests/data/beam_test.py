"""Tests of the builders as pipelines of Apache Beam. Skipped where the extra `beam` is missing.

`launch/test.sh beam` runs them in their own environment.
"""

import json

import numpy as np
import pytest
import soundfile

pytest.importorskip("apache_beam")

from musicrl_jax.inputs import build, content

RATE_HZ = 16000


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """Returns the fields of a config for a folder of 12 recordings, two of them broken."""
    folder = tmp_path_factory.mktemp("music")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        # Lengths of one to three clips.
        noise = rng.uniform(-0.5, 0.5, RATE_HZ * (2 + number % 5) // 4)
        soundfile.write(folder / f"{number}.wav", noise, RATE_HZ)
        rows.append({"file": f"{number}.wav", "caption": f"noise {number}"})
    (folder / "3.wav").write_bytes(b"RIFF" + bytes(100))
    (folder / "7.wav").unlink()
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = str(folder / "captions.jsonl")
    return {"name": "mine", "folder": str(folder), "captions": table, "clip_seconds": 0.5}


SCORES = {
    "name": "mine",
    "train": 20,
    "validation": 3,
    "test": 3,
    "pieces": 4,
    "clip_seconds": 0.5,
    "collections": ("ryansMammoth",),
}


@pytest.mark.slow
@pytest.mark.parametrize("builder", ["audio_folder", "score_clips"])
def test_examples_and_order_are_equal_for_1_2_and_4_processes_and_without_beam(
    builder, music, tmp_path, monkeypatch
):
    # Beam's processes import the builders wherever the build starts.
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    config, sets = music if builder == "audio_folder" else SCORES, {}
    for way in (1, 2, 4, "cluster", "threads"):
        options = f"direct_num_workers={way}" if isinstance(way, int) else ""
        with monkeypatch.context() as patch:
            if way == "cluster":  # its records pass through the runner
                patch.setattr("musicrl_jax.inputs.pipelines.is_local", lambda config: False)
            if way == "threads":
                patch.setattr("musicrl_jax.inputs.pipelines.is_installed", lambda: False)
            name = build.prepare(f"data/{builder}", config, str(tmp_path / str(way)), options)
        (sets[way],) = (tmp_path / str(way) / name).iterdir()
    hashes = {way: content.read(folder) for way, folder in sets.items()}
    assert set(hashes[1]) == {"train", "validation", "test"}
    assert all(splits == hashes[1] for splits in hashes.values())
    names = {frozenset(path.name for path in folder.iterdir()) for folder in sets.values()}
    assert len(names) == 1
    if builder == "audio_folder":
        skipped = [json.loads((folder / "skipped.json").read_text()) for folder in sets.values()]
        assert all(report == skipped[0] for report in skipped)
        counts = {next(iter(fault["files"])): fault["count"] for fault in skipped[0].values()}
        assert counts == {"3.wav": 1, "7.wav": 1}


@pytest.mark.parametrize("runner", ["DaskRunner", "dask"])
def test_a_runner_that_fails_in_the_writer_is_refused(runner, music, tmp_path):
    message = rf"beam_pipeline_options: runner={runner} fails inside TFDS's writer: choose Dir"
    with pytest.raises(ValueError, match=message):
        build.prepare("data/audio_folder", music, str(tmp_path), f"runner={runner}")
