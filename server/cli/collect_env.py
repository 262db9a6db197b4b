"""`jax-engine collect-env`: what one asks first of somebody whose engine does not do what it should."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from jax_engine.config import default_compilation_cache_dir, reported_environment

PACKAGES = (
    *("jax-engine", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy"),
    *("transformers", "tokenizers", "safetensors", "huggingface_hub", "fastapi", "starlette", "uvicorn", "msgspec"),
    *("pyzmq", "llguidance", "typer", "torch"),
)
DEVICE_SECONDS = 120.0
NVIDIA = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


def collect_env(*, as_json: bool) -> int:
    """Print the report; returns the exit code."""
    report = collected()
    if as_json:
        print(json.dumps(report, indent=2))
        return 0
    for title, entries in report.items():
        print(f"{title}:")
        width = max(map(len, entries), default=0)
        for name, value in entries.items():
            print(f"  {name:<{width}}  {'-' if value is None else value}")
    return 0


def collected() -> dict[str, dict[str, Any]]:
    """Versions, machine, devices and variables; no secrets."""
    return {
        "system": {
            "platform": platform.platform(),
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "executable": sys.executable,
            "processor": processor(),
            "cores": os.cpu_count(),
            "cores of this process": len(os.sched_getaffinity(0)) if sys.platform == "linux" else None,
            "memory, GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "compilation cache": default_compilation_cache_dir(),
        },
        "packages": {name: version(name) for name in PACKAGES},
        "devices": devices(),
        "environment": dict(reported_environment()),
    }


def version(package: str) -> str | None:
    """The installed version; None without one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The model of the processor, as its system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def devices() -> dict[str, Any]:
    """What JAX sees, in a process that ends with that; with a reason where it cannot tell."""
    found: dict[str, Any] = {}
    command = [sys.executable, "-P", "-m", "jax_engine.device_report"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=DEVICE_SECONDS, check=False)
        if result.returncode:
            found["error"] = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        else:
            report = json.loads(result.stdout.splitlines()[-1])
            listed = report.pop("devices")
            found |= {name: " ".join(str(value).split()) for name, value in report.items()}
            found |= {f"device {device['id']}": described(device) for device in listed}
    except subprocess.TimeoutExpired:
        found["error"] = f"JAX has not named its devices within {DEVICE_SECONDS:.0f} s; another process may hold them"
    return found | nvidia()


def described(device: dict[str, Any]) -> str:
    """One device in words."""
    memory = device["memory_bytes"]
    if memory is None:
        return str(device["kind"])
    return f"{device['kind']}, {device['memory_bytes_in_use'] / 2**30:.1f} of {memory / 2**30:.1f} GiB in use"


def nvidia() -> dict[str, str]:
    """What the NVIDIA driver lists, be it usable for JAX or not; nothing without one."""
    try:
        result = subprocess.run(NVIDIA, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {f"nvidia-smi {number}": line for number, line in enumerate(result.stdout.strip().splitlines())}
