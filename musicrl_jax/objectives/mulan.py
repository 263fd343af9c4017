"""Trains MuLan's two towers from random weights on clips and captions, then fits its quantizer.

Legend: B clips, N samples, L text pieces, E width of the embedding space.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from musicrl_jax.core import checkpoint
from musicrl_jax.core.statistics import LEAST_INTERVAL, LEAST_RANKED
from musicrl_jax.inputs import pieces
from musicrl_jax.losses.contrastive import contrastive, identical_rows
from musicrl_jax.models import rvq
from musicrl_jax.models.mulan import MuLan, MuLanConfig
from musicrl_jax.objectives.objective import (
    Batch,
    Data,
    Epoch,
    Loss,
    Objective,
    Variables,
    collect_points,
)
from musicrl_jax.systems.musiclm import VOCABULARY

CLIPS_PER_CODE = 256  # that the quantizer is fitted to


@dataclasses.dataclass(frozen=True)
class MuLanObjective(Objective):
    """Contrastive loss over the whole batch; batches {'audio': f32 [B, N], 'text': i32 [B, L]}.

    Attributes:
      vocabulary: path of the captions' SentencePiece model or tokenizer.json; it is stored in the
        checkpoint.
    """

    model: MuLanConfig
    data: Data
    vocabulary: str = dataclasses.field(metadata=checkpoint.PATH)

    # In a batch of one clip the loss is 0, and its caption always ranks first.
    LEAST_EXAMPLES: ClassVar = {
        **dict.fromkeys(("loss", "chance"), LEAST_INTERVAL),
        **dict.fromkeys(("recall_1", "recall_10", "median_rank"), LEAST_RANKED),
    }

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Returns random variables of MuLan."""
        return dict(MuLan(self.model).init(key, batch["audio"][:1], batch["text"][:1]))

    def check(self, batch: Batch) -> None:
        """Raises ValueError if batches have no text, or vocabulary or data do not fit the model."""
        if "text" not in batch:
            raise ValueError("the data has no 'text': set Clips.vocabulary to the vocabulary")
        size = pieces.size(self.assets()[VOCABULARY])
        if size > self.model.text.pieces:
            raise ValueError(
                f"{self.vocabulary} has {size} pieces, more than BertConfig.pieces = "
                f"{self.model.text.pieces}: raise that"
            )
        self._check_clips(self.data.count("train"))

    def frozen(self, read: checkpoint.Reader = checkpoint.load_model) -> Any:
        """Returns {}, and prints that no pretrained weights are used."""
        print(
            "MuLan's towers start from random weights; gin/pretrained.gin uses published ones",
            flush=True,
        )
        return {}

    def loss(self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array) -> Loss:
        """Returns the loss of `losses.contrastive`; nothing is random."""
        variables = {"params": params, **state}
        outputs = MuLan(self.model).apply(variables, batch["audio"], batch["text"])
        loss, metrics = contrastive(*outputs, identical_rows(batch["text"]))
        return loss, (state, metrics)

    def finish(self, variables: Variables, frozen: Any, batches: Epoch) -> Variables:
        """Fills 'rvq' by k-means of embeddings of training clips, level after level.

        Reads the first 256 clips a code in the shuffled order. Raises ValueError if there are fewer
        clips than codes.
        """
        apply = jax.jit(MuLan(self.model).apply, static_argnames="method")
        return variables | self.quantizer(
            apply(variables, batch["audio"], method=MuLan.embed_audio) for batch in batches()
        )

    def quantizer(self, embeddings: Iterable[jax.Array]) -> Variables:
        """Returns the collection 'rvq', fitted to audio embeddings [B, E]."""
        points = collect_points(embeddings, CLIPS_PER_CODE * self.model.codes)
        self._check_clips(len(points))
        codebooks = rvq.fit(
            jax.random.key(0), jnp.asarray(points), self.model.levels, self.model.codes
        )
        return {"rvq": {"codebooks": codebooks}}

    def assets(self) -> dict[str, bytes]:
        """Returns the content of the vocabulary, named 'vocabulary'."""
        return {VOCABULARY: pieces.content(self.vocabulary)}

    def _check_clips(self, count: int) -> None:
        """Raises ValueError if there are fewer clips than codes."""
        if count < self.model.codes:
            raise ValueError(
                f"MuLanConfig.codes = {self.model.codes}, but there are {count} training clips: "
                "lower it, or give more clips"
            )
