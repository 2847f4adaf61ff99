"""Which values a loss depends on differentiably, as the recording grows.

Every gradient that a loop takes asks this, and with differentiable copies the answer reaches back to the first
iteration.  Each value therefore keeps, as bits, the leaf values that it depends on; a query reads them, and only the
equations recorded since the last one are visited.  Linear in the recording over all queries together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlc.ir.builder import Builder
from mlc.ir.core import Alias, Eqn, Stop, Var
from mlc.ir.origin import Origin

__all__ = ["Reach"]


class Reach:
    """Dependence of values on leaf values, for gradients taken in one number of declared levels.

    Args:
        builder: The recording; equations are added to it (for what is changed see :meth:`rewind`).
        bits: One bit for each leaf value, given before it is first read or not at all.
        depth: Stops of this level or a smaller one hold (and those without a level).
        through: Whether stops of this level let everything pass, too: what a gradient that is told to would see.
        own: Whether leaves have no history, as in PyTorch's own graph.
    """

    def __init__(
        self, builder: Builder, bits: Mapping[Var, int], depth: int, through: bool = False, own: bool = False
    ) -> None:
        self.builder = builder
        self._bits = bits
        self._depth = depth
        self._through = through
        self._own = own
        self._found: dict[Var, int] = {}
        self._beyond: dict[Var, int] = {}
        self._seen = 0

    def among(self, losses: Sequence[Var], targets: Sequence[Var]) -> set[Var]:
        """Those of ``targets`` that a loss depends on (a loss on itself included)."""
        self._advance()
        reached = 0
        for v in losses:
            reached |= self._of(v)
        out: set[Var] = set()
        odd: set[Var] = set()
        for v in dict.fromkeys(targets):
            bit = self._bits.get(v, 0)
            if not bit or not self._found.get(v, bit) & bit:  # no leaf, or one that was read before it became one
                odd.add(v)
            elif reached & bit:
                out.add(v)
        return out | self._walk(losses, odd) if odd else out

    def bits(self, losses: Sequence[Var]) -> int:
        """Leaf values that any of the losses depends on."""
        self._advance()
        reached = 0
        for v in losses:
            reached |= self._of(v)
        return reached

    def beyond(self, losses: Sequence[Var]) -> int:
        """Leaf values that a loss depends on by a way that PyTorch's own graph does not have."""
        self._advance()
        reached = 0
        for v in losses:
            reached |= self._beyond.get(v, 0)
        return reached

    def rewind(self, where: int) -> None:
        """The recording was changed from this equation on."""
        self._seen = min(self._seen, where)

    def _advance(self) -> None:
        eqns = self.builder.eqns
        for i in range(self._seen, len(eqns)):
            e = eqns[i]
            bits = more = 0
            if self._passes(e):
                for v in e.inputs:
                    if v.type.is_float:
                        found, own = self._of(v), self._bits.get(v, 0)
                        bits |= found
                        more |= self._beyond.get(v, 0) | (found & ~own if own else 0)  # a leaf has no history there
                if (isinstance(e.op, Alias) and e.origin is Origin.CLONE) or isinstance(e.op, Stop):
                    more |= bits
            for o in e.outs:
                self._found[o] = (bits | self._bits.get(o, 0)) if o.mask else 0
                self._beyond.pop(o, None)
                if more and o.mask:
                    self._beyond[o] = more
        self._seen = len(eqns)

    def _of(self, v: Var) -> int:
        if self._own and self._bits.get(v):
            return self._bits[v]
        found = self._found.get(v)
        if found is None:
            found = self._found[v] = self._bits.get(v, 0)
        return found

    def _passes(self, e: Eqn) -> bool:
        if isinstance(e.op, Stop):
            through = self._through and e.origin is not Origin.HOOK  # there is always a way beside the stop of a hook
            return e.op.level is not None and e.op.level > self._depth - through
        return not e.impure

    def _walk(self, losses: Sequence[Var], targets: set[Var]) -> set[Var]:
        """The same question for values without a bit of their own: back to the oldest of them."""
        position, producer = self.builder.position, self.builder.producer
        oldest = min(position.get(v, -1) for v in targets)
        seen: set[Var] = set()
        todo = list(losses)
        while todo:
            v = todo.pop()
            if v in seen or not v.mask or position.get(v, -1) < oldest:
                continue
            seen.add(v)
            e = producer(v)
            if e is not None and self._passes(e):
                todo.extend(x for x in e.inputs if x.type.is_float)
        return seen & targets
