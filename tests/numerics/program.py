"""A test program: an ordinary loop, its reference, and the three ways they are compared.

A program is made afresh for every use (`make` is deterministic), so nothing that one run leaves behind
reaches another. The reference is held against the unmodified loop run eagerly, by value, by finite
differences over that loop, and by the random draws left behind; the compiled loop is then held against
the reference's gradient, and against the eager loop's value, final modules, optimizers and random state.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.numerics.reference import Tensors, directional, directions, worst

SEED = 1234
Referee = Literal["loop", "reference", "none"]


@dataclass
class Setup:
    """One fresh instance of a program: `loop(**args)` and `reference(**args)` mean the same number."""

    loop: Callable[..., Any]
    reference: Callable[..., Any]
    args: dict[str, Any]
    meta: Tensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.meta:
            self.meta = named_meta(self.args["meta"])


def named_meta(meta: Any) -> Tensors:
    """Meta-parameters of a module, a mapping of tensors, or one tensor."""
    if isinstance(meta, nn.Module):
        return {n: p for n, p in meta.named_parameters() if p.requires_grad}
    return dict(meta) if isinstance(meta, Mapping) else {"meta": meta}


@dataclass(frozen=True)
class Program:
    """How a setup is made, and how it may be judged.

    Attributes:
        make: Makes a fresh setup; receives `clone`, the stand-in for `mlc.clone`, if it asks for it.
        referee: What finite differences are taken of. "none" where they cannot see what is meant
            (detach, straight-through, constant running statistics); the docstring of `make` says why.
        eager: Whether the plain loop has the same value and leaves the same state. Not so where an
            optimizer's result is differentiated inside the loop: plain PyTorch drops that path.
        tolerance: Relative error allowed between the compiled gradient and the reference.
        differences: Relative error allowed between the reference and finite differences.
        stop: What `stop_gradient` is to mean.
        warns: What a warning of mlc says of the program; None if it has none.
    """

    make: Callable[..., Setup]
    referee: Referee = "loop"
    eager: bool = True
    tolerance: float = 1e-9
    differences: float = 2e-6
    clones: bool = False
    stop: str = "all"
    warns: str | None = None

    @property
    def name(self) -> str:
        return self.make.__name__

    def fresh(self, clone: Callable[[nn.Module], nn.Module] = copy.deepcopy) -> Setup:
        """A new instance, and the global generator where every run starts."""
        torch.manual_seed(SEED)
        setup = self.make(clone=clone) if self.clones else self.make()
        torch.manual_seed(SEED)
        return setup


class Suite(list[Program]):
    """Programs of one test module, collected by decorating what makes them."""

    def add(self, **traits: Any) -> Callable[[Callable[..., Setup]], Callable[..., Setup]]:
        def keep(make: Callable[..., Setup]) -> Callable[..., Setup]:
            self.append(Program(make, **traits))
            return make

        return keep


def total(out: Any) -> Tensor:
    """One scalar that depends on every differentiable output, each with its own factor."""
    if isinstance(out, Tensor):
        return out.sum()
    values = list(out.values()) if isinstance(out, Mapping) else list(out)
    tensors = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    return sum((i + 1) * t.sum() for i, t in enumerate(tensors))  # type: ignore[return-value]


def gradients(value: Tensor, meta: Mapping[str, Tensor]) -> Tensors:
    """Gradients of `value` by name, zeros where there is no path."""
    found = torch.autograd.grad(value, list(meta.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(meta.items(), found, strict=True)}


def reference_gradients(program: Program) -> Tensors:
    setup = program.fresh()
    return gradients(total(setup.reference(**setup.args)), setup.meta)


def moved(program: Program, direction: Mapping[str, Tensor], step: float) -> float:
    """The value at meta-parameters moved along `direction`."""
    setup = program.fresh()
    for n, t in setup.meta.items():
        t.data.add_(direction[n], alpha=step)
    run = setup.loop if program.referee == "loop" else setup.reference
    return float(total(run(**setup.args)).detach())


def check_reference(program: Program) -> None:
    """The reference has the value and the draws of the plain loop and the slope of its differences."""
    setup = program.fresh()
    value, state = total(setup.reference(**setup.args)), torch.get_rng_state()
    grads = gradients(value, setup.meta)
    assert all(g.isfinite().all() for g in grads.values())
    assert any(g.abs().max() > 0 for g in grads.values()), "the reference has no gradient at all"
    if program.eager:
        plain = program.fresh()
        assert float(total(plain.loop(**plain.args)).detach()) == pytest.approx(
            float(value.detach()), rel=1e-11, abs=1e-13
        )
        assert torch.equal(torch.get_rng_state(), state), "the reference draws otherwise than the loop"
    if program.referee == "none":
        return
    for seed in (1, 2):
        along = directions(setup.meta, seed)
        slope = sum(float((grads[n] * along[n]).sum()) for n in grads)
        measured, spread = directional(lambda h, d=along: moved(program, d, h))  # type: ignore[misc]
        assert slope == pytest.approx(measured, rel=program.differences, abs=1e-9), f"spread {spread:.1e}"


def check_compiled(program: Program, mlc: ModuleType, mode: str | None = None) -> None:
    """Gradient of the reference; value, random state, modules and optimizers of the plain loop."""
    setup = program.fresh(clone=mlc.clone) if program.clones else program.fresh()
    compiled = mlc.compile(setup.loop, flows=mode, stop_gradient=program.stop)
    with pytest.warns(mlc.MlcWarning, match=program.warns) if program.warns else contextlib.nullcontext():
        out = compiled(**setup.args)
    assert mode in (None, compiled.plan.mode), compiled.plan.explain()
    draws = torch.get_rng_state()
    value = total(out)
    if program.eager:
        plain = program.fresh()
        expected = plain.loop(**plain.args)
        same(describe(out), describe(expected), "output", rel=max(1e-10, program.tolerance))
        assert torch.equal(draws, torch.get_rng_state()), "the random state differs from the loop's"
        for name in plain.args:
            same(describe(setup.args[name]), describe(plain.args[name]), name, rel=max(1e-9, program.tolerance))
    assert all(t.grad is None for t in setup.meta.values() if t.is_leaf), "meta-parameters got an inner .grad"
    other = program.fresh()
    expected = total(other.reference(**other.args))
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=max(1e-10, program.tolerance))
    wanted = gradients(expected, other.meta)
    error, name = worst(gradients(value, setup.meta), wanted)
    assert error <= program.tolerance, f"{name}: relative error {error:.2e}"
    later = program.fresh(clone=mlc.clone) if program.clones else program.fresh()
    if setup.loop.__closure__ is None:
        error, name = worst(gradients(total(compiled(**later.args)), later.meta), wanted)
        assert error <= program.tolerance, f"second call, {name}: relative error {error:.2e}"


def describe(thing: Any) -> Any:
    """What a loop can change in an object, as nested containers of tensors and plain values."""
    if isinstance(thing, nn.Module):
        return {**thing.state_dict(), "training": thing.training}
    if isinstance(thing, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler):
        return {k: v for k, v in thing.state_dict().items() if not callable(v)}
    return thing


def same(one: Any, two: Any, where: str, rel: float = 1e-9) -> None:
    """Assert that two descriptions agree, tensors by relative norm."""
    if isinstance(two, Tensor):
        assert one.shape == two.shape, where
        assert one.dtype == two.dtype, where
        assert one.requires_grad == two.requires_grad, f"{where}.requires_grad"
        torch.testing.assert_close(one.detach(), two.detach(), rtol=rel, atol=1e-12, msg=lambda m: f"{where}: {m}")
    elif isinstance(two, Mapping):
        assert one.keys() == two.keys(), where
        for k in two:
            same(one[k], two[k], f"{where}.{k}", rel)
    elif isinstance(two, list | tuple):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            same(a, b, f"{where}[{i}]", rel)
    elif isinstance(two, bool) or not isinstance(two, int | float):
        if isinstance(two, bool | str | type(None)):
            assert one == two, where
    else:
        assert one == pytest.approx(two, rel=rel, abs=1e-12), where
