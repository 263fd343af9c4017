"""Trains MuLan's two towers from nothing on clips and their captions, then fits the quantizer that makes MuLan tokens.

Legend: B clips, N samples, L text pieces, E width of the shared sphere, P clips of the training set.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from musicrl_jax.core import checkpoint, sharding
from musicrl_jax.core.statistics import LEAST_INTERVAL, LEAST_RANKED
from musicrl_jax.inputs import pieces
from musicrl_jax.losses import contrastive
from musicrl_jax.models import mulan, rvq
from musicrl_jax.objectives.objective import Batch, Data, Metrics, Objective
from musicrl_jax.systems.musiclm import VOCABULARY

CLIPS_PER_CODE = 256  # clips that the quantizer is fitted to


@dataclasses.dataclass(frozen=True)
class MuLanObjective(Objective):
    """Contrastive loss over the whole batch; batches {'audio': f32 [B, N], 'text': i32 [B, L]}.

    Attributes:
        vocabulary: path of what cut the captions, a SentencePiece model or a tokenizer.json; it travels with the
            checkpoint.
    """

    model: mulan.MuLanConfig
    data: Data
    vocabulary: str = dataclasses.field(metadata=checkpoint.PATH)

    # One clip alone has a loss of 0 and is always found.
    LEAST_EXAMPLES: ClassVar = dict.fromkeys(("loss", "chance"), LEAST_INTERVAL) | dict.fromkeys(
        ("recall_1", "recall_10", "median_rank"), LEAST_RANKED
    )

    def init(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """Draws the variables."""
        return dict(mulan.MuLan(self.model).init(key, batch["audio"][:1], batch["text"][:1]))

    def check(self, batch: Batch) -> None:
        """ValueError where the vocabulary or the number of clips does not fit the model, or the batch has no text."""
        if "text" not in batch:
            raise ValueError(
                "the data gives no 'text': set Clips.vocabulary to the vocabulary's path"
            )
        size = pieces.size(self.assets()[VOCABULARY])
        if size > self.model.text.pieces:
            raise ValueError(
                f"{self.vocabulary} has {size} pieces, BertConfig.pieces = {self.model.text.pieces}: raise it"
            )
        self._check_clips(self.data.count("train"))

    def frozen(self, read: checkpoint.Reader = checkpoint.load_model) -> Any:
        """Returns nothing; says that no pretrained weights are used."""
        print(
            "MuLan's towers are trained from nothing; gin/pretrained.gin starts from published weights",
            flush=True,
        )
        return {}

    def loss(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """See `losses.contrastive`. Nothing random happens."""
        variables = {"params": params, **state}
        audio, text, temperature = mulan.MuLan(self.model).apply(
            variables, batch["audio"], batch["text"]
        )
        identical = contrastive.identical_rows(batch["text"])
        loss, metrics = contrastive.contrastive(audio, text, temperature, identical)
        return loss, (state, metrics)

    def finish(
        self,
        variables: dict[str, Any],
        frozen: Any,
        batches: Callable[[], Iterator[dict[str, np.ndarray]]],
    ) -> dict[str, Any]:
        """Fills 'rvq': k-means, level after level, of the embeddings of training clips.

        Looks at 256 clips a code, the first that come in the shuffled order. Raises ValueError where the training
        set has fewer clips than a level has codes.
        """
        module = mulan.MuLan(self.model)
        embed = jax.jit(
            lambda variables, wav: module.apply(variables, wav, method=mulan.MuLan.embed_audio)
        )
        return variables | self.quantizer(embed(variables, batch["audio"]) for batch in batches())

    def quantizer(self, embeddings: Iterable[jax.Array]) -> dict[str, Any]:
        """The collection 'rvq', fitted to as many of the audio embeddings [B, E] as are needed."""
        parts, found = [], 0
        for part in embeddings:
            parts.append(sharding.fetch(part))
            found += len(part)
            if found >= CLIPS_PER_CODE * self.model.codes:
                break
        self._check_clips(found)
        points = jnp.asarray(np.concatenate(parts))  # [P, E]
        codebooks = rvq.fit(jax.random.key(0), points, self.model.levels, self.model.codes)
        return {"rvq": {"codebooks": codebooks}}

    def assets(self) -> dict[str, bytes]:
        """The vocabulary's file, under the name 'vocabulary'."""
        return {VOCABULARY: pieces.content(self.vocabulary)}

    def _check_clips(self, count: int) -> None:
        if count < self.model.codes:
            raise ValueError(
                f"MuLanConfig.codes = {self.model.codes}, but there are {count} training clips: lower it"
            )
