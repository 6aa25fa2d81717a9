"""Imports point one way: read from the source, so that an arrow the wrong way fails here first."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ride_timm

PACKAGE = Path(ride_timm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A room may import the rooms on lower floors; rooms on one floor do not know each other.
FLOORS = (
    {"errors", "files", "hardware", "keys", "priors", "progress"},
    {"data", "losses", "models"},
    {"evaluation"},
    {"training"},
    {"inference"},
    {"cli"},
)
FRONTS = {"", "__main__", "onnx_driver"}  # public names only: the package, python -m, the ONNX driver
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ("datasets", "accelerate", "thop", "matplotlib", "torch._inductor.codecache")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; relative ones made absolute."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def part(name: str) -> str:
    """ride_timm.models.ride -> models"""
    return name.split(".")[1] if name.startswith("ride_timm.") else ""


def own_modules(path: Path) -> set[str]:
    """The files of the package that a file imports."""
    found = set()
    for name in imports(path):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            found.add(name)
    return found - {module_name(path)}


def test_the_reader_sees_imports():
    assert "ride_timm.models.experts.Expert" in imports(MODULES["ride_timm.models.create"])
    assert "ride_timm.errors.InputError" in imports(MODULES["ride_timm.models.legacy"])
    assert "ride_timm.models.ride" in own_modules(MODULES["ride_timm.models.create"])
    assert {part(name) for name in MODULES} == set(FLOOR_OF) | FRONTS


@pytest.mark.parametrize("name", sorted(name for name in MODULES if part(name) not in FRONTS))
def test_imports_point_down(name):
    room = part(name)
    for imported in own_modules(MODULES[name]) - {"ride_timm"}:
        other = part(imported)
        # errors is below the other base rooms; keys, priors and hardware raise its errors
        below = other == "errors" or (other != room and FLOOR_OF[other] < FLOOR_OF[room])
        assert other == room or below, f"{name} imports {imported}"


def test_objectives_join_models_and_losses_only():
    known = {part(name) for name in own_modules(MODULES["ride_timm.training.objectives"])} - {"", "training"}
    assert known <= {"data", "models", "losses", "priors", "errors"}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_in_the_package_imports_what_stands_around_it(name):
    tops = {imported.split(".")[0] for imported in imports(MODULES[name])}
    assert not tops & {"hub", "tests", "benchmarks", "train_accelerate", "conftest", "pytest"}


def test_no_circles():
    graph = {name: own_modules(path) for name, path in MODULES.items()}
    graph["ride_timm"] = set()  # the package's front imports all, and a file that imports its own front goes no further
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_importing_the_package_is_light_and_registers():
    code = f"""
import sys
import timm
theirs = set(sys.modules)  # with torch 2.6, timm imports torch's compiler
import ride_timm
print([name for name in {HEAVY!r} if name in sys.modules and name not in theirs])
print(timm.is_model("ride_resnet32"))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split("\n")[:2] == ["[]", "True"], ran.stderr
