"""TFDS builders of the music that MusicRL-JAX learns from, one folder a data set."""
