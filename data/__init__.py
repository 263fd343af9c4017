"""TFDS builders of the music that MusicRL-JAX learns from, one folder a data set."""

# They import each other by relative imports: this folder is the package `data` in a checkout, and
# `musicrl_jax.shipped.data` in a wheel (setup.py).
