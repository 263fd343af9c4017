"""Tests of audio_folder: decoding, unusable files, captions, splits and rebuilt data sets."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import struct
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

from data.audio_folder import audio_folder_dataset_builder, captions, recordings, streams
from data.audio_folder.audio_folder_dataset_builder import AudioFolderConfig, Builder

RATE_HZ = 16000
DATA_FILES = pathlib.Path(__file__).parents[1] / "data_files"
FORMATS = {
    "wav": {},
    "flac": {},
    "ogg": {},
    "mp3": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
}


# --- helpers ---


def _music(seconds: float, rate_hz: int = RATE_HZ) -> np.ndarray:
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    chord = sum(0.2 * np.sin(2 * np.pi * hertz * time) for hertz in (330, 440, 550))
    return chord.astype(np.float32)


def _write(path: pathlib.Path, samples: np.ndarray, rate_hz: int = RATE_HZ) -> pathlib.Path:
    soundfile.write(path, samples, rate_hz, **FORMATS.get(path.suffix[1:], {}))
    return path


def _build(
    folder: pathlib.Path, table: str = "captions.jsonl", inside: str = "", **settings
) -> Builder:
    """Builds clips of 1 s, if no setting differs, from folder/inside and folder/table."""
    settings = {"name": "mine", "clip_seconds": 1, "sample_rate_hz": RATE_HZ} | settings
    config = AudioFolderConfig(
        folder=str(folder / inside), captions=str(folder / table), **settings
    )
    builder = Builder(config=config, data_dir=folder / "built")
    builder.download_and_prepare(file_format="array_record")
    return builder


def _write_captions(folder: pathlib.Path, *files: str) -> None:
    lines = [json.dumps({"file": file, "caption": f"this is {file}"}) for file in files]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def _examples(builder: Builder) -> list[dict]:
    source = tfds.builder_from_directory(builder.data_dir).as_data_source()
    examples = [example for split in source for example in source[split]]
    return sorted(examples, key=lambda example: example["id"])


def _skipped(builder: Builder) -> dict:
    return json.loads((pathlib.Path(builder.data_dir) / "skipped.json").read_text())


def _clips(path: pathlib.Path, seconds: float = 1.0) -> list[np.ndarray]:
    peak = recordings.examine(path, seconds, RATE_HZ).peak
    return list(recordings.read_clips(path, seconds, RATE_HZ, peak))


def _samples(path: pathlib.Path) -> np.ndarray:
    return np.concatenate(list(recordings._blocks(path, RATE_HZ)))


def _seconds(path: pathlib.Path) -> float:
    recordings.examine(path, 0.1, RATE_HZ)
    return len(_samples(path)) / RATE_HZ


# --- decoding ---


@pytest.mark.parametrize(
    ("ending", "floor_db"), [("wav", 70), ("flac", 70), ("ogg", 20), ("mp3", 20), ("opus", 15)]
)
def test_every_format_gives_the_samples_that_were_written(tmp_path, ending, floor_db):
    rate_hz = 48000 if ending == "opus" else RATE_HZ
    channel = _music(2.0, rate_hz)
    path = _write(tmp_path / f"a.{ending}", np.stack([channel, 0.5 * channel], axis=1), rate_hz)
    first, second = _clips(path)
    assert first.dtype == second.dtype == np.int16 and len(first) == len(second) == RATE_HZ
    expected = 0.75 * _music(2.0) * 32767
    for clip, there in ((first, expected[:RATE_HZ]), (second, expected[RATE_HZ:])):
        # Codecs and resamplers blur a file's ends.
        inner = slice(500, -500)
        error = np.mean((clip[inner] - there[inner]) ** 2)
        assert 10 * np.log10(np.mean(there[inner] ** 2) / error) > floor_db


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("vbr_piped.mp3", 8.034),
        ("cbr_piped.mp3", 8.034),
        ("info_counts_itself.mp3", 8.0),
        ("piped.flac", 3.0),
    ],
)
def test_a_file_is_read_to_its_end_where_the_header_estimates_its_length(name, seconds):
    path = DATA_FILES / name
    assert _seconds(path) == pytest.approx(seconds, abs=1e-3)
    assert len(_clips(path)) == int(seconds)


@pytest.mark.parametrize(
    "tail",
    ["ID3v1", "APEv2", "cut APEv2", "APEv2 and ID3v1", "Lyrics3 and ID3v1", "zeros", "text"],
)
@pytest.mark.parametrize(
    "name", ["vbr_piped.mp3", "info_counts_itself.mp3", "flac", "ogg", "opus", "wav"]
)
def test_a_tag_behind_the_audio_changes_no_sample(tmp_path, name, tail):
    path = DATA_FILES / name
    if not path.exists():
        path = _write(tmp_path / f"a.{name}", _music(2.0))
    # The tags. Those of APEv2 contain what looks like frames.
    fields = struct.pack("<8sIII", b"APETAGEX", 2000, 72, 1)
    ape = fields + struct.pack("<IQ", 0xA0000000, 0) + b"\xff\xfb\x90\x40" * 10
    ape += fields + struct.pack("<IQ", 0x80000000, 0)
    id3 = b"TAG" + b"\xff\xfb\x90" * 41 + b"xx"
    assert len(ape) == 104 and len(id3) == 128
    lyrics = b"LYRICSBEGIN" + b"IND0000210" + b"000021LYRICS200"
    tails = {
        "ID3v1": id3,
        "APEv2": ape,
        "cut APEv2": ape[:12],
        "APEv2 and ID3v1": ape + id3,
        "Lyrics3 and ID3v1": lyrics + id3,
    }
    tails |= {"zeros": bytes(4000), "text": b"not a sound " * 333}

    # The file with a tag behind it.
    tagged = tmp_path / f"tagged{path.suffix}"
    tagged.write_bytes(path.read_bytes() + tails[tail])
    np.testing.assert_array_equal(_samples(tagged), _samples(path))


@pytest.mark.parametrize(
    "names",
    [
        *[(ending, ending) for ending in FORMATS],
        ("vbr_piped.mp3", "info_counts_itself.mp3", "cbr_piped.mp3"),
        ("piped.flac", "flac"),
    ],
    ids=" ".join,
)
def test_joined_files_are_read_to_the_end(tmp_path, names):
    parts = []
    for number, name in enumerate(names):
        path = DATA_FILES / name
        if not path.exists():
            path = _write(tmp_path / f"{number}.{name}", (number + 1) / 4 * _music(2.0))
        parts.append(path)
    joined = tmp_path / f"joined{parts[0].suffix}"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    actual, expected = _samples(joined), np.concatenate([_samples(part) for part in parts])
    if names[0] == "vbr_piped.mp3":  # the last one has no Info frame: it continues the second
        assert len(actual) / RATE_HZ == pytest.approx(len(expected) / RATE_HZ, abs=0.1)
    else:
        np.testing.assert_array_equal(actual, expected)


def test_links_of_a_chain_may_differ_in_rate_and_channels(tmp_path):
    soundfile.write(tmp_path / "a.ogg", np.stack([_music(2.0, 8000)] * 2, axis=1), 8000)
    _write(tmp_path / "b.ogg", _music(3.0, 44100), 44100)
    (tmp_path / "c.ogg").write_bytes(
        (tmp_path / "a.ogg").read_bytes() + (tmp_path / "b.ogg").read_bytes()
    )
    assert _seconds(tmp_path / "c.ogg") == pytest.approx(5.0, abs=0.01)


@pytest.mark.parametrize(
    "size",
    [0, 0x7FFFF000, 0x7FFFFFFF, 0x7FFFFFDB, 0x80000000, 0xFFFFFFFF, 0xFFFFFFDB, 64044],
    ids=hex,
)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_of_unknown_length_is_read_to_its_end(tmp_path, size, channels):
    """Sizes are those of sox, arecord, ffmpeg, a dead recorder and a header that counts itself."""
    samples = np.random.default_rng(0).integers(-9999, 9999, 32000, np.int16)
    (tmp_path / "a.wav").write_bytes(_wav(samples.tobytes(), channels=channels, size=size))
    expected = samples.reshape(-1, channels).mean(axis=1) / 32768
    np.testing.assert_allclose(_samples(tmp_path / "a.wav"), expected, atol=1e-6)


def test_a_wav_of_more_than_its_header_can_state_is_read_to_its_end(tmp_path):
    """The file has 4 GiB and a second, but its 32-bit size says a second. It is sparse on disk."""
    path, length = tmp_path / "a.wav", 2**32 + 32000
    with open(path, "wb") as file:
        file.write(_wav(size=32000)[:44])
        file.truncate(44 + length)
        file.seek(44 + length - 2)
        file.write(b"\x00\x40")
    (stream,) = streams.streams(path)
    with streams.StreamFile(path, stream) as raw, soundfile.SoundFile(raw) as sound:
        assert sound.frames == length // 2
        sound.seek(sound.frames - 2)
        assert sound.read().tolist() == [0.0, 0.5]


def test_chunks_behind_the_audio_of_a_wav_are_not_audio(tmp_path):
    chunk = b"LIST" + struct.pack("<I", 5) + b"INFO\x00\x00"
    for size in (0, 64000):
        (tmp_path / "a.wav").write_bytes(_wav(bytes(size)) + chunk)
        if size:
            assert _seconds(tmp_path / "a.wav") == 2.0
        else:
            with pytest.raises(streams.Unusable, match="no samples"):
                _seconds(tmp_path / "a.wav")


def test_the_file_of_a_dead_recorder_is_read_to_its_end(tmp_path):
    """FLAC and MP3 of unknown length end in half a frame, Ogg without its last page."""
    # FLAC.
    whole = (DATA_FILES / "piped.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) * 6 // 10])
    sound, actual = _samples(DATA_FILES / "piped.flac"), _samples(tmp_path / "a.flac")
    assert len(actual) > 0.55 * len(sound)
    np.testing.assert_array_equal(actual, sound[: len(actual)])

    # MP3.
    whole = (DATA_FILES / "cbr_piped.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(whole[: len(whole) // 2])
    assert _seconds(tmp_path / "a.mp3") == pytest.approx(4.0, abs=0.06)

    # Ogg.
    noise = 0.1 * np.random.default_rng(0).standard_normal(20 * RATE_HZ)
    whole = _write(tmp_path / "b.ogg", noise).read_bytes()
    (tmp_path / "a.ogg").write_bytes(whole[: whole.index(b"OggS", len(whole) // 2)])
    assert 9 < _seconds(tmp_path / "a.ogg") < 12


@pytest.mark.parametrize("ending", list(FORMATS))
def test_random_changes_of_a_file_raise_nothing_but_unusable(tmp_path, ending):
    whole, rng = _write(tmp_path / f"a.{ending}", _music(0.5)).read_bytes(), random.Random(0)
    marks = [b"ID3\x04\0\0\x7f\x7f\x7f\x7f", b"APETAGEX", b"TAG", b"OggS"]
    marks += [b"fLaC\0\0\0\x22", b"RIFF", b"Xing"]
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            at = rng.randrange(1 + min(len(content), rng.choice((100, len(content)))))
            stop = at + rng.choice((0, 1, 8, 2000))
            random_byte = bytes([rng.randrange(256)])
            content[at:stop] = rng.choice((*marks, b"", bytes(8), b"\xff" * 8, random_byte))
        (tmp_path / f"b.{ending}").write_bytes(bytes(content or b"x"))
        with contextlib.suppress(streams.Unusable):
            assert _seconds(tmp_path / f"b.{ending}") > 0


def test_clips_do_not_overlap_and_the_tail_is_dropped(tmp_path):
    ramp = np.linspace(0, 0.9, round(2.7 * RATE_HZ))
    clips = _clips(_write(tmp_path / "a.wav", ramp))
    assert len(clips) == 2
    np.testing.assert_allclose(np.concatenate(clips) / 32767, ramp[: 2 * RATE_HZ], atol=1e-4)


def test_a_file_just_short_of_a_clip_is_repeated(tmp_path):
    samples = np.linspace(-0.5, 0.5, round(0.96 * RATE_HZ))
    (clip,) = _clips(_write(tmp_path / "a.wav", samples))
    np.testing.assert_allclose(clip / 32767, np.resize(samples, len(clip)), atol=1e-4)


def test_a_file_beyond_full_scale_is_scaled_down(tmp_path):
    samples = 2.5 * _music(1.0)
    soundfile.write(tmp_path / "a.wav", samples, RATE_HZ, subtype="FLOAT")
    (clip,) = _clips(tmp_path / "a.wav")
    np.testing.assert_allclose(clip / 32767, samples / np.abs(samples).max(), atol=1e-4)


# --- data sets and splits ---


def test_a_folder_is_built_and_read(tmp_path):
    files = [f"{number}.wav" for number in range(6)]
    for number, file in enumerate(files):
        _write(tmp_path / file, (number + 1) / 10 * _music(2.5))
    rows = "".join(f'{file},"caption, with a comma: {file}",song-{file[0]}\n' for file in files)
    (tmp_path / "captions.csv").write_text("file,caption,id\n" + rows)
    builder = _build(tmp_path, "captions.csv")
    examples = _examples(builder)
    for number, example in enumerate(examples):
        assert example["id"].decode() == f"song-{number // 2}-{number % 2:04d}"
        assert example["caption"].decode() == f"caption, with a comma: {number // 2}.wav"
        loudest = (number // 2 + 1) / 10 * _music(1.0).max() * 32767
        assert np.abs(example["audio"]).max() == pytest.approx(loudest, rel=0.02)
        assert json.loads(example["attributes"]) == {
            "file": f"{number // 2}.wav",
            "start_seconds": float(number % 2),
        }
    assert len(examples) == 12 and set(builder.info.splits) == {"train", "validation", "test"}
    assert _skipped(builder) == {}


def _counts(splits: dict[str, str]) -> list[int]:
    return [list(splits.values()).count(split) for split in ("train", "validation", "test")]


@pytest.mark.parametrize(
    ("count", "least", "most"),
    [(3, 1, 1), (9, 1, 1), (19, 1, 1), (20, 2, 2), (40, 4, 4), (79, 7, 7), (200, 8, 20)],
)
def test_splits_of_few_recordings_go_by_count(count, least, most):
    for start in range(0, 3000, 150):
        splits = captions.splits_of([f"{number:03d}.wav" for number in range(start, start + count)])
        train, validation, test = _counts(splits)
        assert least <= validation <= most and least <= test <= most
        assert train == count - validation - test > 0


def test_splits_of_many_recordings_go_by_hash_alone():
    files = [f"song {number}.mp3" for number in range(2000)]
    splits = captions.splits_of(files)
    assert np.array(_counts(splits)) / 2000 == pytest.approx([0.9, 0.05, 0.05], abs=0.015)
    assert captions.splits_of(files[:1000]) == {file: splits[file] for file in files[:1000]}
    assert captions.splits_of(files[::-1]) == splits


def test_a_new_recording_moves_at_most_one_other_in_or_out_of_each_split():
    files = [f"{number}.flac" for number in range(300)]
    for count in range(3, 300):
        before, after = captions.splits_of(files[:count]), captions.splits_of(files[: count + 1])
        moves = [(split, after[file]) for file, split in before.items() if split != after[file]]
        assert all("train" in move for move in moves)
        assert all(sum(split in move for move in moves) <= 1 for split in ("validation", "test"))


def test_too_few_recordings_raise_an_error_with_the_number_needed(tmp_path):
    for file in ("a.wav", "b.wav"):
        _write(tmp_path / file, _music(1.0) * (1 if file == "a.wav" else 0.5))
    (tmp_path / "copy.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    _write_captions(tmp_path, "a.wav", "b.wav", "copy.wav")
    message = "audio_folder/mine: 2 recordings can be used, and 3 are needed"
    with pytest.raises(ValueError, match=message):
        _build(tmp_path)


def test_clips_of_one_recording_share_a_split(tmp_path):
    """Including those of several captions, equivalent names, links and copies."""
    for number in range(4):
        _write(tmp_path / f"{number}.wav", (number + 1) / 10 * _music(2.0))
    (tmp_path / "link.wav").symlink_to("0.wav")
    rows = []
    for number in range(4):
        shutil.copy(tmp_path / f"{number}.wav", tmp_path / f"copy of {number}.wav")
        for prefix in ("", "./", "x/../", "copy of "):
            rows.append({"file": f"{prefix}{number}.wav", "caption": f"this is {number}"})
    rows.append({"file": "link.wav", "caption": "this is 0"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    builder = _build(tmp_path)
    source = tfds.builder_from_directory(builder.data_dir).as_data_source()
    recordings_of = {split: {example["caption"] for example in source[split]} for split in source}
    assert sum(map(len, recordings_of.values())) == 4 and min(map(len, recordings_of.values())) == 1
    assert len(_examples(builder)) == 2 * 17


def test_splitting_is_linear_in_the_number_of_recordings():
    """Four times the names take about four times as long. A quadratic rule would take 16 times."""

    def seconds(count):
        files, times = [f"{number}.wav" for number in range(count)], []
        for _ in range(5):
            start = time.thread_time()
            captions.splits_of(files)
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds(16000) < 8 * seconds(4000)


def test_a_build_prints_its_progress(capsys, three):
    assert three.is_dir()
    printed = capsys.readouterr().out
    for label in ("files looked at", "files checked", "recordings split"):
        assert f"audio_folder/mine {label}  3/3" in printed


# --- reading in blocks ---


def _at_once(path: pathlib.Path, rate_hz: int) -> np.ndarray:
    """Reads, mixes, resamples and scales a file as a whole: the oracle of its clips."""
    samples, file_rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    whole = soxr.resample(samples.mean(axis=1), file_rate_hz, rate_hz)
    scale = max(np.float32(1.0), np.abs(whole).max(initial=0.0))
    return np.round(whole / scale * 32767).astype(np.int16)


@hypothesis.settings(deadline=None, max_examples=60, database=None)
@hypothesis.given(
    rate_hz=st.sampled_from((8000, 11025, 16000, 22050, 44100, 48000, 96000))
    | st.integers(1000, 200_000),
    channels=st.integers(1, 8),
    subtype=st.sampled_from(("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW")),
    seconds=st.floats(0.0, 1.0),
    gain=st.sampled_from((0.0, 1e-6, 0.5, 1.0, 40.0)),
    block=st.integers(100, 100_000),
    seed=st.integers(0, 9),
)
def test_any_wav_read_in_blocks_equals_one_read_at_once(
    tmp_path_factory, rate_hz, channels, subtype, seconds, gain, block, seed
):
    path = tmp_path_factory.mktemp("any") / "a.wav"
    samples = gain * np.random.default_rng(seed).uniform(
        -1, 1, (round(seconds * rate_hz), channels)
    )
    if subtype == "ULAW":
        # The format ends at full scale. libsndfile reads beyond its table for greater samples.
        samples = samples.clip(-1, 1)
    soundfile.write(path, samples, rate_hz, subtype=subtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recordings, "_BLOCK", block)
        try:
            clips = _clips(path, 0.1)
        except streams.Unusable as unusable:
            assert unusable.reason.split(":")[0] in ("no samples", "shorter than a clip of 0.1 s")
            assert seconds < 0.1
            return
    expected = _at_once(path, RATE_HZ)
    if len(expected) < 1600:
        expected = np.resize(expected, 1600)
    assert len(clips) == len(expected) // 1600 and {len(clip) for clip in clips} == {1600}
    np.testing.assert_array_equal(np.concatenate(clips), expected[: 1600 * len(clips)])


@pytest.mark.parametrize("ending", list(FORMATS))
def test_every_format_read_in_blocks_equals_one_read_at_once(tmp_path, ending, monkeypatch):
    rate_hz = 48000 if ending == "opus" else 44100
    path = _write(tmp_path / f"a.{ending}", np.stack([_music(2.0, rate_hz)] * 2, axis=1), rate_hz)
    monkeypatch.setattr(recordings, "_BLOCK", 5000)
    clips = _clips(path)
    assert len(clips) == 2
    np.testing.assert_array_equal(np.concatenate(clips), _at_once(path, RATE_HZ)[: 2 * RATE_HZ])


def test_a_long_file_is_read_in_little_memory(tmp_path, monkeypatch):
    """Two minutes of stereo are 15 MB as float32. They pass in blocks of 0.3 MB."""
    path = tmp_path / "a.wav"
    with soundfile.SoundFile(path, "w", RATE_HZ, 2) as file:
        for _ in range(24):
            file.write(np.stack([_music(5.0)] * 2, axis=1))
    monkeypatch.setattr(recordings, "_BLOCK", 2**16)
    peak = recordings.examine(path, 1.0, RATE_HZ).peak
    tracemalloc.start()
    try:
        recordings.examine(path, 1.0, RATE_HZ)
        count = sum(1 for _ in recordings.read_clips(path, 1.0, RATE_HZ, peak))
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()
    assert count == 120


def test_at_most_two_files_a_thread_are_read_ahead(monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    started = []
    results = audio_folder_dataset_builder._in_parallel(
        lambda n: started.append(n) or -n, range(100)
    )
    assert next(results) == 0
    time.sleep(0.1)
    assert len(started) <= 5
    assert list(results) == [-n for n in range(1, 100)]


def test_only_the_start_of_a_long_file_is_read_before_its_turn(tmp_path, monkeypatch):
    """The rest, read in its turn, continues it. An error names a file that has changed by then."""
    monkeypatch.setattr(audio_folder_dataset_builder, "_AHEAD", 3 * RATE_HZ)
    monkeypatch.setattr(recordings, "_BLOCK", RATE_HZ)
    path = _write(tmp_path / "a.wav", np.linspace(0, 0.9, 8 * RATE_HZ))
    config = AudioFolderConfig(
        name="mine", folder="", captions="", clip_seconds=1.0, sample_rate_hz=RATE_HZ
    )
    builder = Builder(config=config, data_dir=tmp_path / "built")
    clips = builder._clips(path, np.float32(0.9))
    np.testing.assert_array_equal(np.concatenate(list(clips)), np.concatenate(_clips(path)))
    path.write_bytes(b"")
    message = r"a.wav changed since it was checked: zero bytes long: .*; build again"
    with pytest.raises(ValueError, match=message):
        builder._clips(path, np.float32(0.9))


# --- unusable files ---


def _wav(
    samples: bytes = bytes(64000), rate_hz: int = RATE_HZ, channels: int = 1, bits: int = 16, **odd
) -> bytes:
    """Returns a wav file. `odd` sets the header's `size` of the data and `form`, its codec."""
    size, codec = odd.get("size", len(samples)), odd.get("form", 1)
    header = struct.pack("<4sI4s", b"RIFF", min(36 + size, 2**32 - 1), b"WAVE")
    bytes_per_second = rate_hz * channels * bits // 8
    form = struct.pack("<HHIIHH", codec, channels, rate_hz, bytes_per_second, 2, bits)
    return (
        header
        + struct.pack("<4sI", b"fmt ", 16)
        + form
        + struct.pack("<4sI", b"data", size)
        + samples
    )


def _damaged(path: pathlib.Path, fault: str) -> pathlib.Path:
    """Writes a file with the fault; returns its path."""
    # Faults of the file system.
    special = {
        "missing": lambda path: None,
        "folder": os.mkdir,
        "pipe": os.mkfifo,
        "device": lambda path: os.symlink("/dev/zero", path),
        LONG_NAME: lambda path: None,
    }
    if fault in special:
        special[fault](path)
        return path

    # Faults of the samples.
    samples = _music(3.0)
    values = {"NaN": np.nan, "infinite": -np.inf, "both infinities": [np.inf, -np.inf]}
    values |= {"1e38": 1e38, "3e38": 3e38, "1e300": 1e300}
    if fault in values:
        stereo = np.stack([samples, samples], axis=1).astype(np.float64)
        stereo[20000] = values[fault]
        soundfile.write(path, stereo, RATE_HZ, subtype="DOUBLE" if fault == "1e300" else "FLOAT")
        return path
    if fault == "short":
        return _write(path, samples[:8000])
    if fault == "one sample":
        return _write(path, samples[:1], 96000)

    # Faults of the bytes.
    whole = b""
    if fault in ("cut", "hole"):
        noise = 0.1 * np.random.default_rng(0).standard_normal(3 * RATE_HZ)
        whole = _write(path, noise if fault == "hole" else samples).read_bytes()
    contents = {
        "zero bytes": b"",
        "four bytes": b"RIFF",
        "cut in its header": _wav()[:30],
        "cut in its sizes": b"RF64" + bytes(4) + b"WAVEds64" + bytes(10),
        "cut": whole[: len(whole) * 6 // 10],
        "text": b"not a sound " * 500,
        "zeros": bytes(5000),
        "no samples": _wav(b""),
        "0 Hz": _wav(rate_hz=0),
        "1 Hz": _wav(rate_hz=1),
        "2^31 Hz": _wav(rate_hz=2**31 - 1, bits=8),
        "no channels": _wav(channels=0),
        "unknown codec": _wav(form=99),
        "promises 1 GB": _wav(size=2**30),
        "states less": _wav(size=1000),
        "hole": whole[: len(whole) // 2] + bytes(5000) + whole[len(whole) // 2 + 5000 :],
    }
    path.write_bytes(contents[fault])
    return path


LONG_NAME = "n" * 300  # longer than file systems allow
# Reasons. Their remedies are behind the colon.
TRUNCATED = "truncated: copy or fetch the file again"
UNREADABLE = "not readable as audio, or damaged: replace it, or convert it to wav or flac"
NO_ACCESS = "not readable: look at its name, its permissions and its disk"
DAMAGED = "damaged: fetch the file again"
MORE_BYTES = "more bytes behind the sound than its header states: export it again"
IRREGULAR = "not a regular file, but a folder, a pipe or a device: give a file"
BAD_RATE = "a sample rate that no recording has: mend its header, or export it again"
NOT_FINITE = "NaN or infinite samples: export it again"
SHORT = "shorter than a clip of 1 s: give longer files, or build with shorter clip_seconds"
# By fault and format: reason, and a pattern of the value.
FAULTS = {
    ("missing", "wav"): ("missing: put the file there, or mend its name in the captions", ""),
    ("zero bytes", "wav"): ("zero bytes long: copy the file again", ""),
    ("no samples", "wav"): ("no samples: export it again", ""),
    ("cut", "wav"): (TRUNCATED, r"1\.\d+ of 3\.000 s"),
    ("cut", "aiff"): (TRUNCATED, r"1\.\d+ of 3\.000 s"),
    ("cut", "w64"): (TRUNCATED, r"1\.\d+ of 2\.99\d s"),
    ("promises 1 GB", "wav"): (TRUNCATED, r"2\.000 of 33554\.432 s"),
    ("states less", "wav"): (MORE_BYTES, r"0\.031 s, .*"),
    ("cut", "mp3"): (TRUNCATED, r"1\.\d+ of 3\.\d+ s"),
    ("cut", "opus"): (TRUNCATED, "its last page is cut"),
    ("cut", "ogg"): (TRUNCATED, "its last page is cut"),
    ("cut", "flac"): (TRUNCATED, r"1\.\d+ of 3\.000 s"),
    ("hole", "mp3"): (DAMAGED, r"no frames from byte \d+ on"),
    ("hole", "ogg"): (DAMAGED, r"no pages from byte \d+ on"),
    ("folder", "wav"): (IRREGULAR, ""),
    ("pipe", "wav"): (IRREGULAR, ""),
    ("device", "wav"): (IRREGULAR, ""),
    (LONG_NAME, "wav"): (NO_ACCESS, "File name too long"),
    ("NaN", "wav"): (NOT_FINITE, r"the first at 1\.250 s"),
    ("infinite", "wav"): (NOT_FINITE, r"the first at 1\.250 s"),
    ("both infinities", "wav"): (NOT_FINITE, r"the first at 1\.250 s"),
    ("3e38", "wav"): (NOT_FINITE, r"the first at 1\.250 s"),  # their mean exceeds float32
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
    ("cut in its sizes", "wav"): (UNREADABLE, ""),
    ("1 Hz", "wav"): (BAD_RATE, "1 Hz"),
    ("text", "raw"): ("raw samples without a header: convert it to wav or flac", ""),
    ("short", "wav"): (SHORT, r"0\.500 s"),
    ("one sample", "wav"): (SHORT, r"0\.000 s"),
    ("2^31 Hz", "wav"): (SHORT, r"0\.000 s"),
}


@pytest.mark.parametrize(("fault", "ending"), list(FAULTS))
def test_an_unusable_file_raises_reason_remedy_and_value(tmp_path, fault, ending):
    path = _damaged(tmp_path / f"{fault}.{ending}", fault)
    with pytest.raises(streams.Unusable) as raised:
        _clips(path)
    reason, value = FAULTS[fault, ending]
    assert raised.value.reason == reason
    assert re.fullmatch(value, raised.value.value)


def test_unusable_files_are_named_counted_and_skipped(tmp_path, capsys):
    """The folder has a file with each fault and three good ones."""
    # The folder.
    bad = {}
    for fault, ending in FAULTS:
        bad[_damaged(tmp_path / f"{fault}.{ending}", fault).name] = FAULTS[fault, ending]
    for good in ("a.wav", "b.wav", "c.wav"):
        _write(tmp_path / good, (ord(good[0]) - 96) / 4 * _music(1.0))
    _write_captions(tmp_path, "a.wav", *list(bad)[:10], "b.wav", *list(bad)[10:], "c.wav")
    builder = _build(tmp_path)
    built = [example["caption"].decode() for example in _examples(builder)]
    assert built == [f"this is {name}.wav" for name in "abc"]

    # What the data set and stderr say of the others.
    skipped = _skipped(builder)
    assert {file for fault in skipped.values() for file in fault["files"]} == set(bad)
    for reason, fault in skipped.items():
        count = sum(reason == expected for expected, _ in bad.values())
        assert fault["count"] == len(fault["files"]) == count
        assert all(re.fullmatch(bad[file][1], value) for file, value in fault["files"].items())
    printed = capsys.readouterr().err
    assert f"{len(bad)} files skipped: " in printed
    assert f"1 {bad['missing.wav'][0]} (missing.wav)" in printed
    short = "short.wav: 0.500 s, one sample.wav: 0.000 s, 2^31 Hz.wav: 0.000 s"
    assert f"3 {SHORT} ({short})" in printed
    unreadable = r"9 not readable as audio.* \(text.wav, .*, zeros.flac and 4 more, all in skip"
    assert re.search(unreadable, printed)


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
def test_extreme_samples_are_not_changed(tmp_path, samples, subtype):
    soundfile.write(tmp_path / "a.wav", samples, RATE_HZ, subtype=subtype)
    (clip,) = _clips(tmp_path / "a.wav")
    expected = samples / max(1.0, np.abs(samples).max())
    np.testing.assert_allclose(clip / 32767, expected, atol=1e-4)


def test_silent_clips_are_left_out_and_counted(tmp_path, capsys):
    """Silence, a constant and noise at -66 dB are. A clip with half silence keeps its number."""
    quiet = 5e-4 * np.random.default_rng(0).uniform(-1, 1, RATE_HZ)
    parts = [_music(1.0), np.zeros(RATE_HZ), np.full(RATE_HZ, 0.3), quiet]
    half_silent = np.pad(_music(0.5), (0, RATE_HZ // 2))
    _write(tmp_path / "a.wav", np.concatenate([*parts, half_silent]))
    _write(tmp_path / "b.wav", 0.5 * _music(1.0))
    _write(tmp_path / "c.wav", 0.8 * _music(1.0))
    _write(tmp_path / "d.wav", np.zeros(3 * RATE_HZ))
    _write_captions(tmp_path, *(f"{name}.wav" for name in "abcd"))

    # The default limit, 0.9.
    builder = _build(tmp_path)
    names = [example["id"].decode() for example in _examples(builder)]
    assert names == ["a.wav-0000", "a.wav-0004", "b.wav-0000", "c.wav-0000"]
    starts = [json.loads(example["attributes"])["start_seconds"] for example in _examples(builder)]
    assert starts == [0.0, 4.0, 0.0, 0.0]
    whole = "more than 90% of each clip is silence or a constant: record it again, or build with"
    clips = "clips left out, each more than 90% silence or a constant"
    assert _skipped(builder) == {
        f"{whole} a greater silence_share_limit": {"count": 1, "files": {"d.wav": "3 clips"}},
        clips: {"count": 3, "files": {"a.wav": "3 of 5 clips"}},
    }
    printed = capsys.readouterr().err
    assert f"mine: 1 files skipped: 1 {whole}" in printed
    assert f"mine: 3 {clips} (a.wav: 3 of 5 clips)" in printed

    # Other limits.
    shutil.rmtree(tmp_path / "built")
    assert len(_examples(_build(tmp_path, silence_share_limit=1.0))) == 10
    with pytest.raises(ValueError, match=r"another silence_share_limit \(1.0, now 0.4\): give"):
        _build(tmp_path, silence_share_limit=0.4)
    shutil.rmtree(tmp_path / "built")
    assert len(_examples(_build(tmp_path, silence_share_limit=0.4))) == 3


def test_a_set_older_than_a_setting_counts_as_built_with_its_default(three):
    (path,) = (three / "built").rglob("made_from.json")
    older = json.loads(path.read_text())
    del older["silence_share_limit"]
    path.write_text(json.dumps(older))
    _build(three, inside="music")
    with pytest.raises(ValueError, match=r"another silence_share_limit \(0.9, now 0.5\): give"):
        _build(three, inside="music", silence_share_limit=0.5)


@pytest.mark.slow
def test_three_hours_are_built_in_little_memory(tmp_path, processes):
    """A build of three hours takes as much memory as one of three minutes, apart from TFDS.

    TFDS sorts records by hash. For this it has up to 1 GB of them in memory, here 345 MB.
    """
    code = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from data.audio_folder.audio_folder_dataset_builder import AudioFolderConfig, Builder
folder = sys.argv[2]
config = AudioFolderConfig(
    name="mine", folder=folder, captions=folder + "/captions.jsonl", clip_seconds=10.0
)
Builder(config=config, data_dir=folder + "/built").download_and_prepare(file_format="array_record")
print("MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)
"""
    peaks = {}
    for name, minutes in (("short", 3), ("long", 180)):
        (tmp_path / name).mkdir()
        with soundfile.SoundFile(tmp_path / name / "a.wav", "w", 8000, 2, "PCM_U8") as file:
            for _ in range(minutes):
                file.write(np.stack([_music(60.0, 8000)] * 2, axis=1))
        _write(tmp_path / name / "b.wav", _music(10.0))
        _write(tmp_path / name / "c.wav", 0.5 * _music(10.0))
        _write_captions(tmp_path / name, "a.wav", "b.wav", "c.wav")
        root = str(pathlib.Path(__file__).parents[2])
        command = [sys.executable, "-c", code, root, str(tmp_path / name)]
        printed = processes.run(command, check=True, capture_output=True).stdout
        peaks[name] = int(re.search(r"MB (\d+)", printed)[1])
    assert peaks["long"] < peaks["short"] + 1.25 * 345 + 100


def test_no_usable_file_is_an_error_that_counts_reasons(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    _write(tmp_path / "b.wav", _music(0.1))
    _write_captions(tmp_path, "a.wav", "b.wav", "c.wav")
    message = r"no file can be used: .* \(a.wav\); .* \(b.wav: 0.100 s\); .* \(c.wav\)$"
    with pytest.raises(ValueError, match=message):
        _build(tmp_path)


# --- captions ---


CSV_MISTAKES = [
    ("file,text\na.wav,hello\n", r"line 1, column 'caption': the column is missing"),
    ("file,caption\na.wav,hello\nb.wav,\n", r"line 3, column 'caption'"),
    ('file,caption\na.wav,"slow\nb.wav,fast\n', r"line 2, column 'caption': the quote that opens"),
    ('file,caption\na.wav,"slow\nb.wav,5"\n', r"line 2, column 'caption': .* takes in another row"),
    ("file,caption\na.wav,slow, sad\n", r"line 2, column 3: 3 values for 2 columns"),
    ("file,caption\na.wav,x\n../b.wav,y\n", r"line 3, column 'file': '../b.wav' is not inside"),
    ("file,caption\na/../../b.wav,x\n", r"line 2, column 'file': .* is not inside the folder"),
    ("file,caption\n/etc/passwd,x\n", r"line 2, column 'file': '/etc/passwd' is not inside"),
]
ROW = '{"file": "a.wav", "caption": "x"}\n'
JSONL_MISTAKES = [
    (ROW + '{"caption": "y"}\n', r"line 2, column 'file': the column is missing"),
    (ROW + '\n{"file": oops}\n', r"line 3, column 10: not JSON"),
    ('["a.wav", "x"]\n', r"line 1, column 1: .* is not a JSON object"),
    (ROW.replace('"x"', "7"), r"line 1, column 'caption': 7 where text should be"),
    (ROW + ROW, r"line 2, column 'id': 'a.wav' is also on line 1"),
    ("\n", "no rows"),
    (ROW.replace("a.", "a\\u0000."), r"line 1, column 'file': .* a NUL character"),
    (ROW.replace("a.", "a\\ud800."), r"line 1, column 'file': half of a surrogate"),
    (ROW.replace('"x"', '"x", "id": true'), r"line 1, column 'id': True where text or"),
    (ROW.replace('"x"', '"x", "id": [1]'), r"line 1, column 'id': \[1\] where text or"),
]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *(("captions.csv", *mistake) for mistake in CSV_MISTAKES),
        *(("captions.jsonl", *mistake) for mistake in JSONL_MISTAKES),
        ("captions.txt", "a.wav x\n", "'.txt'"),
    ],
)
def test_an_invalid_row_of_captions_is_named_by_line_and_column(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        _build(tmp_path, name)
    assert name in str(raised.value)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_captions_that_are_not_utf8_are_named_by_file_and_line(tmp_path, ending):
    path = tmp_path / f"captions.{ending}"
    path.write_bytes("file,caption\na.wav,größer\n".encode("latin-1"))
    message = rf"captions.{ending}, line 2: byte 0xf6 is not UTF-8: save it as UTF-8"
    with pytest.raises(ValueError, match=message):
        captions.read_captions(path)


def test_a_caption_may_hold_any_line_separator_that_json_allows(tmp_path):
    texts = [f"a reel{mark}for two" for mark in "\u2028\u2029\x85"]
    rows = []
    for number, text in enumerate(texts):
        row = {"file": f"{number}.wav", "caption": text}
        rows.append(json.dumps(row, ensure_ascii=False))
    (tmp_path / "captions.jsonl").write_bytes("\r\n".join(rows).encode())
    assert [row["caption"] for row in captions.read_captions(tmp_path / "captions.jsonl")] == texts


def test_an_id_of_0_or_an_empty_string_is_an_id(tmp_path):
    rows = [{"id": 0}, {"id": ""}, {"id": "0.wav-2"}, {"id": None}, {}]
    lines = []
    for number, row in enumerate(rows):
        lines.append(json.dumps({"file": f"{number}.wav", "caption": "x"} | row))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    ids = [row["id"] for row in captions.read_captions(tmp_path / "a.jsonl")]
    assert ids == ["0", "", "0.wav-2", "3.wav", "4.wav"]
    # An empty cell of a .csv means no id: a cell cannot be left out.
    (tmp_path / "a.csv").write_text("file,caption,id\n0.wav,x,0\n1.wav,x,\n2.wav,x,\n")
    ids = [row["id"] for row in captions.read_captions(tmp_path / "a.csv")]
    assert ids == ["0", "1.wav", "2.wav"]


def test_files_outside_the_folder_need_allow_outside_but_links_do_not(tmp_path):
    (tmp_path / "music").mkdir()
    (tmp_path / "far").mkdir()
    for number, place in enumerate(("music/a.wav", "far/b.wav", "far/c.wav"), start=1):
        _write(tmp_path / place, number / 4 * _music(1.0))
    (tmp_path / "music/link").symlink_to(tmp_path / "far")

    # By a symbolic link.
    _write_captions(tmp_path, "a.wav", "link/b.wav", "link/c.wav")
    assert len(_examples(_build(tmp_path, inside="music"))) == 3

    # By `..` and by an absolute path.
    shutil.rmtree(tmp_path / "built")
    _write_captions(tmp_path, "a.wav", "../far/b.wav", str(tmp_path / "far/c.wav"))
    message = r"line 2, column 'file': '../far/b.wav' .* or build with allow_outside=True"
    with pytest.raises(ValueError, match=message):
        _build(tmp_path, inside="music")
    assert len(_examples(_build(tmp_path, inside="music", allow_outside=True))) == 3


def test_a_missing_captions_file_or_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"captions.jsonl does not exist: give a"):
        _build(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        _build(tmp_path, inside="nowhere")


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "0: give more"), (np.nan, "nan: give"), (np.inf, "inf: give"), (1e-5, "1e-05, less than")],
)
def test_an_invalid_clip_length_names_field_and_value(tmp_path, value, message):
    with pytest.raises(ValueError, match=f"clip_seconds is {message}"):
        _build(tmp_path, clip_seconds=value)


# --- rebuilding ---


@pytest.fixture
def three(tmp_path) -> pathlib.Path:
    """Makes a folder with three recordings and captions, and builds it."""
    (tmp_path / "music").mkdir()
    for number, file in enumerate("abc", start=1):
        _write(tmp_path / f"music/{file}.wav", number / 4 * _music(1.0))
    _write_captions(tmp_path, "a.wav", "b.wav", "c.wav")
    _build(tmp_path, inside="music")
    return tmp_path


def _change_captions(folder):
    _write_captions(folder, "c.wav", "b.wav", "a.wav")


def _add(folder):
    _write(folder / "music/d.wav", _music(1.0))
    _write_captions(folder, "a.wav", "b.wav", "c.wav", "d.wav")


def _lengthen(folder):
    _write(folder / "music/b.wav", _music(2.0))


def _remove(folder):
    (folder / "music/c.wav").unlink()


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (_change_captions, {}, "another captions file: give"),
        (_add, {}, r"another captions file; another set of recordings \(d.wav\): give"),
        (_lengthen, {}, r"another set of recordings \(b.wav\): give"),
        (_remove, {}, r"another set of recordings \(c.wav\): give"),
        (None, {"clip_seconds": 0.5}, r"another clip_seconds \(1, now 0.5\): give"),
        (
            lambda folder: shutil.copytree(folder / "music", folder / "more"),
            {"inside": "more"},
            r"another folder \(music",
        ),
    ],
)
def test_a_changed_source_under_an_old_name_raises(three, change, config, message):
    # An unchanged source builds nothing and raises nothing.
    _build(three, inside="music")
    if change:
        change(three)
    with pytest.raises(ValueError, match=rf"1.0.0 was built from {message}") as raised:
        _build(three, **{"inside": "music"} | config)
    if not config:
        assert str(raised.value).endswith("another name than 'mine', or delete that folder")
        shutil.rmtree(three / "built")
        if change is _remove:
            _add(three)  # two recordings are too few
        assert _examples(_build(three, inside="music"))


def test_a_set_may_outlive_its_recordings(three):
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
        _build(three, inside="music", clip_seconds=0.5)
