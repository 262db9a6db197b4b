"""The OpenAI-compatible HTTP server, its protocol and the `jax-engine` command. Imports no JAX.

This folder is installed, and must be imported, as `jax_engine.server`.
"""

if __name__ != "jax_engine.server":
    raise ImportError("the folder server/ is installed as jax_engine.server; import it by that name")
