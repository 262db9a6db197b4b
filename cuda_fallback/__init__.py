"""The same ops through XLA and cuDNN: what runs on CPU, and on CUDA devices where no Pallas kernel applies.

This folder is installed, and must be imported, as `jax_engine.cuda_fallback`.
"""

if __name__ != "jax_engine.cuda_fallback":
    raise ImportError("the folder cuda_fallback/ is installed as jax_engine.cuda_fallback; import it by that name")
