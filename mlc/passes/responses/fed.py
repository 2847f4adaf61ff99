"""The gradient that a level's update is fed: the function that is zero where the level has converged.

Found from the update backwards: the next value of a parameter is its value now plus something that depends on the
level's gradients, and what that something is made of is the gradient as the optimizer gets it - accumulated, clipped,
changed by hooks.  A weight decay that the optimizer adds to the gradient (``torch.optim.SGD(weight_decay=)``) belongs
to it; one that shrinks the parameters beside it (AdamW), a projection, or added noise moves the fixed point to where no
gradient is zero, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable

from mlc.errors import PlanError
from mlc.ir.core import Alias, Eqn, Grad, Stop, Var, aten
from mlc.ir.levels.steps import Step
from mlc.ir.origin import Origin
from mlc.ir.types import TensorType
from mlc.passes.responses.site import Site

__all__ = ["Fed"]

_SUMS = {aten("add", "Tensor"), aten("sub", "Tensor"), aten("addcdiv"), aten("addcmul")}
_KEEPS = {aten(n) for n in ("clone", "detach", "alias", "view", "_unsafe_view", "_to_copy", "lift_fresh_copy", "copy")}
_SCALES = {aten("mul", "Tensor"), aten("mul", "Scalar"), aten("div", "Tensor"), aten("div", "Scalar")}
_USE = "put the penalty into the loss (weight_decay=0), or use mlc.Unroll() or mlc.fixed_point"


class Fed:
    """Finds the gradients that the steps of one level are fed."""

    def __init__(self, site: Site, what: str) -> None:
        """``what``: the response, for messages."""
        self.site, self.what = site, what
        self.graph, self.kept = site.graph, site.origins.kept
        grads = {v: 1 for s in site.steps for v in s.site.eqn.outs}
        self._trained_by = self.graph.spread(grads, without=("back", "grad"))

    def of(self, step: Step, k: int) -> Var:
        """The gradient by the ``k``-th value that a step trains.

        Raises:
            PlanError: when the update moves it by more than that.
        """
        before, after, _, _ = step.trained[k]
        root = self.site.root(before, after)
        added = self._added(after, root, step)
        found = self._frontier(added)
        if len(found) == 1:
            v = self._decayed(found[0], root)
        elif self._is_update(added[0]):
            raise self._refused(step.site.eqn, "the update of its optimizer is fed by several gradients")
        else:
            v = added[0]
        return self._unscaled(v)

    def _added(self, after: Var, root: Var, step: Step) -> list[Var]:
        """What is added to a parameter between its values now and next."""
        out: list[Var] = []
        v = after
        while self.kept(v) is not root:
            e = self.graph.producer.get(v)
            if e is not None and (isinstance(e.op, (Stop, Alias)) or e.op in _KEEPS):
                v = e.args[0]
            elif e is not None and e.op in _SUMS:
                own = next((a for a in e.args if type(a) is Var and self._leads(a, root)), None)
                others = [a for a in e.args if type(a) is Var and a is not own]
                if own is None or not all(self._moved(a) for a in others[:1]):
                    raise self._refused(e, "its update moves the parameters by more than their gradient")
                out += others[:1]
                v = own
            else:
                raise self._refused(e or step.site.eqn, "its update does more than add to the parameters")
        if not out:
            raise self._refused(step.site.eqn, "its update leaves the parameters as they are")
        return out

    def _moved(self, v: Var) -> bool:
        return bool(self._trained_by.get(v, 0))

    def _leads(self, v: Var, root: Var) -> bool:
        """Whether a value is the parameter with something added."""
        while self.kept(v) is not root:
            e = self.graph.producer.get(v)
            if e is None or not (isinstance(e.op, (Stop, Alias)) or e.op in _KEEPS or e.op in _SUMS):
                return False
            if e.op in _SUMS:
                return any(type(a) is Var and self._leads(a, root) for a in e.args)
            v = e.args[0]
        return True

    def _is_update(self, v: Var) -> bool:
        e = self.graph.producer.get(v)
        return e is not None and e.origin is Origin.UPDATE

    def _frontier(self, added: list[Var]) -> list[Var]:
        """Where the update begins: gradients, or what is no longer made by the optimizer."""
        found: dict[Var, None] = {}
        seen: set[Var] = set()
        todo = [v for v in added if self._moved(v)]
        inside: Callable[[Eqn], bool] = (
            (lambda e: e.origin is Origin.UPDATE)
            if self._is_update(added[0])
            else (lambda e: not isinstance(e.op, Grad))
        )
        while todo:
            v = todo.pop()
            if v in seen:
                continue
            seen.add(v)
            e = self.graph.producer.get(v)
            if e is None or len(e.outs) > 1 or isinstance(e.op, Grad) or not inside(e):
                if _same_shape(v, added[0]):
                    found[v] = None
                continue
            todo += [x for x in e.inputs if self._moved(x)]
        return list(found)

    def _decayed(self, v: Var, root: Var) -> Var:
        """With the weight decay that an optimizer adds to it."""
        for e in self.graph.users[v]:
            if e.origin is Origin.UPDATE and e.op is aten("neg"):
                return self._decayed(e.outs[0], root)
            if e.origin is not Origin.UPDATE or e.op is not aten("add", "Tensor") or e.args[0] is not v:
                continue
            other = e.args[1]
            made = self.graph.producer.get(other) if type(other) is Var else None
            if made is not None and made.op in _SCALES:
                other = made.args[0]
            if type(other) is Var and self.kept(other) is root:
                return e.outs[0]
        return v

    def _unscaled(self, v: Var) -> Var:
        """Without factors that are one number: clipping by the norm, a loss scale."""
        while True:
            e = self.graph.producer.get(v)
            if e is None or e.op not in _SCALES or not self._moved(e.args[0]):
                return v
            s = e.args[1]
            if type(s) is Var and isinstance(s.type, TensorType) and s.type.numel != 1:
                return v
            v = e.args[0]

    def _refused(self, e: Eqn, why: str) -> PlanError:
        return PlanError(
            f"level {self.site.level.title}: {self.what} needs an update that stops where the gradient is zero, but "
            f"{why}",
            loc=e.loc or self.site.level.loc, advice=_USE,
        )  # fmt: skip


def _same_shape(a: Var, b: Var) -> bool:
    return isinstance(a.type, TensorType) and isinstance(b.type, TensorType) and a.type.shape == b.type.shape
