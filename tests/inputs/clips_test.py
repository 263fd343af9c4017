"""Clips, crops and ratings, against the ramps that the builder wrote: sample n is n - 200, at 100 Hz."""

import collections
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import seqio

from musicrl_jax.inputs import order, pieces, tasks
from musicrl_jax.inputs.clips import Clips, Ratings

RAMP = (np.arange(400) - 200).astype(np.float32) / 32768


@pytest.fixture
def mixture(data_dir, vocabulary_path):
    return Clips(
        {"ramp/ten": 1.0, "ramp/five": 0.5},
        data_dir,
        sample_rate_hz=100,
        crop_seconds=1.5,
        vocabulary=vocabulary_path,
        text_length=12,
        with_captions=True,
    )


def take(clips, steps, **options):
    return list(itertools.islice(clips.batches("train", 4, seed=3, **options), steps))


def equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_whole_clips_are_the_samples_that_were_written(data_dir):
    batch = next(Clips({"ramp/ten": 1.0}, data_dir, 100).batches("train", 3, seed=0))
    assert set(batch) == {"audio"} and batch["audio"].dtype == np.float32
    np.testing.assert_array_equal(batch["audio"], np.tile(RAMP, (3, 1)))


def test_a_resumed_run_reads_what_the_uninterrupted_one_would_have(mixture):
    walk = take(mixture, 40)
    for step in (1, 33):
        equal(take(mixture, 40 - step, start_step=step), walk[step:])


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1], [0, 3]])
def test_a_host_reads_its_rows_of_each_batch(mixture, rows):
    found = take(mixture, 12, start_step=5, rows=np.array(rows))
    equal(
        found,
        [{name: x[rows] for name, x in batch.items()} for batch in take(mixture, 12, start_step=5)],
    )


def test_other_seeds_give_other_orders_and_crops(mixture):
    a, b = (next(mixture.batches("train", 8, seed=seed)) for seed in (0, 1))
    assert list(a["id"]) != list(b["id"])
    assert not np.array_equal(a["audio"][:, 0], b["audio"][:, 0])


def test_order_is_the_one_laid_down(mixture):
    ids = [i for batch in take(mixture, 12) for i in batch["id"]]
    sets = ["ramp/five", "ramp/ten"]
    names = [[text["id"] for text in tasks.texts(name, mixture.data_dir, "train")] for name in sets]
    places = zip(*order.example_at(3, np.arange(48), [5, 10], [0.5, 1.0]), strict=True)
    assert ids == [names[component][index] for component, index in places]


def test_mixture_rates_are_exact(mixture):
    ids = [i for batch in take(mixture, 15) for i in batch["id"]]
    from_five = np.array([i.startswith("five") for i in ids]).reshape(20, 3)
    assert np.all(from_five.sum(axis=1) == 1)
    # 40 examples of the ten clips are four epochs of them.
    assert set(collections.Counter(i for i in ids if i.startswith("ten")).values()) == {4}


def test_crops_lie_inside_the_clip_and_start_everywhere(mixture):
    audio = np.concatenate([batch["audio"] for batch in take(mixture, 500)])
    starts = np.round(audio[:, 0] * 32768).astype(int) + 200
    for crop, start in zip(audio, starts, strict=True):
        np.testing.assert_array_equal(crop, RAMP[start : start + 150])
    # Uniform over 0..250: mean 125, standard deviation sqrt((251^2 - 1) / 12) = 72.5.
    assert starts.min() < 5 and starts.max() > 245 and starts.max() <= 250
    assert abs(starts.mean() - 125) < 5 * 72.5 / np.sqrt(len(starts))
    assert abs(starts.std() - 72.5) < 4


def test_an_epoch_holds_every_clip_once_and_its_last_batch_is_smaller(mixture):
    batches = list(mixture.batches("train", 4, seed=0, epochs=1))
    assert [len(batch["id"]) for batch in batches] == [4, 4, 4, 3]
    assert len({i for batch in batches for i in batch["id"]}) == 15
    twice = [i for batch in mixture.batches("train", 4, seed=0, epochs=2) for i in batch["id"]]
    assert set(collections.Counter(twice[15:]).values()) == {1} and set(twice) == set(twice[:15])
    equal(list(mixture.batches("train", 4, seed=0, epochs=1, start_step=2)), batches[2:])
    assert list(mixture.batches("train", 4, seed=0, epochs=1, start_step=9)) == []


def test_captions_arrive_as_the_pieces_of_the_python_tokenizer(mixture):
    batch = next(mixture.batches("train", 15, seed=0))
    assert batch["text"].dtype == np.int32 and batch["text"].shape == (15, 12)
    np.testing.assert_array_equal(
        batch["text"], pieces.encode(pieces.content(mixture.vocabulary), list(batch["caption"]), 12)
    )
    assert all("größer" in caption for caption in batch["caption"])


def test_counts_captions_and_attributes(mixture):
    assert [mixture.count(split) for split in ("train", "validation", "test")] == [15, 3, 12]
    captions, attributes = mixture.captions("test"), mixture.attributes("test")
    ids = [
        text["id"]
        for name in ("ramp/five", "ramp/ten")
        for text in tasks.texts(name, mixture.data_dir, "test")
    ]
    assert list(attributes) == ids
    numbers = [known["number"] for known in attributes.values()]
    assert [int(name.rsplit("-", 1)[1]) for name in ids] == numbers
    for caption, number in zip(captions, numbers, strict=True):
        assert f" {('slow', 'fast', 'lively')[number % 3]} jig" in caption


def test_a_set_that_says_nothing_of_its_licence_is_left_out(mixture):
    assert mixture.licences() == {}


def test_a_registered_task_is_an_ordinary_seqio_task(mixture):
    next(mixture.batches("train", 4, seed=0))
    task = seqio.get_mixture_or_task("ramp.ten")
    dataset = task.get_dataset({"audio": 150, "text": 12}, "train", shuffle=True, seed=5)
    ids = [example["id"].decode() for example in dataset.as_numpy_iterator()]
    names = [text["id"] for text in tasks.texts("ramp/ten", mixture.data_dir, "train")]
    assert ids == [names[i] for i in order.permutation(5, 0, 0, 10)]
    natural = task.get_dataset({"audio": 150, "text": 12}, "train", shuffle=False)
    assert [example["id"].decode() for example in natural.as_numpy_iterator()] == names


@pytest.mark.parametrize(
    ("change", "split", "error", "message"),
    [
        ({"datasets": {}}, "train", ValueError, "datasets is empty"),
        (
            {"datasets": {"ramp/none": 1.0}},
            "train",
            FileNotFoundError,
            r"'ramp/none'.*musicrl build",
        ),
        ({"datasets": {"ramp/ten": 0.0}}, "train", ValueError, "must all be positive"),
        (
            {"sample_rate_hz": 16000},
            "train",
            ValueError,
            r"sample_rate_hz 16000 is not that of 'ramp/.*', which is 100",
        ),
        ({"crop_seconds": 4.01}, "train", ValueError, r"crop_seconds 4.01 .* at most 4.0"),
        ({"crop_seconds": 0.0}, "train", ValueError, "crop_seconds 0.0 must be above 0"),
        (
            {"vocabulary": "/no/vocabulary.model"},
            "train",
            FileNotFoundError,
            "vocabulary: '/no/vocabulary.model'",
        ),
        ({}, "trian", ValueError, r"split 'trian' has no clips.*'test', 'train', 'validation'"),
        (
            {"datasets": {"ramp/five": 1.0}},
            "validation",
            ValueError,
            "split 'validation' has no clips",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_first_batch(
    mixture, change, split, error, message
):
    with pytest.raises(error, match=message):
        dataclasses.replace(mixture, **change).batches(split, 2, seed=0)


def test_a_batch_larger_than_the_split_is_refused_unless_the_data_end(mixture):
    with pytest.raises(
        ValueError, match="batch_size 16 is more than the 15 clips of split 'train'"
    ):
        mixture.batches("train", 16, seed=0)
    (batch,) = mixture.batches("train", 16, seed=0, epochs=1)
    assert batch["audio"].shape == (15, 150)
    with pytest.raises(ValueError, match="batch_size 0"):
        mixture.batches("train", 0, seed=0)


@pytest.fixture
def table(tmp_path):
    def write(text):
        path = tmp_path / "ratings.csv"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_ratings_carry_the_audio_and_score_of_their_row(data_dir, table):
    clips = Clips({"ramp/ten": 1.0, "ramp/five": 1.0}, data_dir, 100)
    rows = [
        "ten-train-0,ann,1",
        "ten-train-0,bob,2.5",
        "five-train-4,ann,5",
        "ten-test-1,cy,3",
        '"ten-train-9",bob,4',
    ]
    ratings = Ratings(
        clips, table("note,clip,rater,score\n" + "".join(f"x,{row}\n" for row in rows))
    )
    assert (ratings.count("train"), ratings.count("test"), ratings.count("validation")) == (4, 1, 0)
    (batch,) = ratings.batches("train", 8, seed=0, epochs=1)
    assert set(batch) == {"audio", "score"}  # no objective reads who rated
    assert sorted(batch["score"].tolist()) == [1, 2.5, 4, 5] and batch["score"].dtype == np.float32
    np.testing.assert_array_equal(batch["audio"], np.tile(RAMP, (4, 1)))
    walk = list(itertools.islice(ratings.batches("train", 3, seed=1), 6))
    equal(list(itertools.islice(ratings.batches("train", 3, seed=1, start_step=4), 2)), walk[4:])
    with pytest.raises(ValueError, match="more than the 0 ratings of split 'validation'"):
        ratings.batches("validation", 1, seed=0, epochs=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "clip,rater\nten-train-0,ann\n",
            "line 1, column 'score': the column is missing; there are",
        ),
        ("clip,rater,score\n", "no rows: give at least one"),
        ("", "line 1, column 'clip': the column is missing"),
        (
            "clip,rater,score\nten-train-0,ann,3\nten-train-77,ann,3\n",
            "line 3, column 'clip': no clip 'ten-train-77'",
        ),
        (
            "clip,rater,score\nten-train-0,ann,3\n\nten-train-0,ann,5.5\n",
            "line 4, column 'score': '5.5' is no number from 1 to 5$",
        ),
        ("clip,rater,score\nten-train-0,ann,0\n", "line 2, column 'score': '0'"),
        ("clip,rater,score\nten-train-0,ann,nan\n", "line 2, column 'score': 'nan'"),
        ("clip,rater,score\nten-train-0,ann,good\n", "line 2, column 'score': 'good'"),
        ("clip,rater,score\nten-train-0,ann,0_3\n", "line 2, column 'score': '0_3'"),
        ("clip,rater,score\nten-train-0,ann\n", "line 2, column 'score': the row ends before it"),
        (
            "clip,rater,score\nten-train-0,ann,4,5\n",
            "line 2, column 4: 4 values for 3 columns: put quotes",
        ),
        (
            'clip,rater,score\nten-train-0,ann,"4,5"\n',
            "line 2, column 'score': '4,5' .*; write a point, not a comma",
        ),
        (
            'clip,rater,score\nten-train-0,"ann,4\nten-train-1,bob,4\n',
            "line 2, column 'rater': the quote that opens",
        ),
    ],
)
def test_a_wrong_table_of_ratings_is_refused_with_its_line(data_dir, table, text, message):
    with pytest.raises(ValueError, match=message):
        Ratings(Clips({"ramp/ten": 1.0}, data_dir, 100), table(text)).batches("train", 1, seed=0)


def test_a_table_of_ratings_that_is_not_utf8_is_told_by_file_and_line(data_dir, table):
    path = table("clip,rater,score\n")
    Path(path).write_bytes("clip,rater,score\nten-train-0,Jürgen,3\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"ratings.csv, line 2: byte 0xfc is not UTF-8: save it as UTF-8"
    ):
        Ratings(Clips({"ramp/ten": 1.0}, data_dir, 100), path).count("train")


def test_a_missing_table_of_ratings_is_refused(data_dir):
    with pytest.raises(FileNotFoundError, match=r"ratings_csv: '/no/table.csv' is no .csv file"):
        Ratings(Clips({"ramp/ten": 1.0}, data_dir, 100), "/no/table.csv").count("train")
