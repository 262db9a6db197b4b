"""`jax-engine convert`: what it takes, and how it begins."""

from pathlib import Path

from jax_engine.config import DTYPES
from jax_engine.server.cli.flags import Flag, Options
from jax_engine.server.cli.parser import Command
from jax_engine.server.logs import set_up_logging

EPILOG = """\
examples:
  jax-engine convert ./my-model ./my-model-orbax
  jax-engine convert meta-llama/Llama-3.1-8B-Instruct ./llama --dtype bfloat16
  jax-engine serve ./my-model-orbax

The new folder holds the weights as the engine uses them, in chunks with checksums, of which each device reads its own
on any mesh; and configuration, tokenizer and chat template. It takes the old one's place wherever a model is named.
"""
FOLDERS = Flag("folders", "a folder or a Hugging Face name, and the folder to write", str, "HF_DIR OUT", nargs="*")
CONVERT_FLAGS = (
    Flag("dtype", "type of the weights; auto: what config.json says", choices=DTYPES, default="auto"),
    Flag("revision", "branch, tag or commit of a Hugging Face model", metavar="REV"),
)


def convert_command() -> Command:
    """The command."""
    return Command(
        "convert",
        "Write a model's weights as a sharded Orbax checkpoint, which loads on any mesh.",
        run_convert,
        usage="HF_DIR OUT [options]",
        argument=FOLDERS,
        groups={"conversion": CONVERT_FLAGS},
        epilog=EPILOG,
    )


def run_convert(options: Options) -> int:
    folders: list[str] = options["folders"] or []
    if len(folders) != 2:
        raise ValueError(f"convert takes two folders, HF_DIR and OUT, and {len(folders)} were given")
    set_up_logging("info")
    from jax_engine.loading.convert import convert, prepare
    from jax_engine.loading.model_files import resolve_model_path

    prepare()
    model, out = folders
    manifest = convert(resolve_model_path(model, revision=options["revision"]), Path(out), **options.of(["dtype"]))
    print(f"{len(manifest.tensors)} tensors in {out}, {manifest.dtype}")
    return 0
