"""Policies: what ``precision=`` may be, and what it means for one program.

A policy is written over float32 master values.  :class:`Precision` says in which dtype losses and products are
computed, in which dtype what a step saves for its adjoint is stored, and in which dtype updates compute; a mapping says
it for single levels and flows.  :func:`resolve` turns it into a :class:`Resolved`, plain data that a plan holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mlc.errors import PlanError
from mlc.ir.lowered.precision import Resolved
from mlc.ir.program import Program

__all__ = ["KINDS", "Precision", "Resolved", "check_precision", "dtype_of", "resolve"]

KINDS = ("states", "gradients", "residuals")
_NAMES = {
    "bf16": "bfloat16", "fp32": "float32", "f32": "float32", "fp64": "float64", "f64": "float64", "fp16": "float16",
    "half": "float16", "float": "float32", "double": "float64",
}  # fmt: skip
_COMPUTE, _STORE, _UPDATE = ("bf16", "float32"), ("bf16", "int8", "float32"), ("float32", "float64")
_FORM = 'write precision="bf16", "tf32", mlc.Precision(...), or a dict of these by level ("L1") and flow ("L1 -> L0")'
_SCALING = "float16 loses second derivatives below 6e-8 without a scaling of their own, which mlc does not do"


@dataclass(frozen=True)
class Precision:
    """In which dtypes a program computes and keeps what it computes.  ``None`` leaves a part exact (float32).

    Everything is over float32 master values: parameters, optimizer state and hypergradients stay float32.  dtypes are
    given as ``torch.bfloat16`` or by name (``"bf16"``, ``"bfloat16"``).

    Attributes:
        compute: Of matrix products, convolutions and what follows them in losses, their gradients and their mixed
            second-order products: ``"bf16"`` or ``"float32"``; ``"tf32"`` (for the whole program only): products in
            TensorFloat-32 on CUDA.  Norms, reductions and losses compute in float32.
        store: Of what a step saves for the sweep back: ``"bf16"``, ``"int8"`` (residuals only, with a float32 scale per
            row) or ``"float32"``; or a dict of these for ``"states"`` (parameters and optimizer state at every step),
            ``"gradients"`` (inner gradients) and ``"residuals"`` (values of a step that its adjoint reads).
        update: Of the arithmetic of optimizer steps: ``"float32"`` or ``"float64"``; their results are float32.

    Raises:
        PlanError: for a dtype that is none of these.
    """

    compute: Any = None
    store: Any = None
    update: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute", _named(self.compute, (*_COMPUTE, "tf32"), "compute"))
        object.__setattr__(self, "update", _named(self.update, _UPDATE, "update"))
        store = self.store
        if isinstance(store, Mapping):
            store = {k: _named(_kind(k, v), _STORE, f"store[{k!r}]") for k, v in store.items()}
        else:
            store = _named(store, _STORE, "store")
        object.__setattr__(self, "store", store)

    def __hash__(self) -> int:
        return hash((self.compute, self.update, str(self.store)))

    @property
    def stored(self) -> dict[str, str]:
        """The dtype of each kind of saved value, where one is given."""
        if isinstance(self.store, Mapping):
            return {k: v for k, v in self.store.items() if v is not None}
        if self.store is None:
            return {}
        return {"residuals": "int8"} if self.store == "int8" else dict.fromkeys(KINDS, self.store)


def _kind(kind: Any, dtype: Any) -> Any:
    if kind not in KINDS:
        raise PlanError(f"precision: store names {kind!r}", advice="there are " + ", ".join(KINDS))
    if kind != "residuals" and _name(dtype) == "int8":
        raise PlanError(
            f'precision: store={{{kind!r}: "int8"}}: small elements of a row become zero, and Adam divides by them',
            advice=f'use "bf16" for {kind}, "int8" for residuals',
        )
    return dtype


def _name(dtype: Any) -> Any:
    """How a dtype is called here."""
    text = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else dtype
    text = _NAMES.get(text, text) if isinstance(text, str) else text
    return "bf16" if text == "bfloat16" else text


def _named(dtype: Any, allowed: tuple[str, ...], what: str) -> str | None:
    if dtype is None:
        return None
    name = _name(dtype)
    if name == "float16":
        raise PlanError(f"precision: {what}={dtype!r}: {_SCALING}", advice='use "bf16": it has the range of float32')
    if name not in allowed:
        raise PlanError(f"precision: {what}={dtype!r}", advice="use " + ", ".join(f'"{a}"' for a in allowed))
    assert isinstance(name, str)
    return name


def dtype_of(name: str | None) -> torch.dtype | None:
    """The torch dtype of a name; None for None and for float32, which is what is there."""
    return {"bf16": torch.bfloat16, "int8": torch.int8, "float64": torch.float64}.get(name or "")


def check_precision(precision: Any) -> None:
    """Refuse what is no policy.

    Raises:
        PlanError: naming what is wrong.
    """
    if precision is None:
        return
    if isinstance(precision, Mapping):
        for name, p in precision.items():
            if _precision(p).compute == "tf32":
                raise PlanError(
                    f"precision[{name!r}]: tf32 is a setting of the device, for all that runs",
                    advice='write precision="tf32" for the whole program',
                )
        return
    _precision(precision)


def _precision(given: Any) -> Precision:
    if isinstance(given, Precision):
        return given
    if isinstance(given, (str, torch.dtype)):
        return Precision(compute=given)
    raise PlanError(f"precision={given!r}", advice=_FORM)


@dataclass
class _Sides:
    """A policy on its way: for each level and flow that may be named, what was asked for it."""

    levels: dict[str, Precision] = field(default_factory=dict)
    flows: dict[str, Precision] = field(default_factory=dict)


def resolve(program: Program, precision: Any) -> Resolved:
    """What a policy means for a program.

    Args:
        program: The program.
        precision: A name, a :class:`Precision`, or a mapping from levels (``"L1"``: its loss, and its product where the
            flow is not named) and flows (``"L1 -> L0"``: its product and what is saved for it) to these.

    Raises:
        PlanError: for a level or flow that is not there, listing those that are.
    """
    check_precision(precision)
    if precision is None or isinstance(precision, Resolved):
        return precision or Resolved()
    names = [x.name for x in program.levels] or ["L0"]
    responses = {f"{f.source} -> {f.target}": f.source for f in program.flows if f.kind == "response"}
    sides = _Sides()
    if isinstance(precision, Mapping):
        for name, p in precision.items():
            _place(sides, name, _precision(p), names, responses)
    else:
        p = _precision(precision)
        sides.levels = dict.fromkeys(names, p)
    return _resolved(sides, names[0], precision)


def _place(sides: _Sides, name: Any, p: Precision, names: list[str], responses: dict[str, str]) -> None:
    if name in names:
        sides.levels[name] = p
    elif name in responses and p.update is None:
        at = responses[name]
        if sides.flows.setdefault(at, p) != p:
            raise PlanError(
                f"precision: two flows from {at} ask for different things",
                advice=f"its product is computed once: name {at}'s flows alike",
            )
    elif name in responses:
        raise PlanError(f"precision[{name!r}]: a flow has no update", advice=f"give update= for {responses[name]!r}")
    else:
        raise PlanError(
            f"precision names {name!r}, which is no level and no flow from what a level trained",
            advice="there are " + ", ".join([*names, *responses]),
        )


def _resolved(sides: _Sides, outermost: str, given: Any) -> Resolved:
    found: dict[str, dict[str, Any]] = {"compute": {}, "product": {}, "store": {}, "update": {}}
    matmul = ""
    for name in dict.fromkeys((*sides.levels, *sides.flows)):
        level, flow = sides.levels.get(name), sides.flows.get(name)
        loss = None if level is None else level.compute
        if loss == "tf32":
            matmul, loss = "tf32", None
        if loss == "bf16":
            found["compute"][name] = loss
        second = loss if flow is None or flow.compute is None else flow.compute
        if second == "bf16" and name != outermost:
            found["product"][name] = second
        stored = {**(level.stored if level is not None else {}), **(flow.stored if flow is not None else {})}
        stored = {k: v for k, v in stored.items() if v != "float32"}
        if stored and name != outermost:
            found["store"][name] = stored
        if level is not None and level.update == "float64" and name != outermost:
            found["update"][name] = level.update
    return Resolved.model_validate({**found, "matmul": matmul})
