"""The names of the command line: verbs, configs, and what older versions called them."""

import difflib
from collections.abc import Iterable
from typing import NamedTuple


class Verb(NamedTuple):
    """A verb of the command.

    Attributes:
      place: where its function is, 'module:name'.
      purpose: what it is for, in one line.
      examples: two commands, each without the word `musicrl`.
      on_all_hosts: whether every host runs it. Otherwise the first host does, and the rest wait.
      needs_run: whether it is part of a run: joins the hosts and writes MODEL_DIR/config.gin.
    """

    place: str
    purpose: str
    examples: tuple[str, str]
    on_all_hosts: bool = False
    needs_run: bool = True


# --- verbs, in the order of the work --------------------------------------------------------------

VERBS = {
    # Whole runs.
    "run": Verb(
        "musicrl_jax.run:run",
        "Runs all stages of a gin file, or those that --only names.",
        (
            "run --gin_file=quickstart",
            "run --gin_file=demo --gin.MODEL_DIR=runs/mine --only=vocabulary,codec",
        ),
        on_all_hosts=True,
    ),
    "plan": Verb(
        "musicrl_jax.plan:plan",
        "Compiles a run for TPU slices without a TPU: memory and time of each stage.",
        (
            "plan --gin_file=gin/experiments/musicrl_r.gin --topology=v5e:4x4",
            "plan --gin_file=demo --topology=v6e:8x8 --only=r --search",
        ),
        needs_run=False,
    ),
    "config": Verb(
        "musicrl_jax.cli:config",
        "Lists every setting of a run: its type, default and value.",
        ("config --gin_file=quickstart", "config --gin_file=quickstart --verb=export --json"),
        needs_run=False,
    ),
    # Data.
    "fetch": Verb(
        "musicrl_jax.inputs.pretrained:fetch",
        "Downloads the pretrained towers of MuLan.",
        (
            "fetch --directory=runs/pretrained",
            "fetch --directory=runs/pretrained --models=minilm",
        ),
    ),
    "build": Verb(
        "musicrl_jax.inputs.build:prepare",
        "Builds a data set of clips: rendered scores, or a folder of your recordings.",
        (
            "build --builder=data/score_clips --config=tiny --data_dir=runs/data",
            "build --builder=data/audio_folder --data_dir=runs/data "
            "--config=\"{'name': 'mine', 'folder': '~/music'}\"",
        ),
    ),
    "vocabulary": Verb(
        "musicrl_jax.inputs.vocabulary:build",
        "Trains the vocabulary of the captions.",
        (
            "vocabulary --gin_file=demo --path=runs/vocabulary.model --size=1000",
            "run --gin_file=demo --only=data,vocabulary",
        ),
    ),
    # Models, and their tokens.
    "train": Verb(
        "musicrl_jax.train:train",
        "Trains one model: codec, tokens, MuLan, policy, or a reward.",
        (
            "run --gin_file=demo --only=codec --gin.codec/train.steps=100",
            'train --gin_file=demo --model_dir=runs/codec --objective="@CodecObjective()" '
            '--optimiser="@Optimiser()" --steps=100 --batch_size=8',
        ),
        on_all_hosts=True,
    ),
    "assemble": Verb(
        "musicrl_jax.assemble:assemble",
        "Joins trained models into one system.",
        (
            "run --gin_file=demo --only=base",
            "assemble --out=runs/base --parts=\"{'policy': 'runs/policy', 'mulan': 'runs/mulan', "
            "'soundstorm': 'runs/fine', 'soundstream': 'runs/codec'}\"",
        ),
    ),
    "encode": Verb(
        "musicrl_jax.encode:encode",
        "Writes the tokens of clips.",
        (
            "run --gin_file=demo --only=encode",
            "encode --gin_file=demo --system=runs/demo/tokenizer --tokens_dir=runs/tokens",
        ),
        on_all_hosts=True,
    ),
    # Finetuning, votes and judging.
    "train_rl": Verb(
        "musicrl_jax.train_rl:train_rl",
        "Finetunes a system's policy on rewards.",
        (
            "run --gin_file=quickstart --only=r --gin.RLConfig.kl_strength=0.05",
            "train_rl --gin_file=quickstart --system=runs/quickstart/base --model_dir=runs/r "
            '--rewards="@r/Mixture()" --gin.RLConfig.steps=24',
        ),
        on_all_hosts=True,
    ),
    "collect": Verb(
        "musicrl_jax.collect:collect",
        "Draws pairs of clips and collects the votes of simulated listeners.",
        (
            "run --gin_file=demo --only=votes",
            "collect --gin_file=demo --system=runs/demo/r --votes_dir=runs/votes",
        ),
        on_all_hosts=True,
    ),
    "evaluate": Verb(
        "musicrl_jax.evaluate:evaluate",
        "Compares systems on held-out prompts: rewards, win rates, a page to listen to.",
        (
            "run --gin_file=quickstart --only=evaluate",
            "evaluate --gin_file=quickstart --model_dir=runs/evaluation "
            "--systems=\"{'base': 'runs/quickstart/base', 'R': 'runs/quickstart/r'}\"",
        ),
        on_all_hosts=True,
    ),
    # Clips, bundles and weights.
    "generate": Verb(
        "musicrl_jax.generate:generate",
        "Writes a sound file for each prompt.",
        (
            'generate --system=runs/quickstart/ru --prompt="a slow waltz" --out=waltz.wav',
            "generate --system=runs/quickstart/ru --prompts_file=prompts.txt --out='clips/*.flac' "
            "--clip_seconds=20 --seed=3",
            "generate --system=bundle --prompt=jazz --out=- --stream --loudness_lufs=None",
        ),
        on_all_hosts=True,
    ),
    "export": Verb(
        "musicrl_jax.export:export",
        "Writes a system as a bundle, which runs without this package.",
        (
            "export --gin_file=quickstart --out=bundle",
            "export --system=runs/quickstart/ru --out=bundle --dtype=bfloat16 --platforms=cuda",
        ),
        on_all_hosts=True,
    ),
    "serve": Verb(
        "musicrl_jax.serve:serve",
        "Serves a bundle over HTTP.",
        ("serve --bundle=bundle", "serve --bundle=bundle --host=0.0.0.0 --token_file=token.txt"),
        needs_run=False,
    ),
    "pack": Verb(
        "musicrl_jax.pack:pack",
        "Writes models as small files, or a system as one folder, to ship them.",
        (
            "pack --models=\"{'ru': 'runs/quickstart/ru'}\" --out=packed",
            "pack --system=runs/quickstart/ru --format=system --out=ru",
        ),
    ),
    "unpack": Verb(
        "musicrl_jax.pack:unpack",
        "Reads packed models into a run's folder.",
        (
            "unpack --source=packed --out=runs/quickstart",
            "run --gin_file=quickstart --only=pretrained,shipped",
        ),
    ),
}

# --- configs that gin files name, by module -------------------------------------------------------

CONFIGS_OF_MODULES = {
    # Training.
    "core.checkpoint": "model_hash",
    "losses.optimiser": "Optimiser",
    "models.tokens": "TokenLayout",
    # Data.
    "inputs.clips": "Clips Ratings",
    "inputs.prompts": "Prompts",
    "inputs.tokens": "Tokens",
    "inputs.votes": "Votes",
    # Models.
    "models.transformer": "TransformerConfig",
    "models.conformer": "ConformerConfig",
    "models.resnet": "ResNetConfig",
    "models.bert": "BertConfig",
    "models.musicnn": "MusicnnConfig",
    "models.soundstream": "SoundStreamConfig",
    "models.discriminators": "DiscriminatorsConfig",
    "models.semantic": "SemanticConfig",
    "models.mulan": "MuLanConfig",
    "models.musiclm": "MusicLMConfig",
    "models.soundstorm": "SoundStormConfig",
    "models.rewards": "QualityConfig PreferenceConfig",
    # Objectives.
    "objectives.codec": "CodecObjective",
    "objectives.semantic": "SemanticObjective",
    "objectives.mulan": "MuLanObjective",
    "objectives.mulan_projections": "PretrainedTowers TowerOutputs MuLanProjectionsObjective",
    "objectives.policy": "PolicyObjective",
    "objectives.fine": "FineObjective",
    "objectives.quality": "QualityObjective",
    "objectives.preference": "PreferenceObjective",
    "objectives.dpo": "DPOObjective",
    # Listeners.
    "arena.listeners": "training_panel judging_panel monitoring_panel",
    "arena.audience": "Audience",
    "arena.monitor": "Monitor",
    # Finetuning.
    "losses.policy_gradient": "PolicyGradient",
    "systems.sampling": "Sampling",
    "systems.scorers": "TextAdherence AcousticQuality UserPreference SemanticFeatures",
    "rl.config": "RLConfig",
    "rl.rewards": "Mixture",
    # Verbs.
    "collect": "CollectConfig",
    "arena.bench": "EvaluationConfig",
    "evaluate": "PageConfig",
    "serving.settings": "ServiceLimits",
}
CONFIGS: dict[str, str] = {}  # name -> 'module:name'
for _module, _names in CONFIGS_OF_MODULES.items():
    for _name in _names.split():
        CONFIGS[_name] = f"musicrl_jax.{_module}:{_name}"

# --- names of older versions ----------------------------------------------------------------------

# 'VERB.PARAMETER' or 'CONFIG.PARAMETER' -> the new name, or a sentence if there is none.
ONE_FOLDER = (
    "a system is one folder with all its parts, which `musicrl assemble` and a run's stages "
    "'tokenizer' and 'base' write: remove this, and name that folder"
)
READ_BY_SYSTEMS = "each system and each reward reads prompts in its own way: remove this"
RENAMED = {
    "train_rl.kl_target": "RLConfig.kl_target_per_second",
    "train_rl.base": "train_rl.system",
    "collect.policy": "collect.system",
    "evaluate.policies": "evaluate.systems",
    "evaluate.semantic": "SemanticFeatures.semantic",
    "encode.semantic": ONE_FOLDER,
    "generate.checkpoint": "generate.system",
    "export.checkpoint": "export.system",
    "generate.format": (
        "the format follows from out: a file's ending, or a folder and an ending, as "
        "'clips/*.flac'; remove this"
    ),
    "serve.most_waiting": "ServiceLimits.waiting_clips",
    "serve.most_seconds": "ServiceLimits.piece_seconds",
    "serve.most_candidates": "ServiceLimits.candidates",
    "train.log_every": "metrics are written every ten steps: remove this",
    "Prompts.vocabulary": READ_BY_SYSTEMS,
    "Prompts.text_length": READ_BY_SYSTEMS,
}
for _verb, _config, _names in (
    ("train_rl", "RLConfig", "steps batch_size clip_seconds kl_strength policy_optimiser"),
    ("train_rl", "RLConfig", "value_optimiser gradient updates microbatches remat dtype seed"),
    ("train_rl", "RLConfig", "fsdp tensor save_every"),
    ("collect", "CollectConfig", "pairs clip_seconds validation_share votes_per_pair"),
    ("collect", "CollectConfig", "batch_size seed"),
    ("evaluate", "EvaluationConfig", "clip_seconds count seeds batch_size seed raters best_of"),
    ("evaluate", "PageConfig", "run_dir training notes shown worst"),
    ("train_rl", "Sampling", "temperature top_k"),
    ("collect", "Sampling", "temperature top_k"),
    ("evaluate", "Sampling", "temperature top_k"),
    ("export", "Sampling", "temperature top_k"),
    ("Heard", "TowerOutputs", "clips towers folder"),
):
    RENAMED |= {f"{_verb}.{_name}": f"{_config}.{_name}" for _name in _names.split()}
for _verb in ("encode", "train_rl", "collect", "evaluate", "generate", "export"):
    RENAMED |= {f"{_verb}.{_part}": ONE_FOLDER for _part in ("fine", "codec", "mulan")}


def place_of(name: str) -> str:
    """Returns the place of a verb or a config, 'module:name'."""
    return VERBS[name].place if name in VERBS else CONFIGS[name]


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Returns '; did you mean NAME?' with the nearest of the names, or '' if none is near."""
    nearest = difflib.get_close_matches(name, sorted(names), 1)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""
