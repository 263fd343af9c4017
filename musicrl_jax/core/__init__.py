"""Shared parts without machine learning: sharding, checkpoints, locks, metrics, keys."""
