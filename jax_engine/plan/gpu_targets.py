"""NVIDIA GPUs as XLA wants to know them, to compile for one that is not here. Needs no JAX.

Bandwidths are those of NVIDIA's data sheets; the rest is what the devices say of themselves, which XLA's own
descriptions of them have, too (openxla/xla, xla/backends/gpu/target_config/specs).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Gpu:
    """What a program for a GPU depends on; a core is a streaming multiprocessor."""

    name: str  # as the driver has it
    compute_capability: tuple[int, int]
    memory_bytes: int
    bytes_per_second: int
    l2_bytes: int
    num_cores: int
    clock_ghz: float
    lanes_per_core: int = 128  # of float32
    shared_bytes_per_core: int = 228 * 1024

    @property
    def target_config(self) -> str:
        """`stream_executor.GpuTargetConfigProto` as text, for `jax.experimental.topologies`."""
        major, minor = self.compute_capability
        features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""  # sm_90a and the like
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
              thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
              registers_per_core_limit: 65536  registers_per_block_limit: 65536
              shared_memory_per_block: 49152  shared_memory_per_core: {self.shared_bytes_per_core}
              shared_memory_per_block_optin: {self.shared_bytes_per_core - 1024}
              core_count: {self.num_cores}  fpus_per_core: {self.lanes_per_core}  clock_rate_ghz: {self.clock_ghz}
              l2_cache_size: {self.l2_bytes}  device_address_bits: 64
              memory_bandwidth: {self.bytes_per_second}  device_memory_size: {self.memory_bytes}
              cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
              driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


GPUS: Mapping[str, Gpu] = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 85_100_068_864, 2_039 * 10**9, 40 * 2**20, 108, 1.41,
        lanes_per_core=64, shared_bytes_per_core=164 * 1024,
    ),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 84_942_979_072, 3_350 * 10**9, 50 * 2**20, 132, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 151_397_597_184, 4_800 * 10**9, 50 * 2**20, 132, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 191_514_411_008, 8_000 * 10**9, 132_644_864, 148, 1.965),
}  # fmt: skip


def compiler_is_installed() -> bool:
    """Whether XLA for NVIDIA GPUs is here; it needs no GPU to compile for one."""
    return any(find_spec(package) is not None for package in ("jax_cuda13_plugin", "jax_cuda12_plugin"))
