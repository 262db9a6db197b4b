"""The specification of every op (`reference`) and its Pallas kernels for TPU and GPU. Knows nothing of models.

This folder is installed, and must be imported, as `jax_engine.pallas_kernels`.
"""

if __name__ != "jax_engine.pallas_kernels":
    raise ImportError("the folder pallas_kernels/ is installed as jax_engine.pallas_kernels; import it by that name")
