"""Plots and the listening page."""
