"""Real architectures trace as they are: an ordinary loop over each model of the zoo, against a plain unroll.

Meta-parameters are the initial parameters and one log-weight per training example, so every path of the
inner problem is used: the update, the mixed derivative and the product with the Hessian. The reference is
`torch.func.functional_call` with `create_graph=True` in the same dtype. Two fused kernels are spelt out in it:
attention, which has no second derivative, and weight normalisation, whose second derivative is wrong.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

pytest.importorskip("transformers")

import mlc
from tests.zoo.models import EXAMPLES, ZOO, Batch, Entry, losses

RATE, STEPS = 0.1, 2


def held_out_loss(model: nn.Module, log_weights: Tensor, batches: list[Batch], held_out: Batch) -> Tensor:
    """The loop under test: nothing in it knows that it will be compiled, but for the copy that it trains."""
    fast = mlc.clone(model)
    optimizer = torch.optim.SGD(fast.parameters(), lr=RATE)
    for batch in batches:
        optimizer.zero_grad()
        (log_weights.exp() * losses(fast, batch)).mean().backward()
        optimizer.step()
    return losses(fast, held_out).mean()


def unrolled(model: nn.Module, log_weights: Tensor, batches: list[Batch], held_out: Batch) -> Tensor:
    """The same by hand."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def fast(**inputs: Tensor):
        return torch.func.functional_call(model, theta | frozen | buffers, (), inputs)

    for batch in batches:
        inner = (log_weights.exp() * losses(fast, batch)).mean()
        grads = torch.autograd.grad(inner, list(theta.values()), create_graph=True, allow_unused=True)
        theta = {name: p if g is None else p - RATE * g for (name, p), g in zip(theta.items(), grads, strict=True)}
    return losses(fast, held_out).mean()


class SpeltOut(TorchFunctionMode):
    """`torch._weight_norm` by elementary operations: the double backward of the fused kernel takes the norm of v
    for a constant (torch 2.13; 25% to 38% off on a random tensor, forward and gradient right)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch._weight_norm:
            return func(*args, **(kwargs or {}))
        v, g, kept = args
        others = [dim for dim in range(v.dim()) if dim != kept]
        return v * (g / v.square().sum(others, keepdim=True).sqrt())


def problem(entry: Entry) -> tuple[nn.Module, Tensor, list[Batch], Batch]:
    model, first = entry.build()
    log_weights = torch.linspace(-0.4, 0.3, EXAMPLES, dtype=torch.float64, requires_grad=True)
    return model, log_weights, [first, *map(entry.batch, range(1, STEPS))], entry.batch(STEPS)


def hypergradient(value: Tensor, model: nn.Module, log_weights: Tensor) -> dict[str, Tensor]:
    wrt = {"log_weights": log_weights} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(value, list(wrt.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(wrt.items(), grads, strict=True)}


def disagreement(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over the tensors, and where. A tensor whose gradient is much smaller than the
    largest one (a key's bias, whose gradient is zero but for rounding) is measured against 1% of that."""
    floor = 0.01 * max(grad.norm() for name, grad in want.items() if name != "log_weights")
    floors = {name: 0.0 if name == "log_weights" else floor for name in want}
    return max((float((got[n] - g).norm() / max(g.norm(), floors[n])), n) for n, g in want.items())


CASES = [pytest.param(e, id=e.name, marks=[pytest.mark.slow] if e.slow else []) for e in ZOO]


@pytest.mark.parametrize("entry", CASES)
def test_hypergradient_is_that_of_the_plain_unroll(entry: Entry) -> None:
    model, log_weights, batches, held_out = problem(entry)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    value = mlc.compile(held_out_loss)(model, log_weights, batches, held_out)
    got = hypergradient(value, model, log_weights)
    for name, tensor in model.state_dict().items():  # only the copy was trained, buffers included
        assert torch.equal(tensor, before[name]), name

    model, log_weights, batches, held_out = problem(entry)
    with sdpa_kernel(SDPBackend.MATH), SpeltOut():
        expected = unrolled(model, log_weights, batches, held_out)
        want = hypergradient(expected, model, log_weights)

    assert abs(value.item() - expected.item()) <= entry.tolerance * abs(expected.item())
    error, where = disagreement(got, want)
    assert error <= entry.tolerance, f"{where}: {error:.1e}"


def test_the_zoo_has_every_kind() -> None:
    kinds = {entry.kind for entry in ZOO if not entry.slow}
    assert kinds == {
        "decoder",
        "encoder",
        "encoder-decoder",
        "vision transformer",
        "conv net",
        "state space",
        "mixture of experts",
        "speech",
    }
    assert all(entry.why for entry in ZOO if entry.tolerance != 1e-9)
