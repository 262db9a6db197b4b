"""The kernel as a C function, by Numba."""

from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba import types

from jax_engine.cuda_fallback.cpu.kernel import make_handler, make_task

DTYPES = {"float32": np.float32, "bfloat16": np.uint16}  # Numba has no bfloat16: of that the kernel sees the bits

_KEPT: list[Any] = []  # machine code that others have addresses of


def compile_handler(dtype: str, folder: Path | None) -> Any:
    """The function for XLA, as `numba.cfunc` makes it, for queries and pages of "float32" or "bfloat16".

    What was compiled is looked for in `folder` first, and kept there. The result must be kept for good: XLA has its
    address alone. So is the task that it shares, which it finds by a name.
    """
    if folder is not None:
        numba.config.CACHE_DIR = str(folder)
    compiled = numba.cfunc(types.int64(types.int64), cache=folder is not None)
    task_name = f"jax_engine_attention_task_{dtype}"
    task = compiled(make_task(DTYPES[dtype]))
    llvm.add_symbol(task_name, task.address)
    handler = compiled(make_handler(task_name))
    _KEPT.extend((task, handler))
    return handler
