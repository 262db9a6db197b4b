"""The distribution holds what it says: folders under their installed names, data files, declared dependencies."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
PACKAGE_DIRS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
MAPPED_FOLDERS = sorted(folder for package, folder in PACKAGE_DIRS.items() if package != "jax_engine")


def package_folder(package: str) -> Path:
    """The folder that pyproject.toml maps `package` to; a subpackage lies inside its nearest mapped parent."""
    parent = next(name for name in sorted(PACKAGE_DIRS, key=len, reverse=True) if f"{package}.".startswith(f"{name}."))
    return REPOSITORY / PACKAGE_DIRS[parent] / package.removeprefix(parent).replace(".", "/").lstrip("/")


def run_python(code: str, *flags: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_package_list_names_exactly_the_folders_with_code() -> None:
    found = set()
    for package, folder in PACKAGE_DIRS.items():
        for init in (REPOSITORY / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(REPOSITORY / folder)
            found.add(".".join((package, *inside.parts)))
    assert set(PACKAGES) == found


def test_every_python_file_lies_in_a_listed_package() -> None:
    listed = {package_folder(package) for package in PACKAGES}
    files = [file for folder in PACKAGE_DIRS.values() for file in (REPOSITORY / folder).rglob("*.py")]
    assert [file for file in files if file.parent not in listed] == []


def test_every_other_file_in_a_package_is_declared_as_package_data() -> None:
    declared = PROJECT["tool"]["setuptools"]["package-data"]
    missing = []
    for package in PACKAGES:
        folder = package_folder(package)
        shipped = {file for pattern in declared.get(package, []) for file in folder.glob(pattern)}
        for file in folder.iterdir():
            expected = file.is_file() and file.suffix not in (".py", ".pyc") and not file.name.startswith(".")
            if expected and file.name != "README.md" and file not in shipped:
                missing.append(file.relative_to(REPOSITORY))
    assert missing == []


@pytest.mark.parametrize("folder", MAPPED_FOLDERS)
def test_mapped_folder_refuses_its_bare_name(folder: str) -> None:
    script = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import {folder}"
    result = run_python(script, cwd=REPOSITORY)
    assert result.returncode == 1
    assert (
        f"ImportError: the folder {folder}/ is installed as jax_engine.{folder}; import it by that name"
        in result.stderr
    )


@pytest.mark.parametrize("folder", MAPPED_FOLDERS)
def test_mapped_folder_is_imported_under_the_package(folder: str, tmp_path: Path) -> None:
    result = run_python(f"import jax_engine.{folder} as m; print(m.__name__)", cwd=tmp_path)
    assert result.stdout.strip() == f"jax_engine.{folder}", result.stderr


def test_importing_the_package_builds_nothing(tmp_path: Path) -> None:
    """`import jax_engine` must stay cheap: no JAX, no model, no engine until a public name is used."""
    script = "import sys, jax_engine; print(*(m for m in sys.modules if m == 'jax' or m.startswith('jax_engine.')))"
    result = run_python(script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.split()
    assert "jax" not in loaded
    assert "jax_engine.llm" not in loaded


def test_the_command_is_installed() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="jax-engine")
    assert command.value == "jax_engine.server.cli:main"


def test_installed_version_is_the_project_version() -> None:
    assert importlib.metadata.version("jax-engine") == PROJECT["project"]["version"]


def imported_modules(file: Path) -> dict[str, set[str]]:
    """Top-level modules that `file` imports from other distributions, each with the normalised names of those that it
    may come from: many distributions share a namespace.
    """
    tree = ast.parse(file.read_text(), filename=str(file))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules.add(node.module.partition(".")[0])
    modules -= {*sys.stdlib_module_names, "jax_engine"}
    return {module: set(map(normalised, providers_of_modules().get(module, [module]))) for module in modules}


@cache
def providers_of_modules() -> Mapping[str, Sequence[str]]:
    """By module, the distributions that have a part of it. Found once: every installed file is looked at."""
    return importlib.metadata.packages_distributions()


def normalised(requirement: str) -> str:
    """A requirement's distribution name as PEP 503 compares it, without version or extras."""
    name = re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_imported_distribution_is_declared() -> None:
    """Tracing, Ray, plots and the training of the built-in model have extras, imported where they are used."""
    extras = {
        name: set(map(normalised, requirements))
        for name, requirements in PROJECT["project"]["optional-dependencies"].items()
    }
    runtime = {normalised(requirement) for requirement in PROJECT["project"]["dependencies"]}
    undeclared = {}
    for package in PACKAGES:
        for file in package_folder(package).glob("*.py"):
            name = str(file.relative_to(REPOSITORY))
            of_files = {"server/tracing.py": "otel", "server/ray_serve.py": "ray", "jax_engine/plan/drawing.py": "plan"}
            extra = {"jax_engine.models.demo": "train"}.get(package) or of_files.get(name)
            allowed = runtime | (extras[extra] if extra else set())
            if missing := [module for module, providers in imported_modules(file).items() if not providers & allowed]:
                undeclared[name] = missing
    assert undeclared == {}


def test_torch_is_never_needed_at_run_time() -> None:
    """torch serves comparisons in tests and benchmarks; a user who installs jax-engine must not receive it."""
    assert "torch" not in {normalised(requirement) for requirement in PROJECT["project"]["dependencies"]}


def test_tpu_extra_leaves_libtpu_to_jax() -> None:
    """Each JAX release names the one libtpu series it works with; a pin of our own would fight it."""
    extra = PROJECT["project"]["optional-dependencies"]["tpu"]
    (jax_requirement,) = [line for line in PROJECT["project"]["dependencies"] if normalised(line) == "jax"]
    assert extra == [jax_requirement.replace("jax", "jax[tpu]", 1)]
    libtpu = [line for line in importlib.metadata.requires("jax") or [] if line.startswith("libtpu")]
    assert len(libtpu) == 1
    assert "==" in libtpu[0]
