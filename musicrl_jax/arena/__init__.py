"""Preferences: simulated listeners, their votes, and the figures of a comparison."""
