"""Reinforcement learning: config, learner, rewards, and the jitted functions of a run."""
