"""Compiles a run for TPUs on a machine without any: its memory, and its speed at best."""
