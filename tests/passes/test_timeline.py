"""The predicted timeline of memory against what a run holds: after every trip of every loop, and after every stage."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mlc
from mlc.passes.facts import stages_of
from mlc.passes.plan import stages_for
from mlc.passes.timeline import HOLDERS, predicted

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHARE = 0.1
# Of tensors of a few elements: numbers that a loop carries, cotangents, what an operator rounds up for itself.
SLACK = 1024


@pytest.fixture
def workloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _workloads

    yield _workloads


@pytest.mark.parametrize("memory", [None, "min"])
@pytest.mark.parametrize("name", ["digits", "rates", "hyperparameters", "W1"])
def test_memory_is_as_predicted_at_every_boundary(workloads: Any, name: str, memory: str | None) -> None:
    w = workloads.build(name, quick=True)
    fn = mlc.compile(w.fn, memory=memory, backend="interpreter")
    with mlc.recording():
        loss = fn(*w.args)
        torch.autograd.grad(loss, w.meta)
    graphs = stages_for(fn.program, fn.plan)
    lines = predicted(stages_of(graphs), graphs, fn.program.handed)
    marks = [p for line in lines for p in line if p.depth is not None]
    spans = fn.report.recorded.spans
    assert [p.depth for p in marks] == [s.depth for s in spans] and len(marks) > 4
    for mark, span in zip(marks, spans, strict=True):
        held = dict(zip(HOLDERS, mark.live, strict=True))
        assert abs(span.bytes - mark.total) <= SHARE * span.bytes + SLACK, (span, held)
    top = max(p.total for line in lines for p in line)
    assert top == fn.plan.peak_bytes
    assert abs(fn.report.peak_bytes - top) <= 0.05 * top + SLACK


def test_carries_that_are_emitted_are_counted_once() -> None:
    def train(rate, x):
        velocity = torch.zeros(1000)
        for _ in range(5):
            velocity = 0.9 * velocity + x.tanh()
            x = x - rate * velocity
        return x.square().mean()

    rate = torch.tensor(0.1, requires_grad=True)
    fn = mlc.compile(train, backend="interpreter", flows="mixed")
    with mlc.recording():
        fn(rate, torch.randn(1000)).backward()
    assert abs(fn.report.peak_bytes - fn.plan.peak_bytes) <= 0.02 * fn.plan.peak_bytes + SLACK


@pytest.mark.parametrize("momentum", [0.0, 0.9])  # with it, a part of each set is emitted by the trips as well
def test_replayed_states_come_and_go(momentum: float) -> None:
    def train(rate, x):
        velocity = torch.zeros(1000)
        for _ in range(9):
            velocity = momentum * velocity + torch.tanh(x)
            x = x - rate * velocity
        return x.square().mean()

    rate = torch.full((1000,), 0.1, requires_grad=True)
    fn = mlc.compile(train, memory="min", backend="interpreter", flows="mixed")
    with mlc.recording():
        fn(rate, torch.randn(1000)).backward()
    assert fn.plan.slots is not None and fn.plan.slots < 9
    graphs = stages_for(fn.program, fn.plan)
    lines = predicted(stages_of(graphs), graphs, fn.program.handed)
    marks = [p for line in lines for p in line if p.depth is not None]
    kept = HOLDERS.index("kept for backward")
    assert len({m.live[kept] for m in marks[:9]}) > 1, "sets of states are kept on the way"
    for mark, span in zip(marks, fn.report.recorded.spans, strict=True):
        assert abs(span.bytes - mark.total) <= SHARE * span.bytes + SLACK, (span, mark.live)
