"""The settings that say what pages hold, and their checks."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_engine.config import EngineConfig

EIGHT_BIT_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2", "int8")
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", *EIGHT_BIT_CACHES)


def check_cache_type(config: "EngineConfig") -> None:
    """Raise a ValueError unless the type of pages, and where their scales come from, are in range and go together."""
    dtype, calculate = config.kv_cache_dtype, config.calculate_kv_scales
    if dtype not in KV_CACHE_DTYPES:
        raise ValueError(
            f"kv_cache_dtype={dtype!r} must be one of {', '.join(KV_CACHE_DTYPES)}; auto is the type of the model"
        )
    if not isinstance(calculate, bool):
        raise ValueError(f"calculate_kv_scales={calculate!r} must be true or false; leave it out for false")
    if dtype == "int8" and not calculate:
        raise ValueError(
            "kv_cache_dtype='int8' needs calculate_kv_scales=True, since whole numbers from -127 to 127 are of no use "
            "without a scale that was measured; set it, or use kv_cache_dtype='fp8'"
        )
    if calculate and dtype not in EIGHT_BIT_CACHES:
        raise ValueError(
            f"calculate_kv_scales=True is for pages of 8 bits, and kv_cache_dtype is {dtype!r}; leave it out, or set "
            f"kv_cache_dtype to one of {', '.join(EIGHT_BIT_CACHES)}"
        )
