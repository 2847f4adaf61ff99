"""Local rules of views: where the examples are after a change of shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlc.ir.core import aten
from mlc.passes.microbatch.dependence import SAME, Local, Shard, Site, Size, shape_of

__all__ = ["VIEWS"]

_END = 2**62


def _normal(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def _prod(xs: Sequence[int]) -> int:
    n = 1
    for x in xs:
        n *= x
    return n


def _self(s: Site, name: str = "self") -> tuple[Any, Shard, int]:
    """The tensor argument, its dependence and its rank."""
    v = s.get(name)
    c = s.kind(v)
    assert isinstance(c, Shard)
    return v, c, len(shape_of(v))


def _regrouped(shape: Sequence[int], c: Shard, n: int, new: Sequence[int]) -> Shard | None:
    """Where the examples are when the entries of ``shape`` are read in order as ``new``."""
    before = _prod(shape[: c.dim]) * c.outer
    done = 1
    for j, size in enumerate(new):
        if size and done and before % done == 0 and done * size >= before * n:
            outer = before // done
            return Shard(j, outer) if size % (outer * n) == 0 else None
        done *= size
    return None


def _view(s: Site) -> Local | None:
    v, c, _ = _self(s)
    new = _regrouped(shape_of(v), c, s.n, s.out())
    name = next((x for x in ("size", "shape") if s.get(x) is not None), None)
    if new is None or name is None:
        return None
    return s.all(new, set={name: s.sizes(s.out(), new)})


def _permute(s: Site) -> Local | None:
    _, c, rank = _self(s)
    dims = [_normal(d, rank) for d in s.get("dims")]
    return s.all(Shard(dims.index(c.dim), c.outer))


def _transpose(s: Site) -> Local | None:
    _, c, rank = _self(s)
    a, b = _normal(s.get("dim0"), rank), _normal(s.get("dim1"), rank)
    return s.all(Shard({a: b, b: a}.get(c.dim, c.dim), c.outer))


def _t(s: Site) -> Local | None:
    _, c, rank = _self(s)
    return s.all(c if rank < 2 else Shard(1 - c.dim, c.outer))


def _unsqueeze(s: Site) -> Local | None:
    _, c, rank = _self(s)
    at = _normal(s.get("dim"), rank + 1)
    return s.all(Shard(c.dim + (at <= c.dim), c.outer))


def _squeeze(s: Site) -> Local | None:
    """With the dimensions named: a micro-batch may have one example, a dimension that must stay."""
    v, c, rank = _self(s)
    asked = s.get("dim")
    dims = range(rank) if asked is None else [_normal(d, rank) for d in ([asked] if isinstance(asked, int) else asked)]
    gone = [d for d in dims if shape_of(v)[d] == 1]
    return s.all(Shard(c.dim - sum(d < c.dim for d in gone), c.outer), op=aten("squeeze", "dims"), set={"dim": gone})


def _expand(s: Site) -> Local | None:
    _, c, rank = _self(s)
    new = Shard(c.dim + len(s.out()) - rank, c.outer)
    return s.all(new, set={"size": s.sizes(s.out(), new)})


def _repeat(s: Site) -> Local | None:
    _, c, rank = _self(s)
    times = s.get("repeats")
    at = c.dim + len(times) - rank
    return s.all(Shard(at, c.outer)) if times[at] == 1 else None


def _cut(s: Site, v: Any, c: Shard, start: Any, end: Any, step: int, shape: Sequence[int]
         ) -> tuple[Shard, dict[str, Any]] | None:  # fmt: skip
    """A range along the examples that holds every example, whole batches of it."""
    size = shape[c.dim]
    start, end = 0 if start is None else start, size if end is None else min(end, size)
    start, end = _normal(start, size), _normal(end, size)
    block = s.block(v, c)
    if step != 1 or start % block or end % block or end <= start:
        return None
    whole = (start, end) == (0, size)
    bounds = {"start": 0, "end": _END} if whole else {"start": Size(start), "end": Size(end)}
    return Shard(c.dim, (end - start) // block), bounds


def _slice(s: Site) -> Local | None:
    v, c, rank = _self(s)
    if _normal(s.get("dim"), rank) != c.dim:
        return s.all(c)
    cut = _cut(s, v, c, s.get("start"), s.get("end"), s.get("step"), shape_of(v))
    return None if cut is None else s.all(cut[0], set=cut[1])


def _slice_backward(s: Site) -> Local | None:
    v, c, rank = _self(s, "grad_output")
    sizes = s.get("input_sizes")
    if _normal(s.get("dim"), rank) != c.dim:
        return s.all(c, set={"input_sizes": s.sizes(s.out(), c)})
    block = s.block(v, c)
    if sizes[c.dim] % block:
        return None
    whole = Shard(c.dim, sizes[c.dim] // block)
    start, end = s.get("start"), min(s.get("end"), sizes[c.dim])
    if s.get("step") != 1 or start % block or end % block or start < 0 or end < 0:
        return None
    if s.get("step") != 1 or start % block or end % block or start < 0 or end < 0:
        return None
    return s.all(whole, set={"input_sizes": s.sizes(sizes, whole), "start": Size(start), "end": Size(end)})


def _dropped(name: str) -> Callable[[Site], Local | None]:
    """One dimension, which holds no examples, goes away."""

    def rule(s: Site) -> Local | None:
        _, c, rank = _self(s)
        at = _normal(s.get(name), rank)
        return None if at == c.dim else s.all(Shard(c.dim - (at < c.dim), c.outer))

    return rule


def _select_backward(s: Site) -> Local | None:
    _, c, rank = _self(s, "grad_output")
    at = _normal(s.get("dim"), rank + 1)
    new = Shard(c.dim + (at <= c.dim), c.outer)
    return s.all(new, set={"input_sizes": s.sizes(s.out(), new)})


def _split(s: Site) -> Local | None:
    v, c, rank = _self(s)
    if _normal(s.get("dim"), rank) != c.dim:
        return s.all(c)
    sizes = s.get("split_sizes")
    block = s.block(v, c)
    if sizes is None:
        step = s.get("split_size")
        if step % block:
            return None
        changed: dict[str, Any] = {"split_size": Size(step)}
    elif any(x % block for x in sizes):
        return None
    else:
        changed = {"split_sizes": [Size(x) for x in sizes]}
    return Local(tuple(Shard(c.dim, shape_of(o)[c.dim] // block) for o in s.e.outs), set=changed)


def _diagonal(s: Site) -> Local | None:
    _, c, rank = _self(s)
    pair = {_normal(s.get("dim1"), rank), _normal(s.get("dim2"), rank)}
    return None if c.dim in pair else s.all(Shard(c.dim - sum(d < c.dim for d in pair), c.outer))


def _untouched(name: str) -> Callable[[Site], Local | None]:
    """An operator along some dimensions, none of which holds examples."""

    def rule(s: Site) -> Local | None:
        _, c, rank = _self(s)
        dims = s.get(name)
        dims = [dims] if isinstance(dims, int) else dims
        return s.all(c) if dims and all(_normal(d, rank) != c.dim for d in dims) else None

    return rule


def _matrices(s: Site) -> Local | None:
    _, c, rank = _self(s)
    return s.all(c) if c.dim < rank - 2 else None


def _pad(s: Site) -> Local | None:
    _, c, rank = _self(s)
    return s.all(c) if c.dim < rank - len(s.get("pad")) // 2 else None


def _cat(s: Site) -> Local | None:
    """Along another dimension; or batches behind one another, which is a batch with ``outer`` copies."""
    values = [v for v in s.get("tensors") if s.kind(v) is not SAME or shape_of(v) != (0,)]
    c = s.shard(values)
    assert c is not None
    at = _normal(s.get("dim"), len(s.out()))
    if at != c.dim:
        return s.all(c) if all(s.take(v, c) for v in values) else None
    block = s.block(next(v for v in values if isinstance(s.kind(v), Shard)), c)
    for v in values:
        own = s.kind(v)
        size = shape_of(v)[at]
        if isinstance(own, Shard) and (own.dim != at or size != own.outer * block):
            return None
        if not isinstance(own, Shard) and (size % block or not s.take(v, Shard(at, size // block))):
            return None
    return s.all(Shard(at, s.out()[at] // block))


def _stack(s: Site) -> Local | None:
    values = s.get("tensors")
    c = s.shard(values)
    assert c is not None
    at = _normal(s.get("dim"), len(s.out()))
    return s.all(Shard(c.dim + (at <= c.dim), c.outer)) if all(s.take(v, c) for v in values) else None


VIEWS: dict[str, Callable[[Site], Local | None]] = {
    "view": _view, "_unsafe_view": _view, "reshape": _view, "permute": _permute,
    "transpose": _transpose, "t": _t, "unsqueeze": _unsqueeze, "squeeze": _squeeze, "expand": _expand,
    "repeat": _repeat, "slice": _slice, "slice_backward": _slice_backward, "select": _dropped("dim"),
    "unbind": _dropped("dim"), "select_backward": _select_backward, "split": _split, "split_with_sizes": _split,
    "diagonal": _diagonal, "flip": _untouched("dims"), "roll": _untouched("dims"), "tril": _matrices,
    "triu": _matrices, "constant_pad_nd": _pad, "cat": _cat, "stack": _stack,
}  # fmt: skip
