"""`jax-engine bench`: load, clients and figures, which the scripts in `benchmarks/` use too."""
