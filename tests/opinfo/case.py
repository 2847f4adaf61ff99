"""One operator as a bilevel program, and the verdict on its hypergradient.

The inner level takes one gradient step (lr = 1) on ``sum(c * y + 0.5 * b * y * y)``, ``y = op(w + eta * s)``;
the outer loss is ``sum(d * w_new)``.  Its derivative by eta is ``-<d, H s>`` with H the Hessian of the inner
loss, by w it is ``d - H d``: purely second order.  Referees, both float64: the plain unroll under
``create_graph=True``, and central differences of the eager program along eta.  Of several step sizes the
neighbours that agree best are kept.
"""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import mlc
from mlc.passes.autodiff.adjoint import FallBack

# Samples of these write one place several times; the variant "grad" of each does not.
UNDEFINED = {f"nn.functional.max_unpool{n}d" for n in (1, 2, 3)}


def _as_strided_scatter(x: Tensor, src: Tensor, size: Any, stride: Any, storage_offset: int = 0) -> Tensor:
    where = torch.full((), storage_offset)
    for n, step in zip(size, stride, strict=True):
        where = where.unsqueeze(-1) + torch.arange(n) * step
    return x.reshape(-1).index_put((where.reshape(-1),), src.reshape(-1)).reshape(x.shape)


# PyTorch's first derivative of these is wrong: the referees differentiate another spelling.
RESPELT = {"as_strided_scatter": _as_strided_scatter}
RANKS = ("unusable", "ok", "refused", "raw", "wrong")
STEPS = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6)
SEED = 1234


@dataclass
class Verdict:
    """What was found for one operator: ok, wrong, refused, raw or unusable."""

    op: str
    verdict: str
    mode: str = ""
    note: str = ""
    seconds: float = 0.0
    order: int = 2


class Case:
    """One sample of one operator."""

    def __init__(self, op: Any, sample: Any, order: int = 2) -> None:
        self.op = op
        self.order = order
        self.sample = sample
        self.ws = [w.detach().clone() for w in self.parameters(sample)]
        gen = torch.Generator().manual_seed(7)
        self.d, self.s = ([_like(w, gen) for w in self.ws] for _ in range(2))
        self.fn = RESPELT.get(op.name, op.op)
        self.create_graph = False
        self.low_precision = False

    @staticmethod
    def parameters(sample: Any) -> list[Tensor]:
        """The differentiable tensors of a sample."""
        leaves = torch.utils._pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
        return [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]

    def _rebuild(self, a: Any, values: Iterator[Tensor]) -> Any:
        if isinstance(a, Tensor):
            return next(values) if a.requires_grad else a
        if isinstance(a, (tuple, list)):
            parts = [self._rebuild(x, values) for x in a]
            return type(a)(*parts) if hasattr(a, "_fields") else type(a)(parts)
        if isinstance(a, dict):
            return {k: self._rebuild(v, values) for k, v in a.items()}
        return a

    def outputs(self, ws: list[Tensor]) -> list[Tensor]:
        """Floating results of the operator, complex ones as real pairs."""
        s = self.sample
        x, args, kwargs = self._rebuild((s.input, s.args, s.kwargs), iter(ws))
        out = self.op.gradcheck_wrapper(self.fn, x, *args, **kwargs)
        if s.output_process_fn_grad is not None:
            out = s.output_process_fn_grad(out)
        flat = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        flat = [t.to_dense() if t.layout is not torch.strided else t for t in flat]
        flat = [_pairs(t) for t in flat]
        flat = [t for t in flat if t.is_floating_point() and t.requires_grad]
        self.low_precision |= any(t.dtype is not torch.float64 for t in flat)
        return flat

    def program(self, ws: list[Tensor], eta: Tensor) -> Tensor:
        """The unmodified user's loop; runs eagerly too."""
        at = [w + eta * s for w, s in zip(ws, self.s, strict=True)]
        loss = _quadratic(self.outputs(at))
        if self.order == 3:
            slopes = torch.autograd.grad(loss, at, create_graph=True, allow_unused=True)
            loss = _quadratic([_pairs(g) for g in slopes if g is not None])
        grads = torch.autograd.grad(loss, ws, create_graph=self.create_graph, allow_unused=True)
        new = [w if g is None else w - g for w, g in zip(ws, grads, strict=True)]
        return sum(_real(w * d).sum() for w, d in zip(new, self.d, strict=True))

    # ---- the three ways to the derivative

    def fresh(self) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(SEED)
        ws = [w.clone().requires_grad_() for w in self.ws]
        return ws, torch.zeros((), dtype=torch.float64, requires_grad=True)

    def gradient(self, fn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """(d/d eta, H d) by autograd through ``fn``."""
        ws, eta = self.fresh()
        out = fn(ws, eta)
        g = torch.autograd.grad(out, [eta, *ws], allow_unused=True)
        second = [(d.conj() - (0 if x is None else x)).flatten() for d, x in zip(self.d, g[1:], strict=True)]
        first = torch.zeros(()) if g[0] is None else g[0]
        return first.detach(), torch.cat(second).detach()

    def unrolled(self) -> tuple[Tensor, Tensor]:
        self.create_graph = True
        try:
            return self.gradient(self.program)
        finally:
            self.create_graph = False

    def differences(self) -> tuple[float, float]:
        """Central differences along eta, and the relative disagreement of the best pair of steps."""
        found = []
        middle = self._value(0.0)
        for h in STEPS:
            ends = []
            for sign in (1, -1):
                ends.append(self._value(sign * h))
            found.append((ends[0] - ends[1]) / (2 * h))
        if abs(ends[0] + ends[1] - 2 * middle) > 1e-7 * max(1.0, abs(middle)) + 1e-2 * abs(ends[0] - ends[1]):
            return found[-1], 1.0  # a kink or a jump
        pairs = [(abs(a - b) / max(abs(a), abs(b), 1e-8), b) for a, b in pairwise(found)]
        spread, value = min(pairs, key=lambda p: p[0] if p[0] == p[0] else float("inf"))
        return value, spread

    def _value(self, at: float) -> float:
        ws, _ = self.fresh()
        return self.program(ws, torch.tensor(at, dtype=torch.float64)).item()

    def tame(self) -> None:
        """Smaller parameters where numbers are so large that rounding is all there is to compare (matrix_exp)."""
        for _ in range(12):
            large = any(w.numel() and float(w.abs().max()) > 1e4 for w in self.ws)
            if not (large or abs(self._value(0.0)) > 1e7):
                return
            self.ws = [w * 0.3 for w in self.ws]

    def smooth(self) -> bool:
        """Whether the program has finite values and something to differentiate."""
        ws, eta = self.fresh()
        return bool(torch.isfinite(self.program(ws, eta)).all())


def _quadratic(ys: list[Tensor]) -> Tensor:
    return sum((y * _weights(y, 0.7) + 0.5 * _weights(y, 0.3) * y * y).sum() for y in ys)  # type: ignore[return-value]


def _pairs(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _real(t: Tensor) -> Tensor:
    return t.real if t.is_complex() else t


def _weights(y: Tensor, phase: float) -> Tensor:
    n = y.numel()
    return 0.6 + 0.4 * torch.cos(torch.arange(n, dtype=y.dtype) * 1.3 + phase).reshape(y.shape)


def _like(w: Tensor, gen: torch.Generator) -> Tensor:
    return torch.randn(w.shape, dtype=w.dtype, generator=gen)


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds (main thread only)."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@contextmanager
def counting_fallbacks() -> Iterator[list[str]]:
    """Reasons for which a mixed product gave way to reverse over reverse."""
    found: list[str] = []
    init = FallBack.__init__

    def counted(self: FallBack, eqn: Any, reason: str) -> None:
        found.append(reason)
        init(self, eqn, reason)

    FallBack.__init__ = counted
    try:
        yield found
    finally:
        FallBack.__init__ = init


def samples(op: Any, most: int, variants: int = 0) -> list[Any]:
    """A few small samples with something to differentiate, spread over the list, and some with other keywords."""
    found = []
    torch.manual_seed(0)
    # to the end: some generators hold no_grad while they are suspended
    for s in list(op.sample_inputs("cpu", torch.float64, requires_grad=True)):
        ws = Case.parameters(s)
        if ws and all(w.layout is torch.strided for w in ws) and 0 < sum(w.numel() for w in ws) <= 20000:
            found.append(s)
    n = len(found)
    spread = [(n * (2 * k + 1)) // (2 * most) for k in range(most)] if n else []
    first: dict[Any, int] = {}
    for i, s in enumerate(found):
        first.setdefault(_variant(s), i)
    others = [i for i in first.values() if i not in spread][:variants]
    return [found[i] for i in dict.fromkeys([*spread, *others])]


def _variant(sample: Any) -> Any:
    """Which keywords a sample gives, and its words and flags: what chooses between formulas, unlike sizes."""

    def word(a: Any) -> Any:
        if isinstance(a, (tuple, list)):
            return tuple(map(word, a))
        return a if isinstance(a, (bool, str)) or a is None else type(a).__name__

    return tuple(map(word, sample.args)), tuple((k, word(v)) for k, v in sorted(sample.kwargs.items()))


def name_of(op: Any) -> str:
    return op.name + (f".{op.variant_test_name}" if op.variant_test_name else "")


def judge(op: Any, most: int = 2, seconds: int = 60, order: int = 2, variants: int = 0) -> Verdict:
    """The worst verdict over the operator's samples, at one order of differentiation."""
    start = time.perf_counter()
    if name_of(op) in UNDEFINED:
        return Verdict(name_of(op), "unusable", note="repeated indices: PyTorch's gradient is undefined", order=order)
    worst = Verdict(name_of(op), "unusable", note="no differentiable float64 sample")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limit(seconds):
                for s in samples(op, most, variants):
                    v = _judge(op, s, order)
                    if not torch.is_grad_enabled():
                        torch.set_grad_enabled(True)
                        v = Verdict(v.op, "wrong", note=f"gradients were left disabled; {v.note}")
                    worst = max(worst, v, key=lambda x: RANKS.index(x.verdict))
        except TimeoutError as err:
            worst = Verdict(name_of(op), "raw", note=f"TimeoutError: {err}")
    worst.seconds, worst.order = round(time.perf_counter() - start, 2), order
    return worst


def _judge(op: Any, sample: Any, order: int) -> Verdict:
    name = name_of(op)
    case = Case(op, sample, order)
    try:
        case.tame()
        if not case.smooth():
            return Verdict(name, "unusable", note="value not finite")
        value, spread = case.differences()
    except TimeoutError:
        raise
    except Exception as err:
        return Verdict(name, "unusable", note=f"first derivative: {_line(err)}")
    try:
        unrolled, why = case.unrolled(), ""
    except TimeoutError:
        raise
    except Exception as err:
        unrolled, why = None, _line(err)
    try:
        case.fn = op.op
        with counting_fallbacks() as fallbacks:
            ours = case.gradient(mlc.compile(case.program))
    except TimeoutError:
        raise
    except mlc.MlcError as err:
        if unrolled is None or not bool((unrolled[1] != 0).any()):
            return Verdict(name, "unusable", note=f"no second derivative in PyTorch: {why or 'zero'}")
        return Verdict(name, "refused", note=_line(err))
    except Exception as err:
        return Verdict(name, "raw", note=f"{type(err).__name__}: {_line(err)}")
    v = _compare(case, name, ours, unrolled, value, spread)
    v.mode = "reverse" if fallbacks else "mixed"
    return v


def _line(err: BaseException) -> str:
    return str(err).strip().split("\n")[0][:160]


def _compare(
    case: Case,
    name: str,
    ours: tuple[Tensor, Tensor],
    unrolled: tuple[Tensor, Tensor] | None,
    value: float,
    spread: float,
) -> Verdict:
    eta = float(ours[0])
    scale = max(abs(value), 1e-3, 1e-6 * float(ours[1].abs().max()) if ours[1].numel() else 0)
    gap = abs(eta - value) / scale
    trusted = spread < 1e-4
    same = None
    if unrolled is not None:
        both = [torch.cat([a.reshape(1).to(b.dtype), b]) for a, b in (ours, unrolled)]
        same = float((both[0] - both[1]).abs().max() / max(float(both[1].abs().max()), 1e-3))
    zero = not bool((ours[1] != 0).any()) and eta == 0 and abs(value) < 1e-9
    if zero and (unrolled is None or not bool((unrolled[1] != 0).any())):
        return Verdict(name, "unusable", note="second derivative is zero")
    detail = f"unroll {'-' if same is None else f'{same:.0e}'}, differences {gap:.0e} (spread {spread:.0e})"
    agrees = same is not None and same <= 1e-7
    if gap <= max(1e-4, 10 * spread) and trusted:
        theirs = None if unrolled is None else abs(float(unrolled[0]) - value) / scale
        if theirs is None:
            return Verdict(name, "ok", note="PyTorch's own unroll is missing")
        if not theirs <= 1e-3:
            return Verdict(name, "ok", note=f"PyTorch's own unroll is wrong ({theirs:.0e})")
        return Verdict(name, "ok" if same is not None and same <= 1e-6 else "wrong", note="" if agrees else detail)
    if same is not None and same <= 1e-5 and not trusted:
        return Verdict(name, "ok", note="differences not conclusive")
    if agrees and case.low_precision:
        return Verdict(name, "ok", note="computed in low precision: differences not conclusive")
    if unrolled is not None and not bool(torch.isfinite(unrolled[1]).all()) and not trusted:
        return Verdict(name, "unusable", note="no second derivative at this point")
    return Verdict(name, "wrong", note=detail)
