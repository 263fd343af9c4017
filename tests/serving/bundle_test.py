"""Checks that a bundle draws as the model code does, and refuses damage by name."""

import dataclasses
import importlib.metadata
import json
import os
import shutil
import sys
import venv

import jax
import numpy as np
import pytest
import safetensors.numpy
import soundfile

from musicrl_jax import export, generate
from musicrl_jax.core.manifest import MANIFEST, sealed, unsealed
from musicrl_jax.rl.rewards import LoadedMixture
from musicrl_jax.serving import bundle as bundles
from musicrl_jax.serving.bundle import Bundle
from musicrl_jax.systems import folder as folders
from musicrl_jax.systems.musiclm import MuLanCondition, MusicLMSystem
from musicrl_jax.systems.system import Rollout, SampledTokens, Sampling


def test_an_export_is_checked_without_the_model_code(exported):
    _, output = exported
    (line,) = [line for line in output.splitlines() if "wav_error" in line]
    result = json.loads(line.split(": ", 1)[1])
    assert result["tokens"] == result["codes"] == result["clips"] == 1
    assert result["here"].startswith("cpu, jax")
    assert result["wav_error"] < 1e-4 and result["score_error"] < 1e-3
    assert all(f"draw for {platform}" in output for platform in ("cpu", "cuda", "tpu"))


# --- a program of its own ---


def program(processes, folder, *arguments, cwd=None):
    """Runs a bundle's own file, as its card says."""
    command = [sys.executable, str(folder / "bundle.py"), *arguments]
    return processes.run(command, cwd=cwd, capture_output=True, timeout=300)


def test_a_bundle_plays_as_a_program(exported, tmp_path, processes):
    """It writes no file into the bundle."""
    folder, _ = exported
    before = sorted(folder.rglob("*"))
    (tmp_path / "by_link").symlink_to(folder)
    done = program(
        processes, tmp_path / "by_link", "a slow piano", "--out=a.flac", "--seed=7", cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "a.flac\n"), done.stderr
    assert sorted(folder.rglob("*")) == before
    with soundfile.SoundFile(tmp_path / "a.flac") as file:
        assert (file.frames, file.format, file.title) == (3200, "FLAC", "a slow piano")
        assert json.loads(file.comment)["seed"] == 7


# Code that leaves a file beside itself if it runs.
MARK = "import os\nopen(os.path.join(os.path.dirname(__file__), 'MARK'), 'w').close()\n"


@pytest.mark.parametrize("name", ["pieces", "manifest", "audio"])
def test_a_changed_module_is_refused_before_it_runs(exported, tmp_path, name, processes):
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    module = copy / f"{name}.py"
    module.write_text(MARK + module.read_text())
    done = program(processes, copy, "--check")
    assert done.returncode == 1 and f"damaged: {name}.py does not have the sha256" in done.stderr
    assert "Traceback" not in done.stderr and not (copy / "MARK").exists()


def test_a_file_in_a_bundle_does_not_replace_a_library(exported, tmp_path, processes):
    """This holds for Python's own libraries and others."""
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    libraries = ["argparse", "hashlib", "json", "pathlib", "jax", "numpy"]
    for name in [*libraries, "sentencepiece", "flatbuffers"]:
        (copy / f"{name}.py").write_text(MARK)
    done = program(processes, copy, "--check", cwd=copy)
    assert done.returncode == 1 and "damaged: argparse.py does not belong to it" in done.stderr
    assert not (copy / "MARK").exists()


def test_a_missing_library_is_named(exported, processes):
    """The message does not advise another jax, which is there."""
    file = str(exported[0] / "bundle.py")
    command = [sys.executable, "-c", export.WITHOUT, file, '["flatbuffers"]', "--check"]
    done = processes.run(command, capture_output=True, timeout=300)
    message = "a bundle needs flatbuffers: pip install flatbuffers\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_export_checks_with_only_the_libraries_of_the_card(exported):
    hidden = export._not_needed()
    training = {"musicrl_jax", "flax", "orbax", "tensorflow", "tensorflow_datasets", "gin", "optax"}
    assert training <= set(hidden)
    assert not {*bundles.NEEDED, "jaxlib", "scipy", "ml_dtypes", "cffi", "_soundfile"} & set(hidden)
    card = (exported[0] / "README.md").read_text()
    needs = f"These need {', '.join(bundles.NEEDED[:-1])} and {bundles.NEEDED[-1]}"
    assert needs in card.replace("\n", " ")
    assert all(name in bundles.__doc__ for name in bundles.NEEDED)


def test_the_card_warns_of_programs(exported, run):
    """Export copies the run's gin file, which would fail if it were read."""
    folder, _ = exported
    card = (folder / "README.md").read_text()
    assert "**A bundle is a program**" in card and "if you trust its maker" in card
    assert "**A gin file is a program too**" in card and "also with `--dry_run`" in card
    assert (folder / "config.gin").read_bytes() == (run / "config.gin").read_bytes()


@pytest.mark.slow
def test_a_bundle_runs_with_only_the_named_packages(exported, tmp_path, processes):
    """They are installed into a new environment, in the versions of this one."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in bundles.NEEDED]
    processes.run([python, "-m", "pip", "install", "--quiet", *versions], check=True, timeout=1200)
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    command = [python, exported[0] / "bundle.py", "--check"]
    done = processes.run(command, env=environment, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clips"] == 1


# --- draws ---


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"seeds": [1.5]}, "seed=1.5 must be a whole number from 0 to 4294967295"),
        ({"seeds": [-1]}, "seed=-1 must be a whole number from 0 to 4294967295"),
        ({"seeds": [2**32]}, "seed=4294967296 must be a whole number from 0 to 4294967295"),
        ({"seeds": [True]}, "seed=True must be a whole number from 0 to 4294967295"),
        ({"candidates": [0.5]}, "candidate=0.5"),
        ({"beginning_frames": [11]}, "beginning_frames=11"),
        ({"temperatures": [0.0]}, "temperatures="),
    ],
)
def test_a_number_out_of_range_is_refused(bundle, numbers, message):
    with pytest.raises(ValueError, match=message):
        bundle.draw(bundle.encode(["jazz"]), **{"seeds": [1], **numbers})


def samples(*paths):
    return [soundfile.read(path, dtype="float32")[0] for path in paths]


# --- generate ---


def test_generate_makes_the_same_clip_of_bundle_and_system(exported, run, tmp_path, capsys):
    """The clips have the model's length, and that of several windows."""
    order = {"prompt": ["a slow piano", "jazz"], "seed": 7, "loudness_lufs": None}
    models, clips = {"bundle": exported[0], "system": run / "policy"}, {}
    for seconds, length in ((None, 3200), (1.01, 8080)):
        for kind, model in models.items():
            out = f"{tmp_path}/{kind}{length}"
            paths = generate.generate(str(model), out=out, clip_seconds=seconds, **order)
            clips[kind, length] = samples(*paths)
        for one, other in zip(clips["bundle", length], clips["system", length], strict=True):
            assert len(one) == len(other) == length
            np.testing.assert_allclose(one, other, atol=2 / 32768)

    # A piece begins as its first window does, up to the first fade; a shorter one is a part of it.
    whole = clips["bundle", 3200][1]
    np.testing.assert_array_equal(clips["bundle", 8080][1][:2800], whole[:2800])
    message = "clip_seconds=1.01 is more than the 0.4 s of the model's clips: drawn in 5 windows"
    assert capsys.readouterr().out.count(message) == 2
    paths = generate.generate(str(exported[0]), out=f"{tmp_path}/short", clip_seconds=0.1, **order)
    np.testing.assert_array_equal(samples(*paths)[1], whole[:800])


def test_generate_refuses_the_same_settings_for_system_and_bundle(
    exported, run, tmp_path, monkeypatch
):
    read, player = Bundle(exported[0]), generate.SystemPlayer(str(run / "policy"), None)
    monkeypatch.setattr(bundles, "Bundle", lambda _: read)
    monkeypatch.setattr(generate, "SystemPlayer", lambda *_: player)
    for changes, message in (
        ({"clip_seconds": 0.03}, "clip_seconds=0.03 must be from 0.04, one frame, to 13107.2"),
        (
            {"clip_seconds": 1e9},
            "clip_seconds=1000000000.0 must be from 0.04, one frame, to 13107.2",
        ),
        ({"clip_seconds": float("nan")}, "clip_seconds=nan must be"),
        ({"clip_seconds": "two"}, "clip_seconds='two' must be"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 4294967295"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"seed": 2**32}, "seed=4294967296 must be a whole number"),
        ({"seed": [1, 2]}, r"seed=\[1, 2\] must be one whole number"),
        ({"seed": True}, "seed=True must be a whole number"),
        ({"candidates": 0}, "candidates=0 must be 1 or more"),
        ({"candidates": 1.5}, "candidates=1.5 must be a whole number"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": "hot"}, "temperature='hot' must be above 0"),
        ({"seed": "7"}, "seed=7 must be a whole number"),
        ({"prompt": " "}, "prompt ' ' is empty"),
    ):
        for folder in (exported[0], run / "policy"):
            with pytest.raises(ValueError, match=message):
                order = {"prompt": "jazz", "out": str(tmp_path / "clips"), **changes}
                generate.generate(str(folder), **order)
    assert not list(tmp_path.iterdir())


def test_generate_chooses_among_candidates_as_the_service_does(exported, run, bundle, tmp_path):
    clips = bundle.draw(bundle.encode(["jazz"] * 4), [7] * 4, candidates=range(4))
    best = int(np.asarray(bundle.score(clips)["total"]).argmax())
    order = {"prompt": "jazz", "out": str(tmp_path), "seed": 7, "loudness_lufs": None}
    (path,) = generate.generate(str(exported[0]), candidates=4, **order)
    np.testing.assert_allclose(samples(path)[0], np.clip(clips.wav[best], -1, 1), atol=2 / 32768)
    assert path.name.endswith(f"_seed7_{best}.wav")
    with pytest.raises(
        ValueError, match=r"candidates=4: .*policy has no rewards to choose by: `musicrl export` it"
    ):
        generate.generate(str(run / "policy"), candidates=4, **order)


def test_top_k_of_a_bundle_cannot_be_changed(exported):
    with pytest.raises(ValueError, match="top_k=3: the bundle was exported with None"):
        generate.generate(str(exported[0]), "jazz", top_k=3)


# --- names of folders ---


@pytest.mark.parametrize(
    "way", [".", "relative", "a link", "a link in a folder of links", "absolute"]
)
def test_a_checkpoint_is_loaded_by_any_name_with_its_neighbours(run, tmp_path, monkeypatch, way):
    monkeypatch.chdir(run / "policy" if way == "." else tmp_path)
    names = {
        ".": ".",
        "relative": os.path.relpath(run / "policy", tmp_path),
        "a link": "best",
        "a link in a folder of links": "models/best",
        "absolute": str(run / "policy"),
    }
    (tmp_path / "best").symlink_to(run / "policy")
    (tmp_path / "models").mkdir()
    for link, name in {
        "best": "policy",
        "fine": "fine",
        "codec": "codec",
        "mulan": "mulan",
    }.items():
        (tmp_path / "models" / link).symlink_to(run / name)
    assert folders.load(names[way]).hashes == folders.load(str(run / "policy")).hashes
    assert export._gin_of(names[way]) == run / "config.gin"


def test_a_bundle_is_read_by_any_name(exported, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(exported[0])
    monkeypatch.chdir(exported[0])
    for name in (".", str(tmp_path / "link"), os.path.relpath(exported[0])):
        assert bundles.is_one(name) and Bundle(name).manifest["frames"] == 10


# --- clips and rewards ---


def test_a_clip_does_not_depend_on_its_batch(bundle):
    # Another order, and a repeated row.
    text = bundle.encode(["jazz", "piano", "jazz", "a bass"])
    seeds, temperatures = [3, 4, 3, 2**32 - 1], [1.0, 0.9, 1.0, 1.2]
    one = bundle.draw(text, seeds, temperatures=temperatures)
    order = [2, 3, 1, 0]
    other = bundle.draw(
        text[order], [seeds[i] for i in order], temperatures=[temperatures[i] for i in order]
    )
    np.testing.assert_array_equal(one.tokens[np.array(order)], other.tokens)
    np.testing.assert_array_equal(one.tokens[0], one.tokens[2])
    np.testing.assert_array_equal(one.wav[0], one.wav[2])

    # Another candidate.
    candidates = bundle.draw(text, seeds, candidates=[0, 0, 1, 0], temperatures=temperatures)
    np.testing.assert_array_equal(candidates.tokens[0], one.tokens[0])
    assert (np.asarray(candidates.tokens[2]) != one.tokens[2]).any()

    # Beginnings: none, another clip's, a part of its own, all of its own.
    beginnings, frames = np.asarray(one.tokens)[[3, 3, 2, 3]], [0, 4, 4, 10]
    more = bundle.draw(
        text, seeds, None, temperatures, beginnings=beginnings, beginning_frames=frames
    )
    for row in (0, 2, 3):
        np.testing.assert_array_equal(more.tokens[row], one.tokens[row])
    np.testing.assert_array_equal(more.tokens[1, :4], beginnings[1, :4])
    assert (np.asarray(more.tokens[1, 4:]) != beginnings[1, 4:]).any()


def test_rewards_of_a_bundle_are_those_of_the_models(bundle, run, rewards):
    clips = bundle.draw(bundle.encode(["jazz", "piano"]), [1, 2])
    scores = bundle.score(clips)
    mixture, others = rewards.load(), clips.others
    assert bundle.manifest["outputs"][:3] == ["text", "tokens", "wav"]
    condition = MuLanCondition(others["condition/embedding"], others["condition/tokens"])
    sampled = SampledTokens(clips.tokens.reshape(2, -1), None, None)
    rollout = Rollout(condition, sampled, others["codes"], clips.wav[:, None])
    terms = jax.jit(mixture.score)(mixture.variables, rollout, mixture.read(["jazz", "piano"]))
    assert set(scores) == {"text_adherence", "acoustic_quality", "total"}
    for name, score in terms.items():
        np.testing.assert_allclose(scores[name], score, atol=1e-5)
    np.testing.assert_allclose(
        scores["total"], terms["text_adherence"] + 2 * terms["acoustic_quality"], atol=1e-5
    )


def test_a_bundle_of_the_first_format_is_read(exported, tmp_path, monkeypatch):
    """Its manifest names no outputs, since their order was always the same."""
    copy = tmp_path / "first"
    shutil.copytree(exported[0], copy)
    fields = unsealed(copy / MANIFEST)
    assert len(fields.pop("outputs")) == 6
    (copy / MANIFEST).write_text(sealed({**fields, "format": bundles.FIRST_FORMAT}))
    first, now = Bundle(copy), Bundle(exported[0])
    assert first.manifest["outputs"] == ["tokens", "acoustic", "mulan", "embedding", "wav"]
    new_order = ["tokens", "codes", "condition/tokens", "condition/embedding", "wav"]

    # Today's functions, with arguments and results in the order of the first format.
    def draw(*arguments):
        arrays = dict(zip(now.manifest["outputs"], now._functions["draw"](*arguments), strict=True))
        return [arrays[name] for name in new_order]

    def score(weights, *arrays):
        arrays = dict(zip(new_order, arrays, strict=True)) | {"text": text}
        return now._functions["score"](weights, *(arrays[name] for name in now.manifest["outputs"]))

    first._functions = {"draw": draw, "score": score}
    text = first.encode(
        [*first.manifest["golden"]["prompts"], first.manifest["golden"]["prompts"][0]]
    )
    golden = safetensors.numpy.load_file(copy / bundles.GOLDEN)
    golden["acoustic"] = golden.pop("codes")
    monkeypatch.setattr(bundles.safetensors.numpy, "load_file", lambda _: golden)
    result = first.check()
    assert result["tokens"] == result["acoustic"] == result["clips"] == 1
    assert result["wav_error"] < 1e-4 and result["score_error"] < 1e-3
    golden["acoustic"] = golden["acoustic"] + 1
    assert first.check()["acoustic"] == first.check()["clips"] == 0


# --- damage ---


def test_any_changed_byte_is_refused_by_file(exported, tmp_path):
    folder, _ = exported
    rng = np.random.default_rng(0)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (copy / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"damaged: {name}"):
            Bundle(copy)
        shutil.rmtree(copy)


def changed(folder, copy, **fields):
    """Copies a bundle with other fields in its manifest."""
    shutil.copytree(folder, copy)
    (copy / MANIFEST).write_text(sealed({**unsealed(copy / MANIFEST), **fields}))
    return copy


def test_a_bundle_that_cannot_run_here_is_refused_with_a_remedy(exported, tmp_path, monkeypatch):
    folder, _ = exported
    with pytest.raises(FileNotFoundError, match="musicrl export"):
        Bundle(tmp_path)
    with pytest.raises(ValueError, match="format 'another', not 'musicrl-bundle 2'"):
        Bundle(changed(folder, tmp_path / "format", format="another"))
    with pytest.raises(ValueError, match="has functions for tpu, and jax runs on cpu here"):
        Bundle(changed(folder, tmp_path / "platform", platforms=["tpu"]))
    functions = unsealed(folder / MANIFEST)["functions"]
    functions["draw"]["cpu"]["calling_convention"] = 99
    with pytest.raises(
        ValueError, match=r"calling convention 99, and jax .* reads 9 to .*: upgrade jax"
    ):
        Bundle(changed(folder, tmp_path / "new", functions=functions))

    def newer(*_):
        raise RuntimeError("version 7 > 6")

    for where, name in ((bundles.export, "deserialize"), (bundles.export.Exported, "mlir_module")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, newer)
            with pytest.raises(
                ValueError,
                match=r"cannot read it \(version 7 > 6\): install jax .* or newer, or export",
            ):
                Bundle(folder)


# --- export ---


def test_wrong_settings_are_refused_before_any_work(run, rewards, tmp_path, monkeypatch):
    def refused(error, match, **settings):
        with pytest.raises(error, match=match):
            export.export(
                str(run / "policy"), **{"out": str(tmp_path / "b"), "clip_seconds": 0.4, **settings}
            )
        assert not (tmp_path / "b").exists()

    # Single settings.
    refused(ValueError, "dtype='half'", dtype="half")
    refused(ValueError, "'rocm' is none of cpu, cuda, tpu", platforms=("cpu", "rocm"))
    refused(ValueError, r"platforms=\('tpu',\) lacks cpu", platforms=("tpu",))
    refused(ValueError, "clip_seconds=0.39 must be a multiple", clip_seconds=0.39)
    refused(
        ValueError,
        "clip_seconds=500 is more than the 0.4 s that .*policy was trained on: give",
        clip_seconds=500,
    )
    refused(ValueError, "clip_seconds='two' must be a number", clip_seconds="two")
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_trained_seconds", lambda *_: None)
        refused(
            ValueError, "does not record the length .* give export.clip_seconds", clip_seconds=None
        )
    refused(ValueError, "prompt '' is empty", prompts=("",))
    refused(ValueError, "chips=9: jax has 8 devices here", chips=9)
    refused(
        ValueError,
        r"chips=5 cannot share the policy's acoustic_head of shape .* choose chips that divide 8",
        chips=5,
    )

    # Rewards and a system that a bundle cannot have.
    normalised = dataclasses.replace(rewards, normalise=True)
    refused(ValueError, "normalise=True is not exported", rewards=normalised)
    other = {"text_adherence": {"pieces": np.zeros((3, 12), np.int32)}, "acoustic_quality": {}}
    with monkeypatch.context() as patch:
        patch.setattr(LoadedMixture, "read", lambda *_: other)
        refused(
            ValueError,
            "text_adherence reads prompts in another way than the system",
            rewards=rewards,
        )
    with monkeypatch.context() as patch:
        read = MusicLMSystem.read
        patch.setattr(
            MusicLMSystem, "read", lambda *args: {**read(*args), "mask": np.ones((3, 12), bool)}
        )
        refused(ValueError, "MusicLMSystem does not read prompts as pieces of a vocabulary")
    with pytest.raises(FileExistsError, match="is there already"):
        export.export(str(run / "policy"), str(tmp_path), 0.4)


def test_a_check_fails_if_rewards_samples_or_tokens_differ(exported, monkeypatch, capsys):
    folder, _ = exported
    golden = safetensors.numpy.load_file(folder / bundles.GOLDEN)
    assert list(golden["given_frames"]) == [0, 0, 5] and not golden["tokens"][-1, :5].any()
    read = Bundle(folder)
    assert bundles._print_check(read) == 0

    def changed(**arrays):
        monkeypatch.setattr(bundles.safetensors.numpy, "load_file", lambda _: {**golden, **arrays})
        capsys.readouterr()
        assert bundles._print_check(read) == 1
        return capsys.readouterr().err

    assert "score_error is 0.5" in changed(total=2 * np.maximum(1, golden["total"]))
    assert "wav_error is 0.5, more than" in changed(wav=golden["wav"] - np.float32(0.5))
    assert "wav_error is nan, more than" in changed(wav=golden["wav"] * np.float32(np.nan))
    assert "of the golden tokens" in changed(given_frames=np.int32([0, 0, 2]))


def test_a_bundle_that_draws_other_clips_is_not_written(run, tmp_path, monkeypatch):
    """Its weights are changed here."""
    stored = export._stored
    monkeypatch.setattr(
        export, "_stored", lambda trees: stored(jax.tree.map(lambda x: x * 2, trees))
    )
    with pytest.raises(
        ValueError,
        match=r"does not draw what the system does: .* golden tokens and .* golden codes differ",
    ):
        export.export(str(run / "policy"), str(tmp_path / "b"), 0.4, platforms=("cpu",))
    assert not (tmp_path / "b").exists()


def test_half_precision_applies_to_the_policy(run, tmp_path):
    sampling = Sampling(0.9, top_k=5)
    export.export(
        str(run / "policy"),
        str(tmp_path / "b"),
        sampling=sampling,
        platforms=("cpu",),
        dtype="bfloat16",
    )
    half = Bundle(tmp_path / "b")
    assert half.weights["draw"]["policy/trunk/bridge"].dtype == "bfloat16"
    assert half.weights["draw"]["frozen/soundstream/params/decoder/first/kernel"].dtype == "float32"
    assert half.manifest["clip_seconds"] == 0.4  # the length of the policy's training clips
    assert (half.manifest["temperature"], half.manifest["top_k"]) == (0.9, 5)
    assert half.manifest["functions"].keys() == {"draw"} and half.score(None) == {}
    assert "bfloat16" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.slow
def test_chips_share_the_policy_and_draw_the_same(run, rewards, bundle, tmp_path):
    folder = tmp_path / "b"
    export.export(str(run / "policy"), str(folder), 0.4, rewards, platforms=("cpu", "tpu"), chips=2)
    shared = Bundle(folder, jax.devices()[2:4])
    text = bundle.encode(["a slow piano"])
    together, alone = shared.draw(text, [7]), bundle.draw(text, [7])
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    np.testing.assert_allclose(together.wav, alone.wav, atol=1e-4)
    np.testing.assert_allclose(
        shared.score(together)["total"], bundle.score(alone)["total"], rtol=1e-4
    )
    pieces = {name: array.addressable_shards for name, array in shared.weights["draw"].items()}
    assert all(
        {piece.device for piece in each} == set(jax.devices()[2:4]) for each in pieces.values()
    )
    split = set()
    for name, (one, *_) in pieces.items():
        if one.data.shape != shared.weights["draw"][name].shape:
            split.add(name)
    shares = "query", "key", "value", "out", "gate", "up", "down", "relative", "table", "head"
    policy = [name for name in pieces if name.startswith("policy/")]
    assert split == {name for name in policy if name.endswith(shares)}
    assert "split among 2 chips" in (folder / "README.md").read_text()
    with pytest.raises(
        ValueError, match="exported for 2 chips that draw together, and jax has 1 here"
    ):
        Bundle(folder, jax.devices()[:1])
