"""The predicted timeline of memory against what a run holds: after every trip of every loop, and after every stage."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mlc
import mlc.compiled.entry
from mlc.ir.lowered.contract import Levers
from mlc.passes.cost.facts import stages_of
from mlc.passes.cost.memory import peak_bytes
from mlc.passes.cost.timeline import HOLDERS, predicted
from mlc.passes.planning.planned import joint_of
from mlc.runtime.interpreter.recording import REPLAY
from mlc.view.plan import stages_for
from tests.passes.finishing import finish
from tests.passes.planning.test_planner import OPTIMIZERS, loop

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SHARE = 0.1
# Of tensors of a few elements: numbers that a loop carries, cotangents, what an operator rounds up for itself.
SLACK = 1024


@pytest.fixture
def workloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _workloads

    yield _workloads


def trips_of(fn: Any) -> list[Any]:
    """Stages and trips of the last call; steps that are replayed have no point of their own."""
    return [s for s in fn.report.recorded.spans if s.name != REPLAY]


@pytest.mark.parametrize("memory", [None, "min"])
@pytest.mark.parametrize("name", ["digits", "rates", "hyperparameters", "W1"])
def test_memory_is_as_predicted_at_every_boundary(workloads: Any, name: str, memory: str | None) -> None:
    w = workloads.build(name, quick=True)
    fn = mlc.compile(w.fn, memory=memory, backend="interpreter")
    fn(*w.args)  # what the first call hands out is the run's own, not the program's
    with mlc.recording():
        loss = fn(*w.args)
        torch.autograd.grad(loss, w.meta)
    graphs = stages_for(fn.program, fn.plan)
    lines = predicted(stages_of(graphs), graphs)
    marks = [p for line in lines for p in line if p.depth is not None]
    spans = trips_of(fn)
    assert [p.depth for p in marks] == [s.depth for s in spans] and len(marks) > 4
    for mark, span in zip(marks, spans, strict=True):
        held = dict(zip(HOLDERS, mark.live, strict=True))
        assert abs(span.bytes - mark.total) <= SHARE * span.bytes + SLACK, (span, held)
    top = max(p.total for line in lines for p in line)
    assert top == fn.plan.peak_bytes if fn.plan.slots is None else top <= fn.plan.peak_bytes <= 1.05 * top
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
    lines = predicted(stages_of(graphs), graphs)
    marks = [p for line in lines for p in line if p.depth is not None]
    kept = HOLDERS.index("kept for backward")
    assert len({m.live[kept] for m in marks[:9]}) > 1, "sets of states are kept on the way"
    for mark, span in zip(marks, trips_of(fn), strict=True):
        assert abs(span.bytes - mark.total) <= SHARE * span.bytes + SLACK, (span, mark.live)


class Transformer(nn.Module):
    """One layer of attention over few tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 64)
        self.layer = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.layer(self.embed(x)).mean(1))


def adam(net: str, steps: int) -> tuple[Any, ...]:
    """Eight steps or so by Adam."""
    torch.manual_seed(0)
    if net == "transformer":
        made: nn.Module = Transformer()
        batches = [(torch.randint(16, (8, 12)), torch.randint(3, (8,))) for _ in range(steps)]
    else:
        made = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))
        batches = [(torch.randn(512, 6), torch.randint(3, (512,))) for _ in range(steps)]
    weights = torch.randn(batches[0][0].shape[0], requires_grad=True)
    return made, made, weights, batches, OPTIMIZERS["adam"]


@pytest.mark.parametrize("levers", [
    Levers(0.0, 2), Levers(1e-3, 2), Levers(1e-3, 2, 2), Levers(1e-3, 3, 2), Levers(1e-3, 2, offload=1),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("net", ["mlp", "transformer"])
def test_adjoints_that_compute_gradients_again(net: str, levers: Levers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays redo whole steps, some of them in parts of the batch."""
    args = adam(net, 8)
    found = []

    def chosen(program: Any, plan: Any) -> Any:
        found.append(finish(joint_of(program, plan), levers))
        return found[-1]

    monkeypatch.setattr(mlc.compiled.entry, "stages_for", chosen)
    fn = mlc.compile(loop, flows="mixed", backend="interpreter")
    with mlc.recording():
        torch.autograd.grad(fn(*args), [args[2], *args[1].parameters()])
    assert "replay" in {s.name for s in fn.report.recorded.spans} and fn.report.recorded.peak_bytes > 0
    lines = predicted(stages_of(found[-1]), found[-1])
    marks = [p for line in lines for p in line if p.depth in (0, 1)]  # bodies are thinned
    spans = [s for s in trips_of(fn) if s.depth < 2]
    assert len(marks) == len(spans)
    for mark, span in zip(marks, spans, strict=True):
        assert abs(span.bytes - mark.total) <= SHARE * span.bytes + SLACK, (span, mark.live)
    top = max(p.total for line in lines for p in line)
    assert top <= peak_bytes(found[-1]) <= 1.05 * top
    assert abs(fn.report.peak_bytes - top) <= 0.05 * top + SLACK
