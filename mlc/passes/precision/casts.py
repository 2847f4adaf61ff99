"""What differentiation needs of a policy: each region that it comes upon, in the dtypes of its gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mlc.errors import PlanError
from mlc.ir.core import Eqn, Grad, Region, Var
from mlc.ir.lowered.precision import Resolved
from mlc.ir.program import Level, Program
from mlc.ir.types import TensorType
from mlc.passes.precision.compute import Casting, cast, losses_of, slice_of
from mlc.passes.precision.ops import Role, role_of
from mlc.passes.precision.policy import dtype_of
from mlc.passes.precision.update import widen_updates

__all__ = ["Casts", "Twins", "casts_of", "narrow_products"]

Twins = dict[Eqn, tuple[Var, ...]]


@dataclass(frozen=True)
class Casts:
    """Castings of a program's gradients.

    Attributes:
        losses: dtype of the loss of each gradient (absent: exact), for its value.
        products: The same for its second-order product.
        updates: dtype of the update that each gradient enters.
        outer: dtype of what the outermost level computes.
    """

    losses: dict[Eqn, torch.dtype] = field(default_factory=dict)
    products: dict[Eqn, torch.dtype] = field(default_factory=dict)
    updates: dict[Eqn, torch.dtype] = field(default_factory=dict)
    outer: torch.dtype | None = None

    def values(self, region: Region) -> Region:
        """The region with gradients as they are computed for their values."""
        found, _ = cast(region, _castings(region, self.losses))
        return widen_updates(found, self.updates)

    def product(self, region: Region) -> Region:
        """The region with gradients as their products compute them."""
        found, _ = cast(region, _castings(region, self.products))
        return widen_updates(found, self.updates)

    def whole(self, region: Region, n_outputs: int) -> tuple[Region, Twins]:
        """A program's own region; gradients whose product has another dtype than their value have two losses.

        Args:
            region: Of the program.
            n_outputs: How many of its outputs are results of the outermost level.
        """
        outer = Casting(tuple(v for v in region.outputs[:n_outputs] if v.type.is_float), frozenset(), self.outer)
        twins = [
            (e, self.products.get(e)) for e in region.eqns
            if isinstance(e.op, Grad) and self.products.get(e) != self.losses.get(e)
        ]  # fmt: skip
        found, losses = cast(region, [*_castings(region, self.losses), outer], twins)
        return widen_updates(found, self.updates), losses


def narrow_products(program: Program, level: Level, casts: Casts | None) -> tuple[int, int]:
    """How many matrix products and convolutions of a level's losses are narrow, and how many there are."""
    outermost = not level.at
    if outermost:
        made = {v: e for e in program.region.eqns for v in e.outs}
        outer = Casting(tuple(program.region.outputs[: program.n_outputs]), frozenset(), None)
        slices = [(program.region, slice_of(made, outer))]
    else:
        slices = []
        for region, e in _grads(program, level):
            made = {v: x for x in region.eqns for v in x.outs}
            slices.append((region, slice_of(made, losses_of(e, None))))
    total = narrow = 0
    for region, chosen in slices:
        found = region
        if casts is not None and region is program.region:
            found, _ = casts.whole(region, program.n_outputs)
        elif casts is not None:
            found = casts.values(region)
        wide = set(found.eqns)
        heavy = [x for x in chosen if role_of(x.op) is Role.NARROW]
        total += len(heavy)
        narrow += sum(x not in wide for x in heavy)
    return narrow, total


def _grads(program: Program, level: Level) -> list[tuple[Region, Eqn]]:
    """The gradients of a level that are equations of their own, with the regions that they stand in."""
    return [(region, e) for region, e in program.places(level) if isinstance(e.op, Grad)]


def _castings(region: Region, dtypes: dict[Eqn, torch.dtype]) -> list[Casting]:
    return [losses_of(e, dtypes.get(e)) for e in region.eqns if isinstance(e.op, Grad)]


def casts_of(program: Program, policy: Resolved) -> Casts | None:
    """The castings that a policy means for a program; None where it rewrites no computation.

    Raises:
        PlanError: where a level that it names trains values of another type than float32.
    """
    if not (policy.compute or policy.product or policy.update):
        return None
    losses: dict[Eqn, torch.dtype] = {}
    products: dict[Eqn, torch.dtype] = {}
    updates: dict[Eqn, torch.dtype] = {}
    for level in program.levels:
        pairs = ((losses, policy.compute), (products, policy.product), (updates, policy.update))
        asked = [(into, d) for into, named in pairs if (d := dtype_of(named.get(level.name))) is not None]
        for _, e in _grads(program, level) if asked else ():
            _check(level, e)
            for into, dtype in asked:
                into[e] = dtype
    outer = program.levels[0].name if program.levels else "L0"
    return Casts(losses, products, updates, dtype_of(policy.compute.get(outer)))


def _check(level: Level, e: Eqn) -> None:
    op = e.op
    assert isinstance(op, Grad)
    for v in e.args[op.n_loss : op.n_loss + op.n_wrt]:
        t = v.type
        if isinstance(t, TensorType) and t.is_float and t.dtype != torch.float32:
            raise PlanError(
                f"precision names {level.name}, which trains {str(t.dtype).removeprefix('torch.')} values: a policy is "
                "over float32 master values",
                loc=e.loc or level.loc,
                advice=f"leave {level.name} out, or make its parameters float32 (model.float())",
            )  # fmt: skip
