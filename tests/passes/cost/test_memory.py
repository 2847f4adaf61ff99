"""Predicted memory against what the interpreter is measured to hold, on regions and on whole calls."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mlc
import mlc.compiled.entry
from mlc.ir.builder import Builder
from mlc.ir.core import Region, Var
from mlc.ir.lowered.contract import Levers
from mlc.ir.types import TensorType, resident
from mlc.passes.autodiff.policy import Policy
from mlc.passes.cost.memory import held_at, liveness, peak_bytes, region_peak
from mlc.passes.planning.planned import joint_of
from mlc.runtime.interpreter.interpreter import compile_region
from mlc.runtime.interpreter.loop import link
from mlc.runtime.interpreter.recording import Recording, each_stage, resumed
from tests.passes.finishing import finish
from tests.passes.regions import emit, joint, loop_of, recorded, values_for

X = torch.rand(64, 64, dtype=torch.float64)
SIZE = resident(TensorType.of(X))


def measured(region: Region) -> int:
    """Bytes that a run holds beyond its inputs, at most."""
    run = each_stage(compile_region(region, link(lambda op: None, lambda e: None)), "forward")  # type: ignore[arg-type]
    record = Recording()
    with torch.no_grad(), resumed(record):
        run(values_for(region))
    return record.peak_bytes


def step(c: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    new = (c @ k).tanh() + x
    return new, (new * c).exp()


REGIONS: dict[str, Any] = {
    "a chain": lambda: recorded(lambda x: x.sin().exp().cos().mm(x).sum(), X),
    "values that wait": lambda: recorded(lambda x: sum(x.mm(x) * y for y in [x.mm(x.t()), x.t().mm(x), x + 1]), X),
    "views": lambda: recorded(lambda x: (x.mm(x).t()[:32].reshape(-1).exp() + 1).sum(), X),
    "results of two": lambda: recorded(lambda x: torch.var_mean(x.mm(x), 1), X),
    "a loop": lambda: loop_of(lambda c, k: (c @ k).tanh(), [X], [X], trips=5),
    "a loop that emits": lambda: loop_of(step, [X], [X], [X], trips=5, n_emit=1),
    "an adjoint": lambda: joint(loop_of(lambda c, k: (c @ k).tanh() * c, [X], [X], trips=4), Policy("reverse")),
    "an adjoint of layers": lambda: joint(
        recorded(lambda x, w: ((x @ w).tanh() @ w).sin().sum(), X, X), Policy("reverse")
    ),
}


@pytest.mark.parametrize("name", REGIONS)
def test_a_region_holds_what_is_predicted(name: str) -> None:
    region = REGIONS[name]()
    predicted, found = region_peak(region), measured(region)
    assert abs(found - predicted) <= 0.02 * predicted, (found, predicted)


def test_the_widest_point_is_where_most_is_alive() -> None:
    b = Builder()
    x = b.input(TensorType.of(X))
    made: list[Var] = [emit(b, "mm", x, x), emit(b, "mm", x, emit(b, "t", x))]
    total = emit(b, "add", *made, overload="Tensor")
    peak, where = liveness(b.region([emit(b, "sum", emit(b, "exp", total))]))
    assert peak == 2 * SIZE and where == 2  # behind it, sums are written over their operands
    assert region_peak(b.region([total]), [x]) == 3 * SIZE


def test_what_operators_allocate_inside_is_counted() -> None:
    """No measurement from outside sees it: a softmax's copies, a convolution's in another layout."""
    soft = recorded(lambda x: torch.ops.aten._safe_softmax(x, 1), X)
    assert region_peak(soft) == SIZE + 3 * 64 * 64 * 8 // 2
    x, w = torch.rand(1, 4, 32, 32), torch.rand(4, 4, 3, 3)
    conv = recorded(lambda x, w: torch.ops.aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1), x, w)
    assert region_peak(conv) == resident(TensorType.of(x)) + 4 * 32 * 32 * 4


def test_sets_that_are_held() -> None:
    assert held_at(5, 8) == (0, 1, 2, 3, 4)
    assert held_at(8, 3) == (0, 4)
    assert held_at(9, 1) == (0,)


LEVERS = [Levers(), Levers(1e-7), Levers(0.0, 2), Levers(1e-3, 1)]


@pytest.mark.parametrize("levers", LEVERS, ids=str)
def test_a_call_holds_what_its_plan_predicts(levers: Levers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward stage of a training with momentum, whatever is kept or made again."""

    def train(w: Tensor, xs: list[Tensor]) -> Tensor:
        p = X.clone().requires_grad_()
        opt = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        for x in xs:
            opt.zero_grad()
            ((p @ w).tanh() * x).square().mean().backward()
            opt.step()
        return (p @ w).square().mean()

    def chosen(program: Any, plan: Any) -> Any:
        made.append(finish(joint_of(program, plan), levers))
        return made[-1]

    made: list[Any] = []
    monkeypatch.setattr(mlc.compiled.entry, "stages_for", chosen)
    w, xs = X.clone().requires_grad_(), [torch.rand_like(X) for _ in range(6)]
    cf = mlc.compile(train, flows="mixed", backend="interpreter")
    torch.autograd.grad(cf(w, xs), w)
    predicted, found = peak_bytes(made[-1]), cf.report.peak_bytes
    assert abs(found - predicted) <= 0.03 * predicted, (found, predicted)
