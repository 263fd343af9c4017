"""Files that `generate` writes, with a system whose clips are given."""

import dataclasses
import functools
import hashlib
import json
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pyloudnorm
import pytest
import soundfile
from multihost import run_on_hosts

from musicrl_jax import generate
from musicrl_jax.serving import system_player
from musicrl_jax.systems.system import MusicSystem, SampledTokens

RATE = 16000
TONE = 0.02 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)


@dataclasses.dataclass(frozen=True)
class FixedSystem(MusicSystem):
    """Draws the clip `wav`, f32 [C, N], plus a constant of its prompt and key.

    Attributes:
      wav: the clip.
      noise: the largest constant.
      batches: B of each batch, as it was traced.
    """

    PARTS: ClassVar = {}
    sample_rate_hz = RATE
    frame_seconds = 0.04
    frame_tokens = 2
    wav: np.ndarray
    noise: float = 0.0
    batches: list[int] = dataclasses.field(default_factory=list)

    @property
    def channels(self):
        return len(self.wav)

    @classmethod
    def from_models(cls, models):
        raise NotImplementedError

    def read(self, prompts):
        return {"sum": np.int32([sum(prompt.encode()) % 1000 for prompt in prompts])}

    def condition(self, frozen, text):
        return text["sum"]

    def init(self, key):
        return {}

    def sample(self, policy, condition, keys, length, sampling, beginning=None):
        self.batches.append(len(condition))
        tokens = jax.vmap(lambda key: jax.random.randint(key, (length,), 0, 1000))(keys)
        tokens = (tokens + condition[:, None]) % 1000
        return SampledTokens(tokens, tokens.astype(jnp.float32), None)

    def distributions(self, policy, condition, sampled, sampling):
        raise NotImplementedError

    def decode(self, frozen, codes):
        shift = self.noise / 1000 * codes[:, 0].astype(jnp.float32)
        return jnp.repeat(jnp.asarray(self.wav)[None], len(codes), 0) + shift[:, None, None]


def use(monkeypatch, samples=TONE, clip_seconds=2.0, noise=0.0):
    """Lets each clip be `samples`, cut or repeated to two seconds; returns the system."""
    channels = np.atleast_2d(np.asarray(samples, np.float32))
    system = FixedSystem(np.stack([np.resize(channel, 2 * RATE) for channel in channels]), noise)
    loaded = types.SimpleNamespace(
        system=system, policy={}, frozen={}, hashes={}, clip_seconds=clip_seconds
    )
    monkeypatch.setattr(system_player.folders, "load", lambda _: loaded)
    return system


@functools.cache
def tone_player(top_k):
    """Returns a player of a tone, which is compiled once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch)
        return system_player.SystemPlayer("run/rl", top_k)


@pytest.fixture
def tone(monkeypatch):
    """Lets each clip be a tone of two seconds."""
    monkeypatch.setattr(generate, "SystemPlayer", lambda folder, top_k: tone_player(top_k))


def read_tags(path):
    """Returns (the settings in a file's comment, its title)."""
    with soundfile.SoundFile(path) as file:
        return json.loads(file.comment), file.title


def test_samples_beyond_full_scale_are_clipped(monkeypatch, tmp_path):
    samples = np.array([0.0, 0.5, 1.0, 1.7, -1.0, -3.0, -0.25, 0.1])
    use(monkeypatch, samples)
    (path,) = generate.generate("run/rl", "a reel", out=str(tmp_path / "a.wav"), loudness_lufs=None)
    wav, rate_hz = soundfile.read(path)
    assert rate_hz == RATE and len(wav) == 2 * RATE
    np.testing.assert_allclose(wav[:8], np.clip(samples, -1, 1), atol=1 / 32000)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_not_written(monkeypatch, tmp_path, value):
    use(monkeypatch, [0.0, value, 0.5, 0.1])
    with pytest.raises(
        ValueError,
        match=r"the clip for 'a reel' has samples, or a reward, that are not finite: the d",
    ):
        generate.generate("run/rl", "a reel", out=str(tmp_path / "a.wav"))
    assert not list(tmp_path.iterdir())


def test_a_clip_has_the_length_that_the_policy_was_trained_on(monkeypatch, tmp_path, capsys):
    """An unrecorded length is assumed, and the command says so."""
    system = use(monkeypatch)
    (path,) = generate.generate("run/rl", "a reel", out=str(tmp_path))
    assert read_tags(path)[0]["seconds"] == 2.0 and "assumed" not in capsys.readouterr().out
    (path,) = generate.generate("run/rl", "a reel", out=str(tmp_path / "long"), clip_seconds=50)
    assert soundfile.info(path).frames == 50 * RATE and set(system.batches) == {8}  # one a device
    assert (
        "clip_seconds=50 is more than the 2 s of the model's clips: drawn in 49 windows"
        in capsys.readouterr().out
    )
    use(monkeypatch, clip_seconds=None)
    monkeypatch.setattr(system_player, "UNRECORDED_SECONDS", 2.0)
    generate.generate("run/old", "a reel", out=str(tmp_path / "old"))
    words = "run/old does not record the length of the clips that it was trained on: 2 s is assumed"
    assert words in capsys.readouterr().out


def test_clips_are_drawn_together_and_written_batch_by_batch(tone, monkeypatch, tmp_path):
    """Eight devices draw one row each, so that ten prompts are two batches."""
    save, saved = generate._save, []

    def recorded_save(clips, *rest):
        saved.append(len(clips))
        save(clips, *rest)

    monkeypatch.setattr(generate, "_save", recorded_save)
    prompts = [f"reel {number}" for number in range(10)]
    paths = generate.generate("run/rl", prompts, out=str(tmp_path))
    assert saved == [8, 2] and len(paths) == len(list(tmp_path.iterdir())) == 10


def draw_ten(monkeypatch, out):
    """Draws ten clips; returns their paths and the rows of each batch on this host's devices."""
    use(monkeypatch, noise=0.5)
    shares, draw = [], system_player.Player.draw_by_seed

    def recorded_draw(*arguments):
        rollout = draw(*arguments)
        shares.append([len(shard.data) for shard in rollout.wav.addressable_shards])
        return rollout

    monkeypatch.setattr(system_player.Player, "draw_by_seed", recorded_draw)
    prompts = [f"reel {number}" for number in range(10)]
    return generate.generate("run/rl", prompts, out=str(out), clip_seconds=3.0, seed=5), shares


def draw_on_a_host(folder):
    """Draws ten clips on this host and others, and writes its shares to a file."""
    with pytest.MonkeyPatch.context() as patch:
        paths, shares = draw_ten(patch, folder / "clips")
    (folder / f"shares-{jax.process_index()}").write_text(f"{len(paths)} {shares}")


@pytest.mark.slow
def test_two_hosts_share_the_rows_and_write_the_files_of_one(monkeypatch, tmp_path, processes):
    paths, shares = draw_ten(monkeypatch, tmp_path / "clips_of_one")
    assert shares == [[1] * 8] * 4  # two batches, two windows each
    assert len({path.read_bytes()[-1000:] for path in paths}) == 10
    run_on_hosts(processes, draw_on_a_host, tmp_path, hosts=2, devices=2)
    for number in range(2):  # three batches of two windows; two rows of four on each host
        assert (tmp_path / f"shares-{number}").read_text() == f"10 {[[1, 1]] * 6}"
    for path in paths:
        assert (tmp_path / "clips" / path.name).read_bytes() == path.read_bytes()


def test_a_file_has_the_channels_of_the_system(monkeypatch, tmp_path):
    """Channels keep their ratio when a clip is joined from windows and brought to a loudness."""
    use(monkeypatch, [TONE, -0.5 * TONE])
    (path,) = generate.generate("run/rl", "a reel", out=str(tmp_path / "a.flac"), clip_seconds=3.5)
    wav, _ = soundfile.read(path)
    assert wav.shape == (3.5 * RATE, 2)
    np.testing.assert_allclose(wav[:, 1], -0.5 * wav[:, 0], atol=1 / 16000)
    assert np.abs(wav).max() > 0.05


@pytest.mark.parametrize("form", ["wav", "flac", "ogg"])
@pytest.mark.parametrize(
    "prompt", ["a reel", "быстрая джига на скрипке 🎻\nслово", "a jig " * 3000], ids=len
)
def test_a_file_says_how_it_was_made(tone, tmp_path, form, prompt):
    (path,) = generate.generate(
        "run/rl", prompt, out=f"{tmp_path}/*.{form}", seed=3, temperature=1.1
    )
    settings, title = read_tags(path)
    assert title == (prompt.encode()[:2000].decode() if form == "wav" else prompt)
    assert soundfile.info(path).format == form.upper()
    assert settings == {
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "seed": 3,
        "candidate": 0,
        "model": system_player.checkpoint.content_hash({}),
        "seconds": 2.0,
        "temperature": 1.1,
        "top_k": None,
        "candidates": 1,
        "loudness_lufs": -16.0,
    }


def test_a_name_has_the_prompt_the_seed_and_a_number(tone, tmp_path):
    """Another seed or a prompt of the same words has another name; names fit into 255 bytes."""
    paths = []
    for seed in (0, 1, 2**32 - 1):
        paths += generate.generate(
            "run/rl", ["A reel!", "a reel", "𐌰𐌱" * 400, "🎻"], out=str(tmp_path), seed=seed
        )
    assert len(set(paths)) == 12 == len(list(tmp_path.iterdir()))
    assert paths[0].name.startswith("a_reel_") and paths[4].name.endswith("_seed1_0.wav")
    assert all(len(f".{path.name}.partial".encode()) <= 255 for path in paths)


@pytest.mark.parametrize(
    ("flags", "lufs"), [({}, -16), ({"loudness_lufs": -12}, -12), ({"loudness_lufs": None}, -37.7)]
)
def test_files_have_the_same_loudness(tone, tmp_path, capsys, flags, lufs):
    (path,) = generate.generate("run/rl", "a reel", out=f"{tmp_path}/a.wav", **flags)
    wav, rate = soundfile.read(path)
    assert pyloudnorm.Meter(rate).integrated_loudness(wav) == pytest.approx(lufs, abs=0.1)
    assert "not -16" not in capsys.readouterr().out


def test_peaks_do_not_clip_and_silence_stays_silent(monkeypatch, tmp_path, capsys):
    click = 0.01 * TONE
    click[RATE] = 0.5
    use(monkeypatch, click)
    (path,) = generate.generate("r", "a", out=str(tmp_path / "click.wav"))
    assert np.abs(soundfile.read(path)[0]).max() <= 10 ** (-1 / 20)
    assert "LUFS, not -16: louder, its peaks would clip" in capsys.readouterr().out
    use(monkeypatch, np.zeros(8))
    (path,) = generate.generate("r", "a", out=str(tmp_path / "silence.ogg"))
    assert not soundfile.read(path)[0].any() and "silence.ogg is silent" in capsys.readouterr().out


def test_a_folder_of_clips_is_continued_and_not_mixed(tone, tmp_path):
    """Existing clips are not made again; another seed adds clips; other settings are refused."""
    file, out = tmp_path / "prompts.txt", tmp_path / "clips"
    file.write_text("a reel\n\n a jig \na reel\n", encoding="utf-8")
    paths = generate.generate("run/rl", prompts_file=str(file), out=str(out))
    assert [path.name.split("_")[1] for path in paths] == ["reel", "jig"] and len(
        list(out.iterdir())
    ) == 2
    before = paths[0].stat().st_mtime_ns
    paths[1].unlink()
    file.write_text("a reel\na march\na jig", encoding="utf-8")
    paths = generate.generate("run/rl", prompts_file=str(file), out=str(out))
    assert [path.name.split("_")[1] for path in paths] == ["reel", "march", "jig"]
    assert all(path.exists() for path in paths) and paths[0].stat().st_mtime_ns == before
    assert not set(generate.generate("run/rl", "a reel", out=str(out), seed=1)) & set(paths)
    with pytest.raises(
        ValueError, match=r"was made with temperature 0\.99, not 1\.2: give another out"
    ):
        generate.generate("run/rl", prompts_file=str(file), out=str(out), temperature=1.2)
    soundfile.write(paths[0], np.zeros(9), RATE)
    with pytest.raises(
        ValueError,
        match=r"seed0_0\.wav is there and does not say how it was made: give another out",
    ):
        generate.generate("run/rl", "a reel", out=str(out))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give either prompt or prompts_file"),
        ({"prompt": "a", "prompts_file": "b"}, "give either prompt or prompts_file"),
        ({"prompt": ["a", 3]}, "generate.prompt: 3 is no text"),
        ({"prompts_file": "empty.txt"}, "has no prompt in it"),
        (
            {"prompts_file": "some.txt", "out": "a.wav"},
            "is one file, but there are several prompts",
        ),
        (
            {"prompt": ["a", "b"], "out": "a/b.ogg"},
            r"several prompts: give a folder, or 'a/\*\.ogg'",
        ),
        (
            {"prompt": "a", "out": "a.mp3"},
            r"'a\.mp3' does not end in \.wav or \.flac or \.ogg: choose one of them",
        ),
        ({"prompt": "a", "out": "clips.v2"}, "or for a new folder a name that ends in /"),
        ({"prompt": "a", "out": "clips/*.mp3"}, r"'clips/\*\.mp3' does not end in \.wav or"),
        ({"prompt": "a", "out": "file"}, "out='file' is a file: give a folder"),
        (
            {"prompt": "a", "loudness_lufs": 3},
            "loudness_lufs=3 must be above -70 and at most 0, or None",
        ),
        ({"prompt": "a", "loudness_lufs": "loud"}, "loudness_lufs='loud' must be"),
    ],
)
def test_an_unclear_request_is_refused(tone, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "some.txt").write_text("a reel\na jig")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=words):
        generate.generate("run/rl", **arguments)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("out", ["clips.v2", "new.v3/", ".", "plain", "deep/a.FLAC"])
def test_the_name_of_a_folder_may_have_a_dot(tone, monkeypatch, tmp_path, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips.v2").mkdir()
    (path,) = generate.generate("run/rl", "a reel", out=out)
    assert path.exists() and (
        path == generate.Path(out) if "FLAC" in out else path.parent == generate.Path(out)
    )


def test_a_full_disk_leaves_no_partial_file(tone, monkeypatch, tmp_path):
    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate.Path, "replace", full)
    with pytest.raises(
        OSError,
        match=r"cannot write .*: No space left on device; free some space or choose another",
    ):
        generate.generate("run/rl", "a reel", out=str(tmp_path))
    assert not list(tmp_path.iterdir())
