"""What `LLM` takes: `EngineConfig`'s settings, vLLM's others as far as they ask for nothing, one prompt or several."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral
from types import MappingProxyType
from typing import Any

from jax_engine.config import EngineConfig
from jax_engine.frontend.processor import Prompt

# vLLM's settings that this engine does not have, with the values that ask for what it does anyway.
NEUTRAL_SETTINGS: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "allowed_local_media_path": ("", None),
        "async_scheduling": (True, None),
        "compilation_config": (None,),
        "cpu_offload_gb": (0,),
        "disable_custom_all_reduce": (False, True),
        "disable_log_stats": (False, True),
        "distributed_executor_backend": (None,),
        "enable_sleep_mode": (False, True),
        "enforce_eager": (False, None),
        "hf_overrides": (None,),
        "limit_mm_per_prompt": (None,),
        "num_gpu_blocks_override": (None,),
        "quantization": (None,),
        "runner": ("auto", "generate"),
        "skip_tokenizer_init": (False,),
        "task": ("auto", "generate", None),
        "tokenizer_mode": ("auto",),
        "tokenizer_revision": (None,),
    }
)


def engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    """`EngineConfig` of these settings, of which vLLM's other names may be given with the values that change nothing.

    Raises:
        ValueError: a name that is unknown, or vLLM's and not supported; a value outside its range.
    """
    known = [field.name for field in fields(EngineConfig)]
    for name, value in settings.items():
        if name in known:
            continue
        if name in NEUTRAL_SETTINGS:
            if value in NEUTRAL_SETTINGS[name]:
                continue
            allowed = " or ".join(map(repr, NEUTRAL_SETTINGS[name]))
            raise ValueError(
                f"{name}={value!r} is not supported yet; leave it out (the only value that works is {allowed})"
            )
        near = difflib.get_close_matches(name, [*known, *NEUTRAL_SETTINGS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"LLM has no setting {name!r}; {hint}")
    return EngineConfig(**{name: value for name, value in settings.items() if name in known})


def prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list; a sequence of whole numbers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]  # type: ignore[list-item]
    items = list(prompts)
    return [items] if items and isinstance(items[0], Integral) else items
