"""Costs by PyTorch's own counter, and the predicted timeline by the peak of the plan's own liveness."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mlc
from mlc.ir.core import Loop, Region
from mlc.passes.cost.facts import Stage, facts_of, flops_of, op_name, stages_of
from mlc.passes.cost.memory import liveness, region_peak
from mlc.passes.cost.timeline import HOLDERS, predicted
from mlc.view.plan import stages_for
from tests import programs
from tests.passes.regions import recorded


def test_flops_are_those_of_the_counter_of_pytorch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.line = nn.Conv2d(2, 3, 3), nn.Linear(48, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.line(self.conv(x).flatten(1).tanh())

    def loss(net, meta, x):
        return (net(x) * meta).square().mean()

    net, meta, x = Net(), nn.Parameter(torch.ones(())), torch.randn(4, 2, 6, 6)
    plan = mlc.plan(mlc.trace(loss, net, meta, x))
    counted = 0
    for stage in stages_of(plan.stages):
        counted += sum(flops_of(e) for e in stage.region.walk())
    with FlopCounterMode(display=False) as counter:
        loss(net, meta, x).backward()
    assert counted == counter.get_total_flops() > 0


def straight(r: Region) -> bool:
    return not any(isinstance(e.op, Loop) for e in r.eqns)


@pytest.mark.parametrize("name", programs.ALL)
def test_the_timeline_of_a_body_peaks_where_liveness_does(name: str) -> None:
    plan = mlc.plan(programs.ALL[name]())
    bodies = [e.op.body for s in stages_of(plan.stages) for e in s.region.walk() if isinstance(e.op, Loop)]
    for r in [b for b in bodies if straight(b)]:
        (points,) = predicted([Stage("forward", r, frozenset(), frozenset())], plan.stages)
        assert max((p.total for p in points), default=0) == region_peak(r)


def test_holders_are_told_apart() -> None:
    program = programs.two_levels()
    plan = mlc.plan(program, flows="mixed")
    graphs = stages_for(program, plan)
    stages = stages_of(graphs)
    forward, backward = predicted(stages, graphs)
    end, start = forward[-1], backward[0]
    kept = HOLDERS.index("kept for backward")
    assert end.live[kept] > 0
    # nothing is kept that the forward stage did not make; next to all of it is read by the backward stage
    assert 0.9 * end.live[kept] <= start.live[kept] <= end.live[kept]
    assert any(p.live[HOLDERS.index("derivatives")] for p in backward)
    assert all(v >= 0 for p in (*forward, *backward) for v in p.live)


def test_long_loops_are_thinned_without_losing_their_peak() -> None:
    def simulate(force, x):
        for _ in range(3000):
            x = x - 0.1 * torch.tanh(x * force)
        return x.square().mean()

    program = mlc.trace(simulate, nn.Parameter(torch.ones(50)), torch.randn(50))
    plan = mlc.plan(program)
    graphs = stages_for(program, plan)
    lines = predicted(stages_of(graphs), graphs)
    assert all(len(points) < 7000 for points in lines)
    states = 3000 * 50 * 4
    assert max(p.total for p in lines[0]) >= states


def test_fates_cover_every_equation() -> None:
    for name in programs.ALL:
        plan = mlc.plan(programs.ALL[name]())
        for stage in stages_of(plan.stages):
            facts = facts_of(stage)
            assert facts.keys() == set(stage.region.walk())
            results = [e for e in stage.region.eqns if set(e.outs) & stage.results]
            assert all(facts[e].fate.kind in ("result", "saved") for e in results)


def test_every_fate_of_a_stage() -> None:
    x = torch.rand(64, 64)

    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = x.mm(x)  # kept over the peak: it is read behind it
        b = x.t()
        c = a.mm(b)
        d = c.mm(x)
        e = c.mm(d)
        return e.mm(d).mm(a), b.sum()

    region = recorded(f, x)
    stage = Stage("forward", region, frozenset({region.outputs[1]}), frozenset({region.outputs[0]}))
    facts = facts_of(stage)
    peak = liveness(region)[1]
    made = {v: i for i, x in enumerate(region.eqns) for v in x.outs}
    last = {v: i for i, x in enumerate(region.eqns) for v in x.inputs}
    kinds = {}
    for i, e in enumerate(region.eqns):
        (v,) = e.outs
        if v in stage.results:
            want = "result"
        elif v in stage.saved:
            want = "saved"
        elif op_name(e) == "t":
            want = "view"
        else:
            want = "kept" if i < peak < last[v] else "freed"
            line = f"#{last[v]} {op_name(region.eqns[last[v]])}"
            assert facts[e].fate.text.endswith(f"freed after {line}")
        assert facts[e].fate.kind == want, (i, facts[e])
        assert facts[e].bytes == (0 if want == "view" else v.type.numel * 4)  # type: ignore[union-attr]
        kinds[want] = made[v]
    assert set(kinds) == {"result", "saved", "view", "kept", "freed"}
