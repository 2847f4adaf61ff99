"""Docstrings are true: what they say a class has, or a function takes, it has and takes; files that docs name exist."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "mlc").rglob("*.py"))
TREES = {p: ast.parse(p.read_text()) for p in SOURCES}
CLASSES = {c.name: c for tree in TREES.values() for c in ast.walk(tree) if isinstance(c, ast.ClassDef)}
# Not the changelog: what was, is told there.
DOCS = [p for p in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if p.name != "CHANGELOG.md"]


def entries(doc: str, title: str) -> list[str]:
    """Names listed under a title of a Google style docstring."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)*)", doc + "\n", re.MULTILINE)
    lines = re.findall(r"^    (\*{0,2}\w+(?:, \w+)*)(?: \(.*?\))?:(?: |$)", found[1] if found else "", re.MULTILINE)
    return [name.strip().lstrip("*") for line in lines for name in line.split(",")]


def members(c: ast.ClassDef) -> Iterator[str]:
    """Attributes that a class or its bases in mlc define: fields, properties, methods, assignments to self."""
    for base in c.bases:
        name = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
        if name in CLASSES and name != c.name:
            yield from members(CLASSES[name])
    for node in ast.walk(c):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for t in targets:
            for x in ast.walk(t) if isinstance(t, ast.AST) else ():
                if isinstance(x, ast.Name):
                    yield x.id
                elif isinstance(x, ast.Attribute):
                    yield x.attr


def parameters(f: ast.FunctionDef) -> set[str]:
    a = f.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    return {x.arg for x in every}


@cache
def documented() -> list[tuple[str, list[str], set[str]]]:
    """(where, names in the docstring, names there are)."""
    return list(_documented())


def _documented() -> Iterator[tuple[str, list[str], set[str]]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            doc = ast.get_docstring(node) or "" if isinstance(node, ast.ClassDef | ast.FunctionDef) else ""
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.FunctionDef):
                yield where, entries(doc, "Args"), parameters(node)
            elif isinstance(node, ast.ClassDef):
                yield where, entries(doc, "Attributes"), set(members(node))
                inits = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
                given = parameters(inits[0]) if inits else set(members(node))
                yield where, entries(doc, "Args"), given


def test_docstrings_name_nothing_that_is_not_there() -> None:
    wrong = {where: sorted(set(names) - there) for where, names, there in documented() if not set(names) <= there}
    assert not wrong


def test_the_docstrings_are_read() -> None:
    assert sum(len(names) for _, names, _ in documented()) > 500
    doc = "Head.\n\nAttributes:\n    a, b: Two.\n        More: of it.\n    c (int): One.\n\nRaises:\n    X: when.\n"
    assert entries(doc, "Attributes") == ["a", "b", "c"]


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_modules_that_docs_name_exist(path: Path) -> None:
    text = path.read_text()
    files = re.findall(r"`((?:mlc|tests|examples|benchmarks)/[\w/.]+\.(?:py|md|json))`", text)
    modules = re.findall(r"`(mlc(?:\.[a-z]\w*)+)`", text)
    missing = [f for f in files if not (ROOT / f).exists()]
    rooms = {p.name for p in (ROOT / "mlc").iterdir() if p.is_dir()}
    for m in modules:
        head, *rest = m.split(".")[1:]
        if head in rooms and rest and not (ROOT / "mlc" / head / rest[0]).with_suffix(".py").exists():
            missing += [m] if not (ROOT / "mlc" / head / rest[0]).is_dir() else []
    assert not missing
