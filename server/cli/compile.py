"""`jax-engine compile`: what it takes, and how it begins."""

import time
from pathlib import Path

from jax_engine.server.cli.bench import MODEL
from jax_engine.server.cli.flags import Flag, Options, engine_config, engine_groups
from jax_engine.server.cli.parser import Command
from jax_engine.server.logs import set_up_logging

EPILOG = """\
examples:
  jax-engine compile ./my-model --max-num-seqs 32 -o ./my-model-compiled
  jax-engine serve ./my-model --max-num-seqs 32 --compiled ./my-model-compiled
  jax-engine compile ./my-model --device v6e-8 --tensor-parallel-size 8 -o ./my-model-v6e-8
  host-1$ jax-engine compile ./my-model --tensor-parallel-size 16 --nnodes 2 --node-rank 1 --master-addr host-0 -o DIR

The folder holds every program that `serve` runs with the same settings, and a manifest of what they are for: versions,
devices, model and settings must be equal when they are used. An engine over several hosts is compiled by a process on
each, as it is served, and each writes a folder of its own. It is code: use only what comes from whom you trust.
"""

COMPILE_FLAGS = (
    Flag("output", "folder to write, which must not be there yet", metavar="DIR", short="-o", required=True, type=Path),
    Flag(
        "device",
        "what to compile for: cpu, gpu or tpu, which must be here; or a TPU slice that need not be, such as v6e-8; "
        "what is here if left out",
        metavar="NAME",
    ),
)


def compile_command() -> Command:
    """The command."""
    return Command(
        "compile",
        "Compile every program of an engine ahead of time, for serve --compiled.",
        run_compile,
        usage="[MODEL] -o DIR [options]",
        argument=MODEL,
        groups={"bundle": COMPILE_FLAGS, **engine_groups()},
        epilog=EPILOG,
    )


def run_compile(options: Options) -> int:
    config, folder = engine_config(options), options["output"]
    if options["device"] is not None and config.nnodes > 1:
        raise ValueError(
            f"--device {options['device']} compiles in one process, and --nnodes {config.nnodes} has several compile "
            "for the devices that they have; leave one of them out"
        )
    set_up_logging("info")
    start = time.monotonic()
    from jax_engine.compilation.compile_ahead import compile_ahead, find_devices
    from jax_engine.compilation.compile_group import compiling_group
    from jax_engine.compilation.gpu_settings import prepare_gpus

    prepare_gpus(config)
    with compiling_group(config) as group:
        devices, memory_bytes = find_devices(options["device"])
        if group is not None and memory_bytes is not None:
            memory_bytes = group.least(memory_bytes)
        manifest = compile_ahead(config, folder, devices, memory_bytes)
    entries = manifest.executables.values()
    print(
        f"{len(entries)} programs in {folder}: {sum(entry.num_bytes for entry in entries) / 1e6:.1f} MB, "
        f"{time.monotonic() - start:.1f} s in all, {sum(entry.compile_seconds for entry in entries):.1f} s of compiling"
    )
    return 0
