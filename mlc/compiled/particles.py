"""Particles of an unroll from call to call: kept by the compiled function, found again at the user's objects.

After a call every state that the particles have values of their own for stands in some object of the user's (what the
call wrote or made); the next call reads these objects again, under whatever structure it is recorded by then (an
optimizer has state only from the first step on).  So particles are kept by object, with the value that the call left
there: where another value is found, the user has changed it from outside, and a new unroll begins.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mlc.compiled.commit import owner_of
from mlc.errors import MlcWarning, PlanError
from mlc.ir.core import Region
from mlc.ir.opaque.estimates import Recall
from mlc.ir.program import Program
from mlc.runtime.interpreter.particles import Pairs, Window, generator
from mlc.trace.capture import Effect, Recording, Ref
from mlc.trace.python.places import Roots
from mlc.trace.python.state import Change, Fresh, New, parts
from mlc.trace.python.view import fields_of

__all__ = ["Particles", "asked", "placed"]


@dataclass
class _State:
    """A state that particles have for themselves.

    Attributes:
        holder: The user's tensor (after a checkpoint: None until it is found).
        value: What the call left in it.
        pairs: The particles'.
    """

    holder: Tensor | None
    value: Tensor
    pairs: Pairs


@dataclass
class Particles:
    """Those of one compiled function.

    Attributes:
        states: Where the particles stand.
        sums: Sums of directions: the meta-parameter, and one per pair.
        count: Windows since the unroll began; 0: none.
        generator: Where directions come from; made when first asked for, after ``torch.manual_seed``.
    """

    states: list[_State] = field(default_factory=list)
    sums: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)
    count: int = 0
    generator: torch.Generator | None = None
    _given: list[Tensor] = field(default_factory=list)  # results of the last window, and what it read
    _read: list[Tensor] = field(default_factory=list)
    _told: bool = False
    _told_of_numbers: bool = False

    def restart(self) -> None:
        """The next call begins a new unroll; directions go on where they were."""
        self.states, self.sums, self._given, self._read, self.count = [], [], [], [], 0

    def begin(self, op: Recall, program: Program, inputs: Sequence[Tensor], values: Sequence[Tensor]) -> Window:
        """A call begins.

        Args:
            op: What it asks for.
            program: It.
            inputs: The user's tensors.
            values: What stands in them as the call begins.

        Raises:
            PlanError: where a state of the particles is read that the call has no place for.
        """
        if self.generator is None:
            self.generator = generator()
        window = Window(generator=generator())
        window.generator.set_state(self.generator.get_state())
        if not self.count:
            return window
        known = {id(x.holder): x for x in self.states}
        if not any(id(inputs[i]) in known for i in op.states) and not self._copied(op, values):
            self.restart()  # other objects: another training
            return window
        why = self._changed(op, program, inputs, values, known)
        if why:
            self._say(op.level, why)
            self.restart()
            return window
        self._refuse_unplaced(op, program, inputs, known)
        window.states = {i: known[id(inputs[i])].pairs for i in op.states if id(inputs[i]) in known}
        mine = {id(t): x for t, x in self.sums}
        window.sums = {i: mine[id(inputs[i])] for i in op.metas if id(inputs[i]) in mine}
        return window

    def _copied(self, op: Recall, values: Sequence[Tensor]) -> bool:
        """Whether what a window left is found in another object now."""
        left = [x.value for x in self.states if x.value.numel() > 1]
        return any(_same(v, values[i]) and bool((v != v.reshape(-1)[0]).any()) for v in left for i in op.states)

    def _changed(self, op: Recall, program: Program, inputs: Sequence[Tensor], values: Sequence[Tensor],
                 known: Mapping[int, _State]) -> str:  # fmt: skip
        """Why the particles cannot go on; empty where they can."""
        before = {id(t) for t in self._read}
        for i in op.states:
            state, name = known.get(id(inputs[i])), program.inputs[i].name
            if state is None:
                if id(inputs[i]) not in before:
                    return f"{name} is another tensor than before"
            elif not _same(state.value, values[i]):
                return f"{name} was changed from outside"
            elif len(state.pairs.up) != op.samples:
                return "the number of samples is another one"
        metas = {id(inputs[i]) for i in op.metas}
        if any(id(t) not in metas for t, _ in self.sums):
            return "a meta-parameter that earlier windows depend on is no longer read"
        return ""

    def _refuse_unplaced(self, op: Recall, program: Program, inputs: Sequence[Tensor], known: Mapping[int, _State]
                         ) -> None:  # fmt: skip
        own = {*op.states, *op.metas}
        given = {t.untyped_storage()._cdata for t in self._given}
        for i, t in enumerate(inputs):
            if i in own:
                continue
            back = t.layout is torch.strided and t.untyped_storage()._cdata in given
            if id(t) in known or back:
                how = "a result of an earlier window is given back in" if back else "it is read, but not changed here"
                raise PlanError(
                    f"level {op.level}: Evolution(persistent=True) cannot give every particle its own "
                    f"{program.inputs[i].name}: {how}", loc=program.loc,
                    advice="keep state in a tensor that every window changes in place; restart() begins a new unroll",
                )  # fmt: skip

    def _say(self, level: str, why: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                MlcWarning(
                    f"level {level}: {why} since the last window, so a new unroll begins, now and at every such call. "
                    "Call restart() of the compiled function where one is meant to begin"
                ),
                stacklevel=5,
            )

    def end(self, window: Window, recording: Recording, roots: Roots, inputs: Sequence[Tensor], outs: Sequence[Tensor]
            ) -> int:  # fmt: skip
        """A call has succeeded, and the user's objects are as it leaves them; which window of the unroll it was."""
        self._tell_of_numbers(recording)
        where = placed(recording.effects, roots)
        self.states = [
            _State(t, t.detach().clone(), _as(t, pairs))
            for i, pairs in window.kept.items() for t in where.get(i, ())
        ]  # fmt: skip
        self.sums = [(inputs[i], x) for i, x in window.summed.items()]
        self.generator = window.generator
        self._given, self._read = [t.detach() for t in outs if t.layout is torch.strided], list(inputs)
        self.count += 1
        return self.count

    def _tell_of_numbers(self, recording: Recording) -> None:
        kept = [
            e for e in recording.effects
            if e.kind in ("attr", "item", "cell") and any(isinstance(x, Ref) and x.number for x in parts(e.value))
        ]  # fmt: skip
        if kept and not self._told_of_numbers:
            self._told_of_numbers = True
            names = ", ".join(dict.fromkeys(str(e.key) for e in kept[:3]))
            warnings.warn(
                MlcWarning(
                    f"Python numbers made of traced tensors are kept from window to window ({names}): every particle "
                    "of Evolution(persistent=True) finds the real run's. Where a later window computes with them, "
                    "the gradient is biased: keep them in tensors that are changed in place. Logs do no harm"
                ),
                stacklevel=6,
            )

    # ---- taken away and put back

    def copy(self) -> Particles:
        """As they are now (what they hold is never written to)."""
        found = Particles(list(self.states), list(self.sums), self.count, self.generator)
        found._given, found._read, found._told = list(self._given), list(self._read), self._told
        return found

    def state_dict(self, names: Mapping[int, str]) -> dict[str, Any]:
        """In tensors, numbers and text.

        Args:
            names: Of the user's tensors, by identity; the same in another process.
        """
        states = [
            {"name": names[id(x.holder)], "value": x.value, "up": list(x.pairs.up), "down": list(x.pairs.down)}
            for x in self.states if id(x.holder) in names
        ]  # fmt: skip
        sums = [{"name": names[id(t)], "sums": x} for t, x in self.sums]
        drawn = None if self.generator is None else self.generator.get_state()
        read = [names[id(t)] for t in self._read if id(t) in names]
        return {"states": states, "sums": sums, "count": self.count, "generator": drawn, "read": read}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go to a state; ``tensors``: the user's, by the names that it was saved under.

        Raises:
            PlanError: for a state of other tensors.
        """
        names = [x["name"] for x in (*state["states"], *state["sums"])]
        missing = [n for n in names if n not in tensors]
        if missing:
            raise PlanError(
                f"the particles were saved for {missing[0]}, which is not there",
                advice="load them where they were made",
            )
        self.restart()
        self.states = [_State(tensors[x["name"]], x["value"], Pairs(x["up"], x["down"])) for x in state["states"]]
        self.sums = [(tensors[x["name"]], x["sums"]) for x in state["sums"]]
        self._read = [tensors[n] for n in state["read"] if n in tensors]
        self.count = state["count"]
        if state["generator"] is not None:
            self.generator = torch.Generator()
            self.generator.set_state(state["generator"])


def asked(region: Region) -> Recall | None:
    """What a stage asks of particles; None where it has none."""
    return next((e.op for e in region.eqns if isinstance(e.op, Recall)), None)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two values are the same, bit for bit but for the sign of zero."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b) or ((a == b) | ((a != a) & (b != b))).all())


def _as(t: Tensor, pairs: Pairs) -> Pairs:
    """In the type of the tensor that they are other values of."""
    return Pairs(*[[x.to(t.dtype).reshape(t.shape) for x in side] for side in (pairs.up, pairs.down)])


# ---- where results are, once a call is over


def placed(effects: Sequence[Effect | Change], roots: Roots) -> dict[int, list[Tensor]]:
    """The user's tensors that hold each result of the program, after the call."""
    out: dict[int, list[Tensor]] = {}
    for e in effects:
        found = _now(e, roots)
        for i, t in _match(e.value, found, set()):
            out.setdefault(i, []).append(t)
    return {i: list({id(t): t for t in ts}.values()) for i, ts in out.items()}


def _now(e: Effect | Change, roots: Roots) -> Any:
    """What stands now where an effect has put its value."""
    target = owner_of(e.owner, e.path, roots)
    if e.kind == "copy":
        return target
    if e.kind in ("grad", "data"):
        return getattr(target, e.kind)
    if e.kind == "attr":
        return fields_of(target).get(e.key)
    if e.kind == "buffers":
        return target._buffers.get(e.key)
    if e.kind == "group":
        return target.param_groups[e.key[0]].get(e.key[1])
    if e.kind == "state":
        p = roots.at.get(e.key_path, e.key[0]) if e.key_path is not None else e.key[0]
        return target.state.get(p, {}).get(e.key[1]) if isinstance(p, Tensor) else None
    if e.kind == "item":
        return _item(target, e.key)
    if e.kind == "append" and isinstance(e.value, (list, tuple)) and isinstance(target, (list, tuple)):
        return list(target)[len(target) - len(e.value) :]
    return target if e.kind == "content" else None


def _item(target: Any, key: Any) -> Any:
    try:
        return target[key]
    except (KeyError, IndexError, TypeError):
        return None


def _match(tree: Any, found: Any, seen: set[int]) -> Iterator[tuple[int, Tensor]]:
    """Results in a tree, each with the tensor at its place in what was built from it."""
    if isinstance(tree, Ref):
        if not tree.number and isinstance(found, Tensor):
            yield tree.index, found
        return
    if found is None or id(tree) in seen:
        return
    if isinstance(tree, (Fresh, New)):
        seen.add(id(tree))
    if isinstance(tree, Fresh):
        if tree.view is None and isinstance(found, Tensor):
            yield from _match(tree.value, found, seen)
            yield from _match(tree.grad, found.grad, seen)
    elif isinstance(tree, New):
        if isinstance(found, dict):
            yield from _match({k: v for k, v in tree.body or () if isinstance(k, (str, int))}, found, seen)
        else:
            yield from _match(list(tree.body or ()), found, seen)
        yield from _match(dict(tree.attrs), fields_of(found), seen)
    elif isinstance(tree, dict) and isinstance(found, dict):
        for k, v in tree.items():
            yield from _match(v, found.get(k) if isinstance(k, (str, int)) else None, seen)
    elif isinstance(tree, (list, tuple)) and isinstance(found, (list, tuple)) and len(tree) == len(found):
        for a, b in zip(tree, found, strict=True):
            yield from _match(a, b, seen)
