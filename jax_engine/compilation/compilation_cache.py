"""The persistent compilation cache: where it lies, and that it can be trusted.

JAX keeps one file an executable. Without a size limit it neither locks its folder nor writes whole files at once, so
that a process, or a thread, may read half of what another is writing; with a limit it locks. XLA's executables for a
CPU run only on CPUs like it, and a home folder is often shared, so that each kind of machine has a folder of its own.
"""

import hashlib
import logging
import platform
from pathlib import Path

import jax
from filelock import FileLock
from jax.experimental.compilation_cache import compilation_cache

from jax_engine.config import default_compilation_cache_dir

logger = logging.getLogger(__name__)

MAX_BYTES = 32 * 2**30  # the programs of hundreds of configurations; the least recently used go first
LOCK_SECONDS = 10.0


def use_compilation_cache(folder: str | None) -> None:
    """Keep executables in `folder` (None: the default one), small and quickly compiled ones too, so that the next
    start finds them; "" turns the cache off. A folder that cannot be used is a warning: the engine compiles then.
    """
    folder = default_compilation_cache_dir() if folder is None else folder
    if not folder:
        return
    own = Path(folder) / machine_name()
    try:
        own.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(own)
    except OSError as error:  # no folder, no space, or a file system without locks
        logger.warning("compilation_cache_dir=%r is not used, and programs are compiled anew: %s", folder, error)
        return
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_dir", str(own))
    compilation_cache.reset_cache()  # it would keep to the first folder that this process used


def machine_name() -> str:
    """A name for this machine's kind, such as "x86_64-1b2c3d4e": equal where executables for the CPU can be shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _remove_unfinished(folder: Path) -> None:
    """Delete executables whose writer was killed: JAX would warn of them at each start, and never replace them.

    It writes an entry's time of access after the entry, both under the lock.
    """
    with FileLock(folder / ".lockfile", timeout=LOCK_SECONDS):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()
