"""Plays bundles: as files, and over HTTP."""
