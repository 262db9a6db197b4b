"""Logging of the commands: one format, on standard error."""

import logging

LEVELS = ("debug", "info", "warning", "error")


def set_up_logging(level: str) -> None:
    """Log from `level` on. uvicorn and the HTTP libraries speak only when something is wrong."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s [%(name)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S"
    )
    logging.getLogger("jax_engine").setLevel(level.upper())
