"""Golden texts: explanations, Mermaid, Graphviz, stage listings."""

from pathlib import Path

import pytest

import mlc
from mlc.passes.planning.plan import Decision
from mlc.view.listing import listing
from mlc.view.stagelist import after, input_names
from tests import golden, programs

NAMES = ("two_levels", "three_levels", "maml", "one_path_stopped")


def fixed(program: mlc.Program) -> mlc.Plan:
    """A plan whose decisions and figures do not depend on the planner."""
    decisions = (
        Decision(subject="L1", choice="mixed", reason="it fits", seconds=0.25, bytes=3 << 20, runner_up="reverse"),
        Decision(subject="states", choice="every 2nd", reason="the budget", bytes=-(1 << 20), runner_up="all kept"),
    )  # fmt: skip
    figures = {"peak_bytes": 5 << 20, "seconds": 1.25, "memory": 8 << 20, "decisions": decisions}
    return mlc.plan(program, flows="mixed").model_copy(update=figures).bind(program)


@pytest.mark.parametrize("name", NAMES)
def test_explain(name: str) -> None:
    golden.check(f"{name}.explain.txt", fixed(programs.ALL[name]()).explain())


@pytest.mark.parametrize("suffix", [".mmd", ".dot"])
@pytest.mark.parametrize("name", NAMES)
def test_diagrams(name: str, suffix: str, tmp_path: Path) -> None:
    path = mlc.draw(fixed(programs.ALL[name]()), tmp_path / f"{name}{suffix}")
    golden.check(path.name, path.read_text())


def test_listing() -> None:
    plan = mlc.plan(programs.learned_rates())
    (stage,) = after(plan, "trace")
    golden.check("learned_rates.trace.py.txt", listing(stage, input_names(plan, stage)))
