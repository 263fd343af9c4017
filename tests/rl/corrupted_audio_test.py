"""The shipped quality model on clips of unseen pieces that SciPy damaged."""

from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.signal import butter, sosfilt

from data.score_clips.score_clips_dataset_builder import Builder, ScoreClipsConfig
from musicrl_jax import pack
from musicrl_jax.inputs.clips import Clips
from musicrl_jax.models.rewards import Quality

SHIPPED = Path(__file__).parents[2] / "data/pretrained/demo"
PIECES, RATE_HZ = 100, 16_000


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Returns f32 [100, N]: clips of 5 s, of pieces whose openings belong to the test split."""
    folder = str(tmp_path_factory.mktemp("clips"))
    config = ScoreClipsConfig(
        name="held_out", train=1, validation=1, test=PIECES, clip_seconds=5.0, pieces=10 * PIECES
    )
    Builder(data_dir=folder, config=config, file_format="array_record").download_and_prepare()
    clips = Clips({"score_clips/held_out": 1.0}, folder, RATE_HZ, with_captions=True)
    (batch,) = clips.batches("test", PIECES, seed=0, epochs=1)
    assert len({clips.attributes("test")[name]["piece"] for name in batch["id"]}) == PIECES
    return batch["audio"]


@pytest.fixture(scope="module")
def mos(clean):
    """Returns a function that scores clips, and the scores of the clean ones."""
    model = pack.load(str(SHIPPED), "quality")
    score = jax.jit(Quality(model.config).apply)

    def rate(wav):
        return np.asarray(score(model.variables, np.clip(wav, -1, 1).astype(np.float32)))

    return rate, rate(clean)


def level(wav):
    return np.sqrt(np.mean(np.square(wav), axis=1, keepdims=True))


def peak(wav):
    return np.abs(wav).max(axis=1, keepdims=True)


NOISE = np.random.default_rng(0).normal(size=(PIECES, 5 * RATE_HZ))
CORRUPTED = {
    "silence": np.zeros_like,
    "noise": lambda wav: NOISE * level(wav),
    "clipping": lambda wav: 5 * np.clip(wav, -0.1 * peak(wav), 0.1 * peak(wav)),
    "band limit": lambda wav: sosfilt(butter(8, 2000, fs=RATE_HZ, output="sos"), wav),
    "10 dB": lambda wav: wav + NOISE * level(wav) * 10**-0.5,
}


@pytest.mark.exactness(22)
@pytest.mark.parametrize("corruption", CORRUPTED)
def test_the_clean_clip_ranks_first(clean, mos, corruption):
    rate, clean_scores = mos
    assert np.mean(clean_scores > rate(CORRUPTED[corruption](clean))) >= 0.95
