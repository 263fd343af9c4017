"""What the objectives over encoded tokens share."""

import dataclasses
import json

from musicrl_jax.inputs.tokens import Tokens, read_manifest
from musicrl_jax.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class TokenObjective(Objective):
    """An objective on the tokens that `musicrl encode` wrote."""

    data: Tokens

    def check_layout(self, **wanted: int) -> None:
        """ValueError, naming the field, where the tokens are of other sizes than the model's: indices out of range
        would be clamped in silence."""
        layout = self.data.layout()
        for name, size in wanted.items():
            if layout[name] != size:
                raise ValueError(
                    f"the model's {name} is {size}, and its tokens have {layout[name]}: give both the same size in gin"
                )

    def assets(self) -> dict[str, bytes]:
        """tokens.json: the hashes of the models whose tokens this one speaks."""
        return {"tokens.json": json.dumps(read_manifest(self.data.directory)["models"]).encode()}
