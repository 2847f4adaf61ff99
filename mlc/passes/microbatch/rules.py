"""Local rules of operators on examples: a table from operator to a small function.

What a rule may ask and answer is in :mod:`mlc.passes.microbatch.dependence`.

A rule answers for equations that read at least one value of single examples; None means that examples meet, or
that nobody has proved that they do not.  An operator that is not in the table is never assumed to keep them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from mlc.ir.core import Eqn, Primitive, SafeSqrt, Var, aten, flat_vars
from mlc.ir.types import TensorType
from mlc.passes.microbatch.dependence import PARTS, SAME, SUM, Local, Shard, Site, shape_of
from mlc.passes.microbatch.layers import LAYERS, aligned
from mlc.passes.microbatch.losses import LOSSES
from mlc.passes.microbatch.views import VIEWS

__all__ = ["heavy", "linear_rule", "name_of", "rule_for"]

Rule = Callable[[Site], Local | None]


def name_of(op: Any) -> str:
    """Name of an operator without namespace and overload."""
    return op._schema.name.split("::")[1] if isinstance(op, OpOverload) else op.name


def rule_for(op: Any) -> Rule | None:
    """The rule of an operator, if it has one."""
    if isinstance(op, Primitive):
        return pointwise if isinstance(op, SafeSqrt) else None
    assert isinstance(op, OpOverload)
    if torch.Tag.nondeterministic_seeded in op.tags or op.namespace != "aten":
        return None
    found = TABLE.get(f"{name_of(op)}.{op._overloadname}") or TABLE.get(name_of(op))
    return found or (pointwise if torch.Tag.pointwise in op.tags else None)


def heavy(op: Any) -> bool:
    """Whether an operator is the work of a model, not bookkeeping on losses and labels."""
    if isinstance(op, Primitive):
        return not isinstance(op, SafeSqrt)
    name = name_of(op)
    return name in _HEAVY or name.startswith(("linalg_", "_scaled_dot_product", "_fft", "_thnn", "_cudnn", "miopen"))


_HEAVY = {
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "addr", "dot", "matmul", "convolution",
    "convolution_backward", "embedding", "embedding_dense_backward", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional", "native_batch_norm_backward", "native_group_norm",
    "native_group_norm_backward", "native_layer_norm", "native_layer_norm_backward", "_fused_rms_norm",
    "_fused_rms_norm_backward", "_embedding_bag", "grid_sampler_2d", "_cdist_forward", "_trilinear",
}  # fmt: skip


# ---- the same on every entry


def pointwise(s: Site) -> Local | None:
    """Operands broadcast against one another; examples lie along one dimension of the result."""
    return _broadcast(s, s.e.inputs)


def _broadcast(s: Site, values: Sequence[Var]) -> Local | None:
    rank = max(len(shape_of(v)) for v in values)
    at, outer, size = _place(s, values, rank)
    for v in values:
        own = at - (rank - len(shape_of(v)))
        alone = own < 0 or shape_of(v)[own] == 1
        if isinstance(s.kind(v), Shard) or not alone:
            if own < 0 or shape_of(v)[own] != size or not s.take(v, Shard(own, outer)):
                return None
        elif not s.fix(v):
            return None
    return s.all(Shard(at, outer))


def _place(s: Site, values: Sequence[Var], rank: int) -> tuple[int, int, int]:
    """Dimension counted in the result, copies and size of the first operand that holds examples."""
    for v in values:
        c = s.kind(v)
        if isinstance(c, Shard):
            return c.dim + rank - len(shape_of(v)), c.outer, shape_of(v)[c.dim]
    raise AssertionError("no operand holds examples")


def _rowwise(*names: str, dim: str = "dim") -> Rule:
    """Values of one rank, worked on along dimensions that hold no examples (a softmax, a sort, a gather)."""

    def rule(s: Site) -> Local | None:
        values = s.vars(*names)
        c = aligned(s, values)
        if c is None or not s.fix(*[v for v in s.e.inputs if v not in values]):
            return None
        rank = len(shape_of(values[0]))
        dims = s.get(dim)
        dims = [dims] if isinstance(dims, int) else dims or range(rank)
        return None if any(d % rank == c.dim for d in dims) else s.all(c)

    return rule


def _fresh(s: Site) -> Local | None:
    """A constant of a shape that is given: whatever it reads, it does not depend on it."""
    value = aten("zeros") if name_of(s.e.op) == "new_zeros" else aten("ones")
    out = s.e.outs[0].type
    assert isinstance(out, TensorType)
    layout = (("dtype", out.dtype), ("device", out.device))
    made = Eqn(value, (list(out.shape),), s.e.outs, layout, s.e.loc, s.e.tag)
    return Local((SAME,), early=(made,))


# ---- reductions and products


def _dims(s: Site, rank: int) -> list[int]:
    dims = s.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    return [d % rank for d in dims] if dims else list(range(rank))


def _kept(s: Site, c: Shard, dims: Sequence[int]) -> Shard:
    gone = 0 if s.get("keepdim") else sum(d < c.dim for d in set(dims))
    return Shard(c.dim - gone, c.outer)


def _reduce(s: Site) -> Local | None:
    v = s.get("self")
    c = s.kind(v)
    assert isinstance(c, Shard)
    dims = _dims(s, len(shape_of(v)))
    return None if c.dim in dims else s.all(_kept(s, c, dims))


def _sum(s: Site) -> Local | None:
    return _reduce(s) or s.all(SUM)


def _mean(s: Site) -> Local | None:
    """A mean over the batch is the mean of those of equal parts."""
    return _reduce(s) or s.all(SUM, divide=PARTS)


def _contract(spec: str, *names: str) -> Rule:
    """Products summed over shared indices, written as in ``einsum``: examples along one index."""
    left, result = spec.split("->")
    terms = left.split(",")

    def rule(s: Site) -> Local | None:
        values = s.vars(*names)
        index = outer = size = None
        for v, term in zip(values, terms, strict=True):
            c = s.kind(v)
            if isinstance(c, Shard):
                index, outer, size = term[c.dim], c.outer, shape_of(v)[c.dim]
                break
        if index is None or outer is None:
            return None
        for v, term in zip(values, terms, strict=True):
            if index not in term:
                if not s.fix(v):
                    return None
            elif shape_of(v)[term.index(index)] != size or not s.take(v, Shard(term.index(index), outer)):
                return None
        return s.all(Shard(result.index(index), outer) if index in result else SUM)

    return rule


def _biased(product: Rule) -> Rule:
    """A product and something added to it: a bias broadcast over the result."""

    def rule(s: Site) -> Local | None:
        found = product(s)
        if found is None or not isinstance(found.outs[0], Shard):
            return None
        c, bias, rank = found.outs[0], s.get("self"), len(s.out())
        own = c.dim - (rank - len(shape_of(bias)))
        alone = own < 0 or shape_of(bias)[own] == 1
        fits = s.fix(bias) if alone else s.take(bias, Shard(own, c.outer))
        return found if fits else None

    return rule


TABLE: dict[str, Rule] = {
    **VIEWS, **LOSSES, **LAYERS,
    "clone": pointwise, "_to_copy": pointwise, "contiguous": pointwise, "detach": pointwise, "alias": pointwise,
    "lift_fresh_copy": pointwise, "masked_fill": pointwise, "where": pointwise, "lerp": pointwise,
    "zeros_like": pointwise, "ones_like": pointwise, "full_like": pointwise, "leaky_relu_backward": pointwise,
    "hardtanh_backward": pointwise, "elu_backward": pointwise, "softplus_backward": pointwise,
    "hardsigmoid_backward": pointwise, "hardswish_backward": pointwise, "silu_backward": pointwise,
    "new_zeros": _fresh, "new_ones": _fresh,
    "sum": _sum, "mean": _mean, "amax": _reduce, "amin": _reduce, "any": _reduce, "all": _reduce, "prod": _reduce,
    "max": _reduce, "min": _reduce, "max.other": pointwise, "min.other": pointwise, "argmax": _reduce,
    "argmin": _reduce, "logsumexp": _reduce, "var": _reduce, "std": _reduce, "var_mean": _reduce,
    "linalg_vector_norm": _reduce,
    "mm": _contract("ik,kj->ij", "self", "mat2"), "bmm": _contract("bik,bkj->bij", "self", "mat2"),
    "mv": _contract("ik,k->i", "self", "vec"), "dot": _contract("k,k->", "self", "tensor"),
    "addmm": _biased(_contract("ik,kj->ij", "mat1", "mat2")),
    "baddbmm": _biased(_contract("bik,bkj->bij", "batch1", "batch2")),
    "_softmax": _rowwise("self"), "_log_softmax": _rowwise("self"), "_safe_softmax": _rowwise("self"),
    "_softmax_backward_data": _rowwise("grad_output", "output"),
    "_log_softmax_backward_data": _rowwise("grad_output", "output"),
    "cumsum": _rowwise("self"), "cumprod": _rowwise("self"), "logcumsumexp": _rowwise("self"),
    "sort": _rowwise("self"), "topk": _rowwise("self"), "glu": _rowwise("self"),
    "glu_backward": _rowwise("grad_output", "self"), "index_select": _rowwise("self"),
}  # fmt: skip


# ---- of sums over examples

_LINEAR_OPS = {
    *VIEWS, "neg", "clone", "detach", "alias", "sum", "mean", "contiguous", "mm", "bmm", "mul", "div", "add", "sub",
    "_to_copy", "mv", "dot",
}  # fmt: skip
_BILINEAR = {"mul", "mm", "bmm", "mv", "dot"}


def linear_rule(s: Site) -> Local | None:
    """The same for sums over the examples: what is linear in them stays a sum."""
    op, values = s.e.op, s.e.inputs
    sums = [v for v in values if s.kind(v) is SUM]
    if isinstance(op, Primitive) or len(sums) + sum(s.kind(v) is SAME for v in values) != len(values):
        return None
    name = name_of(op)
    if name not in _LINEAR_OPS:
        return None
    if name in _BILINEAR:
        return s.all(SUM) if len(sums) == 1 else None
    if name == "div":
        ok = len(sums) == 1 and s.e.args[0] is sums[0] and s.get("rounding_mode") is None
        return s.all(SUM) if ok else None
    if name in ("add", "sub") and len(flat_vars(s.e.args[:2])) != 2:
        return None
    if (name == "_to_copy" and not _widening(s)) or (name == "constant_pad_nd" and s.get("value") != 0):
        return None
    return s.all(SUM) if len(sums) == len(values) else None


def _widening(s: Site) -> bool:
    """A cast that loses nothing."""
    a, b = s.e.inputs[0].type, s.e.outs[0].type
    dtypes = getattr(a, "dtype", None), getattr(b, "dtype", None)
    return None not in dtypes and torch.promote_types(*dtypes) == dtypes[1]  # type: ignore[arg-type]
