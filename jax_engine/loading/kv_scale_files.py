"""Scales of 8-bit caches as checkpoints store them. Needs no JAX.

By compressed-tensors and vLLM they are `self_attn.k_scale` and `v_scale` of a layer, by ModelOpt `k_proj.k_scale` and
`v_proj.v_scale`, by Quark the `output_scale` of these projections, and by older tools one `kv_scale` for both; each is
a number, or one for each head.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jax_engine.loading.checkpoint_manifest import is_converted, read_checkpoint_manifest
from jax_engine.loading.model_files import ModelLoadError, WeightFiles, listed

# Whatever ends like these is about a cache, those of queries and of attention weights included, which are no use here.
SCALE_TENSORS = r"self_attn\.(?:attn\.)?(?:[qkv]_proj\.)?(?:q|k|v|kv|prob)_scale$|self_attn\.[kv]_proj\.output_scale$"
_NAME = re.compile(
    r"layers\.(?P<layer>\d+)\.self_attn\.(?:attn\.)?"
    r"(?:(?:[kv]_proj\.)?(?P<kind>k|v|kv)_scale|(?P<projection>[kv])_proj\.output_scale)$"
)
_PLANES = {"k": (0,), "v": (1,), "kv": (0, 1)}


def stored_kv_scales(folder: Path) -> dict[str, list[float]]:
    """The scales that a checkpoint has, by the names of their tensors, without those that say nothing (vLLM has -1).

    Raises:
        ModelLoadError: a file is missing or broken.
    """
    if is_converted(folder):
        return dict(read_checkpoint_manifest(folder).kv_scales)
    files = WeightFiles.open(folder)
    found = {
        name: files.whole_tensor(name).astype(np.float64).reshape(-1).tolist()
        for name in sorted(files.names)
        if _NAME.search(name)
    }
    return {name: values for name, values in found.items() if any(value > 0 for value in values)}


def arranged_kv_scales(
    stored: Mapping[str, list[float]], *, num_layers: int, num_heads: int, folder: Path
) -> NDArray[np.float32]:
    """Scales by layer, of keys and of values, by head; of the checkpoint's own key and value heads.

    Raises:
        ModelLoadError: a layer has none, or numbers that cannot be scales.
    """
    scales = np.full((num_layers, 2, num_heads), np.nan, np.float32)
    for name, values in stored.items():
        match = _NAME.search(name)
        assert match is not None
        layer = int(match["layer"])
        if layer >= num_layers or len(values) not in (1, num_heads) or not all(0 < value < np.inf for value in values):
            raise ModelLoadError(
                f"tensor {name} in {folder} must hold a number above 0, or one for each of {num_heads} heads, of one "
                f"of {num_layers} layers; calculate_kv_scales=True takes none from the checkpoint"
            )
        for plane in _PLANES[match["kind"] or match["projection"]]:
            scales[layer, plane] = values
    missing = [f"layer {layer}" for layer in range(num_layers) if np.isnan(scales[layer]).any()]
    if missing:
        raise ModelLoadError(
            f"{folder} has scales for a KV cache, but lacks some of {len(missing)} layers: {listed(missing)}; download "
            "it again, or use calculate_kv_scales=True, which takes none from the checkpoint"
        )
    return scales
