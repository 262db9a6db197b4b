"""Ragged paged attention for TPUs, with the layout of its pages and its block sizes."""

from jax_engine.pallas_kernels.tpu.blocks import UNITS_A_TRIP, Blocks, Chip, block_sizes, chips, find_chip
from jax_engine.pallas_kernels.tpu.geometry import Geometry, page_shape
from jax_engine.pallas_kernels.tpu.ragged_paged_attention import ragged_paged_attention, step_work

__all__ = [
    "UNITS_A_TRIP",
    "Blocks",
    "Chip",
    "Geometry",
    "block_sizes",
    "chips",
    "find_chip",
    "page_shape",
    "ragged_paged_attention",
    "step_work",
]
