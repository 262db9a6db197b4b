"""Ragged paged attention for NVIDIA GPUs of the Hopper generation."""

from jax_engine.pallas_kernels.gpu.ragged_paged_attention import (
    attend,
    attend_stripe,
    interpreter,
    num_stages,
    shared_bytes,
    step_work,
    why_not,
    why_not_pages,
)
from jax_engine.pallas_kernels.gpu.work_list import Stripe, Work

__all__ = [
    "Stripe",
    "Work",
    "attend",
    "attend_stripe",
    "interpreter",
    "num_stages",
    "shared_bytes",
    "step_work",
    "why_not",
    "why_not_pages",
]
