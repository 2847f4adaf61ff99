"""Stage graphs as text: they parse, and their comments are true."""

import ast
import re

import pytest
import torch
from torch import nn

import mlc
from mlc.ir.core import Loop
from mlc.passes.cost.equations import Meter
from mlc.passes.cost.facts import Stage, facts_of
from mlc.passes.planning.planned import joint_of
from mlc.passes.remat.segments import Trade, rematerialise
from mlc.view.listing import difference, listing
from mlc.view.stagelist import after, graphs_after, input_names, shown
from tests import programs


@pytest.mark.parametrize("name", programs.ALL)
def test_every_pass_prints_as_python(name: str) -> None:
    plan = mlc.plan(programs.ALL[name]())
    for graphs in graphs_after(plan).values():
        for stage in shown(graphs):
            text = listing(stage, input_names(plan, stage) if stage.name != "backward" or graphs == plan.stages else ())
            tree = ast.parse(text)
            calls = sum(isinstance(x, ast.Assign | ast.Expr) for x in ast.walk(tree))
            assert calls >= sum(not isinstance(e.op, Loop) for e in stage.region.walk())


def test_values_are_defined_before_they_are_read() -> None:
    plan = mlc.plan(programs.three_levels())
    for stage in after(plan):
        known: set[str] = set()
        for line in listing(stage, input_names(plan, stage)).splitlines():
            code = line.split("#")[0]
            target, eq, rest = code.partition(" = ")
            read = re.findall(r"\bv\d+\b", rest if eq else code)
            assert set(read) <= known, line
            known |= set(re.findall(r"\bv\d+\b", target))


def test_comments_say_what_was_decided() -> None:
    plan = mlc.plan(programs.two_levels())
    forward, backward = after(plan)
    text = listing(forward, input_names(plan, forward))
    assert text.count("kept for the backward stage") + text.count("kept from every trip") > 0
    assert "handed to the next trip" in text
    assert "a hypergradient" in listing(backward)
    assert re.search(r"mm\(.*# \d+: f32\[\S+ \d+ B; freed after #\d+ \w+; line 17 in model", text)


def test_what_is_freed_is_not_read_again() -> None:
    plan = mlc.plan(programs.two_levels())
    for stage in after(plan):
        lines = [x for x in listing(stage).splitlines() if re.match(r"    \w", x)]
        for i, line in enumerate(lines):
            found = re.match(r"    (v\d+) = .*# \d+: .*freed after #(\d+) \w+", line)
            if found:
                last = next(k for k, x in enumerate(lines) if re.search(rf"# {found[2]}: ", x))
                behind = [x.split("#")[0] for x in lines[last + 1 :] if "trip." not in x]
                assert not any(re.search(rf"\b{found[1]}\b", x) for x in behind), (i, line)


def stacked(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) ** 2).mean()


def layers(n: int) -> nn.Module:
    return nn.Sequential(*[x for _ in range(n) for x in (nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64))])


def test_a_pass_that_recomputes_shows_in_the_difference() -> None:
    plan = mlc.plan(mlc.trace(stacked, layers(6), torch.randn(256, 64)), levers={"price": 1e-6})
    before, behind = after(plan, "micro-batches"), after(plan, "rematerialise")
    assert difference(before[1], before[1], ("a", "b")) == ""
    text = difference(before[1], behind[1], ("before", "after"))
    added = [x for x in text.splitlines() if x.startswith("+") and "[recomputed " in x]
    recomputed = sum(e.tag.startswith("recomputed ") for e in behind[1].region.walk())
    assert len(added) == recomputed > 5


def test_other_passes_are_refused() -> None:
    with pytest.raises(mlc.PlanError, match="no pass 'magic'") as e:
        after(mlc.plan(programs.two_levels()), "magic")
    assert "trace" in e.value.advice


def test_recomputed_lines_name_their_segment() -> None:
    program = mlc.trace(stacked, layers(12), torch.randn(256, 64))
    whole = joint_of(program, mlc.plan(program)).region
    region = rematerialise(whole, lambda e: False, Trade(1e-6), Meter(torch.device("cpu")))
    tags = [e.tag for e in region.eqns if e.tag.startswith("recomputed")]
    numbers = [int(t.split()[1]) for t in dict.fromkeys(tags)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 1
    stage = Stage("backward", region, frozenset(), frozenset(region.outputs))
    told = re.findall(r"; recomputed in segment (\d+), freed after", listing(stage))
    assert len(told) > len(numbers) and set(map(int, told)) == set(numbers)


def test_what_the_backward_stage_does_again_says_so() -> None:
    plan = mlc.plan(programs.two_levels(), memory="min", flows="mixed")
    forward, backward = after(plan)
    text = listing(backward)
    assert "computed again from what was kept" in text
    facts = facts_of(forward)
    own = [x for e in forward.region.eqns for x in (e, *(e.op.body.eqns if isinstance(e.op, Loop) else ()))]
    assert not any("computed again from what was kept" in facts[e].fate.text for e in own)  # but replays do so
