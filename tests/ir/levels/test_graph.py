"""Paths, cuts and what can be pruned."""

import networkx as nx
import pytest

from mlc.ir.levels.graph import LevelGraph
from mlc.ir.program import Flow, Input, Level, Program
from mlc.ir.types import Loc
from tests import programs
from tests.ir.regions import F32, tiny


def program(*flows: Flow) -> Program:
    """A program with metas a, b and levels L0 to L2, for its flows alone."""
    p = tiny()
    levels = tuple(Level(f"L{i}", i, "", 1, (), (), 0, None) for i in range(3))
    inputs = (Input("a", "meta", F32), Input("b", "meta", F32))
    return Program(p.name, p.region, inputs, 1, levels, flows)


def test_paths_of_nested_levels() -> None:
    g = programs.three_levels().graph
    assert g.paths("meta") == [("meta", "L1", "L2", "L0")]
    assert g.paths("meta", "L1") == [("meta", "L1")]
    assert g.prunable() == ()
    assert isinstance(g.graph, nx.MultiDiGraph)


def test_every_path_is_found() -> None:
    g = LevelGraph(
        program(
            Flow("value", "a", "L1", why="loss"),
            Flow("value", "a", "L2", why="update"),
            Flow("response", "L2", "L1"),
            Flow("response", "L1", "L0"),
            Flow("value", "a", "L0", why="loss"),
        )
    )
    assert g.paths("a") == [("a", "L0"), ("a", "L1", "L0"), ("a", "L2", "L1", "L0")]
    assert g.paths("b") == []
    assert g.prunable() == ("b",)


def test_what_enters_a_loss_needs_its_gradient() -> None:
    dead = Flow("gradient", "L1", "L1", False)
    g = LevelGraph(program(dead, Flow("value", "a", "L1", why="loss"), Flow("value", "b", "L1", why="start"),
                           Flow("response", "L1", "L0")))  # fmt: skip
    assert g.paths("a") == []
    assert g.paths("a", "L1") == [("a", "L1")]
    assert g.paths("b") == [("b", "L1", "L0")]
    assert g.prunable() == ("a", "L2")


def test_a_cut_names_path_and_line() -> None:
    (cut, _) = programs.one_path_stopped().graph.cuts()
    assert cut.path == ("weigh.weight", "L1", "L0")
    assert "# the stop" in cut.stop.loc.source()
    assert str(cut).startswith("weigh.weight -> L1 -> L0 is cut by detach() or no_grad() at ")


def test_a_dead_path_is_cut_above() -> None:
    stop = Flow("stop", "L1", "L0", False, Loc("train.py", 7), "detach() or no_grad()")
    g = LevelGraph(program(Flow("value", "a", "L1", why="loss"), Flow("response", "L1", "L0", False), stop))
    assert g.paths("a") == []
    assert [str(c) for c in g.cuts("a")] == ["a -> L1 -> L0 is cut by detach() or no_grad() at train.py:7"]
    assert g.cuts("b") == []


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(KeyError, match="no level L7; there are L0, L1"):
        programs.two_levels().level("L7")
