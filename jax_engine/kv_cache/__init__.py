"""Pages of keys and values, as the host accounts for them: who holds which, what they are known by. Needs no JAX."""
