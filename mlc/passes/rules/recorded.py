"""Derivative rules of single operators, recorded from PyTorch's own formulas.

For an equation the reverse rule is a region ``(inputs, results, cotangents) -> cotangents of inputs`` and the
forward rule a region ``(inputs, results, tangents) -> tangents of results``.  Each is recorded once per signature
(operator, literal arguments, types, which inputs are active) on fake tensors, so that differentiating a graph of
thousands of equations only stitches a few dozen regions together.  Rules consist of ATen operators again, hence
rules of rules exist: derivatives of any order.

Where PyTorch's formula is missing or known to be wrong (:mod:`mlc.passes.rules.legality`), the reverse rule comes from
the operator's decomposition, and the forward rule from transposing the reverse rule, which is linear in the cotangent
(the "double-backward trick"): J v = d/du <J^T u, v>.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from mlc.errors import MlcError
from mlc.ir.core import Eqn, Region, Var
from mlc.ir.keys import equation_key
from mlc.ir.trees import flatten
from mlc.ir.types import TensorType, Type
from mlc.passes.rules import collectives as _collectives  # noqa: F401 (registers the formulas of collectives)
from mlc.passes.rules import legality
from mlc.passes.rules.decompositions import own_decomposition
from mlc.record.recorder import Handle, Recorder, Storage

__all__ = ["NoRule", "Rule", "differentiable_outs", "forward_rule", "reverse_rule", "signature"]


class NoRule(Exception):
    """An operator has no usable rule of the kind asked for."""


@dataclass(frozen=True)
class Rule:
    """A recorded rule; ``present[i]`` tells whether result i exists (False stands for a zero derivative)."""

    region: Region
    present: tuple[bool, ...]


_CACHE: dict[Any, Rule | NoRule] = {}
_MODE: FakeTensorMode | None = None


def fake_mode() -> FakeTensorMode:
    """The mode of fake tensors that all rules are recorded under."""
    global _MODE
    if _MODE is None:
        _MODE = FakeTensorMode(allow_non_fake_inputs=False)
    return _MODE


def signature(e: Eqn) -> Any:
    """What a rule of an equation depends on: its operator, literals and the types of its inputs."""
    return (equation_key(e, _type_of), torch.get_default_dtype())


def _type_of(v: Var) -> Type:
    return v.type


def with_values(a: Any, values: list[Tensor]) -> Any:
    """Arguments with the next of ``values`` (which are taken out of the list) in place of each variable."""
    t = type(a)
    if t is Var:
        return values.pop(0)
    if t is tuple or t is list:
        return t([with_values(x, values) for x in a])
    if t is dict:
        return {k: with_values(v, values) for k, v in a.items()}
    return a


def _cached(key: Any, make: Callable[[], Rule]) -> Rule:
    found = _CACHE.get(key)
    if found is None:
        try:
            found = make()
        except NoRule as e:
            found = e
        _CACHE[key] = found
    if isinstance(found, NoRule):
        raise NoRule(*found.args)
    return found


Given = tuple[Type | None, ...]


def reverse_rule(e: Eqn, active: tuple[bool, ...], given: Given) -> Rule:
    """Reverse rule of equation ``e``.

    Args:
        e: The equation; its op is an ATen overload.
        active: For each of ``e.inputs``, whether its cotangent is wanted.
        given: For each of ``e.outs``, the type of its cotangent (None counts as zero).

    Returns:
        A rule with inputs ``(*e.inputs, *e.outs, *cotangents given)``, one result per active input.
    """
    key = ("vjp", signature(e), active, given)

    def make() -> Rule:
        own = _own_part(e, active)
        rule = _first(e, _reverse_ways(e, own, given), lambda way: _record_reverse(e, own, given, way))
        if own == active:
            return rule
        has = iter(rule.present)
        return Rule(rule.region, tuple([next(has) if o else False for o, a in zip(own, active, strict=True) if a]))

    return _cached(key, make)


_CARRYING: dict[Any, tuple[bool, ...]] = {}


def differentiable_outs(e: Eqn) -> tuple[bool, ...]:
    """Which results of an ATen equation carry a derivative: what autograd says, and saved statistics.

    Factorisations do not: formulas that read them account for them.
    """
    key = (e.op, len(e.outs), tuple([v.type.is_float for v in e.inputs]))
    found = _CARRYING.get(key)
    if found is None:
        floats = tuple([v.type.is_float for v in e.outs])
        found = floats
        if len(e.outs) > 1:
            try:
                tape = _RuleTape(e, tuple([v.type.is_float for v in e.inputs]), ())
                with tape.rec, torch.enable_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = tuple([t.requires_grad for t in tape.call(e.op, tape.ins)])  # type: ignore[arg-type]
            except Exception:  # an operator that cannot be run so has its rules recorded otherwise
                found = floats
            if not any(found):
                found = floats
            known = legality.STATISTICS.get(e.op, ())
            found = tuple([f or i in known for i, f in enumerate(found)])
        _CARRYING[key] = found
    return found


def forward_rule(e: Eqn, active: Given, transposed: Callable[[Eqn, Given], Rule]) -> Rule:
    """Forward rule of ``e``: inputs ``(*e.inputs, *e.outs, *tangents)``, one result per out.

    Args:
        e: The equation.
        active: For each of ``e.inputs``, the type of its tangent, or None when it has none.
        transposed: The rule from transposing the reverse rule, where PyTorch has none that can be trusted.
    """
    key = ("jvp", signature(e), active)

    def make() -> Rule:
        own = own_decomposition(e, tuple([a is not None for a in active]))
        ways: list[Any] = [own] if own is not None else [e.op]
        if not legality.forward_formula_trusted(e.op, e.args, e.kwargs):
            ways = []
        try:
            return _first(e, ways, lambda way: _record_forward(e, active, way))
        except NoRule:
            return transposed(e, active)

    return _cached(key, make)


def _own_part(e: Eqn, active: tuple[bool, ...]) -> tuple[bool, ...]:
    """``active`` without the inputs whose part is in the formula for another one already."""
    names = legality.ACCOUNTED.get(e.op)
    if names is None:
        return active
    assert isinstance(e.op, OpOverload)
    skip = [a.name in names for a, x in zip(e.op._schema.arguments, e.args, strict=False) if type(x) is Var]
    return tuple([a and not s for a, s in zip(active, skip, strict=True)])


def _reverse_ways(e: Eqn, active: tuple[bool, ...], given: Given) -> list[Callable[..., Any]]:
    op = e.op
    ways: list[Callable[..., Any]] = []
    if isinstance(op, OpOverload):
        ways.append(op)
        own = own_decomposition(e, active, given)
        if own is not None:
            ways.insert(0, own)
        if op in decomposition_table and op not in legality.DECOMPOSITION_WRONG:
            ways.append(decomposition_table[op])
    return ways


def _first(e: Eqn, ways: Sequence[Callable[..., Any]], record: Callable[[Callable[..., Any]], Rule]) -> Rule:
    why: list[str] = []
    for way in ways:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return record(way)
        except (
            RuntimeError,
            NotImplementedError,
            ValueError,
            TypeError,
            AssertionError,
            KeyError,
            IndexError,
        ) as err:
            why.append(str(err).split("\n")[0])
        except NoRule as err:
            why.append(str(err))
        except MlcError as err:
            why.append(err.what)
    raise NoRule(f"{e.op}: " + ("; ".join(why) or "no formula"))


class _RuleTape:
    """Fakes for one equation's inputs, results and the (co)tangents."""

    def __init__(self, e: Eqn, active: tuple[bool, ...], extra: Sequence[Type]) -> None:
        self.rec = Recorder(merge=True, fake_mode=fake_mode())
        self.e = e
        b = self.rec.builder
        self.ins = [self._fake(b.input(v.type), a) for v, a in zip(e.inputs, active, strict=True)]
        self.outs = [b.input(v.type) for v in e.outs]
        self.extra = [self._fake(b.input(t), False) for t in extra]

    def _fake(self, v: Var, grad: bool) -> Tensor:
        assert isinstance(v.type, TensorType)
        f = self.rec.fresh(v)
        if grad:
            f.requires_grad_(True)
        self.rec.handle(f).leaf = True
        return f

    def call(self, way: Callable[..., Any], ins: Sequence[Tensor]) -> list[Tensor]:
        """Run the operator; its results stand for the equation's results."""
        args = with_values([list(self.e.args), dict(self.e.kwargs)], list(ins))
        result = [t for t in flatten(way(*args[0], **args[1])) if isinstance(t, Tensor)]
        if len(result) != len(self.outs):
            raise NoRule(f"{self.e.op}: results differ")
        for t, v in zip(result, self.outs, strict=True):
            h: Handle = self.rec.handle(t)
            if h.chain or any(t is i for i in ins):
                h.storage, h.chain = Storage(v), ()
            else:
                h.storage.var = v
        return result

    def rule(self, results: Sequence[Tensor | None], types: Sequence[Type]) -> Rule:
        """Package results as a region."""
        present = tuple(r is not None for r in results)
        outs = []
        for r, t in zip(results, types, strict=True):
            if r is None:
                continue
            v = self.rec.value(self.rec.handle(r))
            assert isinstance(t, TensorType) and isinstance(v.type, TensorType)
            if v.type.shape != t.shape:
                raise NoRule(f"{self.e.op}: derivative of another shape")
            outs.append(v)
        return Rule(self.rec.builder.region(outs), present)


def _record_reverse(e: Eqn, active: tuple[bool, ...], given: Given, way: Callable[..., Any]) -> Rule:
    tape = _RuleTape(e, active, [g for g in given if g is not None])
    wanted = [t for t, a in zip(tape.ins, active, strict=True) if a]
    with tape.rec:
        with torch.enable_grad():
            outs = [t for t, g in zip(tape.call(way, tape.ins), given, strict=True) if g is not None]
        pairs = [(t, c) for t, c in zip(outs, tape.extra, strict=True) if t.requires_grad]
        if pairs and len(pairs) < len(outs) and way is e.op:
            raise NoRule(f"{e.op}: PyTorch takes one of its results for a constant")
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            twice = e.op in legality.SECOND_ORDER_FORMULA
            ends, seeds = [t for t, _ in pairs], [c for _, c in pairs]
            grads = torch.autograd.grad(ends, wanted, seeds, allow_unused=True, create_graph=twice)
    return tape.rule(grads, [v.type for v, a in zip(e.inputs, active, strict=True) if a])


def _record_forward(e: Eqn, active: Given, way: Callable[..., Any]) -> Rule:
    tape = _RuleTape(e, tuple(False for _ in active), [a for a in active if a is not None])
    tangents = list(tape.extra)
    with tape.rec, forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(t, tangents.pop(0)) if a is not None else t
            for t, a in zip(tape.ins, active, strict=True)
        ]
        results = [forward_ad.unpack_dual(t).tangent for t in tape.call(way, duals)]
    if not any(r is not None for r in results):
        raise NoRule(f"{e.op}: no tangent")  # not to be trusted: the reverse rule decides whether it is zero
    return tape.rule(results, [v.type for v in e.outs])
