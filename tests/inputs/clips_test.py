"""Clips, crops and ratings of the ramps that the builder wrote: sample n is n - 200, at 100 Hz."""

import collections
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import seqio

from musicrl_jax.inputs import order, pieces
from musicrl_jax.inputs.clips import Clips, Ratings

RAMP = (np.arange(400) - 200).astype(np.float32) / 32768


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def walk(mixture):
    """Returns the first 150 batches of 4 clips."""
    return take(mixture, 150)


def take(clips, steps, **options):
    return list(itertools.islice(clips.batches("train", 4, seed=3, **options), steps))


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def ids_of(batches):
    return [i for batch in batches for i in batch["id"]]


def ids_in(mixture, name, split="train"):
    return [text["id"] for text in mixture.texts(name, split)]


def test_whole_clips_are_the_samples_that_were_written(ten):
    batch = next(ten.batches("train", 3, seed=0))
    assert set(batch) == {"audio"} and batch["audio"].dtype == np.float32
    np.testing.assert_array_equal(batch["audio"], np.tile(RAMP, (3, 1)))


@pytest.mark.parametrize("step", [1, 33])
def test_a_resumed_run_reads_the_batches_of_an_uninterrupted_one(mixture, walk, step):
    assert_equal(take(mixture, 7, start_step=step), walk[step : step + 7])


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1], [0, 3]])
def test_a_host_reads_its_rows_of_each_batch(mixture, walk, rows):
    parts = take(mixture, 12, start_step=5, rows=np.array(rows))
    for part, batch in zip(parts, walk[5:17], strict=True):
        assert part.keys() == batch.keys()
        for name, x in batch.items():
            np.testing.assert_array_equal(part[name], x[rows])


def test_other_seeds_give_other_orders_and_crops(mixture, walk):
    other = next(mixture.batches("train", 4, seed=1))
    assert list(walk[0]["id"]) != list(other["id"])
    assert not np.array_equal(walk[0]["audio"][:, 0], other["audio"][:, 0])


def test_clips_come_in_the_order_of_example_at(mixture, walk):
    names = [ids_in(mixture, name) for name in ("ramp/five", "ramp/ten")]
    places = zip(*order.example_at(3, np.arange(48), [5, 10], [0.5, 1.0]), strict=True)
    assert ids_of(walk[:12]) == [names[component][index] for component, index in places]


def test_mixture_rates_are_exact(walk):
    ids = ids_of(walk[:15])
    from_five = np.array([i.startswith("five") for i in ids]).reshape(20, 3)
    assert np.all(from_five.sum(axis=1) == 1)
    # 40 examples of the ten clips are four epochs of them.
    assert set(collections.Counter(i for i in ids if i.startswith("ten")).values()) == {4}


def test_crops_lie_inside_the_clip_with_uniform_starts(walk):
    audio = np.concatenate([batch["audio"] for batch in walk])
    starts = np.round(audio[:, 0] * 32768).astype(int) + 200
    np.testing.assert_array_equal(audio, RAMP[starts[:, None] + np.arange(150)])
    # Uniform over 0..250: mean 125, standard deviation sqrt((251^2 - 1) / 12) = 72.5.
    assert starts.min() < 5 and starts.max() > 245 and starts.max() <= 250
    assert abs(starts.mean() - 125) < 5 * 72.5 / np.sqrt(len(starts))
    assert abs(starts.std() - 72.5) < 4


def test_an_epoch_holds_every_clip_once_and_its_last_batch_is_smaller(mixture):
    batches = list(mixture.batches("train", 4, seed=0, epochs=2))
    assert [len(batch["id"]) for batch in batches] == [4] * 7 + [2]
    ids = ids_of(batches)
    assert len(set(ids[:15])) == 15 and sorted(ids[:15]) == sorted(ids[15:])
    assert_equal(list(mixture.batches("train", 4, seed=0, epochs=2, start_step=6)), batches[6:])
    assert list(mixture.batches("train", 4, seed=0, epochs=1, start_step=9)) == []


def test_captions_become_the_pieces_of_the_python_tokenizer(mixture, walk):
    assert walk[0]["text"].dtype == np.int32
    vocabulary = pieces.content(mixture.vocabulary)
    for batch in walk[:4]:
        text = pieces.encode(vocabulary, list(batch["caption"]), 12)
        np.testing.assert_array_equal(batch["text"], text)
        assert all("größer" in caption for caption in batch["caption"])


def test_captions_and_attributes_belong_to_their_clips(mixture):
    assert [mixture.count(split) for split in ("train", "validation", "test")] == [15, 3, 12]
    captions, attributes = mixture.captions("test"), mixture.attributes("test")
    ids = [i for name in ("ramp/five", "ramp/ten") for i in ids_in(mixture, name, "test")]
    assert list(attributes) == ids
    for caption, (i, attribute) in zip(captions, attributes.items(), strict=True):
        number = attribute["number"]
        assert number == int(i.rsplit("-", 1)[1])
        assert f" {('slow', 'fast', 'lively')[number % 3]} jig" in caption
    assert mixture.licences() == {}  # the sets state none


def test_a_registered_task_is_an_ordinary_seqio_task(mixture, walk):
    task = seqio.get_mixture_or_task("ramp.ten")
    names = ids_in(mixture, "ramp/ten")
    for shuffle, indices in ((True, order.permutation(5, 0, 0, 10)), (False, range(10))):
        dataset = task.get_dataset({"audio": 150, "text": 12}, "train", shuffle=shuffle, seed=5)
        ids = [example["id"].decode() for example in dataset.as_numpy_iterator()]
        assert ids == [names[i] for i in indices]


@pytest.mark.parametrize(
    ("change", "split", "error", "message"),
    [
        ({"datasets": {}}, "train", ValueError, "datasets is empty"),
        ({"datasets": {"ramp/x": 1.0}}, "train", FileNotFoundError, "'ramp/x'.*musicrl build"),
        ({"datasets": {"ramp/ten": 0.0}}, "train", ValueError, "must all be positive"),
        ({"sample_rate_hz": 16000}, "train", ValueError, "16000 is not that of .*, which is 100"),
        ({"crop_seconds": 4.01}, "train", ValueError, r"crop_seconds 4.01 .* at most 4.0"),
        ({"crop_seconds": 0.0}, "train", ValueError, "crop_seconds 0.0 must be above 0"),
        ({"vocabulary": "/no/v.model"}, "train", FileNotFoundError, "vocabulary: '/no/v.model'"),
        ({}, "trian", ValueError, r"split 'trian' has no clips.*'test', 'train', 'validation'"),
        ({"datasets": {"ramp/five": 1.0}}, "validation", ValueError, "'validation' has no clips"),
    ],
)
def test_wrong_settings_are_refused_before_the_first_batch(mixture, change, split, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(mixture, **change).batches(split, 2, seed=0)


def test_a_full_batch_larger_than_the_split_is_refused(mixture):
    message = "batch_size 16 is more than the 15 clips of split 'train'"
    with pytest.raises(ValueError, match=message):
        mixture.batches("train", 16, seed=0)
    (batch,) = mixture.batches("train", 16, seed=0, epochs=1)
    assert batch["audio"].shape == (15, 150)
    with pytest.raises(ValueError, match="batch_size 0"):
        mixture.batches("train", 0, seed=0)


@pytest.fixture
def table(tmp_path):
    """Writes a table of ratings and returns its path."""

    def write(text, encoding="utf-8"):
        path = tmp_path / "ratings.csv"
        path.write_text(text, encoding=encoding)
        return str(path)

    return write


def test_ratings_have_the_audio_and_the_score_of_their_row(data_dir, table):
    clips = Clips({"ramp/ten": 1.0, "ramp/five": 1.0}, data_dir, 100)
    rows = [
        "ten-train-0,ann,1",
        "ten-train-0,bob,2.5",
        "five-train-4,ann,5",
        "ten-test-1,cy,3",
        '"ten-train-9",bob,4',
    ]
    text = "note,clip,rater,score\n" + "".join(f"x,{row}\n" for row in rows)
    ratings = Ratings(clips, table(text))
    assert [ratings.count(split) for split in ("train", "validation", "test")] == [4, 0, 1]
    (batch,) = ratings.batches("train", 8, seed=0, epochs=1)
    # No objective reads the rater.
    assert set(batch) == {"audio", "score"}
    assert sorted(batch["score"].tolist()) == [1, 2.5, 4, 5] and batch["score"].dtype == np.float32
    np.testing.assert_array_equal(batch["audio"], np.tile(RAMP, (4, 1)))
    batches = list(itertools.islice(ratings.batches("train", 3, seed=1), 6))
    resumed = ratings.batches("train", 3, seed=1, start_step=4)
    assert_equal(list(itertools.islice(resumed, 2)), batches[4:])
    with pytest.raises(ValueError, match="more than the 0 ratings of split 'validation'"):
        ratings.batches("validation", 1, seed=0, epochs=1)


HEADER = "clip,rater,score\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip,rater\nten-train-0,ann\n", "line 1, column 'score': the column is missing; there"),
        (HEADER, "no rows: give at least one"),
        ("", "line 1, column 'clip': the column is missing"),
        (
            f"{HEADER}ten-train-0,ann,3\nten-train-77,ann,3\n",
            "line 3, column 'clip': no clip 'ten-train-77'",
        ),
        (
            f"{HEADER}ten-train-0,ann,3\n\nten-train-0,ann,5.5\n",
            "line 4, column 'score': '5.5' is no number from 1 to 5$",
        ),
        (f"{HEADER}ten-train-0,ann,0\n", "line 2, column 'score': '0'"),
        (f"{HEADER}ten-train-0,ann,nan\n", "line 2, column 'score': 'nan'"),
        (f"{HEADER}ten-train-0,ann,good\n", "line 2, column 'score': 'good'"),
        (f"{HEADER}ten-train-0,ann,0_3\n", "line 2, column 'score': '0_3'"),
        (f"{HEADER}ten-train-0,ann\n", "line 2, column 'score': the row ends before it"),
        (f"{HEADER}ten-train-0,ann,4,5\n", "line 2, column 4: 4 values for 3 columns: put quotes"),
        (f'{HEADER}ten-train-0,ann,"4,5"\n', "line 2, column 'score': '4,5' .*; write a point"),
        (
            f'{HEADER}ten-train-0,"ann,4\nten-train-1,bob,4\n',
            "line 2, column 'rater': the quote that opens",
        ),
    ],
)
def test_a_wrong_table_of_ratings_is_refused_with_its_line(ten, table, text, message):
    with pytest.raises(ValueError, match=message):
        Ratings(ten, table(text)).batches("train", 1, seed=0)


def test_a_table_of_ratings_must_be_a_csv_file_in_utf8(ten, table):
    path = table(f"{HEADER}ten-train-0,Jürgen,3\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"ratings.csv, line 2: byte 0xfc is not UTF-8: save it"):
        Ratings(ten, path).count("train")
    with pytest.raises(FileNotFoundError, match=r"ratings_csv: '/no/table.csv' is no .csv file"):
        Ratings(ten, "/no/table.csv").count("train")
    with pytest.raises(ValueError, match=r"ratings_csv: '.*' is no .csv file"):
        Ratings(ten, str(Path(path).parent)).count("train")
