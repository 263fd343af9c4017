"""Runs compiled for chips that are not there: what they need and how fast they can be."""
