"""Lets a checkout be used as it lies, not installed, and without packages that only several processes need.

Importing this module, before anything of `jax_engine`, is enough. Folder `X/` of the checkout is then `jax_engine.X`,
as in an installed package, unless there is an installed one. Absent packages get stand-ins: what one process does by
itself works, and what needs the package raises a RuntimeError that names it.
"""

import dataclasses
import inspect
import sys
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Messages between processes, and checksums of checkpoints; a module of each that is imported by its own name.
OF_SEVERAL_PROCESSES = ("msgspec", "zmq", "zmq.asyncio", "xxhash")


def is_installed() -> bool:
    """Whether the package is, from wherever."""
    try:
        metadata.distribution("jax-engine")
    except metadata.PackageNotFoundError:
        return False
    return True


def use_folders(root: Path) -> None:
    """Import `jax_engine` from a checkout: its own folder first, and the folders beside it as its subpackages."""
    folder = root / "jax_engine"
    spec = util.spec_from_file_location(
        "jax_engine", folder / "__init__.py", submodule_search_locations=[str(folder), str(root)]
    )
    assert spec is not None and spec.loader is not None
    package = util.module_from_spec(spec)
    sys.modules["jax_engine"] = package
    spec.loader.exec_module(package)


class Absent:
    """Stands for anything of a package that is not there: good for annotations, and for nothing else."""

    def __init__(self, *_: object, **__: object) -> None:
        raise RuntimeError(f"this needs one of {', '.join(absent_packages())}, which is not installed here")

    def __class_getitem__(cls, _: object) -> type["Absent"]:
        return cls


class AbsentModule(ModuleType):
    """A package, or a module of it, all of whose names are `Absent`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent


class Struct:
    """`msgspec.Struct` as a dataclass: the same fields, defaults and comparisons, without a form for the wire."""

    def __init_subclass__(cls, *, frozen: bool = False, kw_only: bool = False, **_: object) -> None:
        super().__init_subclass__()
        for name in inspect.get_annotations(cls):
            default = cls.__dict__.get(name)
            if isinstance(default, list | dict | set):  # each instance has its own
                setattr(cls, name, dataclasses.field(default_factory=default.copy))
        # Not really frozen: writing the fields of a frozen dataclass takes several times as long.
        dataclasses.dataclass(kw_only=kw_only, unsafe_hash=frozen)(cls)
        cls.__struct_fields__ = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type, attr-defined]


def as_dict(struct: Any) -> dict[str, Any]:
    """Its fields, as they are."""
    return {field.name: getattr(struct, field.name) for field in dataclasses.fields(struct)}


def absent_packages() -> list[str]:
    """Those of `OF_SEVERAL_PROCESSES` that stand-ins are used for."""
    return [name for name in OF_SEVERAL_PROCESSES if isinstance(sys.modules.get(name), AbsentModule)]


def stand_in(name: str) -> None:
    """Put a stand-in where a package, or a module of one, would be."""
    module = AbsentModule(name)
    if name == "msgspec":
        structs = AbsentModule("msgspec.structs")
        structs.__dict__.update(replace=dataclasses.replace, asdict=as_dict)
        module.__dict__.update(Struct=Struct, field=dataclasses.field, structs=structs)
        for part in ("json", "msgpack"):
            module.__dict__[part] = AbsentModule(f"msgspec.{part}")
    sys.modules[name] = module
    package, _, part = name.rpartition(".")
    if package:
        setattr(sys.modules[package], part, module)


def is_there(name: str) -> bool:
    """Whether it can be imported, or is."""
    return name in sys.modules or util.find_spec(name) is not None


for _name in OF_SEVERAL_PROCESSES:
    if not is_there(_name):
        stand_in(_name)
if not is_installed():
    use_folders(ROOT)
