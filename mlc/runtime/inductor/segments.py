"""Segments: the pieces of a region that Inductor may compile, cut so that equal structure gives equal pieces.

Matrix products, convolutions and whatever else is a library call anyway stay with the interpreter: they cut a region
into stretches of elementwise work, reductions and moves.  A stretch falls apart into its connected components (no
value passes between them; constants are made anew in each), so that the update of one parameter is a piece of its own
wherever it was scheduled, and layers of the same shape give the same pieces.  Nothing looks at names: the cut is a
function of the equations and of their neighbours alone, so more layers give more pieces but no new ones.

What holds behind: the pieces are in an order that respects all uses; none contains the same computation twice (what
was recomputed on purpose would be merged with its original again); each ends with the values that others read.
Complexity: O(equations + uses), apart from sorting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from mlc.ir.core import Alias, Custom, Eqn, Primitive, Region, SafeSqrt, Stop, Var, map_vars
from mlc.ir.inplace import schema_of
from mlc.ir.keys import equation_key
from mlc.ir.types import TensorType

__all__ = ["Fused", "fuse", "fusible", "is_view", "key_of"]

FEWEST = 2  # equations that compute something; a single one is a library call already
MOST = 150  # equations in one segment; larger ones compile slowly and hold more than they save

# Library calls, and what Inductor would hand back to ATen: nothing is gained by taking them in.
_LIBRARY = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "vdot", "convolution", "convolution_backward",
    "_convolution", "sort", "topk", "kthvalue", "median", "mode", "cumsum", "cumprod", "logcumsumexp",
    "embedding_dense_backward", "scatter_reduce", "index_put", "_unsafe_index_put", "index_add", "scatter_add",
    "scatter", "nonzero", "unique", "_unique2", "masked_select", "histc", "bincount", "searchsorted", "bucketize",
    "grid_sampler_2d", "grid_sampler_3d", "_cdist_forward", "_cdist_backward", "_ctc_loss", "_ctc_loss_backward",
    "lstm", "gru", "as_strided", "as_strided_scatter", "_local_scalar_dense", "repeat_interleave", "tensor_split",
    "renorm", "ormqr", "triangular_solve", "lu_unpack", "max_pool2d_with_indices_backward",
    "native_dropout", "nll_loss2d_forward", "nll_loss2d_backward",
}  # fmt: skip
_LIBRARY_FAMILIES = ("linalg_", "_linalg_", "_fft_", "cholesky", "_cudnn", "mkldnn", "_scaled_dot_product", "special_",
                     "_thnn", "_embedding_bag", "_weight_norm", "max_unpool")  # fmt: skip
_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16,
           torch.int8, torch.uint8, torch.bool}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Fused(Primitive):
    """A run of equations as one: arguments and results are those of ``body``."""

    body: Region


def is_view(e: Eqn) -> bool:
    """Whether an equation computes nothing: its results share the storage of an argument."""
    return isinstance(e.op, OpOverload) and schema_of(e.op).view


def fusible(e: Eqn) -> bool:
    """Whether an equation may stand in a segment."""
    if isinstance(e.op, SafeSqrt):
        return _plain(e)
    if not isinstance(e.op, OpOverload) or e.op.namespace != "aten" or schema_of(e.op).random:
        return False
    name = e.op._schema.name.split("::")[1]
    return name not in _LIBRARY and not name.startswith(_LIBRARY_FAMILIES) and _plain(e)


def _plain(e: Eqn) -> bool:
    types = [v.type for v in (*e.inputs, *e.outs)]
    if not types or not all(isinstance(t, TensorType) and t.dtype in _DTYPES for t in types):
        return False
    if len({t.device for t in types if isinstance(t, TensorType)}) > 1:
        return False
    literals = [*e.args, *(v for _, v in e.kwargs)]
    return not any(isinstance(x, torch.Generator | torch.Tensor) for x in literals)


def without_aliases(region: Region) -> Region:
    """The region without the equations that only give a value another name."""
    env: dict[Var, Var] = {}

    def look(v: Var) -> Var:
        return env.get(v, v)

    eqns = []
    for e in region.eqns:
        if isinstance(e.op, Alias | Stop):
            env.update((o, look(a)) for o, a in zip(e.outs, e.args, strict=False))
        elif isinstance(e.op, Custom):
            results = e.args[e.op.n_in : e.op.n_in + e.op.n_out]
            env.update((o, look(a)) for o, a in zip(e.outs, results, strict=True))
        elif any(v in env for v in e.inputs):
            kwargs = tuple((k, map_vars(x, look)) for k, x in e.kwargs)
            eqns.append(e.with_(args=map_vars(e.args, look), kwargs=kwargs))
        else:
            eqns.append(e)
    return Region(region.inputs, tuple(eqns), tuple(look(v) for v in region.outputs), region.names)


def fuse(region: Region, most: int = MOST) -> Region:
    """The same function, with its stretches of fusible work as :class:`Fused` equations."""
    region = without_aliases(region)
    users = _users(region)
    numbers = _value_numbers(region)
    made_of_nothing = {v: e for e in region.eqns if not e.inputs and fusible(e) for v in e.outs}
    eqns: list[Eqn] = []
    run: list[int] = []

    def flush() -> None:
        for part in _components(region, run):
            for piece in _pieces(region, part, numbers, most):
                eqns.extend(_closed(region, piece, users, made_of_nothing))
        run.clear()

    for i, e in enumerate(region.eqns):
        if fusible(e) and e.inputs:
            run.append(i)
        elif fusible(e):
            eqns.append(e)
        else:
            flush()
            eqns.append(e)
    flush()
    read = {v for e in eqns for v in e.inputs} | set(region.outputs)
    eqns = [e for e in eqns if e.inputs or e.impure or any(v in read for v in e.outs)]
    return Region(region.inputs, tuple(eqns), region.outputs, region.names)


def _components(region: Region, run: Sequence[int]) -> list[list[int]]:
    """Connected components of a stretch, each in order; the one that ends first comes first."""
    parent = {i: i for i in run}

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    made: dict[Var, int] = {}
    for i in run:
        e = region.eqns[i]
        for v in e.inputs:
            if v in made:
                parent[find(made[v])] = find(i)
        made.update((v, i) for v in e.outs)
    parts: dict[int, list[int]] = defaultdict(list)
    for i in run:
        parts[find(i)].append(i)
    return sorted(parts.values(), key=lambda part: part[-1])


def _value_numbers(region: Region) -> list[int]:
    """Equal numbers for equations that compute the same values from the same operands."""
    number: dict[Var, Any] = {}
    known: dict[Any, int] = {}
    out = []
    for e in region.eqns:
        key: Any = equation_key(e, lambda v: ("%", number.get(v, v)))
        if not isinstance(e.op, OpOverload):
            key = (key, e)
        n = known.setdefault(key, len(known))
        out.append(n)
        number.update((v, (n, k)) for k, v in enumerate(e.outs))
    return out


def _pieces(region: Region, part: list[int], numbers: list[int], most: int) -> Iterable[list[int]]:
    """A component cut where it is too long, or where it would compute the same values a second time."""
    piece: list[int] = []
    seen: set[int] = set()
    for i in part:
        e = region.eqns[i]
        again = numbers[i] in seen and not is_view(e)
        if again or len(piece) == most:
            yield piece
            piece, seen = [], set()
        piece.append(i)
        seen.add(numbers[i])
    yield piece


def _users(region: Region) -> dict[Var, list[int]]:
    """Positions of the equations that read a value; behind the last one for outputs."""
    users: dict[Var, list[int]] = defaultdict(list)
    for i, e in enumerate(region.eqns):
        for v in e.inputs:
            users[v].append(i)
    for v in region.outputs:
        users[v].append(len(region.eqns))
    return users


def _closed(region: Region, piece: list[int], users: dict[Var, list[int]], constants: dict[Var, Eqn]) -> list[Eqn]:
    """A piece as one equation, with the constants it reads; as it is when nothing would be gained."""
    eqns = [region.eqns[i] for i in piece]
    if sum(not is_view(e) for e in eqns) < FEWEST:
        return eqns
    within = set(piece)
    eqns = [*dict.fromkeys(constants[v] for e in eqns for v in e.inputs if v in constants), *eqns]
    made = {v for e in eqns for v in e.outs}
    ins = tuple(dict.fromkeys(v for e in eqns for v in e.inputs if v not in made))
    outs = tuple(v for e in eqns if e.inputs for v in e.outs if any(i not in within for i in users.get(v, ())))
    return [Eqn(Fused(Region(ins, tuple(eqns), outs)), ins, outs, (), eqns[-1].loc, eqns[-1].tag)]


def key_of(body: Region) -> str:
    """Text that is equal for segments of equal structure: operators, wiring, literals, types, what is returned."""
    names: dict[Var, str] = {}

    def name(v: Var) -> str:
        return names.setdefault(v, str(len(names)))

    words = [f"{name(v)}:{_type(v)}" for v in body.inputs]
    for e in body.eqns:
        _, args, kwargs = equation_key(e, name)
        words.append(f"{','.join(f'{name(v)}:{_type(v)}' for v in e.outs)}={e.op}{args}{kwargs}")
    words.append("return " + ",".join(map(name, body.outputs)))
    return "\n".join(words)


def _type(v: Var) -> str:
    t = v.type
    assert isinstance(t, TensorType)
    return f"{t.dtype}{t.shape}{t.stride}{t.device}"
