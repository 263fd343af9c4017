"""Trains MuLan's two towers on clips and their captions, then fits the quantizer that makes MuLan tokens.

Legend: B clips, N samples, L text pieces, E width of the shared sphere, P clips of the training set.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

from musicrl_jax.losses import contrastive
from musicrl_jax.models import kmeans, mulan
from musicrl_jax.objectives.objective import Batch, Data, Metrics, Objective

VOCABULARY = "vocabulary.model"
KMEANS_ITERATIONS = 20
CLIPS_PER_CODE = 256  # clips that the quantizer is fitted to


@dataclasses.dataclass(frozen=True)
class MuLanObjective(Objective):
    """Contrastive loss over the whole batch; batches {'audio': f32 [B, N], 'text': i32 [B, L]}.

    Attributes:
        vocabulary: path of the SentencePiece model that cut the captions; it travels with the checkpoint.
    """

    model: mulan.MuLanConfig
    data: Data
    vocabulary: str

    def init(self, key: jax.Array, batch: Batch) -> dict[str, Any]:
        """The variables; ValueError where the vocabulary or the number of clips does not fit the model, or batches have
        no text."""
        if "text" not in batch:
            raise ValueError("the data gives no 'text': set Clips.vocabulary to the SentencePiece model's path")
        size = sentencepiece.SentencePieceProcessor(model_proto=self.assets()[VOCABULARY]).get_piece_size()
        if size > self.model.pieces:
            raise ValueError(f"{self.vocabulary} has {size} pieces, MuLanConfig.pieces = {self.model.pieces}: raise it")
        self._check_clips(self.data.count("train"))
        return dict(mulan.MuLan(self.model).init(key, batch["audio"][:1], batch["text"][:1]))

    def loss(
        self, params: Any, state: Any, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        """See `losses.contrastive`. Nothing random happens."""
        variables = {"params": params, **state}
        audio, text, temperature = mulan.MuLan(self.model).apply(variables, batch["audio"], batch["text"])
        identical = contrastive.identical_rows(batch["text"])
        loss, metrics = contrastive.contrastive(audio, text, temperature, identical)
        return loss, (state, metrics)

    def finish(
        self, variables: dict[str, Any], frozen: Any, batches: Callable[[], Iterator[dict[str, np.ndarray]]]
    ) -> dict[str, Any]:
        """Fills 'rvq': k-means, level after level, of the embeddings of training clips.

        Looks at 256 clips a code, the first that come in the shuffled order. Raises ValueError where the training
        set has fewer clips than a level has codes.
        """
        module = mulan.MuLan(self.model)
        embed = jax.jit(lambda variables, wav: module.apply(variables, wav, method="embed_audio"))
        parts, found = [], 0
        for batch in batches():
            parts.append(np.asarray(embed(variables, batch["audio"])))
            found += len(parts[-1])
            if found >= CLIPS_PER_CODE * self.model.codes:
                break
        self._check_clips(found)
        points = jnp.asarray(np.concatenate(parts))  # [P, E]
        key = jax.random.key(0)
        codebooks = kmeans.fit_rvq(key, points, self.model.levels, self.model.codes, KMEANS_ITERATIONS)
        return variables | {"rvq": {"codebooks": codebooks}}

    def _check_clips(self, count: int) -> None:
        if count < self.model.codes:
            raise ValueError(f"MuLanConfig.codes = {self.model.codes}, but there are {count} training clips: lower it")

    def assets(self) -> dict[str, bytes]:
        """The vocabulary's file, under the name vocabulary.model."""
        if not Path(self.vocabulary).is_file():
            raise FileNotFoundError(f"vocabulary = {self.vocabulary!r} is not a file: build the vocabulary first")
        return {VOCABULARY: Path(self.vocabulary).read_bytes()}
