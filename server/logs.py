"""Logging of the commands: one format, on standard error."""

import logging

from jax_engine.log_lines import log_to_stderr

LEVELS = ("debug", "info", "warning", "error")


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Log from `level` on. uvicorn and the HTTP libraries speak only when something is wrong, in the same format."""
    log_to_stderr(log_format, level=logging.WARNING)
    logging.getLogger("jax_engine").setLevel(level.upper())
