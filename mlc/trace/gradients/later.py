"""Gradients of ``backward()`` that PyTorch's graph does not have, taken where ``.grad`` is read.

``backward()`` of an outer loss reaches leaves through an inner training that the user declared (``mlc.level``,
``mlc.clone``).  Every one of a thousand adapting steps reaches the module that was cloned, and nobody looks at that
module's ``.grad``: so what they would get is noted, and computed when it is first read (by Python or an optimizer) and
not dropped before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlc.errors import CaptureError
from mlc.ir.core import Var
from mlc.trace.gradients.evaluate import evaluate
from mlc.trace.gradients.grads import get_grad, put_grad
from mlc.trace.recorder.observer import Observer

__all__ = ["Later"]

# A ``grad`` equation of these losses for these values, as if it stood where ``backward()`` did.
Take = Callable[[Sequence[Var]], list[Var]]


@dataclass
class _Noted:
    """What one ``backward()`` would add."""

    take: Take
    leaves: dict[int, tuple[Tensor, list[Var]]] = field(default_factory=dict)


class Later:
    """Notes of one run.

    Args:
        observer: Of the run.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._noted: list[_Noted] = []

    def note(self, leaves: Sequence[tuple[Tensor, list[Var]]], take: Take) -> None:
        """``backward()`` reaches ``leaves``, each by these values of it."""
        found = {id(t): (t, values) for t, values in leaves if values}
        if found:
            self._noted.append(_Noted(take, found))

    @contextlib.contextmanager
    def kept(self, t: Tensor) -> Iterator[None]:
        """More is added to ``t.grad``: what was noted before is still to be added."""
        waiting = [(n, n.leaves.pop(id(t))) for n in self._noted if id(t) in n.leaves]
        yield
        for n, leaf in waiting:
            n.leaves[id(t)] = leaf

    def forget(self, t: Tensor) -> None:
        """``t.grad`` is set to something else."""
        for n in self._noted:
            n.leaves.pop(id(t), None)

    def settle(self, t: Tensor) -> None:
        """``t.grad`` is read: what was noted together with it is taken."""
        if any(id(t) in n.leaves for n in self._noted):
            due = [n for n in self._noted if id(t) in n.leaves]
            self._noted = [n for n in self._noted if id(t) not in n.leaves]
            for n in due:
                self._settle(n)

    def _settle(self, n: _Noted) -> None:
        ob = self.observer
        leaves = list(n.leaves.values())
        outs = iter(n.take([v for _, values in leaves for v in values]))
        totals = []
        for _, values in leaves:
            total = next(outs)
            for _ in values[1:]:
                total = ob.add(total, next(outs))
            totals.append(total)
        for (t, _), v, g in zip(leaves, totals, evaluate(ob, totals), strict=True):
            self._put(t, v, g)

    def _put(self, t: Tensor, v: Var, g: Any) -> None:
        ob = self.observer
        old = get_grad(t)
        if old is not None and old.layout is not torch.strided:
            raise CaptureError(f"a {old.layout} gradient is added to", loc=ob.place(), advice="use dense gradients")
        ob.set_grad(t)
        if old is None:
            with ob.pause():
                put_grad(t, g)
            ob.bind(g, v).storage.soft = True
            return
        total = ob.add(ob.present(old), v)
        ob.will_write(old)
        with ob.pause(), torch.no_grad():
            old.add_(g)
        ob.write(old, total)
