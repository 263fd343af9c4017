"""SeqIO tasks over TFDS records: the only TensorFlow in the package, in `libraries` and `tasks`.

Configs of data (Clips, Prompts, Tokens, Votes) are imported without it; their methods import it when they read.
"""
