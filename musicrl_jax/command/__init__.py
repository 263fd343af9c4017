"""The parts of the `musicrl` command that need neither gin nor jax."""
