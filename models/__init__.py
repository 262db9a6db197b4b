"""Model families, their shared layers, the registry, Hugging Face weight rules and the built-in demo checkpoint.

This folder is installed, and must be imported, as `jax_engine.models`.
"""

if __name__ != "jax_engine.models":
    raise ImportError("the folder models/ is installed as jax_engine.models; import it by that name")
