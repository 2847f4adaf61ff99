"""Local rules of losses and of look-ups by index.

Losses that PyTorch reduces itself hide the size of the batch: the mean of all examples is the
mean of the means of equal parts.  The negative log-likelihood divides by the weight of all
labels, which is computed from the labels alone before the batch is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mlc.ir.builder import contiguous
from mlc.ir.core import Arg, Eqn, Op, Var, aten
from mlc.ir.types import TensorType
from mlc.passes.microbatch.dependence import PARTS, SAME, SUM, Local, Shard, Site, Size, shape_of

__all__ = ["LOSSES"]

Rule = Callable[[Site], Local | None]
_NONE, _MEAN, _SUM = 0, 1, 2


def _together(s: Site, values: Sequence[Var], rank: int) -> Shard | None:
    """Dependence of values that broadcast against one another, at the dimension counted in ``rank``."""
    c = next(((v, k) for v in values if isinstance(k := s.kind(v), Shard)), None)
    if c is None:
        return None
    v, k = c
    at, size = k.dim + rank - len(shape_of(v)), shape_of(v)[k.dim]
    for v in values:
        own = at - (rank - len(shape_of(v)))
        if own >= 0 and shape_of(v)[own] == size:
            if not s.take(v, Shard(own, k.outer)):
                return None
        elif (own >= 0 and shape_of(v)[own] != 1) or not s.fix(v):
            return None
    return Shard(at, k.outer)


def _loss(*names: str) -> Rule:
    """A loss of entries: none, mean or sum of them."""

    def rule(s: Site) -> Local | None:
        values = s.vars(*names)
        rank = max(len(shape_of(v)) for v in values)
        c = _together(s, values, rank)
        if c is None or len(values) != len(s.e.inputs):
            return None
        if s.get("reduction") == _NONE:
            return s.all(c)
        return s.all(SUM, divide=PARTS if s.get("reduction") == _MEAN else None)

    return rule


def _loss_backward(*names: str) -> Rule:
    """Its gradient: that of a mean over parts is as many times too large."""

    def rule(s: Site) -> Local | None:
        values, grad = s.vars(*names), s.get("grad_output")
        reduced = s.get("reduction") != _NONE
        rank = max(len(shape_of(v)) for v in values)
        c = _together(s, values if reduced else [grad, *values], rank)
        if c is None or (reduced and (shape_of(grad) or not s.fix(grad))):
            return None
        return s.all(c, divide=PARTS if s.get("reduction") == _MEAN else None)

    return rule


# ---- negative log-likelihood


def _nll(s: Site) -> Local | None:
    x, target, weight = s.get("self"), s.get("target"), s.vars("weight")
    c = s.shard([x, target])
    if c is None or c.dim != 0 or len(shape_of(x)) < 2 or not s.take(x, c) or not s.take(target, c):
        return None
    if not s.fix(*weight) or len(s.e.outs) != 2:
        return None
    total = s.e.outs[1]
    if s.get("reduction") == _NONE:
        return Local((c, SAME), early=(_zeros(total, s),))
    if not s.whole(target):
        return None
    mean = s.get("reduction") == _MEAN
    early = _total_weight(s, target, weight, total)
    return Local((SUM, SAME), set={"reduction": _SUM}, divide=total if mean else None, early=early)


def _zeros(v: Var, s: Site) -> Eqn:
    t = v.type
    assert isinstance(t, TensorType)
    return Eqn(aten("zeros"), (list(t.shape),), (v,), (("dtype", t.dtype), ("device", t.device)), s.e.loc, s.e.tag)


def _total_weight(s: Site, target: Var, weight: Sequence[Var], total: Var) -> tuple[Eqn, ...]:
    """Sum over the labels that count of the weight of their class."""
    t, out = target.type, total.type
    assert isinstance(t, TensorType) and isinstance(out, TensorType)
    made: list[Eqn] = []

    def emit(op: Op, args: tuple[Arg, ...], dtype: torch.dtype) -> Var:
        v = Var(TensorType(dtype, t.shape, contiguous(t.shape), t.device))
        made.append(Eqn(op, args, (v,), (), s.e.loc, s.e.tag))
        return v

    counts = emit(aten("ne", "Scalar"), (target, s.get("ignore_index")), torch.bool)
    if weight:
        label = emit(aten("mul", "Tensor"), (target, counts), t.dtype)
        each = emit(aten("index", "Tensor"), (weight[0], [label]), out.dtype)
        counts = emit(aten("mul", "Tensor"), (each, counts), out.dtype)
    made.append(Eqn(aten("sum"), (counts,), (total,), (("dtype", out.dtype),), s.e.loc, s.e.tag))
    return tuple(made)


def _nll_backward(s: Site) -> Local | None:
    x, target, grad = s.get("self"), s.get("target"), s.get("grad_output")
    reduced = s.get("reduction") != _NONE
    c = s.shard([x, target, grad])
    if c is None or c.dim != 0 or len(shape_of(x)) < 2 or not s.take(x, c) or not s.take(target, c):
        return None
    if not (s.fix(grad) if reduced else s.take(grad, c)):
        return None
    return s.all(c) if s.fix(*s.vars("weight", "total_weight")) else None


# ---- by index


def _is_range(s: Site, v: Var, n: int) -> bool:
    """Whether ``v`` is 0, 1, ..., n - 1."""
    e = s.producer(v)
    if e is None:
        return False
    ranges = (aten("arange"), aten("arange", "start"), aten("arange", "start_step"))
    return e.op in ranges and e.args in ((n,), (0, n), (0, n, 1))


def _zero(s: Site, v: Var) -> bool:
    """Whether ``v`` is zero by construction."""
    e = s.producer(v)
    while e is not None and e.op in (aten("expand"), aten("view"), aten("clone")):
        e = s.producer(e.args[0])
    if e is None:
        return False
    return e.op in (aten("zeros"), aten("zeros_like"), aten("new_zeros")) or (
        e.op in (aten("full"), aten("full_like")) and e.args[1] == 0
    )


def _at(s: Site) -> tuple[Var, list[Any], list[Var]]:
    x, indices = s.get("self"), list(s.get("indices"))
    return x, indices, [v for v in indices if v is not None]


def _index(s: Site) -> Local | None:
    """Rows of a table looked up per example; entries looked up within each example."""
    x, indices, given = _at(s)
    c = s.kind(x)
    if any(v.type.dtype in (torch.bool, torch.uint8) for v in given):  # type: ignore[union-attr]
        return None
    if not isinstance(c, Shard):
        return _table_index(s, x, indices, given)
    own = indices[c.dim] if c.dim < len(indices) else None
    if own is None:
        after = len(indices) > c.dim and all(v is None for v in indices[: c.dim + 1])
        return s.all(c) if s.fix(*given) and (after and _adjacent(indices)) else None
    return _own_entries(s, indices, given, c)


def _adjacent(indices: Sequence[Any]) -> bool:
    at = [i for i, v in enumerate(indices) if v is not None]
    return at == list(range(at[0], at[-1] + 1))


def _rank(values: Sequence[Var]) -> int:
    return max(len(shape_of(v)) for v in values)


def _table_index(s: Site, x: Var, indices: list[Any], given: list[Var]) -> Local | None:
    c = _together(s, given, _rank(given))
    if c is None or not s.fix(x) or not _adjacent(indices):
        return None
    first = next(i for i, v in enumerate(indices) if v is not None)
    return s.all(Shard(c.dim + first, c.outer))


def _own_entries(s: Site, indices: list[Any], given: list[Var], c: Shard) -> Local | None:
    """``x[arange(n), y]``: entry y of each example."""
    n = s.n
    own = indices[c.dim]
    if c != Shard(0) or shape_of(s.get("self"))[0] != n or shape_of(own) != (n,) or not _is_range(s, own, n):
        return None
    rest = [v for v in given if v is not own]
    if None in indices or _rank(given) != 1 or any(not s.take(v, c) for v in rest):
        return None
    made = s.producer(own)
    assert made is not None
    local = Eqn(aten("arange"), (Size(n),), (own,), made.kwargs, made.loc, made.tag)
    return s.all(c, set={"indices": [local, *indices[1:]]})


def _index_put(s: Site) -> Local | None:
    x, indices, given = _at(s)
    values = s.get("values")
    if any(v.type.dtype in (torch.bool, torch.uint8) for v in given):  # type: ignore[union-attr]
        return None
    own = indices[0]
    if own is not None and _is_range(s, own, s.n) and shape_of(own) == (s.n,) and shape_of(x)[0] == s.n:
        first = Shard(0)
        if len(shape_of(values)) < 1 or not s.take(x, first) or not s.take(values, first):
            return None
        return _own_entries(s, indices, given, first)
    if not s.get("accumulate") or not _zero(s, x) or None in indices or len(shape_of(values)) < _rank(given):
        return None
    c = _together(s, given, _rank(given))
    if c is None or len(shape_of(values)) != _rank(given) + len(shape_of(x)) - len(indices):
        return None
    return s.all(SUM) if s.fix(x) and s.take(values, c) else None


def _gather(s: Site) -> Local | None:
    x, index, rank = s.get("self"), s.get("index"), len(shape_of(s.get("index")))
    c = s.shard([x, index])
    if c is None or rank == 0:
        return None
    if s.get("dim") % rank == c.dim:
        return s.all(c) if isinstance(s.kind(index), Shard) and s.fix(x) else None
    same = shape_of(x)[c.dim] == shape_of(index)[c.dim]
    return s.all(c) if same and s.take(x, c) and s.take(index, c) else None


def _scatter(s: Site) -> Local | None:
    x, values = s.get("self"), s.vars("index", "src")
    rank = len(shape_of(x))
    c = s.shard([x, *values])
    if c is None or rank == 0 or s.get("reduce") is not None:
        return None
    if len({shape_of(v)[c.dim] for v in values}) != 1 or any(not s.take(v, c) for v in values):
        return None
    if s.get("dim") % rank == c.dim:
        adds = s.e.op is aten("scatter_add") and _zero(s, x)
        return s.all(SUM) if adds and s.fix(x) else None
    same = shape_of(x)[c.dim] == shape_of(values[0])[c.dim]
    return s.all(c) if same and s.take(x, c) else None


LOSSES: dict[str, Rule] = {
    "mse_loss": _loss("self", "target"), "smooth_l1_loss": _loss("self", "target"),
    "huber_loss": _loss("self", "target"), "soft_margin_loss": _loss("self", "target"),
    "binary_cross_entropy": _loss("self", "target", "weight"),
    "mse_loss_backward": _loss_backward("self", "target"), "smooth_l1_loss_backward": _loss_backward("self", "target"),
    "huber_loss_backward": _loss_backward("self", "target"),
    "soft_margin_loss_backward": _loss_backward("self", "target"),
    "binary_cross_entropy_backward": _loss_backward("self", "target", "weight"),
    "nll_loss_forward": _nll, "nll_loss2d_forward": _nll, "nll_loss_backward": _nll_backward,
    "nll_loss2d_backward": _nll_backward, "index": _index, "_unsafe_index": _index, "index_put": _index_put,
    "_unsafe_index_put": _index_put, "gather": _gather, "scatter": _scatter, "scatter_add": _scatter,
}  # fmt: skip
