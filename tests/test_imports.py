"""The shape of the code: imports run one way, host-side modules need no JAX, the house rules hold in every file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Folder -> the folders that it may import from, besides its own.
LAYERS = {
    "server": {"jax_engine", "models", "pallas_kernels", "cuda_fallback"},
    "jax_engine": {"models", "pallas_kernels", "cuda_fallback"},
    "models": {"pallas_kernels", "cuda_fallback"},
    "pallas_kernels": set(),
    "cuda_fallback": set(),
}
PACKAGE_FILES = [file for folder in LAYERS for file in sorted((REPOSITORY / folder).rglob("*.py"))]
ALL_FILES = [
    *PACKAGE_FILES,
    *(file for folder in ("tests", "benchmarks") for file in (REPOSITORY / folder).rglob("*.py")),
]
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_KERNEL_FILE_LINES = 800
# Written so that the pattern does not find itself.
UNFINISHED = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X]|HAC[K]|NotImplemented[E]rror)\b")


def relative(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def module_name(file: Path) -> str:
    """The name that `file` is imported by."""
    folder, *inside = file.relative_to(REPOSITORY).with_suffix("").parts
    package = ["jax_engine"] if folder == "jax_engine" else ["jax_engine", folder]
    return ".".join([*package, *(part for part in inside if part != "__init__")])


def folder_of(module: str) -> str | None:
    """The top-level folder that holds `jax_engine...` module, or None for a module of another distribution."""
    first, *rest = module.split(".")
    if first != "jax_engine":
        return None
    return rest[0] if rest and rest[0] in LAYERS else "jax_engine"


def imported_modules(file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in `file`, also those inside functions and for type checkers only."""
    name = module_name(file)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def test_imports_run_one_way() -> None:
    backward = [
        f"{relative(file)}:{line} imports {module}"
        for file in PACKAGE_FILES
        for line, module in imported_modules(file)
        if (target := folder_of(module)) is not None
        and (source := folder_of(module_name(file))) is not None
        and target not in {source, *LAYERS[source]}
    ]
    assert backward == []


def test_an_arrow_that_runs_back_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk above sees every spelling of an import; were it blind to one, it could pass on broken code."""
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    file = tmp_path / "models" / "llama.py"
    file.parent.mkdir()
    file.write_text(
        "import jax_engine.server.app\n"
        "from jax_engine.scheduling import scheduler\n"
        "from ..llm import LLM\n"
        "def late():\n    from .ops import Ops\n"
        "import os.path\n"
    )
    found = {module: folder_of(module) for _, module in imported_modules(file)}
    assert found == {
        "jax_engine.server.app": "server",
        "jax_engine.scheduling.scheduler": "jax_engine",
        "jax_engine.llm.LLM": "jax_engine",
        "jax_engine.models.ops.Ops": "models",
        "os.path": None,
    }


def test_host_side_modules_import_without_jax(tmp_path: Path) -> None:
    """The server's processes and the scheduler's tests must not pay for JAX, nor take a device from the engine core."""
    packages = ("server", "frontend", "scheduling", "kv_cache", "grammar")
    modules = [
        name
        for file in PACKAGE_FILES
        if (name := module_name(file)) in {"jax_engine", "jax_engine.config", "jax_engine.core.core_client"}
        or name.startswith(tuple(f"jax_engine.{package}." for package in packages))
    ]
    script = (
        "import importlib, sys, traceback\n"
        "sys.modules['jax'] = None  # from here on, importing jax raises ImportError\n"
        f"for name in {modules!r}:\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except ImportError:\n        print(name, traceback.format_exc(), sep='\\n')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def is_environment_access(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
        return node.attr in {"environ", "environb", "getenv", "putenv", "unsetenv"}
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        return any(alias.name in {"environ", "environb", "getenv", "putenv"} for alias in node.names)
    return False


def test_only_config_reads_the_environment() -> None:
    readers = [
        f"{relative(file)}:{node.lineno}"
        for file in PACKAGE_FILES
        if relative(file) != "jax_engine/config.py"
        for node in ast.walk(parse(file))
        if is_environment_access(node)
    ]
    assert readers == []


def wall_clock_readings(tree: ast.AST) -> Iterator[tuple[int, bool]]:
    """(line, whether it is a `created` field) of every use of the wall clock."""
    wall = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("date", "today")}
    created: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            named = zip(node.keys, node.values, strict=True)
            values = [value for key, value in named if isinstance(key, ast.Constant) and key.value == "created"]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith(".created"):
            values = [node.value]
        else:
            continue
        created |= {id(inner) for value in values for inner in ast.walk(value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (ast.unparse(node.value).rpartition(".")[2], node.attr) in wall:
            yield node.lineno, id(node) in created
        elif isinstance(node, ast.ImportFrom) and any((node.module, alias.name) in wall for alias in node.names):
            yield node.lineno, False


def test_the_wall_clock_is_only_for_what_is_shown_as_a_date() -> None:
    """It jumps when it is set; durations, timeouts and intervals are of the monotonic clock."""
    readings = {relative(file): list(wall_clock_readings(parse(file))) for file in PACKAGE_FILES}
    assert [f"{name}:{line}" for name, found in readings.items() for line, is_date in found if not is_date] == []
    assert any(is_date for found in readings.values() for _, is_date in found), "answers carry their date"


def test_a_duration_of_the_wall_clock_is_found() -> None:
    source = "from time import time\nstart = time.time()\nself.created = int(time.time())\nx = datetime.now()\n"
    assert sorted(wall_clock_readings(ast.parse(source))) == [(1, False), (2, False), (3, True), (4, False)]


def swallows_everything(handler: ast.ExceptHandler) -> bool:
    """Whether `handler` catches every exception and does not end by raising again."""
    caught = (
        [] if handler.type is None else handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    )
    broad = handler.type is None or any(
        isinstance(c, ast.Name) and c.id in {"Exception", "BaseException"} for c in caught
    )
    return broad and not isinstance(handler.body[-1], ast.Raise)


def test_no_handler_swallows_every_exception_outside_the_server() -> None:
    handlers = [
        f"{relative(file)}:{node.lineno}"
        for file in PACKAGE_FILES
        if not relative(file).startswith("server/")
        for node in ast.walk(parse(file))
        if isinstance(node, ast.ExceptHandler) and swallows_everything(node)
    ]
    assert handlers == []


def is_attribute_probe(node: ast.AST) -> bool:
    """`hasattr(x, name)` or `getattr(x, name, default)`: asking an object what it is instead of knowing."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return False
    return node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)


def test_no_object_is_probed_for_attributes() -> None:
    probes = [
        f"{relative(file)}:{node.lineno}"
        for file in PACKAGE_FILES
        for node in ast.walk(parse(file))
        if is_attribute_probe(node)
    ]
    assert probes == []


def test_files_are_short() -> None:
    lengths = {relative(file): len(file.read_text().splitlines()) for file in ALL_FILES}
    limits = {name: MAX_KERNEL_FILE_LINES if name.startswith("pallas_kernels/") else MAX_FILE_LINES for name in lengths}
    assert {name: length for name, length in lengths.items() if length >= limits[name]} == {}


def test_functions_are_short() -> None:
    long_functions = [
        f"{relative(file)}:{node.lineno} {node.name} has {length} lines"
        for file in ALL_FILES
        for node in ast.walk(parse(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) >= MAX_FUNCTION_LINES
    ]
    assert long_functions == []


def test_nothing_is_marked_unfinished() -> None:
    marked = [
        f"{relative(file)}:{number}: {line.strip()}"
        for file in ALL_FILES
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if UNFINISHED.search(line)
    ]
    assert marked == []
