"""Imports point down: the tables of docs/architecture.md against every import in the three packages."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"megamm": ROOT, "megamm_kernels": ROOT / "kernels", "megamm_laws": ROOT / "laws"}


def module_files() -> dict[str, Path]:
    found = {}
    for package, above in PACKAGES.items():
        for path in sorted((above / package).rglob("*.py")):
            found[".".join(path.relative_to(above).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = module_files()


def imports(module: str, nodes) -> set[str]:
    """Full names of what the statements import, our own modules to the file, others as written."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: write imports in full"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts & MODULES.keys() or {node.module}
    return found


@cache
def all_imports(module: str) -> set[str]:
    """Everything that a module imports, at its top or later."""
    return imports(module, ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))))


def imports_at_start(module: str) -> set[str]:
    """What importing a module imports: not inside functions, nor for a type checker alone."""
    found: list[ast.stmt] = []
    left = list(ast.parse(MODULES[module].read_text(encoding="utf-8")).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found.append(node)
        if isinstance(node, ast.If | ast.Try | ast.ClassDef):
            left += node.body
    return imports(module, found) & MODULES.keys()


def table(heading: str) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Line of each room and what a room never imports, from a table of the page."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    body = text.partition(f"| {heading} |")[2].partition("\n\n")[0]
    lines, never = {}, {}
    for number, line in enumerate(body.splitlines()[2:]):
        rooms, _, forbidden = (re.findall("`([^`]+)`", cell) for cell in line.split("|")[1:4])
        for room in rooms:
            lines[room], never[room] = number, forbidden
    return lines, never


@pytest.mark.parametrize(("package", "heading"), [("megamm", "rooms"), ("megamm_laws", "rooms of laws")])
def test_arrows_point_down(package, heading):
    lines, never = table(heading)
    assert len(lines) > 5
    wrong = []
    for module in MODULES:
        if not module.startswith(f"{package}."):
            continue
        room = module.split(".")[1]
        assert room in lines, f"docs/architecture.md: table {heading!r} has no room {room}"
        for other in all_imports(module):
            if other.startswith(f"{package}.") and lines[other.split(".")[1]] < lines[room]:
                wrong.append(f"{module} -> {other}: {room} lies below {other.split('.')[1]}")
            for name in never[room]:
                if f"{other}.".startswith((f"{name}.", f"{package}.{name}.")):
                    wrong.append(f"{module} -> {other}: {room} never imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("package", "unknown"), [("megamm_kernels", ("megamm", "megamm_laws")), ("megamm_laws", ("megamm", "torch"))]
)
def test_libraries_of_their_own(package, unknown):
    for module in (m for m in MODULES if m.split(".")[0] == package):
        strangers = {other.split(".")[0] for other in all_imports(module)} & {*unknown}
        assert not strangers, f"{module} imports {', '.join(strangers)}"


def test_no_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports_at_start(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())
