"""Bundles: executables that were compiled ahead of time, in a folder, and what they are for.

An executable is code, and its file holds pickled objects besides: opening one can run anything. A bundle must come from
somebody who is trusted as a program would be. Digests find what is damaged, mixed up or incomplete; they do not say who
made it. No executable is unpickled before the manifest matches this engine and the files match the manifest.
"""

import hashlib
import logging
import pickle
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import msgspec
from jax.experimental import serialize_executable

from jax_engine.compilation.blueprint import WRITE_TABLES, Blueprint
from jax_engine.compilation.bundle_identity import Value, differences, identity_of
from jax_engine.compilation.planner import MemoryPlan
from jax_engine.execution.page_copies import READ_PAGE, WRITE_PAGE
from jax_engine.execution.step_program import Program
from jax_engine.loading.new_folders import new_folder

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
HELPERS = (READ_PAGE, WRITE_PAGE, WRITE_TABLES)  # small programs beside the steps
_NUM_LISTED = 5  # how much an error lists


class BundleError(ValueError):
    """A bundle cannot be used here; the message names what differs or is damaged, and what to do."""


class MemoryFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an executable needs of each device, in bytes, by its compiler."""

    arguments: int
    outputs: int
    aliased: int  # of the outputs, what takes the place of arguments
    temporaries: int
    code: int

    @classmethod
    def of(cls, executable: jax.stages.Compiled) -> "MemoryFigures":
        analysis = executable.memory_analysis()
        assert analysis is not None
        return cls(
            analysis.argument_size_in_bytes,
            analysis.output_size_in_bytes,
            analysis.alias_size_in_bytes,
            analysis.temp_size_in_bytes,
            analysis.generated_code_size_in_bytes,
        )

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class BundledFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One executable."""

    file: str
    num_bytes: int
    sha256: str
    compile_seconds: float
    memory: MemoryFigures


class BundledPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sizes that the executables are made for; see `MemoryPlan`."""

    num_pages: int
    max_model_len: int
    reason: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bundle holds and what it is for; `sha256` is of all the rest."""

    format: int
    identity: dict[str, Value]
    plan: BundledPlan
    executables: dict[str, BundledFile]  # by the names of their programs
    sha256: str = ""

    def digest(self) -> str:
        """What `sha256` must be."""
        return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(self, sha256=""), order="sorted")).hexdigest()


def write_bundle(
    folder: Path,
    blueprint: Blueprint,
    memory: MemoryPlan,
    executables: Mapping[str, tuple[jax.stages.Compiled, float]],
) -> Manifest:
    """Write executables, each with the seconds that it took to compile, into a folder that is not there yet."""
    files = {}
    with new_folder(folder) as work:
        for number, (name, (executable, seconds)) in enumerate(executables.items()):
            content = pickle.dumps(serialize_executable.serialize(executable))
            file, digest = f"{number:03}.executable", hashlib.sha256(content).hexdigest()
            (work / file).write_bytes(content)
            files[name] = BundledFile(file, len(content), digest, round(seconds, 3), MemoryFigures.of(executable))
        plan = BundledPlan(memory.num_pages, memory.max_model_len, memory.reason)
        manifest = Manifest(FORMAT, dict(identity_of(blueprint)), plan, files)
        manifest = msgspec.structs.replace(manifest, sha256=manifest.digest())
        (work / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
    return manifest


class Bundle:
    """A bundle whose manifest matches this engine and whose files match the manifest."""

    def __init__(self, folder: Path, manifest: Manifest, devices: Iterable[jax.Device]) -> None:
        self._folder = folder
        self._devices = list(devices)
        self.manifest = manifest

    @classmethod
    def open(cls, folder: str, blueprint: Blueprint) -> "Bundle":
        """Check a bundle of this engine; nothing is unpickled.

        Raises:
            BundleError: it is damaged, or for something else; with what differs, here and there.
        """
        start = time.monotonic()
        manifest = read_manifest(Path(folder))
        if found := differences(identity_of(blueprint), manifest.identity):
            more = f" (and {len(found) - _NUM_LISTED} more)" if len(found) > _NUM_LISTED else ""
            raise _error(
                folder,
                f"is for another engine, model or machine: {'; '.join(found[:_NUM_LISTED])}{more}. Start with what it "
                "was compiled for, or compile it again with these settings",
            )
        names = {*map(str, blueprint.programs), *HELPERS}
        if names != manifest.executables.keys():
            missing = sorted(names - manifest.executables.keys())
            other = sorted(manifest.executables.keys() - names)
            raise _error(folder, f"lacks the programs {missing} and has {other} that nothing runs; compile it again")
        _check_files(Path(folder), manifest)
        mesh = blueprint.placed.placement.mesh
        devices = [blueprint.device] if mesh is None else list(mesh.devices.flat)
        num_bytes = sum(entry.num_bytes for entry in manifest.executables.values())
        logger.info(
            "compiled programs: %d in %s, %.1f MB, checked in %.2f s",
            *(len(names), folder, num_bytes / 1e6, time.monotonic() - start),
        )
        return cls(Path(folder), manifest, devices)

    def plan_memory(self, limit: int | None) -> MemoryPlan:
        """The sizes that the executables were made for.

        Raises:
            BundleError: a step needs more than a device's memory, which is `limit` bytes.
        """
        needed = max(entry.memory.total for entry in self.manifest.executables.values())
        if limit is not None and needed > limit:
            raise _error(
                str(self._folder),
                f"holds steps that need {needed / 2**30:.2f} GiB of each device, and there are {limit / 2**30:.2f} GiB "
                "here; compile it again with a lower gpu_memory_utilization",
            )
        plan = self.manifest.plan
        return MemoryPlan(plan.num_pages, plan.max_model_len, f"{plan.reason}; as compiled")

    def load_step(self, program: Program) -> jax.stages.Compiled:
        """The executable of a step program."""
        return self.load(str(program))

    def load(self, name: str) -> jax.stages.Compiled:
        """The executable of this name, ready to run; its file is read once more, and its digest compared first.

        Raises:
            BundleError: the file has changed meanwhile, or the device does not take it.
        """
        entry = self.manifest.executables[name]
        file = self._folder / entry.file
        try:
            content = file.read_bytes()
        except OSError as error:
            raise _error(str(self._folder), f"lacks {entry.file} ({error}); compile it again") from error
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise _changed(self._folder, entry)
        try:
            serialized, in_tree, out_tree = pickle.loads(content)
            return serialize_executable.deserialize_and_load(
                serialized, in_tree, out_tree, backend=self._devices[0].client, execution_devices=self._devices
            )
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise _error(
                str(self._folder),
                f"holds an executable ({entry.file}) that does not load here ({reason}); compile "
                "it again on this machine",
            ) from error


def read_manifest(folder: Path) -> Manifest:
    """A bundle's manifest, as it was written.

    Raises:
        BundleError: there is none, or it is damaged, or of another format.
    """
    file = folder / MANIFEST
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _error(
            str(folder),
            f"has no {MANIFEST} ({error.strerror}): it is no folder of `jax-engine compile`, or what an "
            "interrupted run has left; give another, or compile it again",
        ) from error
    try:
        found: Any = msgspec.json.decode(content)
        number = found.get("format") if isinstance(found, dict) else None
        if isinstance(number, int) and number != FORMAT:
            raise _error(str(folder), f"is of format {number}, and this engine reads format {FORMAT}; compile it again")
        manifest = msgspec.convert(found, Manifest)
    except msgspec.MsgspecError as error:
        raise _error(str(folder), f"has a damaged {MANIFEST} ({error}); copy or compile it again") from error
    if manifest.digest() != manifest.sha256:
        raise _error(str(folder), f"has a {MANIFEST} that was changed after it was written; copy or compile it again")
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Every file of the manifest is there, whole, as it was written, and there is no other."""
    named = {entry.file: entry for entry in manifest.executables.values()}
    there = {str(file.relative_to(folder)) for file in folder.rglob("*")}
    if extra := sorted(there - named.keys() - {MANIFEST}):
        raise _error(str(folder), f"holds {extra[0]!r}, which its manifest does not name; remove it")
    if missing := sorted(named.keys() - there):
        raise _error(str(folder), f"lacks {missing[0]}; copy or compile it again")
    for file, entry in named.items():
        size = (folder / file).stat().st_size
        if size != entry.num_bytes:
            raise _error(str(folder), f"has {size} bytes of {file}, not {entry.num_bytes}; copy or compile it again")
        with (folder / file).open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != entry.sha256:
                raise _changed(folder, entry)


def _changed(folder: Path, entry: BundledFile) -> BundleError:
    return _error(str(folder), f"holds {entry.file} with another SHA-256 than its manifest; copy or compile it again")


def _error(folder: str, reason: str) -> BundleError:
    return BundleError(f"compiled={folder!r} {reason}")
