"""What a model needs and can do on devices that are not here, from its config.json alone: `jax-engine plan`.

Imports run one way: `cli_plan` (server) -> `compare`, `report`, `plot` -> `planning` -> `compiling`, `roofline` ->
`hlo_costs` -> `hlo_loops` -> `hlo_text`; `chips` and `gpu_targets` need no JAX.
"""
