"""Tests of score_clips: captions are true, audio plays the notes, builds repeat bit for bit."""

import collections
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import sys

import hypothesis
import joblib
import mido
import music21
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import strategies as st

from data.score_clips import analysis, captions, clips, render, score_clips_dataset_builder, scores
from data.score_clips.instruments import FEW, INSTRUMENTS
from data.score_clips.score_clips_dataset_builder import Builder, ScoreClipsConfig
from musicrl_jax.inputs import content
from musicrl_jax.inputs.clips import Clips

SECONDS, RATE_HZ = 4.0, 16000
# Of several books and metres, with one part and with four.
PIECES = (
    "ryansMammoth/MorpethHornpipe.abc#0",
    "oneills1850/0732-0758_mh.abc#15",
    "airdsAirs/book4.abc#99",
    "bach/bwv389.mxl",
    "oneills1850/1136-1175.abc#38",
    "ryansMammoth/MissJohnsonsReel.abc#0",
)


@pytest.fixture(scope="module")
def sampled_clips() -> list[clips.Clip]:
    pieces = [scores.parse(name) for name in PIECES]
    return [
        clips.draw_clip(pieces[index % len(pieces)], "train", index, 0, SECONDS, FEW)
        for index in range(96)
    ]


@pytest.fixture(scope="module")
def claims(sampled_clips) -> list[tuple[clips.Clip, str]]:
    pairs = []
    for number, clip in enumerate(sampled_clips):
        for seed in range(20):
            rng = np.random.default_rng([seed, number])
            pairs.append((clip, captions.caption(clip.attributes, rng)))
    return pairs


def _config(name: str, **changes) -> ScoreClipsConfig:
    counts = {"train": 20, "validation": 3, "test": 3, "pieces": 4}
    settings = {"clip_seconds": 0.5, "collections": ("ryansMammoth",)}
    return ScoreClipsConfig(name=name, **counts | settings | changes)


def _build(config: ScoreClipsConfig, folder: pathlib.Path) -> Builder:
    builder = Builder(config=config, data_dir=folder)
    builder.download_and_prepare(file_format="array_record")
    return builder


def _bytes(folder: str | pathlib.Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pathlib.Path(folder).glob("*.array_record*")
    }


@pytest.fixture(scope="module", autouse=True)
def small_waves():
    """Lets builds parse eight pieces at a time. Data sets do not depend on the number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_clips_dataset_builder, "_WAVE", 8)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Builder:
    return _build(_config("built"), tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def source(built):
    return tfds.builder_from_directory(built.data_dir).as_data_source()


# --- captions ---


def test_a_named_key_is_that_of_music21(sampled_clips, claims):
    # By clip: (tonic, mode), or ("", mode) for "in a minor key".
    named_keys = collections.defaultdict(set)
    for clip, caption in claims:
        full = re.findall(r"in (?:the key of )?([A-G](?: sharp| flat)?) (major|minor)", caption)
        named_keys[clip.id] |= {*full, *re.findall(r"in a()? (major|minor) key", caption)}
    tonics = [tonic for keys in named_keys.values() for tonic, _ in keys]
    assert sum(map(bool, tonics)) > 20 and tonics.count("") > 20

    for clip in (clip for clip in sampled_clips if named_keys[clip.id]):
        stream = music21.stream.Stream()
        for onset, duration, pitch, _ in clip.notes:
            stream.insert(onset, music21.note.Note(pitch, quarterLength=duration))
        key = music21.analysis.discrete.KrumhanslKessler().getSolution(stream)
        for tonic, mode in named_keys[clip.id]:
            name = tonic.replace(" sharp", "#").replace(" flat", "-")
            pitch_class = music21.pitch.Pitch(name or key.tonic.name).pitchClass
            assert (pitch_class, mode) == (key.tonic.pitchClass, key.mode)


def test_key_of_scales_by_hand():
    def scale(steps, tonic):
        # The tonic and the fifth sound longest, as in tunes.
        lengths = [3.0 if step in (0, 7) else 1.0 for step in steps]
        return [(float(n), lengths[n], tonic + step, 0) for n, step in enumerate(steps)]

    assert analysis.clear_key(scale((0, 2, 4, 5, 7, 9, 11), 67)) == ("G", "major")
    assert analysis.clear_key(scale((0, 2, 3, 5, 7, 8, 11), 65)) == ("F", "minor")
    assert analysis.clear_key([(float(n), 1.0, 60 + n, 0) for n in range(12)]) is None


@pytest.mark.parametrize("name", PIECES)
def test_tempo_and_metre_agree_with_the_score(sampled_clips, name):
    """Onsets in seconds times the claimed tempo are offsets of the score, which is parsed anew."""
    # The score.
    path, _, number = name.partition("#")
    corpus = pathlib.Path(music21.__file__).parent / "corpus"
    if number:
        text = (corpus / path).read_text(encoding="utf-8", errors="replace")
        tune = re.split(r"(?m)^(?=X:)", text)[1 + int(number)]
        score = music21.converter.parse(tune, format="abc")
    else:
        score = music21.converter.parseFile(corpus / path, forceSource=True, storePickle=False)

    # Its offsets, in quarter notes.
    offsets = {round(float(note.getOffsetInHierarchy(score)), 2) for note in score.recurse().notes}
    metre = score.recurse().getElementsByClass(music21.meter.TimeSignature)[0]
    first_bar = score.parts[0].getElementsByClass(music21.stream.Measure)[1].offset
    pickup = float(first_bar) if first_bar < metre.barDuration.quarterLength else 0.0
    end = float(score.highestTime)
    beats = 1.5 if metre.ratioString in ("6/8", "9/8") else 1.0
    signatures = score.parts[0].recurse().getElementsByClass(music21.meter.TimeSignature)
    metres = [metre.ratioString, None] if len(signatures) > 1 else [metre.ratioString]

    # Its clips.
    attributes = [clip.attributes for clip in sampled_clips if clip.attributes["piece"] == name]
    assert attributes and all(facts["metre"] in metres for facts in attributes)
    for clip in (clip for clip in sampled_clips if clip.attributes["piece"] == name):
        quarters_per_second = clip.attributes["tempo_bpm"] / 60 * beats
        start = clip.attributes["start_quarter"] + pickup
        for onset in (onset for onset, *_ in clip.notes if onset > 0):
            quarter = onset * quarters_per_second + start
            assert quarter >= end or min(abs(offset - quarter) for offset in offsets) < 0.02


def test_tempo_words_and_numbers_agree_with_the_tempo(claims):
    words = {word: name for name, forms in captions.TEMPO.items() for word in forms}
    bounds = {"very slow": (0, 65), "slow": (66, 87), "moderate": (88, 115), "fast": (116, 151)}
    bounds["very fast"] = (152, 999)
    pattern = r"\b(largo|adagio|andante|allegro|presto|brisk|rapid|unhurried)\b"
    counts = collections.Counter()
    for clip, caption in claims:
        for number in re.findall(r"(?:at|tempo) (\d+)", caption):
            counts["numbers"] += 1
            assert int(number) == clip.attributes["tempo_bpm"]
        for word in re.findall(pattern, caption.lower()):
            counts["words"] += 1
            low, high = bounds[words[word]]
            assert low <= clip.attributes["tempo_bpm"] <= high
    assert counts["numbers"] > 100 and counts["words"] > 100


def test_register_and_density_words_agree_with_the_notes(claims):
    said = set()
    for clip, caption in claims:
        lengths = np.array([duration for _, duration, _, _ in clip.notes])
        mean = np.sum(lengths * [pitch for _, _, pitch, _ in clip.notes]) / lengths.sum()
        rate = len({onset for onset, _, _, _ in clip.notes}) / SECONDS
        truth = {
            "low register|low-pitched|deep notes|bass range": mean < 60 + 1e-2,
            "middle register|mid-range|neither high nor low": 60 - 1e-2 <= mean < 75 + 1e-2,
            "high register|high-pitched|treble range": mean >= 75 - 1e-2,
            "few notes|sparse": rate < 2.5,
            "steadily moving": 2.5 <= rate < 6,
            "many quick notes|busy|note-filled|dense": rate >= 6,
        }
        for words, holds in truth.items():
            if re.search(words, caption, re.IGNORECASE):
                assert holds, caption
                said.add(words)
    assert len(said) == 6


def test_a_caption_names_no_other_instrument(claims):
    owners = collections.defaultdict(set)
    for row in INSTRUMENTS.values():
        for name in row.names:
            owners[name].add(row.name)
    longest_first = sorted(owners, key=len, reverse=True)
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in longest_first)
    for clip, caption in claims:
        text = re.sub("fiddle tune", "", caption.lower())
        for name in re.findall(pattern, text):
            player = clip.attributes["instrument"]
            among = ("cello", "horn", "trombone") if player.endswith("quartet") else ()
            assert player in owners[name] or name in among, caption


def test_words_on_drums_texture_and_articulation_are_true(claims):
    for clip, caption in claims:
        facts = clip.attributes
        assert not re.search(r"drum|snare", caption) or (facts["drums"] and clip.drums), caption
        if re.search(r"monophonic|one note at a time|single melodic line|unharmonized", caption):
            notes = sorted(clip.notes)
            assert all(a[0] + a[1] <= b[0] + 1e-3 for a, b in itertools.pairwise(notes)), caption
        for count, word in enumerate(("two", "three", "four", "five"), start=2):
            if re.search(rf"{word}-part|{word} voices", caption.lower()):
                assert len({part for _, _, _, part in clip.notes}) == count
        if "staccato" in caption.lower() or "detached" in caption:
            assert facts["articulation"] == "staccato"
            assert INSTRUMENTS[facts["instrument"]].sustained


def test_clips_are_full_of_music(sampled_clips):
    for clip in sampled_clips:
        stretch = 1 / clips.LENGTHS[clip.attributes["articulation"]]
        grid = np.zeros(4000, bool)  # milliseconds
        for onset, duration, _, _ in clip.notes:
            grid[round(onset * 1000) : round((onset + duration * stretch) * 1000)] = True
        assert grid.mean() > 0.949
        for onset, duration, _, _ in clip.notes:
            assert 0 <= onset < SECONDS and onset + duration <= SECONDS + 1e-3


def test_wording_varies(claims):
    text = " ".join(caption.lower() for _, caption in claims)
    assert len(set(re.findall(r"[a-z][a-z\-]+", text))) > 230
    assert len({caption for _, caption in claims}) > 0.95 * len(claims)


# --- scores and splits ---


def test_parse_by_hand(monkeypatch):
    header = "X:1\nT:A Test Jig\nM:6/8\nL:1/8\nK:G\n"
    tune = header + "D|GAB {c}d2 e-|e3 d2 c|" + "GAB cde|" * 5 + "G6|]\n"
    monkeypatch.setattr(scores, "_tunes", lambda path: [tune])
    piece = scores.parse("ryansMammoth/made-up.abc#0")
    assert (piece.metre, piece.pickup, piece.bar, piece.dance) == ("6/8", 0.5, 3.0, "jig")
    # Upbeat D, then G A B, d without its grace note, and e tied over the bar.
    offsets, durations, pitches, parts = zip(*piece.notes[:6], strict=True)
    assert offsets == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    assert durations == (0.5, 0.5, 0.5, 0.5, 1.0, 2.0)
    assert pitches == (62, 67, 69, 71, 74, 76) and set(parts) == {0}
    assert scores.opening(piece)[:5] == (5, 2, 2, 3, 2)


def _score(*voices: list[tuple[float, float, int, str | None]]) -> music21.stream.Score:
    """Returns a score of one part: the voices' (offset, quarters, pitch, tie), then 24 quarters."""
    part = music21.stream.Part()
    part.insert(0, music21.meter.TimeSignature("4/4"))
    end = max(offset + quarters for offset, quarters, _, _ in itertools.chain(*voices))
    later = [(end + n, 1.0, 62 + n % 8, None) for n in range(24)]
    for offset, quarters, pitch, tie in itertools.chain(*voices, later):
        note = music21.note.Note(pitch, quarterLength=quarters)
        note.tie = tie and music21.tie.Tie(tie)
        part.insert(offset, note)
    return music21.stream.Score([part])


@pytest.mark.parametrize(
    ("voices", "played"),
    [
        # A note starts while its pitch sounds: it starts again and lasts until the later end.
        (([(0.0, 4.0, 60, None)], [(1.0, 1.0, 60, None)]), [(0.0, 1.0, 60), (1.0, 3.0, 60)]),
        (([(0.0, 2.0, 60, None)], [(1.0, 3.0, 60, None)]), [(0.0, 1.0, 60), (1.0, 3.0, 60)]),
        (([(0.0, 1.0, 60, None)], [(0.0, 3.0, 60, None)]), [(0.0, 3.0, 60)]),
        # Other pitches and repetitions do not change.
        (([(0.0, 4.0, 60, None)], [(1.0, 1.0, 62, None)]), [(0.0, 4.0, 60), (1.0, 1.0, 62)]),
        (([(0.0, 1.0, 60, None), (1.0, 1.0, 60, None)],), [(0.0, 1.0, 60), (1.0, 1.0, 60)]),
        # Another voice plays the pitch of a tied note.
        (
            ([(0.0, 4.0, 60, "start"), (4.0, 2.0, 60, "stop")], [(1.0, 1.0, 60, None)]),
            [(0.0, 1.0, 60), (1.0, 5.0, 60)],
        ),
    ],
)
def test_notes_of_one_pitch_do_not_overlap_within_a_part(voices, played):
    piece = scores._piece("bach/made-up", "", _score(*voices))
    assert [note[:3] for note in piece.notes][:-24] == played


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ryansMammoth/MorpethHornpipe.abc#0", "oneills1850/1625-1700.abc#38"),
        ("oneills1850/0732-0758_mh.abc#15", "ryansMammoth/FlamingOFlanigansJig.abc#0"),
        ("airdsAirs/book4.abc#99", "ryansMammoth/RoysWifeHighlandFling.abc#0"),
    ],
)
def test_copies_of_a_tune_in_other_books_and_keys_share_a_split(one, other):
    first, second = scores.parse(one), scores.parse(other)
    assert first.notes[0][2] != second.notes[0][2]
    assert scores.opening(first) == scores.opening(second)


@hypothesis.given(st.lists(st.integers(40, 90), min_size=21, max_size=40), st.integers(-12, 12))
@hypothesis.settings(deadline=None, max_examples=50)
def test_an_opening_depends_on_neither_key_nor_ending(pitches, shift):
    def piece(line):
        notes = tuple((float(n), 1.0, pitch, 0) for n, pitch in enumerate(line))
        return scores.Piece("made-up", "bach", None, "4/4", 0.0, 4.0, notes)

    opening = scores.opening(piece(pitches))
    assert opening == tuple(np.diff(pitches[:21]))
    assert opening == scores.opening(piece([pitch + shift for pitch in [*pitches[:21], 60, 61]]))


def test_splits_have_their_shares_of_pieces():
    splits = [scores.split_of((number, 1, 2)) for number in range(4000)]
    assert splits.count("train") / 4000 == pytest.approx(0.8, abs=0.02)
    assert splits.count("validation") / 4000 == pytest.approx(0.1, abs=0.015)


def test_no_opening_is_in_two_splits_of_a_build(source):
    openings = {}
    for split in source:
        pieces = {json.loads(example["attributes"])["piece"] for example in source[split]}
        openings[split] = {scores.opening(scores.parse(piece)) for piece in pieces}
        assert {scores.split_of(opening) for opening in openings[split]} == {split}
    assert len(set().union(*openings.values())) == sum(map(len, openings.values())) == 5


def test_a_short_piece_is_repeated():
    notes = tuple((float(n), 1.0, 60 + n % 8, 0) for n in range(24))
    piece = scores.Piece("made-up", "bach", None, "4/4", 0.0, 4.0, notes)
    clip = clips.draw_clip(piece, "train", 0, 0, 60.0, ("piano",))
    pitches = [pitch for _, _, pitch, _ in clip.notes]
    assert len(pitches) >= 48 and all(np.diff(pitches)[7::8] == -7)
    assert analysis.coverage(clip.notes, 0, 60) > 0.85


# --- audio ---


def _play(*notes, instrument: str = "flute", dynamics: str = "medium") -> np.ndarray:
    """Renders a second of the notes (onset, duration, pitch, part)."""
    parts = len(INSTRUMENTS[instrument].programs)
    facts = {"instrument": instrument, "dynamics": dynamics, "parts": parts}
    return render.render(clips.Clip("a", notes, (), facts), 1.0, RATE_HZ)


@pytest.mark.parametrize("pitch", [60, 69, 76, 81])
def test_a_rendered_note_has_the_frequency_of_its_pitch(pitch):
    sound = _play((0.0, 1.0, pitch, 0)) * np.hanning(RATE_HZ)
    spectrum = np.abs(np.fft.rfft(sound, 8 * RATE_HZ))  # bins of 1/8 Hz
    fundamental = 440 * 2 ** ((pitch - 69) / 12)
    for hertz in (fundamental, 2 * fundamental):
        near = spectrum[round(8 * hertz * 0.94) : round(8 * hertz * 1.06)]
        assert np.argmax(near) / 8 + hertz * 0.94 == pytest.approx(hertz, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTRUMENTS)
def test_the_soundfont_has_every_note_of_an_instruments_range(name):
    """It lacks alto saxophone at E4 and tin whistle above G5: neither is in the table."""
    row = INSTRUMENTS[name]
    for part, pitch in itertools.product(range(len(row.programs)), range(row.low, row.high + 1)):
        sound = _play((0.0, 0.8, pitch, part), instrument=name).astype(np.int32)
        assert np.abs(sound).max() > 300, pitch


def _sounding(clip: clips.Clip) -> list[tuple[int, float, float, int]]:
    """Returns (part, start s, end s, pitch) of the notes of a clip's MIDI file.

    As in MIDI, the first end of a pitch ends all its notes.
    """
    events, sounding, notes = [], {}, []
    # Note events of all parts, without the drums of channel 9.
    for track in mido.MidiFile(file=io.BytesIO(render._midi(clip, SECONDS))).tracks[1:]:
        at = 0.0
        for message in track:
            at += message.time / 1920  # 960 ticks a beat at 120 beats a minute
            if message.type in ("note_on", "note_off") and message.channel != 9:
                events.append((at, message))

    # Notes, from an event that starts a pitch to the next event of it.
    for at, message in events:
        key = message.channel, message.note
        if key in sounding:
            notes.append((message.channel, sounding.pop(key), at, message.note))
        if message.type == "note_on" and message.velocity:
            sounding[key] = at
    return sorted(notes)


def test_each_note_of_a_clip_sounds_as_long_as_recorded(sampled_clips):
    quartet = scores.parse("haydn/opus74no1/movement1.mxl")
    instruments = ("string orchestra", "organ")
    quartet_clips = [
        clips.draw_clip(quartet, "train", index, 0, SECONDS, instruments) for index in range(20)
    ]
    for clip in sampled_clips + quartet_clips:
        recorded = np.array([(part, on, on + time, pitch) for on, time, pitch, part in clip.notes])
        recorded = recorded[np.lexsort(recorded.T[::-1])]
        sounding = np.array(_sounding(clip))
        np.testing.assert_array_equal(sounding[:, [0, 3]], recorded[:, [0, 3]])
        np.testing.assert_allclose(sounding[:, 1:3], recorded[:, 1:3], atol=1e-3)


def test_a_pitch_sounds_until_the_later_end():
    """Two voices of a part may have a long and a short note of one pitch."""
    played = scores.struck_anew([(0.0, 0.9, 72), (0.1, 0.1, 72)])
    sound = _play(*((*note, 0) for note in played)) / 32767
    early, late = (sound[round(at * RATE_HZ) :][: RATE_HZ // 10] for at in (0.1, 0.7))
    assert np.sqrt(np.mean(late**2)) > 0.3 * np.sqrt(np.mean(early**2))


@pytest.mark.parametrize(("dynamics", "level"), [("quiet", -34), ("medium", -27), ("loud", -20)])
def test_dynamics_set_the_level(dynamics, level):
    samples = _play((0.0, 1.0, 72, 0), dynamics=dynamics) / 32767
    moments = np.lib.stride_tricks.sliding_window_view(samples, 6400)[::100]
    loudest = np.sqrt(np.mean(moments**2, axis=1)).max()
    assert 20 * np.log10(loudest) == pytest.approx(level, abs=0.05)


def test_no_clip_is_silent_or_clipped(source):
    for split in source:
        for example in source[split]:
            assert 300 < np.abs(example["audio"].astype(np.int32)).max() < 32767


# --- builds ---


def test_random_access_gives_the_clip_of_its_index(source):
    counts = {split: len(source[split]) for split in source}
    assert counts == {"train": 20, "validation": 3, "test": 3}
    example = source["train"][7]
    # The clip of the same index, drawn anew.
    facts = json.loads(example["attributes"])
    index = int(example["id"].decode().removeprefix("train-"))
    clip = clips.draw_clip(scores.parse(facts["piece"]), "train", index, 0, 0.5, FEW)
    assert clip.attributes == facts
    assert [list(note) for note in clip.notes] == json.loads(example["notes"])
    assert example["audio"].dtype == np.int16
    np.testing.assert_array_equal(example["audio"], render.render(clip, 0.5, RATE_HZ))


def test_bytes_are_the_same_in_another_process_with_one_worker(built, tmp_path, processes):
    script = f"""
import sys, joblib
sys.path.insert(0, {str(pathlib.Path(score_clips_dataset_builder.__file__).parents[2])!r})
joblib.cpu_count = lambda: 1
from data.score_clips import score_clips_dataset_builder
from data.score_clips.score_clips_dataset_builder import Builder, ScoreClipsConfig
score_clips_dataset_builder._WAVE = 8
config = ScoreClipsConfig(name="built", **{built.info.metadata!r})
Builder(config=config, data_dir={str(tmp_path)!r}).download_and_prepare(file_format="array_record")
"""
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    processes.run([sys.executable, "-c", script], check=True, env=environment)
    again = tmp_path / "score_clips" / "built" / str(Builder.VERSION)
    assert _bytes(again) == _bytes(built.data_dir)
    assert content.read(again) == content.read(built.data_dir) == content.of_splits(built)
    assert set(content.read(again)) == {"train", "validation", "test"}


def test_a_data_set_has_the_licence_of_its_clips(built):
    assert "GPL-2" in (pathlib.Path(built.data_dir) / "LICENSE").read_text()
    data_dir = str(pathlib.Path(built.data_dir).parents[2])
    data = Clips({"score_clips/built": 1.0}, data_dir, RATE_HZ)
    assert data.licences() == {"score_clips/built": score_clips_dataset_builder.LICENCE}


def test_an_interrupted_build_resumes_from_its_cache(built, tmp_path, monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)

    # A build that is interrupted leaves its cache.

    def interrupted(items, label, total):
        for number, item in enumerate(items):
            if "train" in label and number == 12:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(score_clips_dataset_builder, "Progress", interrupted)
        _build(_config("built"), tmp_path)
    cache = tmp_path / "score_clips" / "built" / "cache"
    assert list((cache / str(Builder.VERSION)).rglob("output.pkl"))
    assert not (tmp_path / "score_clips" / "built" / str(Builder.VERSION)).exists()

    # The next one takes results from it, and has the same bytes.
    parsed, rendered = [], []
    parse, play = scores.parse, render.render
    monkeypatch.setattr(scores, "parse", lambda name: parsed.append(name) or parse(name))
    monkeypatch.setattr(
        render, "render", lambda clip, *rest: rendered.append(clip.id) or play(clip, *rest)
    )
    assert _bytes(_build(_config("built"), tmp_path).data_dir) == _bytes(built.data_dir)
    assert not parsed and "train-000000" not in rendered and "train-000019" in rendered
    assert not cache.exists()


def test_a_changed_config_under_an_old_name_raises(built):
    with pytest.raises(ValueError, match="built from another config"):
        _build(_config("built", seed=1), pathlib.Path(built.data_dir).parents[2])


def test_a_full_disk_raises_before_the_build(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(score_clips_dataset_builder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="GB free"):
        _build(_config("full"), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train", 0),
        ("clip_seconds", -1.0),
        ("pieces", 0),
        ("collections", ("palestrina",)),
        ("instruments", ("kazoo",)),
        ("instruments", ("flute",)),
    ],
)
def test_an_invalid_config_names_its_field(field, value):
    with pytest.raises(ValueError, match=field):
        _config("bad", **{field: value})


def test_shipped_configs_have_their_hours_and_clips():
    hours, counts = {}, {}
    for config in Builder.BUILDER_CONFIGS:
        counts[config.name] = (config.train, config.validation, config.test)
        hours[config.name] = sum(counts[config.name]) * config.clip_seconds / 3600
    assert hours["demo"] == pytest.approx(6600 * 5 / 3600)
    assert hours["hours50"] == pytest.approx(50.0)
    assert counts["tiny"] == (8, 8, 16) and counts["quickstart"] == (640, 64, 96)
