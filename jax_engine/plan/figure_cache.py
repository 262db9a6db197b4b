"""What compiling a program taught, kept on disk beside the compilation cache: a plan made twice compiles once.

A program is known by its traced text, by where its arrays lie, and by the versions of the compilers.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

from jax_engine.config import default_compilation_cache_dir
from jax_engine.plan.hlo_costs import Collective, Costs

logger = logging.getLogger(__name__)

_FORM = 5  # of what is kept; a change of how costs are counted is another
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt", "jax-engine")


class FigureCache:
    """A folder of figures; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @classmethod
    def of(cls, compilation_cache_dir: str | None) -> "FigureCache":
        """Beside the programs that the setting of this name keeps; "" keeps nothing."""
        folder = default_compilation_cache_dir() if compilation_cache_dir is None else compilation_cache_dir
        return cls(Path(folder) / "plans" if folder else None)

    def key(self, lowered: jax.stages.Lowered, devices: Sequence[jax.Device]) -> str:
        """What a program for these devices is known by."""
        versions = [f"{name} {_version(name)}" for name in _COMPILERS]
        kinds = [f"{device.device_kind} {device.platform} {device.id}" for device in devices]
        described = "\n".join([str(_FORM), *versions, *kinds, lowered.as_text()])
        return hashlib.sha256(described.encode()).hexdigest()

    def read(self, key: str) -> dict[str, Any] | None:
        """What was kept; None where there is nothing, or nothing that can be read."""
        if self._folder is None:
            return None
        try:
            kept: dict[str, Any] = json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return kept | {"costs": _costs(kept["costs"])}

    def write(self, key: str, figures: dict[str, Any]) -> None:
        """Keep figures; a folder that cannot be written to is no reason to fail."""
        if self._folder is None:
            return
        costs = figures["costs"]
        kept = figures | {"costs": asdict(replace(costs, collectives={})) | {"collectives": _listed(costs)}}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial = self._folder / f"{key}.{os.getpid()}"
            partial.write_text(json.dumps(kept), encoding="utf-8")
            partial.replace(self._folder / f"{key}.json")
        except OSError as error:
            logger.warning("what was compiled is not kept for the next plan: %s", error)


def _listed(costs: Costs) -> list[list[Any]]:
    return [[one.opcode, one.num_devices, one.num_bytes, count] for one, count in costs.collectives.items()]


def _costs(kept: dict[str, Any]) -> Costs:
    collectives = {Collective(*described): count for *described, count in kept["collectives"]}
    return Costs(**kept | {"collectives": collectives, "unknown_loops": tuple(kept["unknown_loops"])})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
