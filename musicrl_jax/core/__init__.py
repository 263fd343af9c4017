"""What every run needs and no machine learning: sharding, state, checkpoints, metrics, keys, tokens, spectra."""
