#!/usr/bin/env bash
# MusicGen's decoder alone (`MusicgenForCausalLM`, transformers 5.23.0) draws other codes than it
# scores. Its `generate` makes a plain DynamicCache. Cross-attention then takes that for its own
# cache too: in every step the keys of the text are appended to those of the past, so after n
# columns a query sees n (1 + text) keys. No error, no warning; the codes are wrong, and a draw of
# 200 columns takes four times as long. A benchmark against it, or RL that trusts its samples, is
# off by both.
# Remedy: past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()). transformers 5.24.0
# refuses this argument there.
# torch 2.13.0, Python 3.11. PyTorch's wheel may bring CUDA, 3 GB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 numpy==2.3.5
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, MusicgenForCausalLM
from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

torch.manual_seed(0)
clips, codebooks, codes, width, columns, words = 4, 4, 64, 64, 200, 12
config = MusicgenDecoderConfig(
    vocab_size=codes, num_codebooks=codebooks, hidden_size=width, ffn_dim=128,
    num_hidden_layers=2, num_attention_heads=2, pad_token_id=codes, bos_token_id=codes,
    initializer_factor=0.5,
)
model = MusicgenForCausalLM(config).eval()
text = torch.randn(clips, words, width)
greedy = GenerationConfig(
    do_sample=False, max_length=columns, guidance_scale=None, pad_token_id=codes,
    bos_token_id=codes, decoder_start_token_id=codes, return_dict_in_generate=True,
    output_logits=True,
)


def draw(**cache):
    """Returns the share of codes that scoring in one pass chooses too, and the number of keys."""
    inputs = []  # of each step
    hook = model.register_forward_pre_hook(
        lambda _, words, names: inputs.append((words[0] if words else names["input_ids"])[:, -1]),
        with_kwargs=True,
    )
    result = model.generate(
        torch.full((clips * codebooks, 1), codes),
        attention_mask=torch.ones(clips, 1, dtype=torch.long),
        encoder_hidden_states=text,
        num_return_sequences=1,
        generation_config=greedy,
        **cache,
    )
    hook.remove()
    with torch.no_grad():
        scored = model(torch.stack(inputs, 1), encoder_hidden_states=text, use_cache=False).logits
    drawn = torch.stack(result.logits, 1).reshape(scored.shape)
    equal = (drawn.argmax(-1) == scored.argmax(-1)).float().mean().item()
    kept = result.past_key_values
    own = getattr(kept, "self_attention_cache", kept)
    return type(kept).__name__, own.layers[0].keys.shape[2], equal


alone = draw()
pair = draw(past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
for name, keys, equal in (alone, pair):
    print(f"{name}: {keys} keys after {columns} columns; {equal:.0%} of codes are those it scores best")
sys.exit(not (alone[:2] == ("DynamicCache", 2600) and alone[2] < 0.5 and pair[1:] == (200, 1.0)))
PYTHON
# Output:
#   DynamicCache: 2600 keys after 200 columns; 4% of codes are those it scores best
#   EncoderDecoderCache: 200 keys after 200 columns; 100% of codes are those it scores best
