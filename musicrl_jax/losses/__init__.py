"""Pure functions: arrays in, (loss, metrics) out."""
