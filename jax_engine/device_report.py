"""What JAX sees on this machine, as JSON on standard output: `python -m jax_engine.device_report`.

It runs in a process of its own, since to look at the devices is to take them.
"""

import json
from typing import Any

import jax


def device_report() -> dict[str, Any]:
    """The backend and its devices; memory in bytes, where the device tells it."""
    devices = []
    for device in jax.devices():
        memory = device.memory_stats() or {}
        devices.append(
            {
                "id": device.id,
                "kind": device.device_kind,
                "memory_bytes": memory.get("bytes_limit"),
                "memory_bytes_in_use": memory.get("bytes_in_use"),
            }
        )
    backend = jax.devices()[0].client
    return {
        "backend": jax.default_backend(),
        "platform_version": backend.platform_version,
        "processes": jax.process_count(),
        "devices": devices,
    }


if __name__ == "__main__":
    print(json.dumps(device_report()))
