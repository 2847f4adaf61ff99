"""Paths in explanations: responses, steps, shares of the work."""

import mlc
from mlc.view.details import path_lines, paths_data, shares
from tests.passes.responses.paths.levels import program, values


def test_lines_say_responses_and_shares() -> None:
    traced = mlc.trace(program, *values())
    plan = mlc.plan(traced, backend="interpreter", flows={"fine": mlc.Truncated(2)}, paths={"a -> L0": False})
    text = "\n".join(map(str, path_lines(plan, traced, plan.stages)))
    assert "-> L0 (value: loss)  [off]" in text and "Truncated(" in text and "% of the work" in text
    found = shares(plan.stages)
    assert found.keys() == {"pre", "fine"} and 0 < sum(found.values()) < 1
    assert {"path": ["a", "L0"], "on": False} in paths_data(plan, traced)
    assert "[off]" in plan.explain(verbose=True) and "[off]" not in mlc.plan(traced).explain()
