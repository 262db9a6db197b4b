"""How a process of the engine begins that another one has started, and whose standard input that other one holds."""

import json
import logging
import os
import signal
import sys
import threading
from typing import Any

from jax_engine.log_lines import log_to_stderr


def begin_as_child() -> dict[str, Any]:
    """Read the settings from standard input, log as they say, and end with the parent; returns them."""
    # The parent decides when to end: a terminal's Ctrl-C reaches both processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    _end_with_parent()
    text = f"%(asctime)s %(levelname)s [{settings['name']}] %(message)s"
    log_to_stderr(settings["log_format"], level=settings["log_level"], text=text)
    logging.getLogger("jax").setLevel(
        max(settings["log_level"], logging.WARNING)
    )  # it reports every platform that it does not find
    return settings


def _end_with_parent() -> None:
    """Exit once standard input ends, which is when the parent process is gone, however it went."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # not through sys.stdin, whose lock would hold up the interpreter's end
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
