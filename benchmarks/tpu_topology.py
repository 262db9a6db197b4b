"""TPUs to compile for, on a machine that has none.

`jax.experimental.topologies` describes devices to libtpu's compiler, which needs no hardware and, here, no metadata
server. `pip install "jax-engine[tpu]"` brings the libtpu that belongs to the installed JAX.
"""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


@dataclass(frozen=True)
class Chip:
    """A kind of device as the compiler sees it; a `v4` or `tpu7x` chip has two of them.

    `topology` is the smallest that the compiler knows with it, `whole_host` whether it is a full host's. `hbm_gib` is
    what a program may use, as the compiler says in its error when one needs more.
    """

    topology: str
    whole_host: bool
    hbm_gib: float


CHIPS = {
    "v4": Chip("v4:2x2x1", whole_host=True, hbm_gib=15.25),
    "v5e": Chip("v5e:1x1", whole_host=False, hbm_gib=15.75),
    "v5p": Chip("v5p:2x2x1", whole_host=True, hbm_gib=95.74),
    "v6e": Chip("v6e:1x1", whole_host=False, hbm_gib=31.25),
    "tpu7x": Chip("tpu7x:2x2x1", whole_host=True, hbm_gib=94.75),
}


def compiler_environment(dump: Path | None) -> dict[str, str]:
    """Variables for a process that compiles; the compiler writes its schedules to `dump`."""
    flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_pass_label_regex=.*final.*" if dump else ""
    return {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # else a second process ends at the first one's lock
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what it holds is not compiled again, and so not dumped
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": flags,
        "TPU_DUMP_DIR": str(dump or ""),
        "TPU_SKIP_MDS_QUERY": "1",
    }


def topology_devices(chip: Chip, topology: str | None = None) -> list[jax.Device]:
    """Devices to compile for: of the chip's smallest topology, or of a larger one of it."""
    single = topology is None and not chip.whole_host
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    name = topology or chip.topology
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **bounds).devices)


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
