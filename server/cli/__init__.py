"""The `jax-engine` command: what its commands take, and what they do besides serving. Imports no JAX."""

from jax_engine.server.cli.root import main as main
