"""score_clips: what captions claim holds in the notes, the audio plays the notes, and builds repeat bit by bit."""

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
PIECES = (
    "ryansMammoth/MorpethHornpipe.abc#0",
    "oneills1850/0732-0758_mh.abc#15",
    "airdsAirs/book4.abc#99",
    "bach/bwv389.mxl",
    "oneills1850/1136-1175.abc#38",
    "ryansMammoth/MissJohnsonsReel.abc#0",
)


@pytest.fixture(scope="module")
def drawn() -> list[clips.Clip]:
    pieces = [scores.parse(name) for name in PIECES]
    return [
        clips.draw_clip(pieces[index % len(pieces)], "train", index, 0, SECONDS, FEW)
        for index in range(96)
    ]


@pytest.fixture(scope="module")
def claims(drawn) -> list[tuple[clips.Clip, str]]:
    return [
        (clip, captions.caption(clip.attributes, np.random.default_rng([seed, number])))
        for number, clip in enumerate(drawn)
        for seed in range(20)
    ]


def _config(name: str, **changes) -> ScoreClipsConfig:
    return ScoreClipsConfig(
        **{
            "name": name,
            "train": 20,
            "validation": 3,
            "test": 3,
            "clip_seconds": 0.5,
            "pieces": 4,
            "collections": ("ryansMammoth",),
        }
        | changes
    )


def _build(config: ScoreClipsConfig, folder: pathlib.Path) -> Builder:
    builder = Builder(config=config, data_dir=folder)
    builder.download_and_prepare(file_format="array_record")
    return builder


def _bytes(folder: str | pathlib.Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pathlib.Path(folder).glob("*.array_record*")
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Builder:
    return _build(_config("built"), tmp_path_factory.mktemp("built"))


# What captions claim.


def test_a_named_key_is_the_one_music21_finds(drawn, claims):
    said = collections.defaultdict(
        set
    )  # by clip: (tonic, mode), or ("", mode) for "in a minor key"
    for clip, caption in claims:
        said[clip.id] |= set(
            re.findall(r"in (?:the key of )?([A-G](?: sharp| flat)?) (major|minor)", caption)
        )
        said[clip.id] |= set(re.findall(r"in a()? (major|minor) key", caption))
    assert (
        min(
            sum(bool(tonic) == told for key in said.values() for tonic, _ in key)
            for told in (True, False)
        )
        > 20
    )
    for clip in (clip for clip in drawn if said[clip.id]):
        stream = music21.stream.Stream()
        for onset, duration, pitch, _ in clip.notes:
            stream.insert(onset, music21.note.Note(pitch, quarterLength=duration))
        key = music21.analysis.discrete.KrumhanslKessler().getSolution(stream)
        for tonic, mode in said[clip.id]:
            named = (
                music21.pitch.Pitch(tonic.replace(" sharp", "#").replace(" flat", "-"))
                if tonic
                else key.tonic
            )
            assert (named.pitchClass, mode) == (key.tonic.pitchClass, key.mode)


def test_key_of_scales_by_hand():
    def scale(steps, tonic):
        # the tonic and the fifth sound longest, as they do in tunes
        return [
            (float(n), 3.0 if step in (0, 7) else 1.0, tonic + step, 0)
            for n, step in enumerate(steps)
        ]

    assert analysis.clear_key(scale((0, 2, 4, 5, 7, 9, 11), 67)) == ("G", "major")
    assert analysis.clear_key(scale((0, 2, 3, 5, 7, 8, 11), 65)) == ("F", "minor")
    assert analysis.clear_key([(float(n), 1.0, 60 + n, 0) for n in range(12)]) is None


@pytest.mark.parametrize("name", PIECES)
def test_tempo_and_metre_against_the_score_itself(drawn, name):
    """Onsets in seconds times the claimed tempo are the score's own offsets, parsed anew."""
    path, _, number = name.partition("#")
    corpus = pathlib.Path(music21.__file__).parent / "corpus"
    if number:
        tunes = re.split(
            r"(?m)^(?=X:)", (corpus / path).read_text(encoding="utf-8", errors="replace")
        )[1:]
        score = music21.converter.parse(tunes[int(number)], format="abc")
    else:
        score = music21.converter.parseFile(corpus / path, forceSource=True, storePickle=False)
    offsets = {round(float(note.getOffsetInHierarchy(score)), 2) for note in score.recurse().notes}
    metre = score.recurse().getElementsByClass(music21.meter.TimeSignature)[0]
    first_bar = score.parts[0].getElementsByClass(music21.stream.Measure)[1].offset
    pickup = float(first_bar) if first_bar < metre.barDuration.quarterLength else 0.0
    end = float(score.highestTime)
    mine = [clip for clip in drawn if clip.attributes["piece"] == name]
    assert mine
    for clip in mine:
        beats = 1.5 if metre.ratioString in ("6/8", "9/8") else 1.0
        changes = len(score.parts[0].recurse().getElementsByClass(music21.meter.TimeSignature)) > 1
        assert clip.attributes["metre"] == metre.ratioString or (
            changes and clip.attributes["metre"] is None
        )
        quarters = [
            onset * clip.attributes["tempo_bpm"] / 60 * beats
            + clip.attributes["start_quarter"]
            + pickup
            for onset, _, _, _ in clip.notes
            if onset > 0
        ]
        assert all(
            min(abs(offset - quarter) for offset in offsets) < 0.02
            for quarter in quarters
            if quarter < end
        )


def test_tempo_words_and_numbers_of_captions(claims):
    words = {word: name for name, forms in captions.TEMPO.items() for word in forms}
    numbers, named = 0, 0
    for clip, caption in claims:
        for number in re.findall(r"(?:at|tempo) (\d+)", caption):
            numbers += 1
            assert int(number) == clip.attributes["tempo_bpm"]
        for word in re.findall(
            r"\b(largo|adagio|andante|allegro|presto|brisk|rapid|unhurried)\b", caption.lower()
        ):
            named += 1
            low, high = {
                "very slow": (0, 65),
                "slow": (66, 87),
                "moderate": (88, 115),
                "fast": (116, 151),
                "very fast": (152, 999),
            }[words[word]]
            assert low <= clip.attributes["tempo_bpm"] <= high
    assert numbers > 100 and named > 100


def test_register_and_density_words_against_the_notes(claims):
    seen = set()
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
                seen.add(words)
    assert len(seen) == 6


def test_a_caption_names_no_other_instrument(claims):
    owners = {
        name: {row.name for row in INSTRUMENTS.values() if name in row.names}
        for row in INSTRUMENTS.values()
        for name in row.names
    }
    for clip, caption in claims:
        text = re.sub("fiddle tune", "", caption.lower())
        longest_first = sorted(owners, key=len, reverse=True)
        for name in re.findall("|".join(rf"\b{re.escape(name)}\b" for name in longest_first), text):
            player = clip.attributes["instrument"]
            among = ("cello", "horn", "trombone") if player.endswith("quartet") else ()
            assert player in owners[name] or name in among, caption


def test_drums_texture_and_articulation_words(claims):
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
            assert (
                facts["articulation"] == "staccato" and INSTRUMENTS[facts["instrument"]].sustained
            )


def test_clips_are_full_of_music(drawn):
    for clip in drawn:
        stretch = 1 / clips.LENGTHS[clip.attributes["articulation"]]
        grid = np.zeros(4000, bool)  # milliseconds
        for onset, duration, _, _ in clip.notes:
            grid[round(onset * 1000) : round((onset + duration * stretch) * 1000)] = True
        assert grid.mean() > 0.949
        assert all(
            0 <= onset < SECONDS and onset + duration <= SECONDS + 1e-3
            for onset, duration, _, _ in clip.notes
        )


def test_wording_varies(claims):
    text = " ".join(caption.lower() for _, caption in claims)
    assert len(set(re.findall(r"[a-z][a-z\-]+", text))) > 230
    assert len({caption for _, caption in claims}) > 0.95 * len(claims)


# Scores and splits.


def test_parse_by_hand(monkeypatch):
    tune = (
        "X:1\nT:A Test Jig\nM:6/8\nL:1/8\nK:G\nD|GAB {c}d2 e-|e3 d2 c|" + "GAB cde|" * 5 + "G6|]\n"
    )
    monkeypatch.setattr(scores, "_tunes", lambda path: [tune])
    piece = scores.parse("ryansMammoth/made-up.abc#0")
    assert (piece.metre, piece.pickup, piece.bar, piece.dance) == ("6/8", 0.5, 3.0, "jig")
    # upbeat D, then G A B, d without its grace note, and e tied over the bar
    assert piece.notes[:6] == (
        (0.0, 0.5, 62, 0),
        (0.5, 0.5, 67, 0),
        (1.0, 0.5, 69, 0),
        (1.5, 0.5, 71, 0),
        (2.0, 1.0, 74, 0),
        (3.0, 2.0, 76, 0),
    )
    assert scores.opening(piece)[:5] == (5, 2, 2, 3, 2)


def _score(*voices: list[tuple[float, float, int, str | None]]) -> music21.stream.Score:
    """A score of one part that holds the voices, (offset, quarters, pitch, tie) each, and then 24 quarters."""
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
        # struck while it sounds: struck anew, until the later end
        (([(0.0, 4.0, 60, None)], [(1.0, 1.0, 60, None)]), [(0.0, 1.0, 60), (1.0, 3.0, 60)]),
        (([(0.0, 2.0, 60, None)], [(1.0, 3.0, 60, None)]), [(0.0, 1.0, 60), (1.0, 3.0, 60)]),
        (([(0.0, 1.0, 60, None)], [(0.0, 3.0, 60, None)]), [(0.0, 3.0, 60)]),
        # other pitches and repetitions stay as they are
        (([(0.0, 4.0, 60, None)], [(1.0, 1.0, 62, None)]), [(0.0, 4.0, 60), (1.0, 1.0, 62)]),
        (([(0.0, 1.0, 60, None), (1.0, 1.0, 60, None)],), [(0.0, 1.0, 60), (1.0, 1.0, 60)]),
        # another voice on the pitch of a tied note
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
def test_opening_knows_no_key_and_no_ending(pitches, shift):
    def piece(line):
        notes = tuple((float(n), 1.0, pitch, 0) for n, pitch in enumerate(line))
        return scores.Piece("made-up", "bach", None, "4/4", 0.0, 4.0, notes)

    opening = scores.opening(piece(pitches))
    assert opening == tuple(np.diff(pitches[:21]))
    assert opening == scores.opening(piece([pitch + shift for pitch in [*pitches[:21], 60, 61]]))


def test_shares_of_the_splits():
    splits = [scores.split_of((number, 1, 2)) for number in range(4000)]
    assert splits.count("train") / 4000 == pytest.approx(0.8, abs=0.02)
    assert splits.count("validation") / 4000 == pytest.approx(0.1, abs=0.015)


def test_no_opening_crosses_splits_in_a_build(built):
    source = tfds.builder_from_directory(built.data_dir).as_data_source()
    openings = {
        split: {
            scores.opening(scores.parse(json.loads(example["attributes"])["piece"]))
            for example in source[split]
        }
        for split in source
    }
    for split, found in openings.items():
        assert {scores.split_of(opening) for opening in found} == {split}
    assert len(set().union(*openings.values())) == sum(map(len, openings.values())) == 5


def test_a_short_piece_is_repeated():
    notes = tuple((float(n), 1.0, 60 + n % 8, 0) for n in range(24))
    piece = scores.Piece("made-up", "bach", None, "4/4", 0.0, 4.0, notes)
    clip = clips.draw_clip(piece, "train", 0, 0, 60.0, ("piano",))
    pitches = [pitch for _, _, pitch, _ in clip.notes]
    assert (
        len(pitches) >= 48
        and all(np.diff(pitches)[7::8] == -7)
        and analysis.coverage(clip.notes, 0, 60) > 0.85
    )


# Audio.


def _tone(pitch: int, dynamics: str, instrument: str = "flute") -> np.ndarray:
    facts = {"instrument": instrument, "dynamics": dynamics, "parts": 1}
    return render.render(clips.Clip("a", ((0.0, 1.0, pitch, 0),), (), facts), 1.0, RATE_HZ)


@pytest.mark.parametrize("pitch", [60, 69, 76, 81])
def test_a_rendered_note_has_the_frequency_of_its_pitch(pitch):
    spectrum = np.abs(np.fft.rfft(_tone(pitch, "medium") * np.hanning(RATE_HZ), 8 * RATE_HZ))
    hertz = 440 * 2 ** ((pitch - 69) / 12)
    peaks = [
        np.argmax(spectrum[round(8 * hertz * n * 0.94) : round(8 * hertz * n * 1.06)]) / 8
        + hertz * n * 0.94
        for n in (1, 2)
    ]
    assert peaks[0] == pytest.approx(hertz, rel=0.01) and peaks[1] == pytest.approx(
        2 * hertz, rel=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTRUMENTS)
def test_the_soundfont_holds_every_note_of_an_instruments_range(name):
    """It has no alto saxophone at E4 and no tin whistle above G5, which is why neither is in the table."""
    row = INSTRUMENTS[name]
    for part, pitch in itertools.product(range(len(row.programs)), range(row.low, row.high + 1)):
        facts = {"instrument": name, "dynamics": "medium", "parts": len(row.programs)}
        clip = clips.Clip("a", ((0.0, 0.8, pitch, part),), (), facts)
        assert np.abs(render.render(clip, 1.0, RATE_HZ).astype(np.int32)).max() > 300, pitch


def _sounding(clip: clips.Clip) -> list[tuple[int, float, float, int]]:
    """(part, start s, end s, pitch) of each note of the clip's MIDI file, in which a pitch ends at its first end."""
    events, sounding, notes = [], {}, []
    for track in mido.MidiFile(file=io.BytesIO(render._midi(clip, SECONDS))).tracks[1:]:
        at = 0.0
        for message in track:
            at += message.time / 1920  # 960 ticks a beat at 120 beats a minute
            events += (
                [(at, message)]
                if message.type in ("note_on", "note_off") and message.channel != 9
                else []
            )
    for at, message in events:
        key = message.channel, message.note
        if key in sounding:
            notes.append((message.channel, sounding.pop(key), at, message.note))
        if message.type == "note_on" and message.velocity:
            sounding[key] = at
    return sorted(notes)


def test_each_note_of_a_clip_sounds_as_long_as_its_record_says(drawn):
    quartet = scores.parse("haydn/opus74no1/movement1.mxl")
    instruments = ("string orchestra", "organ")
    for clip in drawn + [
        clips.draw_clip(quartet, "train", index, 0, SECONDS, instruments) for index in range(20)
    ]:
        told = sorted(
            (part, onset, onset + duration, pitch) for onset, duration, pitch, part in clip.notes
        )
        sounding = _sounding(clip)
        assert [(part, pitch) for part, _, _, pitch in sounding] == [
            (part, pitch) for part, _, _, pitch in told
        ]
        np.testing.assert_allclose(np.array(sounding)[:, 1:3], np.array(told)[:, 1:3], atol=1e-3)


def test_a_pitch_sounds_until_the_later_end():
    """Of a long note and a short one on the same pitch, as two voices of a part may have them."""
    played = scores.struck_anew([(0.0, 0.9, 72), (0.1, 0.1, 72)])
    facts = {"instrument": "flute", "dynamics": "medium", "parts": 1}
    sound = (
        render.render(
            clips.Clip("a", tuple((*note, 0) for note in played), (), facts), 1.0, RATE_HZ
        )
        / 32767
    )
    late, early = (
        np.sqrt(np.mean(sound[int(at * RATE_HZ) : int((at + 0.1) * RATE_HZ)] ** 2))
        for at in (0.7, 0.1)
    )
    assert late > 0.3 * early


def test_loudness_is_what_the_word_says():
    for dynamics, level in {"quiet": -34, "medium": -27, "loud": -20}.items():
        samples = _tone(72, dynamics) / 32767
        moments = [
            np.sqrt(np.mean(samples[at : at + 6400] ** 2)) for at in range(0, RATE_HZ - 6400, 100)
        ]
        assert 20 * np.log10(max(moments)) == pytest.approx(level, abs=0.05)


def test_no_clip_is_silent_or_clipped(built):
    for split in ("train", "validation", "test"):
        for example in tfds.builder_from_directory(built.data_dir).as_data_source()[split]:
            assert 300 < np.abs(example["audio"].astype(np.int32)).max() < 32767


# Builds.


def test_random_access_gives_what_was_drawn(built):
    source = tfds.builder_from_directory(built.data_dir).as_data_source()
    assert {split: len(source[split]) for split in source} == {
        "train": 20,
        "validation": 3,
        "test": 3,
    }
    example = source["train"][7]
    facts = json.loads(example["attributes"])
    index = int(example["id"].decode().removeprefix("train-"))
    clip = clips.draw_clip(scores.parse(facts["piece"]), "train", index, 0, 0.5, FEW)
    assert clip.attributes == facts
    assert [list(note) for note in clip.notes] == json.loads(example["notes"])
    assert example["audio"].dtype == np.int16
    np.testing.assert_array_equal(example["audio"], render.render(clip, 0.5, RATE_HZ))


def test_bytes_are_the_same_in_another_process_with_one_worker(built, tmp_path, processes):
    again = f"""
import sys, joblib
sys.path.insert(0, {str(pathlib.Path(score_clips_dataset_builder.__file__).parents[2])!r})
joblib.cpu_count = lambda: 1
from data.score_clips.score_clips_dataset_builder import Builder, ScoreClipsConfig
config = ScoreClipsConfig(name="built", **{built.info.metadata!r})
Builder(config=config, data_dir={str(tmp_path)!r}).download_and_prepare(file_format="array_record")
"""
    processes.run(
        [sys.executable, "-c", again], check=True, env=os.environ | {"PYTHONHASHSEED": "1"}
    )
    again = tmp_path / "score_clips" / "built" / str(Builder.VERSION)
    assert _bytes(again) == _bytes(built.data_dir)
    assert content.read(again) == content.read(built.data_dir) == content.of_splits(built)
    assert set(content.read(again)) == {"train", "validation", "test"}


def test_a_set_says_what_its_clips_contain(built):
    assert "GPL-2" in (pathlib.Path(built.data_dir) / "LICENSE").read_text()
    data_dir = str(pathlib.Path(built.data_dir).parents[2])
    data = Clips({"score_clips/built": 1.0}, data_dir, RATE_HZ)
    assert data.licences() == {"score_clips/built": score_clips_dataset_builder.LICENCE}


def test_an_interrupted_build_goes_on_where_it_was(built, tmp_path, monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)

    def interrupted(items, label, total):
        for number, item in enumerate(items):
            if "train" in label and number == 12:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(score_clips_dataset_builder, "Progress", interrupted)
        _build(_config("built"), tmp_path)
    cache = tmp_path / "score_clips" / "built" / "cache"
    kept = list(
        (cache / str(Builder.VERSION)).rglob("output.pkl")
    )  # of no other version, whose clips were others
    assert kept and not (tmp_path / "score_clips" / "built" / str(Builder.VERSION)).exists()

    parsed, rendered = [], []
    parse, play = scores.parse, render.render
    monkeypatch.setattr(scores, "parse", lambda name: parsed.append(name) or parse(name))
    monkeypatch.setattr(
        render, "render", lambda clip, *rest: rendered.append(clip.id) or play(clip, *rest)
    )
    assert _bytes(_build(_config("built"), tmp_path).data_dir) == _bytes(built.data_dir)
    assert not parsed and "train-000000" not in rendered and "train-000019" in rendered
    assert not cache.exists()


def test_a_changed_config_under_an_old_name_is_refused(built):
    with pytest.raises(ValueError, match="built from another config"):
        _build(_config("built", seed=1), pathlib.Path(built.data_dir).parents[2])


def test_a_full_disk_is_told_before_the_build(tmp_path, monkeypatch):
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
def test_bad_configs_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        _config("bad", **{field: value})


def test_shipped_configs():
    hours = {
        config.name: (config.train + config.validation + config.test) * config.clip_seconds / 3600
        for config in Builder.BUILDER_CONFIGS
    }
    assert hours["demo"] == pytest.approx(6600 * 5 / 3600) and hours["hours50"] == pytest.approx(
        50.0
    )
    assert [(c.train, c.validation, c.test) for c in Builder.BUILDER_CONFIGS[:2]] == [
        (8, 8, 16),
        (640, 64, 96),
    ]
