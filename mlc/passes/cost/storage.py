"""Which storages are alive at a point of a region, as the interpreter allocates and frees them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from mlc.ir.core import Eqn, Feed, Pack, Region, Var
from mlc.ir.lowered.reuse import reused, shared_with
from mlc.ir.types import TensorType, nbytes, resident

__all__ = ["Book", "own_bytes", "roots_of", "workspace"]


class Book:
    """Storages alive at a point of a region."""

    def __init__(self, region: Region, owned: Mapping[Var, int], same: Mapping[Var, Var]) -> None:
        self.last: dict[Var, int] = {}
        for i, e in enumerate(region.eqns):
            for v in e.inputs:
                self.last[v] = i
        for v in region.outputs:
            self.last[v] = len(region.eqns)
        self.reused = reused(region)
        self.owner: dict[Var, Var] = {v: v for v in region.inputs}
        self.holders: dict[Var, int] = {}
        self.size: dict[Var, int] = {}
        self.keeps: dict[Var, list[Var]] = {}
        self.live = 0
        for v, size in owned.items():
            self.own(v, size, same.get(v, v))

    def own(self, v: Var, size: int, root: Var) -> None:
        """An input that dies here; ``root`` is the one whose storage it shares."""
        if v not in self.last:
            return
        self.owner[v] = root
        if root in self.holders:
            self.holders[root] += 1
        else:
            self.add(root, size)

    def add(self, v: Var, size: int) -> None:
        """A storage of its own."""
        self.holders[v], self.size[v] = 1, size
        self.live += size

    def drop(self, root: Var) -> None:
        """A storage that nobody holds any more."""
        self.live -= self.size[root]
        del self.holders[root]
        for r in self.keeps.pop(root, ()):
            self.let_go(r)

    def let_go(self, root: Var) -> None:
        """One holder less."""
        self.holders[root] -= 1
        if self.holders[root] == 0:
            self.drop(root)

    def enter_loop(self, e: Eqn, i: int, sizes: Sequence[int | None], keeps: Iterable[tuple[int, int]]) -> None:
        """Results of a loop; ``keeps`` tells which of them keep which arguments or results alive, by position."""
        self.enter(e, i, sizes)
        values = (*e.args, *e.outs)
        for k, at in keeps:
            self.keep(e.outs[k], values[at])

    def keep(self, v: Var, kept: Var) -> None:
        """As long as ``v`` lives, so does the storage of another value."""
        root, held = self.owner[v], self.owner.get(kept)
        if root in self.holders and held in self.holders and held is not root:
            self.holders[held] += 1
            self.keeps.setdefault(root, []).append(held)

    def held_by(self, root: Var) -> set[Var]:
        """A storage, and those that it keeps alive."""
        return {root}.union(*[self.held_by(r) for r in self.keeps.get(root, ())])

    def enter(self, e: Eqn, i: int, sizes: Sequence[int | None]) -> None:
        """Results of equation ``i``, with the bytes of those that have a storage of their own."""
        over = self.reused.get(i)
        for k, v in enumerate(e.outs):
            size = sizes[k]
            shared = over if over is not None else e.args[k] if size is None else shared_with(e, k)
            root = v if shared is None else self.owner[shared]
            self.owner[v] = root
            if root is v:
                assert size is not None
                self.add(v, size)
            elif root in self.holders:
                self.holders[root] += 1
        for v in e.args if isinstance(e.op, Pack) else ():
            self.keep(e.outs[0], v)

    def leave(self, e: Eqn, i: int) -> None:
        """Drop what the equation read or made for the last time."""
        for v in dict.fromkeys([*e.inputs, *e.outs]):
            root = self.owner[v]
            if self.last.get(v, i) == i and root in self.holders:
                self.let_go(root)

    def freed_with(self, v: Var, i: int) -> int:
        """Bytes that go when equation ``i``, their last user, lets ``v`` go."""
        root = self.owner[v]
        alone = self.last.get(v) == i and self.holders.get(root) == 1
        return self.size[root] if alone else 0


def own_bytes(e: Eqn) -> list[int | None]:
    """Bytes of the results of an operator that have storages of their own; what a feed draws is held trip by trip."""
    return [0 if isinstance(e.op, (Feed, Pack)) else resident(v.type) for v in e.outs]


_SCRATCH = {"_safe_softmax": 1.5}


def workspace(e: Eqn) -> int:
    """Bytes that an operator allocates and frees inside, beyond its results (measured with torch 2.13 on a CPU)."""
    if not isinstance(e.op, torch._ops.OpOverload):
        return 0
    name = e.op._schema.name.split("::")[1]
    if name in _CONVOLUTIONS:
        return _convolution(e, _CONVOLUTIONS[name])
    factor = _SCRATCH.get(name)
    return int(factor * nbytes(e.outs[0].type)) if factor else 0


_CONVOLUTIONS = {"convolution": 1, "convolution_backward": 2}


def _convolution(e: Eqn, times: int) -> int:
    """Scratch of a convolution on a CPU: copies in another layout; in float64, the columns of the whole batch."""
    given = [v.type for v in e.args[:3] if isinstance(v, Var) and isinstance(v.type, TensorType)]
    made = [v.type for v in e.outs if isinstance(v.type, TensorType)]
    if not given or not made or given[0].device.type != "cpu":
        return 0
    if given[0].dtype != torch.float64:
        return times * max(nbytes(t) for t in (*given, *made))
    out, weight = (made[0], given[1]) if times == 1 else (given[0], given[2])
    return out.numel * weight.numel * out.dtype.itemsize // max(weight.shape[0], 1) ** 2


def roots_of(region: Region) -> dict[Var, Var]:
    """The value that owns the storage of each value."""
    owner: dict[Var, Var] = {}
    for e in region.eqns:
        for k, v in enumerate(e.outs):
            shared = shared_with(e, k)
            owner[v] = v if shared is None else owner.get(shared, shared)
    return owner
