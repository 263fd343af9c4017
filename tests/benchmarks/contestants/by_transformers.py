"""The rows in PyTorch with the models of `transformers`, in float32 and without compilation.

The peer of a music policy is MusicGen's decoder: four codebooks at 50 frames a second, in the delay
pattern, with cross-attention to twelve vectors in place of a text. Its wav comes from the 32 kHz
EnCodec that MusicGen has; prompts are not encoded. The peer of a plain decoder is Llama's, with as
many weights of the same shapes. The codec is EnCodec of 24 kHz at 6 kbps.

A step of RL is RLOO put together from the library's parts: `generate` with sampling and a cache,
the anchor's forward pass without gradient, one forward and backward pass of the policy with the
exact KL over the vocabulary, and AdamW.

Legend: B clips, K codebooks, T frames, S tokens in a row, V codes, D width.
"""

import copy
import os
import time

import torch
from contestants.rows import (
    CLIPS_PER_PROMPT,
    KL_STRENGTH,
    LEARNING_RATE,
    SIZES,
    TEMPERATURE,
    Row,
)
from torch.nn import functional
from transformers import (
    EncodecConfig,
    EncodecModel,
    LlamaConfig,
    LlamaForCausalLM,
    MusicgenForCausalLM,
)
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

CODEBOOKS, FRAMES_PER_SECOND, CONDITIONS = 4, 50, 12
MUSICGEN_CODEC = {
    "sampling_rate": 32_000,
    "upsampling_ratios": [8, 5, 4, 4],
    "num_filters": 64,
    "codebook_size": 2048,
    "use_causal_conv": False,
    "target_bandwidths": [2.2],
}
PEER_LEVELS, PEER_FRAMES_PER_SECOND = 8, 75  # of EnCodec, 24 kHz at 6 kbps
TINY_FILTERS = 4
SAMPLING = {"do_sample": True, "top_k": 0, "temperature": TEMPERATURE}


# --- decoders ---


class Music:
    """A decoder of MusicGen's shape."""

    def __init__(self, row: Row):
        size = SIZES[row.size]
        layers, width, heads, mlp = size.peer
        self.codes, self.frames = size.peer_codes, round(row.clip_seconds * FRAMES_PER_SECOND)
        self.model = MusicgenForCausalLM(
            MusicgenDecoderConfig(
                vocab_size=self.codes,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                ffn_dim=mlp,
                num_codebooks=CODEBOOKS,
                pad_token_id=self.codes,
                bos_token_id=self.codes,
            )
        )
        self.model.generation_config.decoder_start_token_id = self.codes
        self.condition = torch.randn(row.batch, CONDITIONS, width)
        self.begin = torch.full((row.batch * CODEBOOKS, 1), self.codes)

    def sample(self, **changes: object) -> torch.Tensor:
        """Returns sampled codes, int64 [B, K, T]; `changes` are of the library's arguments."""
        return self.model.generate(
            self.begin,
            # Without it, transformers 5.23 masks the first column, which is padding.
            attention_mask=torch.ones(len(self.condition), 1, dtype=torch.int64),
            encoder_hidden_states=self.condition,
            # Its default cache takes keys of the condition for keys of the past, once a column.
            past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()),
            max_length=self.frames + CODEBOOKS,
            num_return_sequences=1,  # transformers 5.23 fails without
            **SAMPLING | changes,
        )

    def logits(self, model: torch.nn.Module, codes: torch.Tensor) -> torch.Tensor:
        """Returns the logits of each code given those before it, f32 [B, K, T, V]."""
        # Codebook k is delayed by k columns; a column of padding comes first.
        batch, _, frames = codes.shape
        columns = torch.full((batch, CODEBOOKS, frames + CODEBOOKS), self.codes)
        for number in range(CODEBOOKS):
            columns[:, number, number + 1 : number + 1 + frames] = codes[:, number]
        inputs = columns[:, :, :-1].reshape(batch * CODEBOOKS, -1)
        logits = model(
            inputs, encoder_hidden_states=self.condition[:batch], use_cache=False
        ).logits.unflatten(0, (batch, CODEBOOKS))
        return torch.stack(
            [logits[:, number, number : number + frames] for number in range(CODEBOOKS)], dim=1
        )

    def some_codes(self, batch: int) -> torch.Tensor:
        """Returns codes to train on, int64 [B, K, T]."""
        return torch.zeros(batch, CODEBOOKS, self.frames, dtype=torch.int64)


class Plain:
    """A decoder of Llama's shape."""

    def __init__(self, row: Row):
        size = SIZES[row.size]
        layers, width, heads, mlp = size.decoder
        self.codes, self.length = size.codes, row.length
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size.codes,
                hidden_size=width,
                intermediate_size=mlp,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=2048,
                bos_token_id=0,
                eos_token_id=None,
                pad_token_id=size.codes - 1,
            )
        )
        self.begin = torch.zeros(row.batch, 1, dtype=torch.int64)

    def sample(self, **changes: object) -> torch.Tensor:
        """Returns sampled codes, int64 [B, S]; `changes` are of the library's arguments."""
        ids = self.model.generate(
            self.begin,
            attention_mask=torch.ones_like(self.begin),
            max_new_tokens=self.length,
            **SAMPLING | changes,
        )
        return ids[:, 1:]

    def logits(self, model: torch.nn.Module, codes: torch.Tensor) -> torch.Tensor:
        """Returns the logits of each code given those before it, f32 [B, S, V]."""
        inputs = torch.cat([self.begin[: len(codes)], codes[:, :-1]], dim=1)
        return model(inputs, use_cache=False).logits

    def some_codes(self, batch: int) -> torch.Tensor:
        """Returns codes to train on, int64 [B, S]."""
        return torch.zeros(batch, self.length, dtype=torch.int64)


def decoder_of(row: Row) -> Music | Plain:
    """Returns the row's decoder."""
    return Plain(row) if row.is_plain else Music(row)


# --- rows ---


class Work:
    """A row; see `contestants.worker.Work`."""

    compile_seconds = None

    def __init__(self, model: torch.nn.Module):
        self.weights = sum(weight.numel() for weight in model.parameters())

    def prepare(self) -> None:
        """Does nothing: `run` leaves no gradients."""


class Drawing(Work):
    """A draw."""

    def __init__(self, row: Row):
        self.decoder = decoder_of(row)
        self.decoder.model.eval()
        super().__init__(self.decoder.model)

    def run(self) -> dict[str, float]:
        """Samples clips."""
        start = time.perf_counter()
        self.sampled = self.decoder.sample()
        return {"draw": time.perf_counter() - start}


class Training(Work):
    """A step of supervised training."""

    def __init__(self, row: Row):
        self.decoder = decoder_of(row)
        self.decoder.model.train()
        self.codes = self.decoder.some_codes(row.batch)
        self.optimiser = adam(self.decoder.model)
        super().__init__(self.decoder.model)

    def run(self) -> dict[str, float]:
        """Takes a step."""
        start = time.perf_counter()
        logits = self.decoder.logits(self.decoder.model, self.codes)
        functional.cross_entropy(logits.flatten(0, -2), self.codes.flatten()).backward()
        step(self.decoder.model, self.optimiser)
        return {"training step": time.perf_counter() - start}


class Reinforcing(Drawing):
    """A draw and an update."""

    def __init__(self, row: Row):
        super().__init__(row)
        self.anchor = copy.deepcopy(self.decoder.model).requires_grad_(False)
        self.reward = torch.linspace(0.0, 1.0, row.batch)
        self.optimiser = adam(self.decoder.model)

    def run(self) -> dict[str, float]:
        """Samples clips and learns from them."""
        seconds = super().run()
        start = time.perf_counter()
        self.measured()
        seconds["update"] = time.perf_counter() - start
        seconds["step"] = seconds["draw"] + seconds["update"]
        return seconds

    def measured(self) -> None:
        """Updates the policy once."""
        log_policy, kl = self.scores()

        # Advantages: the reward and the future KL, less the means of the prompt's other clips.
        future = kl.detach().flip(1).cumsum(1).flip(1) - kl.detach()
        others = CLIPS_PER_PROMPT - 1
        by_prompt = self.reward.unflatten(0, (-1, CLIPS_PER_PROMPT))
        mean = ((by_prompt.sum(1, keepdim=True) - by_prompt) / others).flatten()
        mean_future = (future.sum(0, keepdim=True) - future) / (len(future) - 1)
        advantage = (1 - KL_STRENGTH) * (self.reward - mean)[:, None]
        advantage = advantage - KL_STRENGTH * (future - mean_future)

        # The gradient of -J.
        (KL_STRENGTH * kl - advantage * log_policy).sum(1).mean().backward()
        step(self.decoder.model, self.optimiser)

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-probs of the sampled codes, and the exact KL before each, f32 [B, S]."""
        decoder, codes = self.decoder, self.sampled
        with torch.no_grad():
            anchor = (decoder.logits(self.anchor, codes) / TEMPERATURE).log_softmax(-1)
        policy = (decoder.logits(decoder.model, codes) / TEMPERATURE).log_softmax(-1)
        log_probs = policy.gather(-1, codes[..., None])[..., 0]
        kl = (policy.exp() * (policy - anchor)).sum(-1)
        # Codes of a frame follow each other.
        in_order = (lambda x: x) if codes.ndim == 2 else (lambda x: x.transpose(1, 2).flatten(1))
        return in_order(log_probs), in_order(kl)


class Decoding(Work):
    """A codec's decoder."""

    def __init__(self, row: Row):
        config = EncodecConfig(num_filters=TINY_FILTERS) if row.size == "tiny" else EncodecConfig()
        self.codec = EncodecModel(config).eval()
        frames = round(row.clip_seconds * PEER_FRAMES_PER_SECOND)
        self.codes = torch.zeros(1, row.batch, PEER_LEVELS, frames, dtype=torch.int64)
        super().__init__(self.codec)

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Decodes clips."""
        start = time.perf_counter()
        self.codec.decode(self.codes, [None])
        return {"codec decode": time.perf_counter() - start}


class Playing(Drawing):
    """What turns prompts into wavs."""

    def __init__(self, row: Row):
        super().__init__(row)
        filters = {"num_filters": TINY_FILTERS} if row.size == "tiny" else {}
        self.codec = EncodecModel(EncodecConfig(**MUSICGEN_CODEC | filters)).eval()

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Samples clips and decodes them."""
        start = time.perf_counter()
        self.codec.decode(self.decoder.sample()[None], [None])
        return {"prompt to wav": time.perf_counter() - start}


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Returns the optimiser."""
    return torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)


def step(model: torch.nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Moves a model by its gradients, clipped to norm 1."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


ROWS = {
    "draw": Drawing,
    "rl": Reinforcing,
    "wav": Playing,
    "train": Training,
    "decode": Decoding,
}


def work(row: Row) -> Work:
    """Builds the row's models."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    return ROWS[row.kind](row)
