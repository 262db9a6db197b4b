"""TPUs to compile for, on a machine that has none.

`jax.experimental.topologies` describes devices to libtpu's compiler, which needs no hardware and, here, no metadata
server. `pip install "jax-engine[tpu]"` brings the libtpu that belongs to the installed JAX.
"""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jax_engine.plan import targets
from jax_engine.plan.chips import CHIPS as ALL_CHIPS
from jax_engine.plan.chips import Target

# The smallest slice of each TPU that the compiler knows.
CHIPS = {name: Target(name, chip, chip.sizes[0]) for name, chip in ALL_CHIPS.items() if chip.platform == "tpu"}


def compiler_environment(dump: Path | None) -> dict[str, str]:
    """Variables for a process that compiles; the compiler writes its schedules to `dump`."""
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_pass_label_regex=.*final.*" if dump else ""
    return targets.COMPILERS | {
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what it holds is not compiled again, and so not dumped
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": flags,
        "TPU_DUMP_DIR": str(dump or ""),
    }


def topology_devices(chip: Target, topology: str | None = None) -> list[jax.Device]:
    """Devices to compile for: of the chip's smallest topology, or of a larger one of it."""
    return targets.topology_devices(topology or chip.topology, single=topology is None and chip.num_chips == 1)


def traced_for(device: jax.Device) -> AbstractContextManager[AbstractMesh]:
    """Trace within it, so that Pallas lowers for this device and not for the CPU that JAX runs on."""
    described = AbstractDevice(device_kind=device.device_kind, platform="tpu", num_cores=device.num_cores)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=described))


@dataclass(frozen=True)
class Moment:
    """A reading of the wall's clock and of this process's processor time, in seconds."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Moment":
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Moment") -> float:
        """Seconds of the clock that moved less: neighbours on a busy machine stretch the wall's, threads the other."""
        return min(self.wall - start.wall, self.processor - start.processor)
