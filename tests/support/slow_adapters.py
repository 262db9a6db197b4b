"""An adapter on a disk that is as slow as a test wants."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def slow_adapter(original: str | Path, folder: Path) -> Callable[[], None]:
    """A copy of an adapter, which cannot be read before what is returned is called: its configuration is a pipe, whose
    reader waits. By then somebody must read it, or will soon; who does so afterwards need not wait.
    """
    shutil.copytree(original, folder)
    config, ready = folder / "adapter_config.json", folder / "ready.json"
    config.rename(ready)
    content = ready.read_bytes()
    os.mkfifo(config)

    def go_on() -> None:
        with config.open("wb") as pipe:
            ready.replace(config)
            pipe.write(content)

    return go_on
