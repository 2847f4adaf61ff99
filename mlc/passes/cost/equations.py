"""What an equation costs: floating point operations, bytes moved, seconds on a device.

Operations come from PyTorch's own formulas where they exist (matrix products, convolutions, attention) and are one
per element elsewhere; bytes are operands read and results written (views move nothing).  Seconds are a roofline over
the :class:`~mlc.passes.cost.rates.Rates` of the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from mlc.ir.call import Call
from mlc.ir.communication.collectives import is_collective
from mlc.ir.core import Alias, Custom, Eqn, Feed, Index, Loop, Pack, Random, Region, SafeSqrt, Stop, Var, map_vars
from mlc.ir.inplace import schema_of
from mlc.ir.keys import equation_key
from mlc.ir.lowered.slots import replayed_steps
from mlc.ir.types import TensorType, Type, nbytes
from mlc.passes.cost.rates import Rates, rates

__all__ = ["Cost", "Meter", "device_of", "flops"]

_SPECIAL = {
    "exp", "log", "tanh", "erf", "gelu", "gelu_backward", "sin", "cos", "pow", "sigmoid", "_softmax", "_log_softmax",
    "softplus", "silu", "silu_backward", "expm1", "log1p", "mish", "elu",
}  # fmt: skip


# How many times an exponential's time some take per element.
_SLOW = {"gelu": 5.0, "gelu_backward": 6.0, "pow": 0.5}


@dataclass(frozen=True)
class Cost:
    """Cost of running something once.

    Attributes:
        flops: Floating point operations of matrix products and the like.
        bytes: Bytes read and written.
        seconds: Predicted wall time, seconds.
    """

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.bytes * times, self.seconds * times)


def flops(e: Eqn) -> float:
    """Floating point operations of a matrix product, convolution or attention; 0 for anything else."""
    formula = flop_registry.get(e.op.overloadpacket) if isinstance(e.op, OpOverload) else None
    if formula is None:
        return 0.0
    args = map_vars(e.args, lambda v: torch.Size(v.type.shape))
    kwargs = {k: map_vars(x, lambda v: torch.Size(v.type.shape)) for k, x in e.kwargs}
    return float(formula(*args, **kwargs, out_val=_result_shapes(e)))


def _result_shapes(e: Eqn) -> Any:
    """Shapes of the results as the operator returns them; None where its ``output_mask`` leaves one out."""
    assert isinstance(e.op, OpOverload)
    shapes = iter([torch.Size(v.type.shape) for v in e.outs if isinstance(v.type, TensorType)])
    names = [a.name for a in e.op._schema.arguments]
    mask = e.args[names.index("output_mask")] if "output_mask" in names[: len(e.args)] else None
    if mask is not None:
        return tuple(next(shapes, None) if m else None for m in mask)
    return next(shapes) if len(e.op._schema.returns) == 1 else tuple(shapes)


def device_of(region: Region) -> torch.device:
    """Where a region computes: the first accelerator among its values, else the CPU."""
    for v in (*region.inputs, *(v for e in region.walk() for v in e.outs)):
        if isinstance(v.type, TensorType) and v.type.device.type != "cpu":
            return v.type.device
    return torch.device("cpu")


_LATENCY, _LINK = 5e-5, 1e10  # of a collective: seconds, bytes per second (not measured)
_FREE, _NOTHING = (Alias, Stop, Custom, Pack, Index, Feed), Cost()


class Meter:
    """Predicts costs on one device; remembers loop bodies."""

    def __init__(self, on: Rates | torch.device) -> None:
        self.rates = on if isinstance(on, Rates) else rates(on)
        self._bodies: dict[int, tuple[Region, Cost]] = {}
        self._known: dict[Any, Cost] = {}
        self._met: dict[Eqn, Cost] = {}

    def region(self, region: Region) -> Cost:
        """Cost of running all equations once."""
        total = Cost()
        for e in region.eqns:
            total = total + self(e)
        return total

    def fusible(self, region: Region) -> tuple[float, int]:
        """Seconds spent outside of library calls, and how many different operators that is.

        What a compiler that fuses elementwise work and reductions can save at, and what it has to compile.
        """
        seen: set[object] = set()
        return self._fusible(region, seen), len(seen)

    def _fusible(self, region: Region, seen: set[object]) -> float:
        total = 0.0
        for e in region.eqns:
            if isinstance(e.op, Loop):
                total += self._fusible(e.op.body, seen) * e.op.count
            elif isinstance(e.op, OpOverload) and not flops(e) and not schema_of(e.op).view:
                seen.add((e.op, tuple(v.type for v in e.inputs), tuple(v.type for v in e.outs)))
                total += self(e).seconds
        return total

    def __call__(self, e: Eqn) -> Cost:
        """Cost of one equation; a loop counts its trips (1 where their number is open)."""
        op = e.op
        if isinstance(op, _FREE):
            return _NOTHING
        if isinstance(op, Call):
            return Cost(seconds=op.seconds)
        if isinstance(op, Loop):
            once = self._body(op.body) * op.count
            if op.replay is None:
                return once
            return once + self._body(op.replay.body) * replayed_steps(op.count, op.replay.slots)
        found = self._met.get(e)
        if found is None:
            key = (equation_key(e, _type_of), tuple([v.type for v in e.outs]))
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = self._operator(e)
            self._met[e] = found
        return found

    def _body(self, body: Region) -> Cost:
        entry = self._bodies.get(id(body))
        if entry is None:
            entry = self._bodies[id(body)] = (body, self.region(body))
        return entry[1]

    def _operator(self, e: Eqn) -> Cost:
        r = self.rates
        if isinstance(e.op, OpOverload) and schema_of(e.op).view:
            return Cost(seconds=r.start * r.strain)
        moved = float(sum(nbytes(v.type) for v in (*dict.fromkeys(e.inputs), *e.outs)))
        work = flops(e)
        size, numel = _element(e)
        seconds = max(moved / (r.near if moved <= r.cache else r.far), work / r.flops.get(size, r.flops[4]))
        if is_collective(e):
            seconds += _LATENCY + moved / _LINK
        if _name(e) in _SPECIAL or isinstance(e.op, Random):
            slow = _SLOW.get(_name(e), 1.0)
            seconds = max(seconds, slow * numel / r.special.get(size, r.special[4]))
        return Cost(work, moved, (r.start + seconds) * r.strain)


def _type_of(v: Var) -> Type:
    return v.type


def _element(e: Eqn) -> tuple[int, int]:
    types = [v.type for v in (*e.outs, *e.inputs) if isinstance(v.type, TensorType)]
    if not types:
        return 4, 0
    return types[0].dtype.itemsize, types[0].numel


def _name(e: Eqn) -> str:
    if isinstance(e.op, SafeSqrt):
        return "sqrt"
    return e.op._schema.name.split("::")[1] if isinstance(e.op, OpOverload) else ""
