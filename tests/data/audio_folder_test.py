"""audio_folder: what can be read is read alike, bad files are named and skipped, captions are told by line."""

import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import joblib
import numpy as np
import pytest
import soundfile
import soxr
import tensorflow_datasets as tfds

from data.audio_folder import audio_folder_dataset_builder, recordings
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


def _clips(path: pathlib.Path, seconds: float = 1.0) -> list[np.ndarray]:
    peak = recordings.examine(path, seconds, RATE_HZ)
    return list(recordings.read_clips(path, seconds, RATE_HZ, peak))


@pytest.mark.parametrize(("ending", "floor_db"), [("wav", 70), ("flac", 70), ("ogg", 20), ("mp3", 20), ("opus", 15)])
def test_every_format_gives_the_samples_that_were_written(tmp_path, ending, floor_db):
    rate_hz = 48000 if ending == "opus" else RATE_HZ
    left = _music(2.0, rate_hz)
    path = _write(tmp_path / f"a.{ending}", np.stack([left, 0.5 * left], axis=1), rate_hz)
    first, second = _clips(path)
    assert first.dtype == second.dtype == np.int16 and len(first) == len(second) == RATE_HZ
    wanted = 0.75 * _music(2.0) * 32767
    for clip, there in ((first, wanted[:RATE_HZ]), (second, wanted[RATE_HZ:])):
        inner = slice(500, -500)  # codecs and resamplers blur a file's ends
        error = np.mean((clip[inner] - there[inner]) ** 2)
        assert 10 * np.log10(np.mean(there[inner] ** 2) / error) > floor_db


def test_clips_do_not_overlap_and_the_tail_is_dropped(tmp_path):
    ramp = np.linspace(0, 0.9, round(2.7 * RATE_HZ))
    clips = _clips(_write(tmp_path / "a.wav", ramp))
    assert len(clips) == 2
    np.testing.assert_allclose(np.concatenate(clips) / 32767, ramp[: 2 * RATE_HZ], atol=1e-4)


def test_a_file_just_short_of_a_clip_is_repeated(tmp_path):
    samples = np.linspace(-0.5, 0.5, round(0.96 * RATE_HZ))
    (clip,) = _clips(_write(tmp_path / "a.wav", samples))
    np.testing.assert_allclose(clip / 32767, np.concatenate([samples, samples[: len(clip) - len(samples)]]), atol=1e-4)


def test_samples_beyond_full_scale_are_turned_down(tmp_path):
    samples = 2.5 * _music(1.0)
    soundfile.write(tmp_path / "a.wav", samples, RATE_HZ, subtype="FLOAT")
    (clip,) = _clips(tmp_path / "a.wav")
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


def _at_once(path: pathlib.Path, rate_hz: int) -> np.ndarray:
    """What the clips of a file should be, one after the other: the file read, mixed, resampled and scaled whole."""
    samples, file_rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    whole = soxr.resample(samples.mean(axis=1), file_rate_hz, rate_hz)
    return np.round(whole / max(np.float32(1.0), np.abs(whole).max(initial=0.0)) * 32767).astype(np.int16)


@hypothesis.settings(deadline=None, max_examples=60, database=None)
@hypothesis.given(
    rate_hz=st.sampled_from((8000, 11025, 16000, 22050, 44100, 48000, 96000)) | st.integers(1000, 200_000),
    channels=st.integers(1, 8),
    subtype=st.sampled_from(("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")),
    seconds=st.floats(0.0, 1.0),
    gain=st.sampled_from((0.0, 1e-6, 0.5, 1.0, 40.0)),
    block=st.integers(100, 100_000),
    seed=st.integers(0, 9),
)
def test_any_wav_in_blocks_is_what_it_is_at_once(
    tmp_path_factory, rate_hz, channels, subtype, seconds, gain, block, seed
):
    path = tmp_path_factory.mktemp("any") / "a.wav"
    samples = gain * np.random.default_rng(seed).uniform(-1, 1, (round(seconds * rate_hz), channels))
    if subtype == "ULAW":  # has nothing above full scale, and libsndfile reads beyond its table when asked to write it
        samples = samples.clip(-1, 1)
    soundfile.write(path, samples, rate_hz, subtype=subtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recordings, "_BLOCK", block)
        try:
            clips = _clips(path, 0.1)
        except recordings.Unusable as unusable:
            assert unusable.reason.split(":")[0] in ("no samples", "shorter than a clip of 0.1 s")
            assert seconds < 0.1
            return
    wanted = _at_once(path, RATE_HZ)
    if len(wanted) < 1600:
        wanted = np.resize(wanted, 1600)
    assert len(clips) == len(wanted) // 1600 and {len(clip) for clip in clips} == {1600}
    np.testing.assert_array_equal(np.concatenate(clips), wanted[: 1600 * len(clips)])


@pytest.mark.parametrize("ending", list(FORMATS))
def test_every_format_in_blocks_is_what_it_is_at_once(tmp_path, ending, monkeypatch):
    rate_hz = 48000 if ending == "opus" else 44100
    path = _write(tmp_path / f"a.{ending}", np.stack([_music(2.0, rate_hz)] * 2, axis=1), rate_hz)
    monkeypatch.setattr(recordings, "_BLOCK", 5000)
    clips = _clips(path)
    assert len(clips) == 2
    np.testing.assert_array_equal(np.concatenate(clips), _at_once(path, RATE_HZ)[: 2 * RATE_HZ])


def test_a_long_file_is_not_held_in_memory(tmp_path, monkeypatch):
    """Five minutes of stereo are 38 MB as float32; they pass in blocks of 0.3 MB."""
    path = tmp_path / "a.wav"
    with soundfile.SoundFile(path, "w", RATE_HZ, 2) as file:
        for _ in range(60):
            file.write(np.stack([_music(5.0)] * 2, axis=1))
    monkeypatch.setattr(recordings, "_BLOCK", 2**16)
    peak = recordings.examine(path, 1.0, RATE_HZ)
    tracemalloc.start()
    try:
        recordings.examine(path, 1.0, RATE_HZ)
        count = sum(1 for _ in recordings.read_clips(path, 1.0, RATE_HZ, peak))
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()
    assert count == 300


def test_files_are_read_ahead_by_no_more_than_two_a_thread(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    started = []
    results = audio_folder_dataset_builder._in_parallel(lambda n: started.append(n) or -n, range(100))
    assert next(results) == 0
    time.sleep(0.1)
    assert len(started) <= 5
    assert list(results) == [-n for n in range(1, 100)]


def test_of_a_long_file_little_is_read_before_its_turn(tmp_path, monkeypatch):
    """The rest, read in its turn, joins on; where the file is gone by then, the message says which."""
    monkeypatch.setattr(audio_folder_dataset_builder, "_AHEAD", 3 * RATE_HZ)
    monkeypatch.setattr(recordings, "_BLOCK", RATE_HZ)
    path = _write(tmp_path / "a.wav", np.linspace(0, 0.9, 8 * RATE_HZ))
    config = AudioFolderConfig(name="mine", folder="", captions="", clip_seconds=1.0, sample_rate_hz=RATE_HZ)
    builder = Builder(config=config, data_dir=tmp_path / "built")
    clips = builder._clips(path, np.float32(0.9))
    np.testing.assert_array_equal(np.concatenate(list(clips)), np.concatenate(_clips(path)))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.wav changed since it was checked: zero bytes long: .*; build again"):
        builder._clips(path, np.float32(0.9))


def _wav(samples: bytes = bytes(64000), rate_hz: int = RATE_HZ, channels: int = 1, bits: int = 16, **odd: int) -> bytes:
    """A wav file by hand, with a header that may lie."""
    size = odd.get("size", len(samples))
    form = struct.pack("<HHIIHH", odd.get("form", 1), channels, rate_hz, rate_hz * channels * bits // 8, 2, bits)
    header = b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + struct.pack("<I", 16) + form
    return header + b"data" + struct.pack("<I", size) + samples


def _damaged(path: pathlib.Path, fault: str) -> pathlib.Path:
    whole = _write(path, _music(3.0)).read_bytes() if path.suffix != ".raw" else b""
    contents = {
        "zero bytes": b"",
        "four bytes": b"RIFF",
        "cut in its header": _wav()[:30],
        "cut": whole[: len(whole) * 6 // 10],
        "text": b"not a sound " * 500,
        "zeros": bytes(5000),
        "no samples": _wav(b""),
        "0 Hz": _wav(rate_hz=0),
        "1 Hz": _wav(rate_hz=1),
        "2^31 Hz": _wav(rate_hz=2**31 - 1, bits=8),
        "no channels": _wav(channels=0),
        "unknown codec": _wav(form=99),
        "promises 2 GB": _wav(size=2**31),
    }
    samples = _music(3.0)
    if fault == "missing":
        path.unlink()
    elif fault in contents:
        path.write_bytes(contents[fault])
    elif fault in ("NaN", "infinite", "both infinities", "1e38", "3e38", "1e300"):
        samples = np.stack([samples, samples], axis=1).astype(np.float64)
        value = {"NaN": np.nan, "infinite": -np.inf, "both infinities": [np.inf, -np.inf]}.get(fault)
        samples[20000] = float(fault) if value is None else value
        soundfile.write(path, samples, RATE_HZ, subtype="DOUBLE" if fault == "1e300" else "FLOAT")
    else:
        _write(path, {"short": samples[:8000], "one sample": samples[:1]}[fault], 96000 if "one" in fault else RATE_HZ)
    return path


TRUNCATED = "truncated: copy or fetch the file again"
UNREADABLE = "not readable as audio, or damaged: replace it, or convert it to wav or flac"
NOT_FINITE = "NaN or infinite samples: export it again"
SHORT = "shorter than a clip of 1 s: give longer files, or build with shorter clip_seconds"
FAULTS = {
    ("missing", "wav"): ("missing: put the file there, or mend its name in the captions", ""),
    ("zero bytes", "wav"): ("zero bytes long: copy the file again", ""),
    ("no samples", "wav"): ("no samples: export it again", ""),
    ("cut", "wav"): (TRUNCATED, "less than its header says"),
    ("promises 2 GB", "wav"): (TRUNCATED, "less than its header says"),
    ("cut", "mp3"): (TRUNCATED, r"1\.\d+ of 3\.\d+ s"),
    ("cut", "opus"): (TRUNCATED, "less than its header says"),
    ("cut", "ogg"): (TRUNCATED, "less than its header says"),
    ("cut", "flac"): (UNREADABLE, ""),
    ("NaN", "wav"): (NOT_FINITE, r"the first at 1\.250 s"),
    ("infinite", "wav"): (NOT_FINITE, r"the first at 1\.250 s"),
    ("both infinities", "wav"): (NOT_FINITE, r"the first at 1\.250 s"),
    ("3e38", "wav"): (NOT_FINITE, r"the first at 1\.250 s"),  # their mean has no float32
    ("1e300", "wav"): (NOT_FINITE, r"the first at 1\.250 s"),
    ("1e38", "wav"): ("samples far beyond full scale: export it again", r"1e\+38 times"),
    ("text", "wav"): (UNREADABLE, ""),
    ("text", "mp3"): (UNREADABLE, ""),
    ("four bytes", "wav"): (UNREADABLE, ""),
    ("cut in its header", "wav"): (UNREADABLE, ""),
    ("zeros", "flac"): (UNREADABLE, ""),
    ("0 Hz", "wav"): (UNREADABLE, ""),
    ("no channels", "wav"): (UNREADABLE, ""),
    ("unknown codec", "wav"): (UNREADABLE, ""),
    ("1 Hz", "wav"): ("a sample rate that no recording has: mend its header, or export it again", "1 Hz"),
    ("text", "raw"): ("raw samples without a header: convert it to wav or flac", ""),
    ("short", "wav"): (SHORT, r"0\.500 s"),
    ("one sample", "wav"): (SHORT, r"0\.000 s"),
    ("2^31 Hz", "wav"): (SHORT, r"0\.000 s"),
}


@pytest.mark.parametrize(("fault", "ending"), list(FAULTS))
def test_a_bad_file_is_refused_with_reason_mend_and_value(tmp_path, fault, ending):
    path = _damaged(tmp_path / f"bad.{ending}", fault)
    with pytest.raises(recordings.Unusable) as refused:
        _clips(path)
    reason, value = FAULTS[fault, ending]
    assert refused.value.reason == reason
    assert re.fullmatch(value, refused.value.value)


def test_bad_files_are_named_counted_and_skipped(tmp_path, capsys):
    """Every fault in one folder, and three good files between them."""
    bad = {_damaged(tmp_path / f"{fault}.{ending}", fault).name: FAULTS[fault, ending] for fault, ending in FAULTS}
    for good in ("a.wav", "b.wav", "c.wav"):
        _write(tmp_path / good, _music(1.0))
    _say(tmp_path, "a.wav", *list(bad)[:10], "b.wav", *list(bad)[10:], "c.wav")
    builder = _build(tmp_path)
    assert [example["caption"].decode() for example in _examples(builder)] == [f"this is {x}.wav" for x in "abc"]
    skipped = _skipped(builder)
    assert {file for fault in skipped.values() for file in fault["files"]} == set(bad)
    for reason, fault in skipped.items():
        assert fault["count"] == len(fault["files"]) == sum(reason == wanted for wanted, _ in bad.values())
        assert all(re.fullmatch(bad[file][1], value) for file, value in fault["files"].items())
    told = capsys.readouterr().err
    assert f"{len(bad)} files skipped: " in told and f"1 {bad['missing.wav'][0]} (missing.wav)" in told
    assert f"3 {SHORT} (short.wav: 0.500 s, one sample.wav: 0.000 s, 2^31 Hz.wav: 0.000 s)" in told
    assert re.search(r"9 not readable as audio.* \(cut.flac, .*, cut in its header.wav and 4 more, all in skip", told)


@pytest.mark.parametrize(
    ("samples", "subtype"),
    [
        (np.zeros(RATE_HZ), "PCM_16"),  # silence
        (np.full(RATE_HZ, 0.5), "PCM_24"),  # a constant
        (np.sign(_music(1.0)), "FLOAT"),  # clipped all through
        (1e-30 * _music(1.0), "FLOAT"),  # nearly silent
        (32768 * _music(1.0), "FLOAT"),  # 16-bit samples written as floats
    ],
)
def test_extreme_sound_is_kept_as_it_is(tmp_path, samples, subtype):
    soundfile.write(tmp_path / "a.wav", samples, RATE_HZ, subtype=subtype)
    (clip,) = _clips(tmp_path / "a.wav")
    wanted = samples / max(1.0, np.abs(samples).max())
    np.testing.assert_allclose(clip / 32767, wanted, atol=1e-4)


@pytest.mark.slow
def test_three_hours_are_built_in_little_memory(tmp_path):
    """In a process of its own: a build of three hours takes no more memory than one of three minutes, but for TFDS.

    TFDS sorts records by hash, and holds up to 1 GB of them in memory for that: here 345 MB.
    """
    code = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from data.audio_folder.audio_folder_dataset_builder import AudioFolderConfig, Builder
config = AudioFolderConfig(name="mine", folder=sys.argv[2], captions=sys.argv[2] + "/captions.jsonl", clip_seconds=10.0)
Builder(config=config, data_dir=sys.argv[2] + "/built").download_and_prepare(file_format="array_record")
print("MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)
"""
    peaks = {}
    for name, minutes in (("short", 3), ("long", 180)):
        (tmp_path / name).mkdir()
        with soundfile.SoundFile(tmp_path / name / "a.wav", "w", 8000, 2, "PCM_U8") as file:
            for _ in range(minutes):
                file.write(np.stack([_music(60.0, 8000)] * 2, axis=1))
        _say(tmp_path / name, "a.wav")
        root = str(pathlib.Path(__file__).parents[2])
        command = [sys.executable, "-c", code, root, str(tmp_path / name)]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[name] = int(re.search(r"MB (\d+)", told)[1])
    assert peaks["long"] < peaks["short"] + 1.25 * 345 + 100


def test_no_usable_file_is_an_error_that_counts_reasons(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    _write(tmp_path / "b.wav", _music(0.1))
    _say(tmp_path, "a.wav", "b.wav", "c.wav")
    with pytest.raises(ValueError, match=r"no file can be used: .* \(a.wav\); .* \(b.wav: 0.100 s\); .* \(c.wav\)$"):
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


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0: give more"), (np.nan, "nan: give"), (np.inf, "inf: give"), (1e-5, "1e-05, less than a")],
)
def test_bad_configs_name_the_field(tmp_path, seconds, told):
    with pytest.raises(ValueError, match=f"clip_seconds is {told}"):
        _build(tmp_path, seconds=seconds)


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
