"""Small functions as regions, run by the interpreter, and float64 central differences of them: the referee of rules."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mlc.ir.builder import Builder, contiguous_type
from mlc.ir.core import Eqn, Grad, Loop, Region, Var, aten
from mlc.ir.types import SeqType, TensorType
from mlc.passes.autodiff.adjoint import FallBack, Tape, lower_grads
from mlc.passes.autodiff.policy import Policy
from mlc.record.recorder import Recorder
from mlc.record.regions import record_region
from mlc.record.retype import shared
from mlc.runtime.interpreter.interpreter import compile_region
from mlc.runtime.interpreter.loop import link

Function = Callable[..., Any]


def recorded(f: Function, *like: Tensor, safe_sqrt: bool = False) -> Region:
    """`f` as a region; tensors say shapes and dtypes."""
    rec = Recorder(merge=True)
    rec.safe_sqrt = safe_sqrt

    @torch.no_grad()
    def listed(*ins: Tensor) -> list[Tensor | None]:
        out = f(*ins)
        return [out] if isinstance(out, Tensor) else list(out)

    return record_region(rec, listed, [TensorType.of(t) for t in like])[0]


def run(region: Region, values: Sequence[Any]) -> list[Any]:
    """Results of a region; sequences are lists."""
    with torch.no_grad():
        return compile_region(region, link(lambda op: None, lambda e: None))(list(values))  # type: ignore[arg-type]


def values_for(region: Region, seed: int = 0) -> list[Any]:
    """Random inputs in float64, away from 0 and 1; sequences as lists."""
    generator = torch.Generator().manual_seed(seed)

    def draw(t: Any) -> Any:
        if isinstance(t, SeqType):
            return [draw(t.elem) for _ in range(t.length or 0)]
        return torch.rand(t.shape, generator=generator, dtype=torch.float64) * 0.6 + 0.2

    return [draw(v.type) for v in region.inputs]


def dot(a: Any, b: Any) -> float:
    """Inner product of values or of sequences of them."""
    if isinstance(a, Tensor):
        return float((a * b).sum())
    return sum(dot(x, y) for x, y in zip(a, b, strict=True))


def moved(a: Any, along: Any, h: float) -> Any:
    return a + h * along if isinstance(a, Tensor) else [moved(x, y, h) for x, y in zip(a, along, strict=True)]


def slope(f: Callable[[list[Any]], float], at: Sequence[Any], along: Sequence[Any]) -> float:
    """Derivative of `f` along a direction: the central differences of the two neighbouring steps that agree best."""
    found = []
    for h in (1e-3, 1e-4, 1e-5, 1e-6):
        there, back = ([moved(a, d, s * h) for a, d in zip(at, along, strict=True)] for s in (1, -1))
        found.append((f(there) - f(back)) / (2 * h))
    return min(pairwise(found), key=lambda p: abs(p[0] - p[1]))[1]


def agrees(mine: float, differences: float, rel: float = 1e-7) -> bool:
    return abs(mine - differences) <= rel * max(abs(differences), 1e-2)


def loop_of(step: Function, carry: Sequence[Tensor], const: Sequence[Tensor] = (), each: Sequence[Tensor] = (), *,
            trips: int = 3, n_emit: int = 0, reverse: bool = False, label: str = "loop") -> Region:  # fmt: skip
    """A region of one loop: ``step(*carry, *const, *each) -> (*carry, *emitted)``; `each` are elements of sequences."""
    body = recorded(step, *carry, *const, *each)
    b = Builder()
    ins = [b.input(TensorType.of(t)) for t in (*carry, *const)]
    seqs = [b.input(SeqType(TensorType.of(t), trips)) for t in each]
    op = Loop(body, len(carry), len(const), trips, reverse, label)
    types = [v.type for v in body.outputs[: len(carry)]]
    types += [SeqType(v.type, trips) for v in body.outputs[len(carry) :]]
    assert len(body.outputs) == len(carry) + n_emit
    return b.region(list(b.emit(op, (*ins, *seqs), types)))


def emit(b: Builder, name: str, *args: Any, overload: str = "default", **kw: Any) -> Var:
    """One ATen equation of one result, its type found out."""
    op = aten(name, overload)
    (t,) = shared().types(op, args, tuple(kw.items()))
    return b.emit(op, args, (t,), tuple(kw.items()), simplify=False)[0]


def grad_of(b: Builder, loss: Var, wrt: Sequence[Var], depth: int = 0) -> tuple[Var, ...]:
    """An inner gradient of a scalar."""
    one = b.one(loss.type)
    return b.emit(Grad(1, len(wrt), depth), (loss, *wrt, one), [v.type for v in wrt])


def joint(region: Region, policy: Policy) -> Region:
    """Results of a region and its hypergradient: ``(*inputs, *cotangents) -> (*results, *cotangents of inputs)``.

    Zeros stand for inputs that nothing depends on. Falls back to reverse over reverse as the pipeline does.
    """
    over: frozenset[Eqn] = frozenset()
    while True:
        b = Builder(policy=policy)
        env = {v: b.input(v.type) for v in region.inputs}
        ins = list(env.values())
        tape = Tape(b, region, env, policy, reverse_over=over)
        outs = [env[v] for v in region.outputs]
        cts = [b.input(contiguous_type(v.type)) for v in outs]
        seeds: dict[Var, Var] = {}
        for o, c in zip(outs, cts, strict=True):
            seeds[o] = b.add(seeds.get(o), c)
        try:
            found = tape.pull(seeds, ins)
        except FallBack as why:
            policy.note(why.eqn, why.reason)
            over |= {why.eqn}
            continue
        grads = [
            found[v] if v in found else b.zero(v.type) for v in ins if not isinstance(v.type, SeqType) or v in found
        ]
        return lower_grads(b.region([*outs, *grads]), policy)


def check_adjoint(region: Region, f: Callable[[list[Any]], Sequence[Tensor]], policy: Policy, *, seed: int = 0,
                  rel: float = 1e-7, cut: Callable[[list[Any]], Sequence[Tensor]] | None = None) -> None:  # fmt: skip
    """Values of a region against `f`, its hypergradient against central differences of `f` (or of `cut`, if given)."""
    at = values_for(region, seed)
    made = joint(region, policy)
    cts = [torch.linspace(0.5, 1.5, max(v.type.numel, 1), dtype=torch.float64).reshape(v.type.shape)
           for v in region.outputs]  # type: ignore[union-attr]  # fmt: skip
    n = len(region.outputs)
    found = run(made, [*at, *cts])
    for a, b in zip(found[:n], f(at), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    along = values_for(region, seed + 1)
    mine = sum(dot(g, d) for g, d in zip(found[n:], along, strict=True))

    def value(x: list[Any]) -> float:
        return sum(dot(y, c) for y, c in zip((cut or f)(x), cts, strict=True))

    expected = slope(value, at, along)
    assert agrees(mine, expected, rel), (mine, expected)
