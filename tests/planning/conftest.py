"""Builds the stages of a tiny run, with nothing on disk."""

import dataclasses

import pytest

from musicrl_jax.inputs.clips import Clips
from musicrl_jax.inputs.tokens import Tokens
from musicrl_jax.inputs.votes import Votes
from musicrl_jax.losses.optimiser import Optimiser
from musicrl_jax.models.bert import BertConfig
from musicrl_jax.models.conformer import ConformerConfig
from musicrl_jax.models.mulan import MuLanConfig
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.resnet import ResNetConfig
from musicrl_jax.models.rewards import PreferenceConfig, QualityConfig
from musicrl_jax.models.semantic import SemanticConfig
from musicrl_jax.models.soundstorm import SoundStormConfig
from musicrl_jax.models.soundstream import SoundStreamConfig
from musicrl_jax.models.tokens import TokenLayout
from musicrl_jax.models.transformer import TransformerConfig
from musicrl_jax.objectives.codec import CodecObjective
from musicrl_jax.objectives.dpo import DPOObjective
from musicrl_jax.objectives.fine import FineObjective
from musicrl_jax.objectives.mulan import MuLanObjective
from musicrl_jax.objectives.policy import PolicyObjective
from musicrl_jax.objectives.preference import PreferenceObjective
from musicrl_jax.objectives.quality import QualityObjective
from musicrl_jax.objectives.semantic import SemanticObjective
from musicrl_jax.planning.models import PlannedModels
from musicrl_jax.planning.stages import Stage
from musicrl_jax.rl.config import RLConfig
from musicrl_jax.rl.rewards import Mixture
from musicrl_jax.systems.scorers import (
    AcousticQuality,
    SemanticFeatures,
    TextAdherence,
    UserPreference,
)
from musicrl_jax.systems.system import Sampling

SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Settings of `collect` and `evaluate` that a plan reads."""

    clip_seconds: float = SECONDS
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    batch_size: int = 8
    pairs: int = 20
    count: int = 8
    seeds: int = 2
    best_of: int = 2

    @property
    def counts(self):
        """Pairs of each split, as in `CollectConfig`."""
        return {"train": 12, "validation": 8}


def train(folder, objective, **settings):
    """Returns a stage that trains."""
    optimiser = {"optimiser": Optimiser(1e-3), "seed": 0, "fsdp": 2, "tensor": 1}
    arguments = {"model_dir": folder, "objective": objective, "steps": 4, "batch_size": 8}
    return Stage("train", arguments | optimiser | settings)


@pytest.fixture(scope="session")
def stages():
    """Returns the stages of the tiny run by name; folders are relative."""
    # Data.
    clips = Clips({"set": 1.0}, "data", 16000)
    tokens, votes = Tokens("tokens", {"codec": "hash"}), Votes("votes")

    # Models.
    conformer = ConformerConfig(layers=2, heads=2, embed=16, mlp=32)
    resnet = ResNetConfig(mels=16, widths=(8, 16), blocks=1)
    bert = BertConfig(layers=1, heads=2, embed=16, mlp=32, positions=64, pieces=512)
    codec = SoundStreamConfig(16000, (8, 5, 4, 2), channels=4, embed=8, levels=6, codes=16)
    semantic = SemanticConfig(16000, 16, conformer, layer=1, targets=32, codes=16)
    mulan = MuLanConfig(16000, audio=resnet, text=bert, embed=16, codes=8)
    quality = QualityConfig(16000, network=resnet)
    policy = MusicLMConfig(
        TransformerConfig(layers=2, embed=32, heads=2, mlp=64),
        TransformerConfig(layers=1, embed=16, heads=2, mlp=32),
        TokenLayout(16, 16, 4),
        mulan_codes=8,
    )
    fine = SoundStormConfig(conformer, levels=6, coarse_levels=4, codes=16, first_passes=4)

    # Rewards and settings.
    rewards = Mixture(
        (TextAdherence("mulan", "mine"), AcousticQuality("quality", "mine")),
        {"text_adherence": 1.0, "acoustic_quality": 1.0},
    )
    preference = Mixture((UserPreference("preference", "mine"),), {"user_preference": 1.0})
    config = RLConfig(3, 8, SECONDS, 0.001, Optimiser(1e-4), Optimiser(1e-3), fsdp=2, tensor=2)
    parts = {"soundstream": "codec", "mulan": "mulan", "semantic": "semantic"}
    playing = parts | {"policy": "policy", "soundstorm": "fine"}
    words = dataclasses.replace(clips, vocabulary="vocabulary.model")

    # Stages, in order.
    return {
        "codec": train(
            "codec", CodecObjective(codec, dataclasses.replace(clips, crop_seconds=0.5))
        ),
        "semantic": train("semantic", SemanticObjective(semantic, clips)),
        "mulan": train("mulan", MuLanObjective(mulan, words, "vocabulary.model")),
        "quality": train("quality", QualityObjective(quality, clips, "codec")),
        "tokenizer": Stage("assemble", {"out": "tokenizer", "parts": parts, "kind": "musiclm"}),
        "encode": Stage("encode", {"system": "tokenizer", "tokens_dir": "tokens", "data": clips}),
        "policy": train("policy", PolicyObjective(policy, tokens)),
        "fine": train("fine", FineObjective(fine, tokens)),
        "base": Stage("assemble", {"out": "base", "parts": playing, "kind": "musiclm"}),
        "r": Stage(
            "train_rl", {"model_dir": "r", "system": "base", "rewards": rewards, "config": config}
        ),
        "votes": Stage(
            "collect", {"votes_dir": "votes", "system": "r", "config": GenerationConfig()}
        ),
        "preference": train(
            "preference", PreferenceObjective(PreferenceConfig(policy), votes, "policy")
        ),
        "dpo": train("dpo", DPOObjective(policy, votes, "policy", kl_strength=0.1)),
        "ru": Stage(
            "train_rl", {"model_dir": "ru", "system": "r", "rewards": preference, "config": config}
        ),
        "evaluate": Stage(
            "evaluate",
            {
                "model_dir": "evaluation",
                "systems": {"MusicLM": "base", "RU": "ru", "DPO": "dpo"},
                "rewards": rewards,
                "features": SemanticFeatures("semantic"),
                "config": GenerationConfig(),
            },
        ),
    }


@pytest.fixture(scope="session")
def models(stages):
    """Returns the models of the tiny run; each is traced once for all tests."""
    return PlannedModels(stages, SECONDS)
