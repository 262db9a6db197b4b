"""The kernel as a C function, by Numba."""

from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types

from jax_engine.cuda_fallback.cpu.kernel import make_handler

DTYPES = {"float32": np.float32, "bfloat16": np.uint16}  # Numba has no bfloat16: of that the kernel sees the bits


def compile_handler(dtype: str, folder: Path | None) -> Any:
    """The function for XLA, as `numba.cfunc` makes it, for queries and pages of "float32" or "bfloat16".

    What was compiled is looked for in `folder` first, and kept there.
    """
    if folder is not None:
        numba.config.CACHE_DIR = str(folder)
    return numba.cfunc(types.int64(types.int64), cache=folder is not None)(make_handler(DTYPES[dtype]))
