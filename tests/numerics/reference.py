"""The referee: a functional unroll under `create_graph=True` in float64, and finite differences.

`Learner` is a module whose parameters are plain differentiable tensors: calling it runs the module on them,
`grads` differentiates a loss, `step` applies an optimizer's rule. A reference is then an ordinary loop over
a Learner, and its result can be differentiated by autograd with respect to anything. Parameters start as
copies cut from the module's own; buffers are constants of the derivative, as they are for PyTorch.
Finite differences take central pairs at several step sizes and keep the two neighbours that agree best,
so that neither round-off nor curvature nor one kink decides. Nothing here imports mlc.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.numerics.rules import RULES, State, hyper

Tensors = dict[str, Tensor]
Optimizer = type[torch.optim.Optimizer]

STEP_SIZES = (1e-3, 2.5e-4, 6.3e-5, 1.6e-5, 4e-6)


class Learner:
    """A module run functionally on its own differentiable parameters."""

    def __init__(self, module: nn.Module, params: Mapping[str, Tensor] | None = None):
        """`params` replaces the starting values, attached to the graph that made them."""
        self.module = module
        own = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in module.named_parameters()}
        self.params: Tensors = {**own, **(params or {})}
        self.buffers: Tensors = {n: b.detach().clone() for n, b in module.named_buffers()}
        self.state: dict[str, State] = {n: {} for n in self.params}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; buffers that it writes (BatchNorm) are kept as fresh constants."""
        buffers = {n: b.detach().clone() for n, b in self.buffers.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
            out = torch.func.functional_call(self.module, {**self.params, **buffers}, args, kwargs)
        self.buffers = buffers
        return out

    def parameters(self) -> list[Tensor]:
        return list(self.params.values())

    def grads(self, loss: Tensor, names: Iterable[str] | None = None) -> Tensors:
        """Differentiable gradients of `loss`; parameters without one are left out."""
        names = [n for n in (names or self.params) if self.params[n].requires_grad]
        found = torch.autograd.grad(loss, [self.params[n] for n in names], create_graph=True, allow_unused=True)
        return {n: g for n, g in zip(names, found, strict=True) if g is not None}

    def renew(self) -> None:
        """The same values as new variables: what was computed from the old ones is constant to new losses."""
        self.params = {n: p.view_as(p) for n, p in self.params.items()}

    def step(self, cls: Optimizer, grads: Mapping[str, Tensor], **given: Any) -> None:
        """One step of `cls` on the parameters named in `grads`."""
        settings = hyper(cls, given)
        for n, g in grads.items():
            self.params[n], self.state[n] = RULES[cls](self.params[n], g, self.state[n], settings)

    def continue_from(self, opt: torch.optim.Optimizer) -> None:
        """Take over the state of a real optimizer that has stepped on the module."""
        for n, p in self.module.named_parameters():
            if p in opt.state:
                self.state[n] = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in opt.state[p].items()}


def clip_norm(grads: Mapping[str, Tensor], limit: float) -> Tensors:
    """`torch.nn.utils.clip_grad_norm_`, differentiable."""
    total = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    factor = (limit / (total + 1e-6)).clamp(max=1.0)
    return {n: g * factor for n, g in grads.items()}


def clip_value(grads: Mapping[str, Tensor], limit: float) -> Tensors:
    """`torch.nn.utils.clip_grad_value_`, differentiable."""
    return {n: g.clamp(-limit, limit) for n, g in grads.items()}


def schedule(
    cls: Optimizer,
    given: Mapping[str, Any],
    scheduler: Callable[[torch.optim.Optimizer], Any],
    steps: int,
) -> list[dict[str, Any]]:
    """What a scheduler sets the hyperparameters to before each step: read from the real one."""
    opt = cls([torch.zeros((), requires_grad=True)], **given)
    turn = scheduler(opt)
    table = []
    for _ in range(steps):
        group = opt.param_groups[0]
        table.append({k: group[k] for k in {*given, "lr", "momentum", "betas"} if k in group})
        opt.step()
        turn.step()
    return table


def relative_error(value: Tensor, reference: Tensor, least: float = 0.0) -> float:
    """Norm of the difference over norm of the reference, or over `least` (absolute where both are zero)."""
    scale = max(float(reference.norm()), least)
    return float((value - reference).norm()) / (scale if scale > 0 else 1.0)


def worst(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error over named tensors, and whose it is.

    A gradient a million times smaller than the largest is what cancellation left of that: its rounding is measured in
    the same terms.
    """
    assert values.keys() == references.keys()
    least = 1e-6 * max(float(r.norm()) for r in references.values())
    return max((relative_error(values[n], references[n], least), n) for n in references)


def directional(f: Callable[[float], float], steps: Sequence[float] = STEP_SIZES) -> tuple[float, float]:
    """Derivative of `f` at 0 by central differences, and how far the two best neighbours are apart.

    Neighbouring step sizes are also extrapolated (Richardson), which removes the quadratic term.
    """
    slopes = [(f(h) - f(-h)) / (2 * h) for h in steps]
    ratios = [(a / b) ** 2 for a, b in pairwise(steps)]
    pairs = zip(ratios, pairwise(slopes), strict=True)
    better = [(r * fine - coarse) / (r - 1) for r, (coarse, fine) in pairs]
    candidates = [*pairwise(slopes), *pairwise(better)]
    one, two = min(candidates, key=lambda pair: abs(pair[0] - pair[1]))
    return (one + two) / 2, abs(one - two)


def directions(like: Mapping[str, Tensor], seed: int) -> Tensors:
    """A random direction of unit length for every named tensor."""
    gen = torch.Generator().manual_seed(seed)
    raw = {n: torch.randn(t.shape, generator=gen, dtype=t.dtype) for n, t in like.items()}
    length = torch.stack([r.square().sum() for r in raw.values()]).sum().sqrt()
    return {n: r / length for n, r in raw.items()}


def flowing(learner: Learner, loss: Tensor, h: Tensor, f: Callable[[Tensor], Tensor]) -> Tensors:
    """Gradients of `loss` where what flows back into `h` becomes `f` of it."""
    (g,) = torch.autograd.grad(loss, h, create_graph=True)
    own = torch.autograd.grad(h, learner.parameters(), f(g) - g, create_graph=True, allow_unused=True)
    more = dict(zip(learner.params, own, strict=True))
    return {n: v if more[n] is None else v + more[n] for n, v in learner.grads(loss).items()}
