"""A path switched off: the gradient of the same program with ``detach()`` at the flows it goes through, float64."""

import pytest
import torch
from torch import Tensor

import mlc
from tests.passes.responses.paths.levels import DTYPE, by_hand, compiled, values

CASES = [
    (["a -> L0"], ["a -> L0"]),
    (["a -> fine -> L0"], ["a -> L2"]),  # what both read is computed from a once, outside of the loops
    (["a -> pre -> fine -> L0"], ["L1 -> L2"]),
    (["a -> pre -> *"], ["L1 -> L0"]),
    (["a -> pre -> L0", "a -> pre -> fine -> L0"], ["a -> L1"]),
    (["b -> L2 -> L0"], ["b -> L2"]),
    (["b -> L0"], ["b -> L0"]),
    (["* -> fine -> L0", "a -> pre -> fine -> L0"], ["L2 -> L0"]),
]


@pytest.mark.parametrize(("off", "cut"), CASES)
def test_the_gradient_without_a_path_is_that_with_its_flow_detached(off: list[str], cut: list[str]) -> None:
    given = values()
    fn = compiled(paths=dict.fromkeys(off, False), flows="reverse" if "b -> L0" in off else "mixed")
    loss = fn(*given)
    loss.backward()
    expected = by_hand(*values(), cut)
    found = [loss.detach(), *[torch.zeros(3, dtype=DTYPE) if t.grad is None else t.grad for t in given[2:]]]
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_forward_mode_leaves_the_same_path_out() -> None:
    given = values()
    compiled(paths={"a -> fine -> L0": False}, flows="forward")(*given).backward()
    torch.testing.assert_close([t.grad for t in given[2:]], by_hand(*values(), ["a -> L2"])[1:], rtol=1e-11, atol=1e-13)


def nested(x: Tensor, decay: Tensor, m: Tensor) -> Tensor:
    """Two levels that read each other: decay is trained through the training of x, which it enters."""
    top = torch.optim.SGD([decay], lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            x.fill_(0.5)
        opt = torch.optim.SGD([x], lr=0.1)
        with mlc.level("inner"):
            for _ in range(3):
                opt.zero_grad()
                ((x - m).square().sum() * m.cos() + decay.exp() * x.square().sum()).backward()
                opt.step()
        top.zero_grad()
        (m.exp() * (x - 0.2).square().sum()).backward()
        top.step()
    return (x + decay).square().sum()


def nested_by_hand(x: Tensor, decay: Tensor, m: Tensor, cut: str) -> Tensor:
    def use(t: Tensor, flow: str) -> Tensor:
        return t.detach() if flow == cut else t

    decay = decay.detach().requires_grad_()
    for _ in range(2):
        x = torch.full_like(x.detach(), 0.5).requires_grad_()
        m2 = use(m, "m -> L2")
        for _ in range(3):
            loss = (x - m2).square().sum() * m2.cos() + decay.exp() * x.square().sum()
            x = x - 0.1 * torch.autograd.grad(loss, x, create_graph=True)[0]
        loss = use(m, "m -> L1").exp() * (x - 0.2).square().sum()
        decay = decay - 0.1 * torch.autograd.grad(loss, decay, create_graph=True)[0]
    out = (use(x, "L2 -> L0") + use(decay, "L1 -> L0")).square().sum()
    return torch.autograd.grad(out, m)[0]


@pytest.mark.parametrize(
    ("off", "cut"),
    [
        (["m -> L1 -> L0", "m -> inner -> L1 -> L0"], "L1 -> L0"),
        (["m -> inner -> L1 -> L0", "m -> inner -> L0"], "m -> L2"),
        (["m -> L1 -> L0", "m -> L1 -> inner -> L0"], "m -> L1"),
    ],
)
def test_walks_that_return_to_a_level_belong_to_the_path_without_the_return(off: list[str], cut: str) -> None:
    def given() -> list[Tensor]:
        start = (torch.zeros(2, dtype=DTYPE), torch.tensor(-1.0, dtype=DTYPE), torch.tensor(0.3, dtype=DTYPE))
        return [t.requires_grad_() for t in start]

    args = given()
    compiled(nested, paths=dict.fromkeys(off, False), flows="mixed")(*args).backward()
    torch.testing.assert_close(args[2].grad, nested_by_hand(*given(), cut), rtol=1e-11, atol=1e-13)


def test_a_way_that_is_no_flow_is_refused() -> None:
    def penalised(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        opt = torch.optim.SGD([w], lr=0.1)
        for _ in range(2):
            opt.zero_grad()
            (g,) = torch.autograd.grad((a * w**3).sum(), w, create_graph=True)
            (g.square().sum() + (b * w).sum()).backward()
            opt.step()
        return (w * w + a + b).sum()

    w, _, a, b = values()
    with pytest.raises(mlc.PlanError, match=r"(?s)a enters L1 by a way.*detach"):
        compiled(penalised, paths={"a -> L0": False})(w, a, b)
