"""The user's function itself, run eagerly on the sandbox: its values, its state, and how it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mlc.check.sandbox import Sandbox
from mlc.ir.trees import each_tensor
from mlc.ir.types import Loc
from mlc.trace.python.frames import is_user_code
from mlc.trace.python.inputs import walk

__all__ = ["Failure", "Function", "line_of"]

_A: Any = torch.ops.aten
# Samples whose distribution depends on tensors: to PyTorch's derivative they are constants.
_SAMPLES = {
    _A.normal.Tensor_float, _A.normal.float_Tensor, _A.normal.Tensor_Tensor, _A.normal.Tensor_float_out,
    _A.normal.float_Tensor_out, _A.normal.Tensor_Tensor_out, _A.bernoulli.default, _A.bernoulli.out,
    _A.bernoulli.Tensor, _A.bernoulli_.Tensor, _A.multinomial.default, _A.multinomial.out, _A.poisson.default,
    _A.binomial.default,
}  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """How the function fails when it runs by itself.

    Attributes:
        error: What it raised.
        loc: The user's line.
        torchs: Whether an operator of PyTorch's raised it (not the user's own code).
        mixed: Whether the operands of that operator are of several floating types.
    """

    error: Exception
    loc: Loc | None
    torchs: bool
    mixed: bool

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {(str(self.error).splitlines() or [''])[0]}"


class Function:
    """The plain function of a check.

    Args:
        box: Where it runs.
        fn: The user's function.
        args: Of the call.
        kwargs: Of the call.
    """

    def __init__(self, box: Sandbox, fn: Any, args: Any, kwargs: Any) -> None:
        self.box, self.fn, self.args, self.kwargs = box, fn, args, kwargs
        self.failure: Failure | None = None
        self.state: dict[Any, Tensor] = {}
        self.generator = torch.get_rng_state()
        self._samples: list[Tensor] = []
        self.leaves = self._base()

    def _base(self) -> list[Any]:
        """The run as it is."""
        self.box.reset()
        try:
            with _graphs_kept():
                leaves = pytree.tree_leaves(self.fn(*self.args, **self.kwargs))
        except Exception:
            self.failure = self._failing()
            return []
        self.state = self.now()
        self.generator = torch.get_rng_state()
        return [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]

    def keep_draws(self) -> None:
        """Later runs use the samples of the run as it is (for programs that have such draws)."""
        self._samples.clear()
        self.box.reset()
        with _graphs_kept(), _Draws(self._samples, keep=True):
            self.fn(*self.args, **self.kwargs)

    def _failing(self) -> Failure | None:
        """The run again, its operators watched."""
        self.box.reset()
        calls, operators = _Calls(), _Operators()  # type: ignore[no-untyped-call]
        try:
            with _graphs_kept(), calls, operators:
                self.fn(*self.args, **self.kwargs)
        except Exception as e:
            watched = [w for w in (operators, calls) if w.error is e]
            mixed = any(len(w.types) > 1 for w in watched)
            return Failure(e, line_of(e), bool(watched), mixed)
        return None

    def now(self) -> dict[Any, Tensor]:
        """Values of everything reachable (not ``.grad``: meta-parameters deliberately differ there)."""
        at = walk(self.fn, self.args, self.kwargs).at
        return {
            p: t.detach().clone()
            for p, t in at.items()
            if p[-1] != ".grad" and t.layout is torch.strided and not t.is_meta
        }

    def run(self, move: Callable[[], None]) -> list[Any]:
        """What it returns after the meta-parameters were moved; draws are those that were kept."""
        self.box.reset()
        move()
        with _graphs_kept(), _Draws(self._samples) if self._samples else contextlib.nullcontext():
            leaves = pytree.tree_leaves(self.fn(*self.args, **self.kwargs))
        return [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]

    def last(self) -> None:
        """Once more as it is: files and other things that no sandbox holds are left as the call itself leaves them."""
        if self.failure is None:
            self.run(lambda: None)


class _Draws(TorchDispatchMode):
    """Keeps samples, or gives kept ones again in the same order (the generator moves all the same)."""

    def __init__(self, samples: list[Tensor], keep: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._samples, self._keep, self._at = samples, keep, 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _SAMPLES:
            if self._keep:
                self._samples.append(out.detach().clone())
            elif self._at < len(self._samples) and self._samples[self._at].shape == out.shape:
                out.copy_(self._samples[self._at])
            self._at += 1
        return out


class _Noticed:
    """Remembers the operation that failed first, and the floating types of its operands."""

    error: Exception | None = None
    types: frozenset[torch.dtype] = frozenset()

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call it."""
        try:
            return func(*args, **(kwargs or {}))
        except Exception as e:
            if self.error is not e:
                found: set[torch.dtype] = set()
                each_tensor((args, kwargs or {}), lambda t: found.add(t.dtype))
                self.error, self.types = e, frozenset(t for t in found if t.is_floating_point or t.is_complex)
            raise


class _Calls(_Noticed, TorchFunctionMode):
    def __torch_function__(self, func: object, types: object, args: object = (), kwargs: object = None) -> Any:
        return self.call(func, args, kwargs)


class _Operators(_Noticed, TorchDispatchMode):
    def __torch_dispatch__(self, func: object, types: object, args: object = (), kwargs: object = None) -> Any:
        return self.call(func, args, kwargs)


def line_of(e: BaseException) -> Loc | None:
    """The user's line that an exception passed last."""
    last: Loc | None = None
    first: Loc | None = None
    tb = e.__traceback__
    while tb is not None:
        code = tb.tb_frame.f_code
        if is_user_code(code):
            last = Loc(code.co_filename, tb.tb_lineno, code.co_name, first)
            first = first or last
        tb = tb.tb_next
    return last


@contextlib.contextmanager
def _graphs_kept() -> Iterator[None]:
    """Inner gradients keep their graphs, as mlc does: every step may use a value made before the loop."""
    engine: Any = torch.autograd
    original = engine._engine_run_backward

    def run(outputs: object, grads: object, keep_graph: object = False, *args: object, **kwargs: object) -> Any:
        return original(outputs, grads, True, *args, **kwargs)

    engine._engine_run_backward = run
    try:
        yield
    finally:
        engine._engine_run_backward = original
