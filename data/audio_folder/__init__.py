"""Builds a data set from a user's own recordings and captions."""
