"""Programs whose inner steps and products run in micro-batches, compared with the same ones in one piece."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import mlc
from mlc.ir.core import Eqn, Loop, Region
from mlc.ir.lowered.contract import Context, Refused
from mlc.ir.lowered.stages import Stages
from mlc.ir.verify import verify
from mlc.passes.microbatch.phases import in_phases
from mlc.passes.microbatch.split import TAG
from mlc.passes.planning import search


def loops(region: Region) -> list[Eqn]:
    """Equations of user's loops, sweeps and adjoints."""
    return [e for e in region.eqns if (isinstance(e.op, Loop) and e.op.title == "train") or e.tag == "adjoint"]


def is_split(region: Region) -> bool:
    return any(e.tag == TAG and isinstance(e.op, Loop) for e in region.eqns)


def split_bodies(region: Region, k: int, found: list[Region | Refused]) -> Region:
    """The bodies of the region's loops in ``k`` micro-batches; what came of each goes into ``found``."""
    chosen = set(loops(region))
    eqns = []
    for e in region.eqns:
        if e in chosen:
            refused: list[Refused] = []
            new = in_phases(e.op.body, k, refused.append)
            found.append(refused[0] if refused else new)
            if not refused:
                e = e.with_(op=replace(e.op, body=verify(new)))
        eqns.append(e)
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


@contextmanager
def in_parts(k: int) -> Iterator[list[Region | Refused]]:
    """Plans made here split what they can; the results of each attempt are collected."""
    found: list[Region | Refused] = []
    whole = search.lowered

    def lower(joint: Any, context: Context, passes: Any) -> Stages:
        nothing_kept = replace(context.levers, price=1e-3, rounds=0)  # whole steps are split
        s = whole(joint, replace(context, levers=nothing_kept), passes)
        backward = s.backward if s.backward is None else split_bodies(s.backward, k, found)
        return replace(s, forward=split_bodies(s.forward, k, found), backward=backward)

    with patch.object(search, "lowered", lower):
        yield found


def hypergradients(fn: Callable[..., Any], args: tuple[Any, ...], metas: list[Tensor]) -> list[Tensor]:
    """The value and its gradients, on a compilation of its own."""
    value = mlc.compile(fn, flows="mixed")(*args)
    return [value.detach(), *torch.autograd.grad(value, metas)]


def both(make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...], list[Tensor]]], k: int
         ) -> tuple[list[Tensor], list[Tensor], list[Region | Refused]]:  # fmt: skip
    """Value and hypergradients in one piece, the same in parts, and what was split."""
    one = hypergradients(*make())
    with in_parts(k) as found:
        parts = hypergradients(*make())
    return one, parts, found


def error(one: list[Tensor], two: list[Tensor]) -> float:
    """Largest relative difference, tensor by tensor."""
    return max(((a - b).norm() / (a.norm() + 1e-300)).item() for a, b in zip(one, two, strict=True))
