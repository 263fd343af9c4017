"""Whether clips, rewards and updates are those of an earlier revision, to the bit, on this machine.

    python tests/benchmarks/bits.py --run runs/tiny --pretrained runs/pretrained

Draws, scores and updates three times by the earlier revision, in a folder of its own, and by
this one: with random models, with a run's, and with those that ship, if their towers were fetched.
--record writes what the earlier revision gives for the random models by this version of jax, for
`tests/bits_test.py`.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).parents[2]
REVISION = "f1186c7"  # the last one without systems/
RECORD = ROOT / "tests/data_files/bits.json"
PROMPTS = ["a slow jig", "a fast air", "air for flute", "a jig", "slow air", "fast", "a", "flute"]
STEPS, RANDOM_SECONDS, SECONDS = 3, 0.2, 1.0


def updates(folder: str, seconds: float) -> dict[str, np.ndarray]:
    """Returns tokens, scores, metrics and weights of three updates by a run's models."""
    from musicrl_jax.core import sharding
    from musicrl_jax.core.keys import Stream
    from musicrl_jax.losses.optimiser import Optimiser
    from musicrl_jax.rl.config import RLConfig
    from musicrl_jax.rl.rewards import Mixture
    from musicrl_jax.rl.steps import Run
    from musicrl_jax.systems import folder as systems
    from musicrl_jax.systems.scorers import AcousticQuality, TextAdherence

    terms = TextAdherence(f"{folder}/mulan", ""), AcousticQuality(f"{folder}/quality", "")
    mixture = Mixture(terms, {term.name: 1.0 for term in terms}).load()
    optimiser = Optimiser(1e-3, 1)
    config = RLConfig(STEPS, len(PROMPTS), seconds, 0.01, optimiser, optimiser)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    loaded = systems.load(f"{folder}/policy")
    run = Run(loaded, mixture, config, mesh)
    units, results = {term.name: (0.0, 1.0) for term in terms}, {}
    state, anchor = run.start()
    base = jax.device_get(anchor)
    with jax.set_mesh(mesh):
        for step in range(STEPS):
            rollout = run.draw(state.policy, PROMPTS, step, Stream.ROLLOUT)
            results[f"tokens {step}"] = rollout.sampled.tokens
            results[f"log_probs {step}"] = rollout.sampled.log_probs
            results[f"wav {step}"] = rollout.mono
            done = run.step(state, anchor, PROMPTS, step, units)
            state = done.state
            _keep(results, step, done.reward, done.terms, done.metrics)
    return _finished(results, loaded.system.stored, base, state)


def earlier_updates(folder: str, seconds: float) -> dict[str, np.ndarray]:
    """Returns what `updates` does, by the earlier revision."""
    from musicrl_jax.core import sharding
    from musicrl_jax.core.state import Optimiser
    from musicrl_jax.inputs import pieces
    from musicrl_jax.losses.policy_gradient import PolicyGradient
    from musicrl_jax.models.layers import stacked, unstacked
    from musicrl_jax.rl import rollout as rollouts
    from musicrl_jax.rl.rewards import AcousticQuality, Mixture, TextAdherence
    from musicrl_jax.rl.steps import build

    terms = TextAdherence(f"{folder}/mulan", ""), AcousticQuality(f"{folder}/quality", "")
    mixture = Mixture(terms, {term.name: 1.0 for term in terms}).load()
    loaded = rollouts.load(*(f"{folder}/{name}" for name in ("policy", "fine", "codec", "mulan")))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    settings = {"steps": STEPS, "batch_size": len(PROMPTS), "clip_seconds": seconds}
    settings |= {"kl_strength": 0.01, "kl_target": None, "gradient": PolicyGradient(), "updates": 1}
    settings |= {"policy_optimiser": Optimiser(1e-3, 1), "value_optimiser": Optimiser(1e-3, 1)}
    settings |= {"temperature": 0.99, "top_k": None, "microbatches": 1, "remat": False}
    learner, steps = build(loaded, mixture, mesh, **settings, dtype="float32")
    state, shardings = sharding.create_sharded(mesh, learner.create, jax.random.key(0))
    anchor = sharding.put(stacked(loaded.policy), shardings.policy)
    base = jax.device_get(anchor)
    state = jax.jit(learner.started, out_shardings=shardings)(state, anchor)
    frozen, scorers = (
        sharding.put(tree, sharding.spread(mesh, tree))
        for tree in (loaded.frozen, mixture.variables)
    )
    text = pieces.encode(loaded.vocabulary, PROMPTS, loaded.studio.mulan.config.text_length)
    units, results = {term.name: (0.0, 1.0) for term in terms}, {}
    with jax.set_mesh(mesh):
        rows = sharding.put_batch(mesh, {"text": text})["text"]
        for step in range(STEPS):
            keys = steps.keys(*(np.int32(number) for number in (0, step, 3)))
            rollout = steps.rollout(*steps.gather(state.policy, frozen), rows, keys)
            results[f"tokens {step}"] = rollout.tokens.reshape(len(PROMPTS), -1)
            results[f"log_probs {step}"] = rollout.log_probs.reshape(len(PROMPTS), -1)
            results[f"wav {step}"] = rollout.wav
            reward, scores = steps.reward(steps.gather_scorers(scorers), rollout, units)
            if step == 0:
                started = jax.jit(learner.with_baseline, out_shardings=shardings)
                state = started(state, reward)
            copy = steps.gather_learner(state, anchor)
            state, metrics = steps.update(state, copy, rollout, reward)
            _keep(results, step, reward, scores, metrics)
    return _finished(results, lambda tree: {"params": unstacked(tree)}, base, state)


def _keep(results: dict[str, Any], step: int, reward: Any, terms: Any, metrics: Any) -> None:
    """Adds the numbers of a step."""
    results[f"reward {step}"] = reward
    for name, number in {**terms, **metrics}.items():
        results[f"{name} {step}"] = number


def _finished(results: dict[str, Any], stored: Any, base: Any, state: Any) -> dict[str, np.ndarray]:
    """Adds the weights, and how far each of the policy's has moved."""
    policy, value, base = (
        stored(jax.device_get(tree)) for tree in (state.policy, state.value, base)
    )
    for name, tree in (("policy", policy), ("value", value)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            results[f"{name}{jax.tree_util.keystr(path)}"] = leaf
    moves = jax.tree.map(lambda new, old: np.linalg.norm(new - old), policy, base)
    results["moves"] = np.array(jax.tree.leaves(moves), np.float32)
    return {name: np.asarray(array) for name, array in results.items()}


def write_random(directory: Path) -> Path:
    """Writes random models as a run of the earlier revision has them."""
    sys.path.append(str(ROOT / "tests"))
    import tiny_musiclm

    from musicrl_jax.core import checkpoint

    places = {"soundstream": "codec", "soundstorm": "fine"}
    for part in ("policy", "soundstorm", "soundstream", "mulan", "quality"):
        model = tiny_musiclm.model(part)
        place = directory / places.get(part, part)
        checkpoint.save_model(place, model.config, model.variables, model.assets)
    return directory


def compared(tree: Path, folder: Path, seconds: float, out: Path) -> dict[str, np.ndarray]:
    """Runs both revisions, says what differs, and returns what the earlier one gives."""
    results = []
    for number, root in enumerate((tree, ROOT)):
        path = out / f"{number}.npz"
        command = [sys.executable, __file__, "--draw", str(folder), str(seconds), str(path)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(root)})
        with np.load(path) as arrays:
            results.append(dict(arrays))
    earlier, now = results
    differ = [
        name
        for name in sorted(earlier.keys() | now.keys())
        if not (
            name in earlier
            and name in now
            and np.array_equal(earlier[name], now[name], equal_nan=True)
        )
    ]
    verdict = f"differ: {', '.join(differ)}" if differ else "all bit-equal"
    print(f"{folder.name}: {len(earlier)} arrays, {verdict}", flush=True)
    return earlier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="folder of a finished run, as `runs/tiny`")
    parser.add_argument("--pretrained", default="runs/pretrained", help="where towers were fetched")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--draw", nargs=3, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.draw:
        from musicrl_jax import rl

        earlier = (Path(rl.__file__).parent / "rollout.py").is_file()
        draw = earlier_updates if earlier else updates
        np.savez(flags.draw[2], **draw(flags.draw[0], float(flags.draw[1])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        out, tree = Path(scratch), Path(scratch) / "tree"
        tar = subprocess.run(
            ["git", "-C", str(ROOT), "archive", REVISION], check=True, stdout=subprocess.PIPE
        )
        with tarfile.open(fileobj=io.BytesIO(tar.stdout)) as archive:
            archive.extractall(tree, filter="data")
        random = write_random(out / "random")
        numbers = compared(tree, random, RANDOM_SECONDS, out)
        if flags.record:
            wanted = {
                name: array.tolist()
                for name, array in numbers.items()
                if "[" not in name and not name.startswith("wav")
            }
            recorded = json.loads(RECORD.read_text(encoding="utf-8"))
            RECORD.write_text(json.dumps({**recorded, jax.__version__: wanted}, sort_keys=True))
        if flags.run:
            compared(tree, Path(flags.run), SECONDS, out)
        towers = Path(flags.pretrained).resolve()
        if not (towers / "minilm").is_dir():
            print(f"shipped: left out, no towers in {towers}: `musicrl fetch` brings them")
            return
        unpack = (
            "from musicrl_jax.pack import unpack; import sys; root, out, towers = sys.argv[1:];"
            "unpack(root + '/data/pretrained/demo', out, towers + '/musicnn/model.safetensors',"
            "towers + '/minilm/model.safetensors', towers + '/minilm/tokenizer.json')"
        )
        arguments = [sys.executable, "-c", unpack, str(tree), str(out / "shipped"), str(towers)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        subprocess.run(arguments, check=True, env=environment)
        compared(tree, out / "shipped", SECONDS, out)


if __name__ == "__main__":
    main()
