"""Ragged paged attention for NVIDIA GPUs of the Hopper generation."""

from jax_engine.pallas_kernels.gpu.ragged_paged_attention import (
    attend,
    interpreter,
    num_stages,
    shared_bytes,
    step_work,
    why_not,
    why_not_pages,
)
from jax_engine.pallas_kernels.gpu.work_list import Work

__all__ = ["Work", "attend", "interpreter", "num_stages", "shared_bytes", "step_work", "why_not", "why_not_pages"]
