"""Data: SeqIO tasks over TFDS records. `libraries` and `tasks` alone import TensorFlow.

The configs of data (Clips, Prompts, Tokens, Votes) import it when they read, not before.
"""
