"""audio_folder: five formats read alike, bad files are named and skipped, mistakes in captions are told by line."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from data.audio_folder import recordings
from data.audio_folder.audio_folder_dataset_builder import AudioFolderConfig, Builder

RATE_HZ = 16000
FORMATS = {"wav": {}, "flac": {}, "ogg": {}, "mp3": {}, "opus": {"format": "OGG", "subtype": "OPUS"}}


def _music(seconds: float, rate_hz: int = RATE_HZ) -> np.ndarray:
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    return sum(0.2 * np.sin(2 * np.pi * hertz * time) for hertz in (330, 440, 550)).astype(np.float32)


def _write(path: pathlib.Path, samples: np.ndarray, rate_hz: int = RATE_HZ) -> pathlib.Path:
    soundfile.write(path, samples, rate_hz, **FORMATS.get(path.suffix[1:], {}))
    return path


def _build(folder: pathlib.Path, captions: str = "captions.jsonl", inside: str = "", seconds: float = 1) -> Builder:
    config = AudioFolderConfig(
        name="mine",
        folder=str(folder / inside),
        captions=str(folder / captions),
        clip_seconds=seconds,
        sample_rate_hz=RATE_HZ,
    )
    builder = Builder(config=config, data_dir=folder / "built")
    builder.download_and_prepare(file_format="array_record")
    return builder


def _say(folder: pathlib.Path, *files: str) -> None:
    lines = [json.dumps({"file": file, "caption": f"this is {file}"}) for file in files]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def _examples(builder: Builder) -> list[dict]:
    source = tfds.builder_from_directory(builder.data_dir).as_data_source()
    return sorted((example for split in source for example in source[split]), key=lambda example: example["id"])


def _skipped(builder: Builder) -> dict:
    return json.loads((pathlib.Path(builder.data_dir) / "skipped.json").read_text())


@pytest.mark.parametrize(("ending", "floor_db"), [("wav", 70), ("flac", 70), ("ogg", 20), ("mp3", 20), ("opus", 15)])
def test_every_format_gives_the_samples_that_were_written(tmp_path, ending, floor_db):
    rate_hz = 48000 if ending == "opus" else RATE_HZ
    left = _music(2.0, rate_hz)
    path = _write(tmp_path / f"a.{ending}", np.stack([left, 0.5 * left], axis=1), rate_hz)
    first, second = recordings.read_clips(path, 1.0, RATE_HZ)
    assert first.dtype == second.dtype == np.int16 and len(first) == len(second) == RATE_HZ
    wanted = 0.75 * _music(2.0) * 32767
    for clip, there in ((first, wanted[:RATE_HZ]), (second, wanted[RATE_HZ:])):
        inner = slice(500, -500)  # codecs and resamplers blur a file's ends
        error = np.mean((clip[inner] - there[inner]) ** 2)
        assert 10 * np.log10(np.mean(there[inner] ** 2) / error) > floor_db


def test_clips_do_not_overlap_and_the_tail_is_dropped(tmp_path):
    ramp = np.linspace(0, 0.9, round(2.7 * RATE_HZ))
    clips = recordings.read_clips(_write(tmp_path / "a.wav", ramp), 1.0, RATE_HZ)
    assert len(clips) == 2
    np.testing.assert_allclose(np.concatenate(clips) / 32767, ramp[: 2 * RATE_HZ], atol=1e-4)


def test_a_file_just_short_of_a_clip_is_repeated(tmp_path):
    samples = np.linspace(-0.5, 0.5, round(0.96 * RATE_HZ))
    (clip,) = recordings.read_clips(_write(tmp_path / "a.wav", samples), 1.0, RATE_HZ)
    np.testing.assert_allclose(clip / 32767, np.concatenate([samples, samples[: len(clip) - len(samples)]]), atol=1e-4)


def test_samples_beyond_full_scale_are_turned_down(tmp_path):
    samples = 2.5 * _music(1.0)
    soundfile.write(tmp_path / "a.wav", samples, RATE_HZ, subtype="FLOAT")
    (clip,) = recordings.read_clips(tmp_path / "a.wav", 1.0, RATE_HZ)
    np.testing.assert_allclose(clip / 32767, samples / np.abs(samples).max(), atol=1e-4)


def test_a_folder_is_built_and_read(tmp_path):
    files = [f"{number}.wav" for number in range(6)]
    for number, file in enumerate(files):
        _write(tmp_path / file, (number + 1) / 10 * _music(2.5))
    rows = "".join(f'{file},"caption, with a comma: {file}",song-{file[0]}\n' for file in files)
    (tmp_path / "captions.csv").write_text("file,caption,id\n" + rows)
    builder = _build(tmp_path, "captions.csv")
    examples = _examples(builder)
    assert [example["id"].decode() for example in examples] == [f"song-{n}-{k:04d}" for n in range(6) for k in (0, 1)]
    for number, example in enumerate(examples):
        assert example["caption"].decode() == f"caption, with a comma: {number // 2}.wav"
        loudest = (number // 2 + 1) / 10 * _music(1.0).max() * 32767
        assert np.abs(example["audio"]).max() == pytest.approx(loudest, rel=0.02)
        assert json.loads(example["attributes"]) == {"file": f"{number // 2}.wav", "start_seconds": float(number % 2)}
    assert set(builder.info.splits) == {"train", "validation", "test"}
    assert _skipped(builder) == {}


def test_splits_go_by_file_name_and_are_filled_where_possible():
    files = [f"song {number}.mp3" for number in range(2000)]
    splits = recordings.splits_of(files)
    shares = {split: list(splits.values()).count(split) / 2000 for split in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.9, "validation": 0.05, "test": 0.05}, abs=0.015)
    # other files do not move a file, unless a split would be empty
    assert recordings.splits_of(files[:1000]) == {file: splits[file] for file in files[:1000]}
    for count, wanted in ((1, {"train"}), (2, {"train", "validation"}), (3, {"train", "validation", "test"})):
        for start in range(0, 60, 3):
            assert len(set(recordings.splits_of(files[start : start + count]).values())) == len(wanted)


def _damage(path: pathlib.Path, fault: str) -> None:
    whole = _write(path, _music(3.0)).read_bytes()
    faults = {"missing": None, "truncated": whole[: len(whole) * 6 // 10], "empty": b"", "text": b"not a sound " * 500}
    if fault == "missing":
        path.unlink()
    elif fault == "no samples":
        _write(path, np.zeros(0, np.float32))
    elif fault in ("nan", "infinite"):
        samples = _music(3.0)
        samples[20000] = np.nan if fault == "nan" else -np.inf
        soundfile.write(path, samples, RATE_HZ, subtype="FLOAT")
    elif fault == "short":
        _write(path, _music(0.5))
    elif fault == "one sample":
        _write(path, np.ones(1, np.float32), 96000)
    else:
        path.write_bytes(faults[fault])


@pytest.mark.parametrize(
    ("fault", "file", "reason"),
    [
        ("missing", "bad.wav", "missing"),
        ("empty", "bad.wav", "zero-length file"),
        ("no samples", "bad.wav", "no samples"),
        ("truncated", "bad.wav", "truncated"),
        ("truncated", "bad.mp3", "truncated"),
        ("truncated", "bad.opus", "truncated"),
        ("truncated", "bad.ogg", "truncated"),
        ("truncated", "bad.flac", "not readable as audio, or damaged"),
        ("nan", "bad.wav", "NaN or infinite samples"),
        ("infinite", "bad.wav", "NaN or infinite samples"),
        ("text", "bad.wav", "not readable as audio, or damaged"),
        ("text", "bad.mp3", "not readable as audio, or damaged"),
        ("short", "bad.wav", "shorter than a clip"),
        ("one sample", "bad.wav", "shorter than a clip"),
    ],
)
def test_a_bad_file_is_named_counted_and_skipped(tmp_path, capsys, fault, file, reason):
    for good in ("a.wav", "b.wav", "c.wav"):
        _write(tmp_path / good, _music(1.0))
    _damage(tmp_path / file, fault)
    _say(tmp_path, "a.wav", file, "b.wav", "c.wav")
    builder = _build(tmp_path)
    assert _skipped(builder) == {reason: {"count": 1, "files": [file]}}
    assert f"1 files skipped: 1 {reason} ({file})" in capsys.readouterr().err
    assert [example["caption"].decode() for example in _examples(builder)] == [f"this is {x}.wav" for x in "abc"]


def test_no_usable_file_is_an_error_that_counts_reasons(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    _write(tmp_path / "b.wav", _music(0.1))
    _say(tmp_path, "a.wav", "b.wav", "c.wav")
    with pytest.raises(ValueError, match=r"no file can be used: .*file \(a.wav\).*clip \(b.wav\).*missing \(c.wav\)"):
        _build(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.csv", "file,text\na.wav,hello\n", r"captions.csv, line 1: column 'caption' is missing"),
        ("captions.csv", "file,caption\na.wav,hello\nb.wav,\n", r"captions.csv, line 3, column 'caption'"),
        (
            "captions.jsonl",
            '{"file": "a.wav", "caption": "x"}\n{"caption": "y"}\n',
            r"line 2: column 'file' is missing",
        ),
        ("captions.jsonl", '{"file": "a.wav", "caption": "x"}\n\n{"file": oops}\n', r"line 3, column 10: not JSON"),
        ("captions.jsonl", '["a.wav", "x"]\n', r"line 1, column 1: .* is not an object"),
        ("captions.jsonl", '{"file": "a.wav", "caption": 7}\n', r"line 1, column 'caption': 7 where text should be"),
        (
            "captions.jsonl",
            '{"file": "a.wav", "caption": "x"}\n' * 2,
            r"line 2, column 'id': 'a.wav' is also on line 1",
        ),
        ("captions.jsonl", "\n", "no rows"),
        ("captions.txt", "a.wav x\n", "'.txt'"),
    ],
)
def test_a_mistake_in_the_captions_is_told_by_line_and_column(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        _build(tmp_path, name)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_captions_that_are_not_utf8_are_told_by_file_and_line(tmp_path, ending):
    path = tmp_path / f"captions.{ending}"
    path.write_bytes("file,caption\na.wav,größer\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"captions.{ending}, line 2: byte 0xf6 is not UTF-8: save it as UTF-8"):
        recordings.read_captions(path)


def test_a_caption_may_hold_any_line_separator_that_json_allows(tmp_path):
    captions = [f"a reel{mark}for two" for mark in "\u2028\u2029\x85"]
    rows = [json.dumps({"file": f"{i}.wav", "caption": text}, ensure_ascii=False) for i, text in enumerate(captions)]
    (tmp_path / "captions.jsonl").write_bytes("\r\n".join(rows).encode())
    assert [row["caption"] for row in recordings.read_captions(tmp_path / "captions.jsonl")] == captions


def test_a_missing_captions_file_or_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"captions: .*captions.jsonl does not exist"):
        _build(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        _build(tmp_path, inside="nowhere")


def test_bad_configs_name_the_field(tmp_path):
    with pytest.raises(ValueError, match="clip_seconds is 0"):
        _build(tmp_path, seconds=0)


@pytest.fixture
def three(tmp_path) -> pathlib.Path:
    """A folder with three recordings and captions, built."""
    (tmp_path / "music").mkdir()
    for file in "abc":
        _write(tmp_path / f"music/{file}.wav", _music(1.0))
    _say(tmp_path, "a.wav", "b.wav", "c.wav")
    _build(tmp_path, inside="music")
    return tmp_path


def _recaption(folder):
    _say(folder, "c.wav", "b.wav", "a.wav")


def _add(folder):
    _write(folder / "music/d.wav", _music(1.0))
    _say(folder, "a.wav", "b.wav", "c.wav", "d.wav")


def _lengthen(folder):
    _write(folder / "music/b.wav", _music(2.0))


def _remove(folder):
    (folder / "music/c.wav").unlink()


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (_recaption, {}, "another captions file: give"),
        (_add, {}, r"another captions file; another set of recordings \(d.wav\): give"),
        (_lengthen, {}, r"another set of recordings \(b.wav\): give"),
        (_remove, {}, r"another set of recordings \(c.wav\): give"),
        (None, {"seconds": 0.5}, r"another clip_seconds \(1, now 0.5\): give"),
        (
            lambda folder: shutil.copytree(folder / "music", folder / "more"),
            {"inside": "more"},
            r"another folder \(music",
        ),
    ],
)
def test_what_a_name_was_built_from_may_not_change(three, change, config, message):
    _build(three, inside="music")  # nothing changed
    if change:
        change(three)
    with pytest.raises(ValueError, match=rf"1.0.0 was built from {message}") as refusal:
        _build(three, **{"inside": "music"} | config)
    if not config:
        assert str(refusal.value).endswith("another name than 'mine', or delete that folder")
        shutil.rmtree(three / "built")
        assert _examples(_build(three, inside="music"))


def test_a_set_outlives_its_recordings(three):
    whole = _examples(_build(three, inside="music"))
    assert len(whole) == 3
    for file in "abc":
        (three / f"music/{file}.wav").unlink()
    assert len(_examples(_build(three, inside="music"))) == 3
    (three / "music").rmdir()
    assert len(_examples(_build(three, inside="music"))) == 3
    (three / "captions.jsonl").unlink()
    assert len(_examples(_build(three, inside="music"))) == 3
    with pytest.raises(ValueError, match="another clip_seconds"):
        _build(three, inside="music", seconds=0.5)
