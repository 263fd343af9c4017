"""Sampling, rewards and the rollout that joins them."""
