"""The tree keeps its shape: links, sizes, dependency arrows, versions and pins that agree."""

import ast
import importlib.metadata
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

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

# Which modules of ours a room may import besides itself; mlc.errors is open to all. Rooms not named here
# (front door, tracer, CLI, drawing) may import everything.
ARROWS = {
    "ir": (),
    "record": ("mlc.ir",),
    "passes": ("mlc.ir", "mlc.record"),
    "runtime": ("mlc.ir", "mlc.implicit"),
    "errors.py": (),
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


def within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(allowed + ".")


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


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_run_one_way(room: str) -> None:
    allowed = ("mlc.errors", f"mlc.{room.removesuffix('.py')}", *ARROWS[room])
    against = [
        f"{name(path)}:{line} imports {module}"
        for path in SOURCES
        if path.relative_to(ROOT).parts[1] == room
        for line, module in imports(path)
        if within(module, "mlc") and not any(within(module, each) for each in allowed)
    ]
    assert not against, "\n".join(against)


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
