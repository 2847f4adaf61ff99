"""The interpreter: values are dropped at their last use, results never share memory by accident, layouts are kept."""

import weakref
from typing import Any

import torch
from torch import Tensor

from mlc.ir.builder import Builder
from mlc.ir.core import Index, Pack, Random, aten
from mlc.ir.types import SeqType, TensorType
from mlc.runtime.interpreter.interpreter import compile_region, run_random
from tests.passes.regions import emit, recorded, run

X = torch.rand(4, 5, dtype=torch.float64)
T = TensorType.of(X)


def test_a_value_is_dropped_at_its_last_use() -> None:
    """Arguments too: the list that they come in is emptied."""
    alive: list[int] = []
    refs: list[Any] = []

    def watch(e: Any) -> Any:
        if e.op is not aten("cosh"):  # one that is never written over its operand
            return None

        def call(args: list[Any]) -> list[Tensor]:
            alive.append(sum(r() is not None for r in refs))
            out = args.pop().cosh()
            refs.append(weakref.ref(out))
            return [out]

        return call

    f = compile_region(recorded(lambda x: x.cosh().cosh().cosh().cosh(), X), watch)
    given = [X.clone()]
    refs.append(weakref.ref(given[0]))
    f(given)
    assert not given and alive == [1, 1, 1, 1]  # the operand alone


def test_keyword_arguments_and_masks_of_results_arrive() -> None:
    y = torch.rand(4, 5, dtype=torch.float64)
    (out,) = run(recorded(lambda x, y: torch.ops.aten.add.Tensor(x, y, alpha=3), X, y), [X, y])
    torch.testing.assert_close(out, X + 3 * y)
    mean, var = run(recorded(lambda x: torch.var_mean(x, 1, correction=0)[::-1], X), [X])
    torch.testing.assert_close(mean, X.mean(1))
    torch.testing.assert_close(var, X.var(1, correction=0))


def test_numbers_that_python_does_not_spell_arrive() -> None:
    (out,) = run(recorded(lambda x: x.clamp(min=float("-inf"), max=float("inf")) + float("nan"), X), [X])
    assert out.isnan().all()
    (out,) = run(recorded(lambda x: x * 1e-300 * 0.1, X), [X])
    assert torch.equal(out, X * 1e-300 * 0.1)


def test_a_result_is_written_over_an_operand_only_where_nobody_reads_that_again() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        a = x @ x.t()
        b = a.exp()
        c = b + a
        return c, c.t().sin(), a * 2

    want = f(X)
    given = X.clone()
    for a, b in zip(run(recorded(f, X), [given]), want, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(given, X)


def test_as_strided_reads_the_layout_that_was_recorded() -> None:
    region = recorded(lambda x: torch.as_strided(x, (4,), (6,)), X)
    torch.testing.assert_close(run(region, [X.t().contiguous().t()])[0], torch.as_strided(X, (4,), (6,)))


def test_sequences() -> None:
    b = Builder(merge=False)
    x = b.input(T)
    (seq,) = b.emit(Pack(), (x, emit(b, "sin", x), emit(b, "cos", x)), (SeqType(T, 3),))
    other = b.input(SeqType(T, 3))
    picked = [b.emit(Index(i), (s,), (T,))[0] for s in (seq, other) for i in (0, -1)]
    found = run(b.region(picked), [X, [X + 1, X + 2, X + 3]])
    for a, b_ in zip(found, (X, X.cos(), X + 1, X + 3), strict=True):
        torch.testing.assert_close(a, b_)


def test_draws_fill_memory_laid_out_as_recorded() -> None:
    """A permuted tensor draws in its own order of memory, as PyTorch does."""
    like = X.t()
    t = TensorType.of(like)
    torch.manual_seed(0)
    want = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).uniform_(2, 3)
    torch.manual_seed(0)
    (found,) = run_random(Random(aten("uniform_"), fill=True), (t.shape, t.stride, t.dtype, t.device, 2, 3), {})
    assert torch.equal(found, want) and found.stride() == want.stride()
