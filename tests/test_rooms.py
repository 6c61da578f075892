"""The house: which room may import which, read from the imports themselves."""

import ast
from pathlib import Path

import pytest
from helpers.processes import launch

ROOT = Path(__file__).resolve().parents[1]

# Imports go down, from a higher floor to a lower one, or stay within a room.
FLOORS = {
    "programs": 8,
    "evaluation": 7,
    "engine": 6,
    "exporting": 6,
    "training": 5,
    "options": 5,
    "flag_rules": 4,
    "tasks": 4,
    "datasets": 3,
    "losses": 3,
    "schedules": 3,
    "drawing": 3,
    "models": 2,
    "loading": 1,
    "ops": 1,
    "utils": 0,
}
ROOMS = ("drawing", "evaluation", "exporting", "loading", "models", "ops", "tasks", "utils")
PROGRAMS = ("main", "ablation", "compare", "export", "predict", "report", "visualize")


def project_files() -> list[Path]:
    return [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    room = module.split(".")[0]
    return "programs" if room in PROGRAMS else room


def imports_of(source: str, module: str, is_package: bool, known: set[str]) -> set[str]:
    """Modules of this project that a source file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = module.split(".")
                up = up[: len(up) - node.level + is_package]
                base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                for alias in node.names
            }
    return found & known


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    files = project_files()
    known = {module_name(file) for file in files}
    return {
        module_name(file): imports_of(
            file.read_text(), module_name(file), file.name == "__init__.py", known
        )
        - {module_name(file)}
        for file in files
    }


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if room_of(module) != room_of(other) and FLOORS[room_of(module)] <= FLOORS[room_of(other)]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of modules that import each other, or nothing."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph[module]):
            found = walk(other, [*path, module])
            if found:
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def test_every_file_has_a_floor(graph):
    assert {room_of(module) for module in graph} == set(FLOORS)


def test_imports_go_down(graph):
    assert upward_imports(graph) == []


def test_there_is_no_circle(graph):
    # A package's face imports its own files, which is no circle of theirs.
    faces = {module_name(file) for file in project_files() if file.name == "__init__.py"}
    inner = {
        module: {other for other in others if not module.startswith(f"{other}.")}
        for module, others in graph.items()
    }
    assert faces < set(graph)
    assert circle(inner) == []


def test_that_these_checks_see_what_they_look_for():
    known = {"engine", "evaluation", "evaluation.summary", "utils", "utils.files"}
    found = imports_of("def f():\n    from evaluation import summary", "engine", False, known)
    assert found == {"evaluation.summary"}
    assert imports_of("from .files import x", "utils", True, known) == {"utils.files"}
    assert imports_of("from . import files", "utils.errors", False, known) == {"utils.files"}
    assert upward_imports({"engine": found}) == ["engine imports evaluation.summary"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_training_starts_without_what_only_pictures_need():
    launch(1, ["-c", "import main, sys; sys.exit('matplotlib' in sys.modules)"])
