"""TFDS builders of the music that MusicRL-JAX trains on, one folder for each data set."""

# The modules use relative imports: this folder is the package `data` in a checkout and
# `musicrl_jax.shipped.data` in a wheel (see setup.py).
