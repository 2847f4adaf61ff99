"""What `flows` means, and the shape of forward stages."""

import pytest
import torch
from torch import Tensor

import mlc
from mlc.ir.core import Loop, Region
from mlc.ir.verify import verify
from mlc.passes.autodiff.adjoint import Policy
from mlc.passes.autodiff.jacobian import MOST_COLUMNS, count, forward_stages, legal
from mlc.passes.cost.memory import peak_bytes
from mlc.passes.lowering.modes import resolve
from mlc.view.plan import Plan


def descend(start: Tensor, batches: list[Tensor], lr: Tensor, scale: Tensor) -> Tensor:
    w = start * scale
    for x in batches:
        (g,) = torch.autograd.grad((scale * torch.tanh(x @ w)).square().mean(), [w], create_graph=True)
        w = w - lr * g
    return w.square().sum()


def traced(steps: int = 4, elements: int = 3) -> mlc.Program:
    scale = torch.ones(elements, requires_grad=True)
    start = torch.ones(5, elements)
    batches = [torch.randn(6, 5) for _ in range(steps)]
    return mlc.trace(descend, start, batches, torch.tensor(0.1, requires_grad=True), scale)


def loops(region: Region) -> list[Loop]:
    return [e.op for e in region.walk() if isinstance(e.op, Loop)]


def test_one_fused_loop_that_emits_nothing() -> None:
    program = traced()
    assert count(program) == 4
    assert legal(program, Policy()) is None
    stages = forward_stages(program, Policy("forward"))
    verify(stages.forward)
    assert stages.backward is not None
    verify(stages.backward)
    (loop,) = loops(stages.forward)
    assert loop.n_emit == 0
    shapes = [v.type.shape for v in loop.body.inputs[: loop.n_carry]]  # type: ignore[union-attr]
    assert sorted(shapes) == [(4, 5, 3), (5, 3)]


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    few, many = (peak_bytes(forward_stages(traced(steps), Policy("forward"))) for steps in (4, 40))
    assert few == many


def test_one_element_has_no_extra_dimension() -> None:
    stages = forward_stages(traced_with_one(), Policy("forward"))
    (loop,) = loops(stages.forward)
    assert [v.type.shape for v in loop.body.inputs[: loop.n_carry]] == [(3,), (3,)]  # type: ignore[union-attr]


def traced_with_one() -> mlc.Program:
    def loop(x: Tensor, a: Tensor) -> Tensor:
        for _ in range(5):
            x = torch.sin(a * x)
        return x.sum()

    return mlc.trace(loop, torch.ones(3), torch.tensor(0.5, requires_grad=True))


def test_a_loop_before_the_meta_parameter_is_left_alone() -> None:
    def loop(x: Tensor, a: Tensor) -> Tensor:
        for _ in range(5):
            x = torch.sin(x) * x
        x = a * x
        for _ in range(5):
            x = torch.cos(x) * x
        return x.sum()

    program = mlc.trace(loop, torch.ones(3), torch.tensor(0.5, requires_grad=True))
    first, second = loops(forward_stages(program, Policy("forward")).forward)
    assert (first.n_carry, second.n_carry) == (1, 2)


def test_too_many_elements_fall_back() -> None:
    program = traced(elements=MOST_COLUMNS)
    plan = mlc.plan(program, flows="forward")
    assert plan.mode == "mixed"
    (mode,) = [d for d in plan.decisions if d.subject == "mode"]
    assert "too many" in mode.reason


@pytest.mark.parametrize(
    "flows", ["forward", {"lr": "forward"}, {"lr -> L1": "forward", "scale": "forward"}, {"L1": "forward"}]
)
def test_ways_to_ask_for_forward(flows: object) -> None:
    plan = mlc.plan(traced(), flows=flows)
    assert plan.mode == "forward"
    assert "forward mode" in plan.explain()
    assert {d.choice for d in plan.decisions if d.subject in ("mode", "L1")} == {"forward"}


def test_a_level_in_reverse() -> None:
    plan = mlc.plan(traced(), flows={"L1": "reverse"})
    assert (plan.mode, plan.flows) == ("mixed", {"L1": "reverse"})
    assert {d.choice for d in plan.decisions if d.subject == "L1"} == {"reverse"}
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_reverse_for_all_and_for_the_only_level_are_the_same_graph() -> None:
    sizes = []
    for flows in ("reverse", {"L1": "reverse"}, "mixed"):
        stages = mlc.plan(traced(), flows=flows).stages
        assert stages is not None
        assert stages.backward is not None
        sizes.append(sum(1 for _ in stages.backward.walk()))
    assert sizes[0] == sizes[1] != sizes[2]


@pytest.mark.parametrize(
    ("flows", "words"),
    [
        ("sideways", "sideways"),
        (3, "flows=3"),
        ({"L1": "up"}, "flows['L1']='up'"),
        ({"L7": "forward"}, "names 'L7'"),
        ({"lr -> L7": "forward"}, "names 'lr -> L7'"),
        ({"lr": "forward", "scale": "reverse"}, "one sweep"),
    ],
)
def test_refusals(flows: object, words: str) -> None:
    with pytest.raises(mlc.PlanError) as caught:
        mlc.plan(traced(), flows=flows)
    assert words in caught.value.what


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(mlc.PlanError) as caught:
        resolve(traced(), {"learning_rate": "forward"})
    assert "L1, lr, scale" in str(caught.value)
