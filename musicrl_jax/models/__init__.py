"""Linen modules and their frozen configs, one file a component."""
