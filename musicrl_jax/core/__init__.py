"""What every run needs besides machine learning: sharding, checkpoints, locks, metrics, keys."""
