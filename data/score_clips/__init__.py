"""Builds a data set from scores of music21's corpus, rendered with captions true of their notes."""
