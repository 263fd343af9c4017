"""The base class of objectives over encoded tokens.

Legend: F frames, T codec frames, Q codec levels, K codes in a frame.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp

from musicrl_jax.core import checkpoint
from musicrl_jax.inputs.tokens import Tokens, read, read_manifest
from musicrl_jax.inputs.votes import Votes
from musicrl_jax.models.musiclm import MusicLMConfig
from musicrl_jax.models.tokens import FRAMES_PER_SECOND, interleave
from musicrl_jax.objectives.objective import Batch, Objective


@dataclasses.dataclass(frozen=True)
class TokenObjective(Objective):
    """An objective on the tokens that `musicrl encode` wrote."""

    data: Tokens | Votes

    def check_layout(self, **sizes: int) -> None:
        """Raises ValueError, naming the field, if the tokens have other sizes than the model.

        Otherwise indices out of range would be clamped silently.
        """
        # The layout is that of the manifest of the tokens' folder.
        layout = self.data.layout()
        for name, size in sizes.items():
            if layout[name] != size:
                raise ValueError(
                    f"the model's {name} is {size}, and its tokens have {layout[name]}: give both "
                    "the same size in gin"
                )

    def check_policy(self, policy: MusicLMConfig) -> None:
        """Raises ValueError if the tokens have other sizes than a policy."""
        self.check_layout(
            acoustic_codes=policy.layout.acoustic_codes,
            semantic_codes=policy.layout.semantic_codes,
            mulan_levels=policy.mulan_levels,
            mulan_codes=policy.mulan_codes,
        )

    def assets(self) -> dict[str, bytes]:
        """Returns tokens.json, hashes of the models that wrote the tokens, and clip.json.

        clip.json holds the clips' length. It is missing if no split of the folder is complete.
        """
        manifest = read_manifest(self.data.directory)
        assets = {checkpoint.LINEAGE: json.dumps(manifest["models"]).encode()}
        for split in list(manifest["counts"])[:1]:  # clips of all splits have one length
            frames = read(self.data.directory, split)[1]["semantic"].shape[0]
            assets[checkpoint.CLIP] = json.dumps({"seconds": frames / FRAMES_PER_SECOND}).encode()
        return assets


def policy_tokens(batch: Batch, policy: MusicLMConfig) -> jax.Array:
    """Interleaves semantic int32 [..., F] and coarse acoustic [..., T, Q]: int32 [..., F, K]."""
    coarse = jnp.asarray(batch["acoustic"])[..., : policy.layout.coarse_levels]
    return interleave(jnp.asarray(batch["semantic"]), coarse)
