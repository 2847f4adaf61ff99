"""Faults planted in the compiler, and how many generated programs see each: what the oracles are worth.

A fault is a context manager that replaces one function of mlc for its duration.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from mlc.passes.rules import recorded
from tests.fuzz import known
from tests.fuzz.generate import spec_of
from tests.fuzz.judge import judged

Plant = Callable[[], contextlib.AbstractContextManager[None]]
FAULTS: dict[str, Plant] = {}


def fault(plant: Callable[[], Iterator[None]]) -> None:
    """Register a fault under the name of the function that plants it."""
    FAULTS[plant.__name__] = contextlib.contextmanager(plant)  # type: ignore[arg-type]


@contextlib.contextmanager
def instead(where: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """Replace `module:name` (or `module:Class.name`) by `change(what is there)`; cached rules are forgotten."""
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    with mock.patch.object(owner, name, change(getattr(owner, name))):
        yield


def other_operator(operator: str, was: str, becomes: str) -> Callable[[Any], Any]:
    """In the rules of an operator, one operator stands for another of the same signature."""
    old, new = (getattr(torch.ops.aten, n.split(".")[0]) for n in (was, becomes))
    old, new = getattr(old, was.split(".")[1]), getattr(new, becomes.split(".")[1])

    def change(rule_of: Any) -> Any:
        def faulty(e: Any, *rest: Any) -> Any:
            rule = rule_of(e, *rest)
            if operator not in str(e.op):
                return rule
            eqns = tuple(replace(x, op=new) if x.op == old else x for x in rule.region.eqns)
            return replace(rule, region=replace(rule.region, eqns=eqns))

        return faulty

    return change


@fault
def tanh_as_sigmoid() -> Iterator[None]:
    change = other_operator("aten.tanh.", "tanh_backward.default", "sigmoid_backward.default")
    with instead("mlc.passes.autodiff.reverse:reverse_rule", change):
        yield


@fault
def mean_as_product() -> Iterator[None]:
    """The reverse rule of a mean multiplies by the number of elements."""
    with instead("mlc.passes.autodiff.reverse:reverse_rule", other_operator("aten.mean.", "div.Scalar", "mul.Scalar")):
        yield


@fault
def forward_sign() -> Iterator[None]:
    """A sign in every forward rule that subtracts."""
    with instead("mlc.passes.autodiff.forward:forward_rule", other_operator("aten.", "sub.Tensor", "add.Tensor")):
        yield


@fault
def square_root_twice() -> Iterator[None]:
    """The derivative of the square root in Adam without its half."""

    def change(rule: Any) -> Any:
        def faulty(b: Any, e: Any, ct: Any) -> Any:
            return b.add(rule(b, e, ct), rule(b, e, ct))

        return faulty

    with instead("mlc.passes.autodiff.reverse:_safe_sqrt", change):
        yield


@fault
def sum_forgets() -> Iterator[None]:
    """Of two cotangents of a value only the later one counts."""
    with instead("mlc.passes.autodiff.reverse:sum_of", lambda add: lambda b, v, before, ct: ct):
        yield


@fault
def stops_ignored() -> Iterator[None]:
    """A `detach` that lets the outer derivative pass."""
    with instead("mlc.passes.autodiff.adjoint:Tape.outer_cut", lambda cut: lambda self: frozenset()):
        yield


@fault
def state_not_left() -> Iterator[None]:
    """The optimizer's state is not brought to where the loop leaves it."""

    def change(commit: Any) -> Any:
        return lambda effects, *rest: commit([e for e in effects if e.kind not in ("state", "group")], *rest)

    with instead("mlc.compiled.call:commit", change):
        yield


@fault
def buffers_not_left() -> Iterator[None]:
    """The last tensor of the user's that is written in place keeps its old value."""

    def change(commit: Any) -> Any:
        def faulty(effects: Any, *rest: Any) -> Any:
            copies = [e for e in effects if e.kind == "copy"]
            return commit([e for e in effects if e is not (copies or [None])[-1]], *rest)

        return faulty

    with instead("mlc.compiled.call:commit", change):
        yield


@fault
def data_baked_in() -> Iterator[None]:
    """The first item of an iterable comes again and again."""

    def change(draw: Any) -> Any:
        kept: dict[Any, Any] = {}

        def faulty(self: Any, op: Any, *rest: Any) -> Any:
            found = draw(self, op, *rest)
            return kept.setdefault((id(self), op.source), found)

        return faulty

    with instead("mlc.runtime.interpreter.feeds:Drawer.next", change):
        yield


@fault
def draws_not_replayed() -> Iterator[None]:
    """What is recomputed draws other random numbers than the first time."""
    with instead("mlc.runtime.interpreter.feeds:_restore", lambda restore: lambda g, state: None):
        yield


@fault
def literals_merged() -> Iterator[None]:
    """Value numbering that does not look at literals: `add(alpha=0.1)` is `add(alpha=0.2)`."""

    def blank(a: Any) -> Any:
        if type(a) in (int, float):
            return "number"
        return type(a)([blank(x) for x in a]) if type(a) in (list, tuple) else a

    def change(key: Any) -> Any:
        def faulty(e: Any, name: Any) -> Any:
            return key(e.with_(args=blank(e.args), kwargs=tuple((k, blank(v)) for k, v in e.kwargs)), name)

        return faulty

    with instead("mlc.passes.remat.numbering:equation_key", change):
        yield


@fault
def guards_hold() -> Iterator[None]:
    """A trace is used again whatever has changed."""
    with instead("mlc.compiled.compiled:fits", lambda fits: lambda entry, roots: True):
        yield


def score(number: int, limit: int = 2000) -> dict[str, Any]:
    """For each fault, how many of `number` programs that are right today see it."""
    right = []
    listed = known.listed()
    for seed in range(limit):
        if len(right) < number and seed not in listed and judged(spec_of(seed)).kind == "ok":
            right.append(seed)
    found: dict[str, Any] = {}
    for name, plant in FAULTS.items():
        forget()
        try:
            with plant():
                seen = [seed for seed in right if judged(spec_of(seed)).kind not in ("ok", "vague")]
            found[name] = {"seen": len(seen), "of": len(right), "by": seen[:5]}
        finally:
            forget()
    caught = sum(bool(f["seen"]) for f in found.values())
    return {"caught": caught, "faults": len(found), "programs": len(right), "each": found}


def forget() -> None:
    """Drop the rules that were recorded so far: a fault may sit in them."""
    recorded._CACHE.clear()
