"""The tree keeps its shape: links, sizes, dependency arrows, versions and pins that agree."""

import ast
import importlib.metadata
import re
import subprocess
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mlc

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "mlc").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

MAX_FILE, MAX_FUNCTION = 400, 60

# "mlc/path.py" or "mlc/path.py:function" -> why it is better long.
LONG_WITH_REASON: dict[str, str] = {}

# 70 arrows for the rooms up to passes, runtime, view and check; each room that stands on them adds its own.
MAX_MODULES, MAX_ARROWS = 15, 100

# What every room may import, and what imports none of ours but each other.
LEAVES = ("mlc.errors", "mlc.progress", "mlc.shown", "mlc.units")

# Which rooms a room imports, exactly: a sub-package of mlc with all below it, or one of passes. `front` is what stands
# beside them (api, draw, notebook); `mlc/__init__.py` only gives out names, and no room imports it.
ROOMS = {
    "ir": "",
    "record": "ir",
    "linear": "",
    "passes.cost": "ir",
    "passes.levels": "ir",
    "passes.rolling": "ir record",
    "passes.remat": "ir passes.cost",
    "passes.rules": "ir record",
    "passes.microbatch": "ir record passes.cost passes.remat",
    "passes.precision": "ir record passes.cost",
    "passes.autodiff": "ir record passes.remat passes.rules passes.precision",
    "passes.responses": "ir linear record passes.rules passes.autodiff",
    "passes.lowering": "ir passes.remat passes.microbatch passes.precision passes.autodiff passes.responses",
    "passes.planning": (
        "ir passes.cost passes.remat passes.microbatch "
        "passes.precision passes.autodiff passes.responses passes.lowering"
    ),
    "passes.formulas": "ir record passes.cost passes.microbatch passes.autodiff passes.planning",
    "view": "ir passes.cost passes.lowering passes.planning passes.formulas",
    "runtime": "ir linear",
    "trace": "ir record passes.levels passes.rolling passes.rules passes.autodiff passes.responses runtime",
    "compiled": "ir passes.cost passes.rules passes.responses passes.planning passes.formulas view runtime trace",
    "check": "ir passes.precision passes.autodiff trace compiled",
    "front": "ir passes.planning view trace compiled",
    "implicit": "ir linear runtime trace",
    "training": "ir passes.planning view runtime trace compiled front",
    "cli": "passes.planning view runtime trace compiled front training",
}

MACHINE_PATH = re.compile(r"(?:^|[^\w.])/(?:work|farm|root|tmp|home|Users)/")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lengths() -> Iterator[tuple[str, int, int]]:
    """(where, lines, allowed) for each file and each function of the package."""
    for path in SOURCES:
        text = path.read_text()
        yield name(path), len(text.splitlines()), MAX_FILE
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name(path)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1, MAX_FUNCTION


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, relative ones resolved, `from a import b` as a.b."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            for alias in node.names:
                yield node.lineno, ".".join([*base, *filter(None, [node.module]), alias.name])


def dotted(path: Path) -> str:
    """Name of a module or package by its file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> nx.DiGraph:
    """Which module of ours imports which; imports inside functions and those for types count as any other.

    Each arrow has the line that makes it. ``mlc/__init__.py``, which gives out names of all, is left out.
    """
    modules = {dotted(path): path for path in SOURCES}
    graph = nx.DiGraph()
    graph.add_nodes_from(modules)
    for module, path in modules.items():
        for line, found in imports(path):
            while found and found not in modules:
                found = found.rpartition(".")[0]
            if found and found != module:
                graph.add_edge(module, found, where=f"{name(path)}:{line}")
    graph.remove_node("mlc")
    return graph


def room_of(module: str) -> str:
    """The room of a module, by its dotted name; a leaf is its own."""
    if module in LEAVES:
        return module
    _, room, *rest = module.split(".")
    if room == "passes" and rest:
        return f"passes.{rest[0]}"
    if room == "__main__":
        return "cli"
    return room if (ROOT / "mlc" / room).is_dir() else "front"


def room_arrows() -> dict[tuple[str, str], list[str]]:
    """Arrows between rooms and the lines that make them; leaves are open to all."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, imported, where in import_graph().edges(data="where"):
        pair = room_of(module), room_of(imported)
        if pair[0] != pair[1] and pair[1] not in LEAVES:
            found.setdefault(pair, []).append(f"{where} imports {imported}")
    return found


def tracked() -> list[Path]:
    """Every file git has or would take; links and deleted files left out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = (ROOT / entry for entry in listed.split("\0") if entry)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def declared() -> Iterator[Requirement]:
    """Every requirement of pyproject.toml, extras included."""
    for requirement in PROJECT["dependencies"]:
        yield Requirement(requirement)
    for extra in PROJECT["optional-dependencies"].values():
        yield from map(Requirement, extra)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pairs}


@pytest.mark.parametrize("room", ["ir", "passes", "runtime"])
def test_links_at_the_top_lead_into_the_package(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink()
    assert link.readlink() == Path("mlc") / room
    assert link.is_dir()


def test_files_and_functions_are_short_or_say_why() -> None:
    long = {where: lines for where, lines, allowed in lengths() if lines > allowed}
    assert long.keys() == LONG_WITH_REASON.keys(), long


def test_no_modules_import_each_other_in_a_circle() -> None:
    circles = [c for c in nx.strongly_connected_components(import_graph()) if len(c) > 1]
    assert not circles, circles


def test_rooms_import_what_the_table_says() -> None:
    table = {(room, other) for room, others in ROOMS.items() for other in others.split()}
    found = room_arrows()
    against = [line for pair in found.keys() - table for line in found[pair]]
    assert not against, "\n".join(sorted(against))
    assert not table - found.keys(), "no longer needed: take it out of the table"


def test_arrows_between_rooms_are_few_and_run_one_way() -> None:
    order = list(ROOMS)
    for room, others in ROOMS.items():
        for other in others.split():
            assert order.index(other) < order.index(room), f"{room} imports {other}, which stands further down"
    arrows = sum(len(others.split()) for others in ROOMS.values())
    assert arrows <= MAX_ARROWS, arrows


def test_folders_are_small() -> None:
    sizes = Counter(name(path.parent) for path in SOURCES if path.name != "__init__.py")
    assert max(sizes.values()) <= MAX_MODULES, sizes.most_common(3)


def test_no_module_imports_a_private_name_of_another() -> None:
    private = [
        f"{name(path)}:{line} imports {found}"
        for path in SOURCES
        for line, found in imports(path)
        if found.startswith("mlc.") and any(re.match("_(?!_)", part) for part in found.split("."))
    ]
    assert not private, "\n".join(private)


def test_no_file_names_a_path_of_some_machine() -> None:
    found = [
        f"{name(path)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not found, "\n".join(found)


def test_versions_agree() -> None:
    assert mlc.__version__ == PROJECT["version"] == importlib.metadata.version("mlc")
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert not released or released[0] == PROJECT["version"]


def test_every_declared_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    for requirement in declared():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_no_installing_file_names_a_package_host() -> None:
    host = re.compile(r"://|--(extra-)?index-url|--find-links|--trusted-host")
    for file in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        assert not host.search((ROOT / file).read_text()), file


def test_what_the_page_of_rooms_names_is_there() -> None:
    text = (ROOT / "docs" / "where.md").read_text()
    named = set(re.findall(r"`((?:mlc|tests|docs)/[\w/.]+)`", text))
    assert len(named) > 20
    missing = sorted(x for x in named if not (ROOT / x).exists())
    assert not missing, missing


def test_the_page_of_passes_lists_the_pipeline() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "passes.md").read_text(), flags=re.MULTILINE)
    assert tuple(rows) == tuple(p.name for p in mlc.PIPELINE)
