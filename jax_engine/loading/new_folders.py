"""Folders that appear whole or not at all."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished-"
_NUM_SYNCS = 16  # at once, which file systems commit together


def check_new_folder(folder: Path, setting: str) -> None:
    """Refuse a folder that holds something already, before work that would end up there; and say what an interrupted
    run has left beside it.

    Raises:
        ValueError: it is there and not empty, or is a file; `setting` is what asked for it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{setting}={str(folder)!r} is there already, and not empty; give another, or remove it")
    for left in sorted(folder.absolute().parent.glob(f".{folder.name}{UNFINISHED}*")):
        logger.warning("%s is what an interrupted run has left; remove it", left)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, which takes its name when the block ends, everything on disk by then, and
    is removed if it fails. What is left of a process that was killed has another name, with `UNFINISHED` in it.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}{UNFINISHED}", dir=folder.parent))
    try:
        yield work
        with ThreadPoolExecutor(_NUM_SYNCS) as pool:
            for _ in pool.map(_to_disk, (work, *work.rglob("*"))):
                pass
        work.chmod(0o755)  # as other folders: mkdtemp's are the user's alone
        work.rename(folder)
        _to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _to_disk(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
