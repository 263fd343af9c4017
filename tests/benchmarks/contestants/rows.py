"""The rows of `peers.py`, and the sizes of their models; without any other package.

A row is one piece of work that every contestant does in its own way. One call of a row may have
several figures: a step of RL is a draw and an update, each with its seconds.

Legend: L layers, D width, H heads, M width of the feed-forward.
"""

import dataclasses

# Figures of a call, in seconds, in the order of the table.
SECONDS = ("draw", "update", "step", "prompt to wav", "training step", "codec decode")
MEMORY = "peak memory of an update"  # in MiB, above what was in use before
COMPILE = "compile"  # in seconds, once
CLIP_SECONDS = 5.0
TINY_CLIP_SECONDS = 0.4
CLIPS_PER_PROMPT = 4  # compared by the leave-one-out baseline
TEMPERATURE = 0.99
KL_STRENGTH = 0.01
LEARNING_RATE = 1e-5


@dataclasses.dataclass(frozen=True)
class MusicSize:
    """Sizes of a music policy, and of its peer with an equal number of weights.

    Attributes:
      temporal, depth: (L, D, H, M) of the policy's transformers.
      peer: (L, D, H, M) of a MusicGen-shaped decoder.
      semantic_codes, acoustic_codes: the policy's vocabularies.
      peer_codes: codes in each of the decoder's four codebooks.
    """

    temporal: tuple[int, int, int, int]
    depth: tuple[int, int, int, int]
    peer: tuple[int, int, int, int]
    semantic_codes: int = 1024
    acoustic_codes: int = 256
    peer_codes: int = 1024


@dataclasses.dataclass(frozen=True)
class PlainSize:
    """Sizes of a plain decoder, the same for all contestants.

    Attributes:
      decoder: (L, D, H, M), M of a gated feed-forward.
      codes: the vocabulary.
    """

    decoder: tuple[int, int, int, int]
    codes: int


SIZES = {
    # The policy that is in the repository: gin/sizes/shipped.gin.
    "3 M": MusicSize((4, 160, 4, 448), (2, 96, 4, 192), peer=(4, 160, 4, 704)),
    "27 M": MusicSize((6, 512, 8, 1344), (4, 256, 4, 768), peer=(6, 512, 8, 1664)),
    "plain 27 M": PlainSize((6, 512, 8, 1792), 4096),
    "tiny": MusicSize((1, 16, 2, 24), (1, 8, 2, 16), (1, 16, 2, 24), 9, 7, 9),
    "plain tiny": PlainSize((1, 16, 2, 24), 11),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One piece of work.

    Attributes:
      kind: 'rl', 'draw', 'wav', 'train' or 'decode'.
      size: name in SIZES, or of a codec: 'demo' (16 kHz), 'base' (24 kHz) or 'tiny'.
      batch: clips, or sequences.
      length: tokens of a sequence of a plain decoder; 0 for clips.
      clip_seconds: length of a clip.
    """

    kind: str
    size: str
    batch: int
    length: int = 0
    clip_seconds: float = CLIP_SECONDS

    def __str__(self) -> str:
        size = f"{self.batch} x {self.length}" if self.length else f"batch {self.batch}"
        names = {"rl": "RL", "draw": "draw", "wav": "wav", "train": "train", "decode": "codec"}
        return f"{names[self.kind]}, {self.size}, {size}"

    @property
    def is_plain(self) -> bool:
        """Whether the model is a plain decoder."""
        return self.length > 0


ROWS = (
    Row("draw", "3 M", 1),
    Row("rl", "3 M", 8),
    Row("rl", "3 M", 32),
    Row("rl", "27 M", 8),
    Row("rl", "plain 27 M", 32, 141),
    Row("wav", "3 M", 1),
    Row("wav", "3 M", 8),
    Row("wav", "3 M", 32),
    Row("train", "3 M", 8),
    Row("train", "plain 27 M", 8, 512),
    Row("decode", "demo", 1),
    Row("decode", "base", 1),
)
TINY_ROWS = (
    Row("draw", "tiny", 1, clip_seconds=TINY_CLIP_SECONDS),
    Row("rl", "tiny", 4, clip_seconds=TINY_CLIP_SECONDS),
    Row("rl", "plain tiny", 4, 6),
    Row("wav", "tiny", 1, clip_seconds=TINY_CLIP_SECONDS),
    Row("train", "tiny", 2, clip_seconds=TINY_CLIP_SECONDS),
    Row("train", "plain tiny", 2, 6),
    Row("decode", "tiny", 1, clip_seconds=TINY_CLIP_SECONDS),
)
BY_NAME = {str(row): row for row in ROWS + TINY_ROWS}
