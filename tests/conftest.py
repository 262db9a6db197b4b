"""What every test runs under: the installed package, no network, and no accelerator test without an accelerator."""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version

import pytest
from jaxtyping import install_import_hook

# A child started with `python -c` or `-m` would otherwise find the clone's `jax_engine/` before the installed package.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The tests compile a thousand programs and run each a few times. The older emitters without LLVM's optimization take a
# quarter of the time to compile; XLA's own passes over the program are the same.
QUICK_COMPILES = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # which has no older ones, and ends at unknown flags
    QUICK_COMPILES += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{QUICK_COMPILES} {os.environ.get('XLA_FLAGS', '')}"

# Shapes are checked where arrays are handled; the hook has to be there before those modules are imported.
SHAPED = ("models", "pallas_kernels", "cuda_fallback", "sampling", "execution.step_batch", "execution.step_program")
install_import_hook([f"jax_engine.{name}" for name in SHAPED], "shape_checks.check_arrays")


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_go_with_their_module() -> Iterator[None]:
    """Each executable for the CPU takes dozens of memory maps. Linux gives a process some 65,000 of them, and XLA's
    compiler crashes where there are no more; engines of the session keep theirs.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` or `tpu` where JAX sees no such device; without such tests JAX is not asked."""
    marked = [(item, platform) for item in items for platform in ("gpu", "tpu") if item.get_closest_marker(platform)]
    if not marked:
        return
    import jax

    present = jax.default_backend()
    for item, platform in marked:
        if platform != present:
            item.add_marker(pytest.mark.skip(reason=f"needs a {platform}; JAX runs on {present} here"))
