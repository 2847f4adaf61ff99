"""Regions and programs made by hand, and hypothesis strategies for random ones."""

from typing import Any

import torch
from hypothesis import strategies as st

from mlc.ir.builder import contiguous
from mlc.ir.core import (
    Alias,
    Custom,
    Draw,
    EffectCall,
    Eqn,
    Feed,
    Grad,
    Index,
    Loop,
    NestedEffects,
    Pack,
    Random,
    Region,
    Replay,
    SafeSqrt,
    Stop,
    Var,
    aten,
)
from mlc.ir.program import Flow, Input, Level, Program
from mlc.ir.types import Loc, SeqType, TensorType

ME = "/src/me/train.py"
CPU = torch.device("cpu")
F32 = TensorType(torch.float32, (), (), CPU)
MUL = aten("mul", "Tensor")


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> TensorType:
    return TensorType(dtype, shape, contiguous(shape), CPU)


def tiny() -> Program:
    """`a * b`."""
    a, b, c = Var(F32), Var(F32), Var(F32)
    region = Region((a, b), (Eqn(MUL, (a, b), (c,)),), (c,))
    return Program("tiny", region, (Input("a", "meta", F32), Input("b", "data", F32)), 1)


def loop_program() -> Program:
    """One of everything that is not an ATen call, with a replay as passes make it."""
    x, seq = Var(tensor(4)), Var(SeqType(tensor(4), 3))
    a, k, s, y, g, loss, one = [Var(tensor(4)) for _ in range(5)] + [Var(F32), Var(F32)]
    square = Eqn(aten("dot"), (a, s), (loss,), loc=Loc(ME, 3, "train"))
    body = Region(
        (a, k, s),
        (square, Eqn(aten("ones"), ([],), (one,)), Eqn(Grad(1, 1), (loss, a, one), (g,), tag="grad"),
         Eqn(aten("sub", "Tensor"), (a, g), (y,), (("alpha", 0.5),), Loc(ME, 4, "train"), "update")),
        (y, loss),
    )  # fmt: skip
    r1, r2 = Var(tensor(4)), Var(tensor(4))
    replay = Replay(Region((r1,), (Eqn(Alias(), (r1,), (r2,)),), (r2,), ("state",)), (0,), (), (), (), 2)
    final, losses, last = Var(tensor(4)), Var(SeqType(F32, 3)), Var(F32)
    op = Loop(body, 1, 1, 3, True, "train", replay)
    eqns = (
        Eqn(Feed((EffectCall(Draw(0, 0), (), (), (tensor(4),)),), 3), (), (seq,)),
        Eqn(op, (x, x, seq), (final, losses)),
        Eqn(Index(-1), (losses,), (last,)),
    )
    level = Level("L1", 1, "SGD", 3, ("x",), (), 0, Loc("/src/you/train.py", 1), ((1, 2),))
    top = Level("L0", 0, "", 1, ("x",), (), 0, None)
    flow = Flow("stop", "x", "L1", False, Loc(ME, 9, "<lambda>"), "detach() or no_grad()")
    region = Region((x,), eqns, (last, final))
    inputs = (Input("x", "meta", tensor(4)),)
    return Program("train", region, inputs, 1, (top, level), (flow,), ('it says "so"',), Loc(ME, 1))


# ---- random programs: well-formed, though no operator would take such arguments

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2])
DEVICES = st.sampled_from([CPU, torch.device("cuda:1"), torch.device("meta")])
WORDS = st.text(max_size=5)


@st.composite
def types(draw: Any) -> TensorType:
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    stride = contiguous(shape) if draw(st.booleans()) else tuple(draw(st.integers(0, 9)) for _ in shape)
    return TensorType(draw(DTYPES), shape, stride, draw(DEVICES))


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(), WORDS, st.complex_numbers(max_magnitude=9),
    DTYPES, DEVICES, st.sampled_from([torch.strided, torch.channels_last, torch.preserve_format]),
    st.builds(torch.Generator), st.just(MUL),
)  # fmt: skip


def literals(values: list[Var]) -> Any:
    leaf = st.one_of(LEAVES, st.sampled_from(values)) if values else LEAVES
    return st.recursive(
        leaf,
        lambda x: st.one_of(st.lists(x, max_size=3), st.tuples(x), st.tuples(x, x), st.dictionaries(WORDS, x)),
    )


LOCS = st.none() | st.builds(
    Loc,
    st.sampled_from(["/a/x.py", "/b/x.py", "/c d/#y.py"]),
    st.integers(1, 99),
    st.sampled_from(["", "f", "<lambda>"]),
)
TAGS = st.sampled_from(["", "update", "adjoint loop"])


@st.composite
def equations(draw: Any, known: list[Var], depth: int) -> Eqn:
    """An equation over known values."""
    where = {"loc": draw(LOCS), "tag": draw(TAGS)}
    floats = [v for v in known if isinstance(v.type, TensorType) and v.type.is_float]
    kind = draw(st.sampled_from(["aten", "plain", "pack", "grad", "loop", "feed", "random", "custom"]))
    v = draw(st.sampled_from(known))
    if kind == "plain" and isinstance(v.type, TensorType):
        op = draw(st.sampled_from([Stop(), Stop(level=1), Alias(), SafeSqrt()]))
        return Eqn(op, (v,), (Var(v.type),), **where)
    if kind == "pack":
        return Eqn(Pack(), (v, v), (Var(SeqType(v.type, 2)),), **where)
    if kind == "grad" and floats:
        x, y = draw(st.sampled_from(floats)), draw(st.sampled_from(floats))
        return Eqn(Grad(1, 1), (x, y, x), (Var(y.type),), **where)
    if kind == "loop" and depth:
        return draw(loops(known, depth, where))
    if kind == "feed":
        call = EffectCall(Draw(1, 0), (), (), (draw(types()),))
        noise = EffectCall(Random(aten("rand")), (draw(literals([])),), (("generator", torch.Generator()),), ())
        effects = (call, NestedEffects((call, noise), draw(st.none() | st.just(2))))
        trips = draw(st.none() | st.just(4))
        outs = (call.types[0], SeqType(call.types[0], effects[1].trips))
        return Eqn(Feed(effects, trips), (), tuple(Var(SeqType(t, trips)) for t in outs), **where)
    if kind == "random":
        return Eqn(
            Random(aten("bernoulli_", "float"), fill=True),
            (draw(literals(known)),),
            (Var(draw(types())),),
            **where,
        )
    if kind == "custom" and isinstance(v.type, TensorType):
        a, b, c, g = (Var(v.type) for _ in range(4))
        op = Custom("My Function", Region((a, b, c, g), (), (g,)), 1, 1, (True,))
        return Eqn(op, (v, v, v), (Var(v.type),), **where)
    args = tuple(draw(st.lists(literals(known), max_size=3)))
    kwargs = tuple(draw(st.dictionaries(st.sampled_from(["dtype", "in", "each"]), literals(known))).items())
    return Eqn(MUL, args, tuple(Var(draw(types())) for _ in range(draw(st.integers(0, 2)))), kwargs, **where)


@st.composite
def loops(draw: Any, known: list[Var], depth: int, where: dict[str, Any]) -> Eqn:
    carry, const = draw(st.sampled_from(known)), draw(st.sampled_from(known))
    ins = (Var(carry.type), Var(const.type))
    body = draw(regions(ins, depth - 1))
    emitted = body.outputs[:1]
    trips = draw(st.none() | st.integers(1, 4))
    op = Loop(
        Region(ins, body.eqns, (ins[0], *emitted), body.names),
        1,
        1,
        trips,
        draw(st.booleans()),
        draw(WORDS),
    )
    outs = (Var(carry.type), *[Var(SeqType(v.type, trips)) for v in emitted])
    return Eqn(op, (carry, const), outs, **where)


@st.composite
def regions(draw: Any, inputs: tuple[Var, ...], depth: int) -> Region:
    known, eqns = list(inputs), []
    for _ in range(draw(st.integers(0, 4))):
        eqns.append(draw(equations(known, depth)))
        known += eqns[-1].outs
    outs = tuple(draw(st.lists(st.sampled_from(known), min_size=1, max_size=2)))
    names = tuple(draw(WORDS) for _ in inputs)
    return Region(inputs, tuple(eqns), outs, names if any(names) else ())


@st.composite
def random_programs(draw: Any) -> Program:
    inputs = tuple(Var(draw(types())) for _ in range(draw(st.integers(1, 3))))
    region = draw(regions(inputs, 2))
    role = st.sampled_from(["meta", "trained", "state", "data"])
    described = tuple(Input(draw(WORDS), draw(role), v.type) for v in inputs)
    return Program(draw(WORDS), region, described, 1, notes=tuple(draw(st.lists(WORDS, max_size=2))), loc=draw(LOCS))
