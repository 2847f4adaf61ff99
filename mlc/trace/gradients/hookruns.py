"""One run of autograd's engine in which hooks may run: which gradients are known, and what is entered where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mlc.ir.core import Var
from mlc.trace.gradients.grads import get_grad
from mlc.trace.gradients.hooksites import Sites

__all__ = ["Run"]


@dataclass(eq=False)
class _Entry:
    """A ``.grad`` that a ``backward()`` adds to, as the user's code last saw it."""

    t: Tensor
    old: Tensor | None
    version: int = 0
    done: bool = False
    touched: bool = False

    def look(self) -> None:
        """The user's code has seen, or set, what is there now."""
        self.old = get_grad(self.t)
        self.version = 0 if self.old is None else self.old._version
        self.touched = False

    @property
    def changed(self) -> bool:
        """Whether PyTorch has added to it since."""
        return get_grad(self.t) is not self.old or (self.old is not None and self.old._version != self.version)


class Run:
    """One run of autograd's engine in which hooks may run.

    Args:
        hooks: Whose it is.
        pairs: Losses and seeds.
        wrt: Tensors that gradients are taken of.
        before: What their ``.grad`` was, where it is added to.
        create_graph: As the user gave it.
    """

    def __init__(self, hooks: Sites, pairs: list[tuple[Var, Var]], wrt: Sequence[Tensor],
                 before: Sequence[tuple[Tensor, Tensor | None]], create_graph: bool) -> None:  # fmt: skip
        self.hooks = hooks
        self.losses = pairs
        self.wrt = wrt
        self.create_graph = create_graph
        self.where = hooks.observer.locate()
        self.level = hooks.observer.depth()
        self.seeds: dict[Var, Var] = {}  # what hooks made of gradients, by the value in front of them
        self.given: dict[int, Tensor] = {}  # gradients as the next hook of a leaf, or a site's value, gets them
        self.entries = {id(t): _Entry(t, None) for t, _ in before}
        for e in self.entries.values():
            e.look()
        self._values: dict[int, tuple[Var | None, bool]] = {}
        self._hooked: dict[int, Var] = {}
        self.at_site = False  # whether a hook runs that is not one of a leaf
        self._asked = -1  # how many seeds there were when it was last asked whether more will come
        self._complete = False

    @property
    def pairs(self) -> list[tuple[Var, Var]]:
        """Losses and seeds, with what hooks have made so far."""
        return [*self.losses, *self.seeds.items()]

    @property
    def complete(self) -> bool:
        """Whether the engine has been at every hook between the losses and the leaves."""
        if self._asked != len(self.seeds):
            self._asked = len(self.seeds)
            ahead = [w for w in self.hooks.sites if id(w) not in self.given]
            self._complete = not (ahead and self.hooks.gradients.reach().among([v for v, _ in self.pairs], ahead))
        return self._complete

    def value(self, t: Tensor) -> tuple[Var | None, bool]:
        """The gradient of ``t`` before its hooks, and whether it goes ways that PyTorch's graph does not have."""
        if id(t) not in self._values:
            # Where no hook is still to come, or to end, one equation serves all of them.
            every = self.complete and not self.at_site
            targets = [x for x in (t, *self.wrt) if id(x) not in self._values] if every else [t]
            self._take(list({id(x): x for x in targets}.values()))
        return self._values[id(t)]

    def values(self, wrt: Sequence[Tensor]) -> tuple[list[Var | None], list[bool]]:
        """Gradients after all hooks, at the end of the run."""
        self._take([t for t in wrt if id(t) not in self._values])
        found = [self._values[id(t)] for t in wrt]
        return [self._hooked.get(id(t), v) for t, (v, _) in zip(wrt, found, strict=True)], [m for _, m in found]

    def _take(self, targets: Sequence[Tensor]) -> None:
        if targets:
            found = self.hooks.gradients.taken(self.pairs, targets)
            self._values.update((id(t), x) for t, *x in zip(targets, *found, strict=True))  # type: ignore[misc]

    def hooked(self, t: Tensor, v: Var) -> None:
        """What the hooks of a leaf have made of its gradient."""
        self._hooked[id(t)] = v

    def settle(self, t: Tensor) -> None:
        """Enter what PyTorch has added to ``t.grad``."""
        e = self.entries.get(id(t))
        if e is None or e.done:
            return
        if not e.changed:
            e.touched = True  # the user's code sees it before PyTorch adds
            return
        e.done = True
        v, beyond = self.value(t)
        if beyond:
            raise self.hooks.beyond()
        self.hooks.gradients.accumulate(t, e.old, self._hooked.get(id(t), v), False, self.create_graph)

    def forget(self, t: Tensor) -> None:
        """``t.grad`` is set by the user's code."""
        e = self.entries.get(id(t))
        if e is not None and not e.done:
            e.done, e.touched = e.changed, not e.changed

    def seen(self) -> None:
        """The user's code has run."""
        for e in self.entries.values():
            if e.touched:
                e.look()
                if e.old is not None:
                    self.hooks.observer.will_write(e.old)

    def rest(self) -> list[tuple[Tensor, Tensor | None]]:
        """What is not entered yet."""
        return [(e.t, e.old) for e in self.entries.values() if not e.done and (e.t.is_leaf or e.changed)]
