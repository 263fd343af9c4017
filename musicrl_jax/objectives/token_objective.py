"""What the objectives over encoded tokens share.

Legend: B clips or pairs of clips, F frames, T codec frames, Q codec levels, K codes in a frame.
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

    def check_layout(self, **wanted: int) -> None:
        """ValueError, naming the field, where the tokens are of other sizes than the model's: indices out of range
        would be clamped in silence.
        """
        layout = self.data.layout()
        for name, size in wanted.items():
            if layout[name] != size:
                raise ValueError(
                    f"the model's {name} is {size}, and its tokens have {layout[name]}: give both the same size in gin"
                )

    def assets(self) -> dict[str, bytes]:
        """Returns tokens.json, the hashes of the models whose tokens this one speaks, and clip.json, its clips' length.

        A token folder in which no split is complete has no length, and gives no clip.json.
        """
        told = read_manifest(self.data.directory)
        assets = {checkpoint.LINEAGE: json.dumps(told["models"]).encode()}
        for split in list(told["counts"])[:1]:  # clips of all splits have one length
            frames = read(self.data.directory, split)[1]["semantic"].shape[0]
            assets[checkpoint.CLIP] = json.dumps({"seconds": frames / FRAMES_PER_SECOND}).encode()
        return assets

    def check_policy(self, policy: MusicLMConfig) -> None:
        """`check_layout` for what a policy reads."""
        self.check_layout(
            acoustic_codes=policy.layout.acoustic_codes,
            semantic_codes=policy.layout.semantic_codes,
            mulan_levels=policy.mulan_levels,
            mulan_codes=policy.mulan_codes,
        )


def policy_tokens(batch: Batch, policy: MusicLMConfig) -> jax.Array:
    """What a policy of that config reads: semantic int32 [..., F] and acoustic [..., T, Q] -> int32 [..., F, K]."""
    coarse = jnp.asarray(batch["acoustic"])[..., : policy.layout.coarse_levels]
    return interleave(jnp.asarray(batch["semantic"]), coarse)
