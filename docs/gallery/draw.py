"""Draws the gallery: the loops of ``loops.py`` and the examples, and the page that lists them.

make gallery
"""

import contextlib
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from loops import LOOPS

import mlc
from mlc.cli.userfile import load
from mlc.compiled.underlying import underlying
from mlc.passes.planning.options import planning

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[!_]*.py"))

HEAD = """# Gallery

What programs look like to mlc ([how to read this](../pictures.md)). Each picture is the plan of a loop in
[loops.py](loops.py) or of an example; `make gallery` draws them anew. They follow your system's light or
dark mode.
"""


def plan_of_example(path: Path) -> mlc.Plan:
    file = load(str(path))
    args, kwargs = file.arguments()
    fn, args, options = underlying(file.function(), args)
    with contextlib.redirect_stdout(sys.stderr):
        return mlc.plan(mlc.trace(fn, *args, **kwargs), **planning(options))


def readme() -> mlc.Plan:
    """The plan of the example of the README, with the lines that it has there."""
    text = (ROOT / "README.md").read_text()
    start, end = text.index("```python\n") + len("```python\n"), text.index("\n```\n")
    scope: dict[str, Any] = {"__name__": "readme"}
    exec(compile("\n" * text.count("\n", 0, start) + text[start:end], "README.md", "exec"), scope)
    return scope["validate_after_training"].plan


def main() -> None:
    torch.manual_seed(0)
    lines = [HEAD, entry("readme", "The example of the [README](../../README.md).", readme())]
    for name, make in LOOPS.items():
        torch.manual_seed(0)
        lines.append(entry(name, inspect.getdoc(make) or "", mlc.plan(make())))
    for path in EXAMPLES:
        told = f"[examples/{path.name}](../../examples/{path.name})"
        lines.append(entry(path.stem, told, plan_of_example(path)))
    (HERE / "README.md").write_text("\n".join(lines))


def entry(name: str, told: str, plan: mlc.Plan) -> str:
    mlc.draw(plan, HERE / f"{name}.svg")
    print(f"{name}.svg")
    return f"## {name.replace('_', ' ')}\n\n{told}\n\n![levels and flows of {name}]({name}.svg)\n"


if __name__ == "__main__":
    main()
