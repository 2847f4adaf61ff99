"""Gradients that stop at a training, as in PyTorch, though more was there, or that no step uses: what to warn of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mlc.ir.core import Eqn, Grad, Stop, Var
from mlc.trace.gradients.grads import get_grad
from mlc.trace.gradients.store import GradientStore

__all__ = ["dropped_ways", "needed", "unstepped"]


def needed(eqns: Sequence[Eqn], results: Sequence[Var]) -> set[Var]:
    """Values that what the function returns is computed from."""
    live = set(results)
    for e in reversed(eqns):
        if any(v in live for v in e.outs):
            live.update(e.inputs)
    return live


def dropped_ways(gradients: GradientStore, live: set[Var]) -> list[str]:
    """Warnings: gradients that the result needs, which stop at a training that was not declared."""
    ob = gradients.observer
    found: dict[str, None] = {}
    stepped = {id(p) for s in ob.steps for g in s.optimizer.param_groups for p in g["params"]}
    without = [x for x in gradients.stopped.values() if id(x[0]) in stepped and get_grad(x[0]) is None]
    for out, losses, target, loc, depth in [
        *((k, *x) for k, x in ob.dropped.items()),
        *((None, *x[1:]) for x in without),
    ]:
        if out is not None and out not in live:
            continue
        update = _update_between(gradients, losses, ob.bit_of[target], depth)
        if update is not None:
            found[
                f"the gradient taken at {loc} stops at the update at {update}, as in PyTorch: what was trained "
                f"there is a constant for it. To let it go through that training, put the training into "
                f'`with mlc.level("inner"):`; to keep this meaning without a warning, detach what was trained'
            ] = None
    return list(found)


def unstepped(before: Iterable[tuple[Tensor, Tensor | None]], optimizers: Sequence[Optimizer],
              trained: Callable[[Tensor], bool], names: Mapping[int, str]) -> list[str]:  # fmt: skip
    """Warnings: an optimizer's parameters that ``backward()`` gave gradients, and that the loop never updates.

    They count as meta-parameters, whose ``.grad`` is left alone; a loop that accumulates over several calls means more.

    Args:
        before: Tensors whose ``.grad`` the run set, and what it was.
        optimizers: Those that the function read.
        trained: Whether a tensor counts as trained by the loop.
        names: Of the user's tensors, by identity.
    """
    held = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
    left = [t for t, g in before if id(t) in held and not trained(t) and get_grad(t) is not None and id(t) in names]
    if not left:
        return []
    which = ", ".join(names[id(t)] for t in left[:3]) + ", ..." * (len(left) > 3)
    return [
        f"backward() gives a gradient to {which}, which {type(held[id(left[0])]).__name__} is never told to use: what "
        "a loop does not update is a meta-parameter, and its .grad is left as it was before the call. To accumulate "
        "over calls, let the compiled function run up to the step"
    ]


def _update_between(gradients: GradientStore, losses: Sequence[Var], bit: int, depth: int) -> Any:
    """The line of an update on the way from the losses to a value; None where only other state is (an average)."""
    for e in _back(gradients, losses, bit, depth):
        held = isinstance(e.op, Stop) and e.op.level is not None and e.op.level <= depth
        if held and any(isinstance(x.op, Grad) for x in _back(gradients, e.inputs, bit, depth)):
            return e.loc or "an earlier line"
    return None


def _back(gradients: GradientStore, start: Sequence[Var], bit: int, depth: int) -> Iterator[Eqn]:
    """Equations on the ways back to a value, updates of trainings included."""
    through = gradients.reach(depth, through=True)
    seen: set[Var] = set()
    todo = list(start)
    while todo:
        v = todo.pop()
        e = gradients.observer.builder.producer(v)
        if v in seen or e is None or not through.bits([v]) & bit:
            continue
        seen.add(v)
        yield e
        todo.extend(e.inputs)
