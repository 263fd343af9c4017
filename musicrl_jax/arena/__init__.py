"""Preferences: who listens, and what they chose."""
