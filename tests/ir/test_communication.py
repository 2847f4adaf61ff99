"""Collectives in programs: which ones a region runs, in which loops, and which repeat one another."""

from __future__ import annotations

import torch

from mlc.ir.builder import Builder
from mlc.ir.communication.collectives import operator
from mlc.ir.communication.sequence import communicates, fingerprint, sequence
from mlc.ir.core import Region, aten
from mlc.ir.types import TensorType

T = TensorType(torch.float64, (3,), (1,), torch.device("cpu"))


def _region(second: str, group: str = "0") -> Region:
    b = Builder(merge=False)
    x, y = b.input(T), b.input(T)
    (a,) = b.emit(operator("all_reduce"), (x, "sum", "0"), (T,))
    (c,) = b.emit(operator("all_reduce"), ({"x": x, "y": y, "a": a}[second], "sum", group), (T,))
    (out,) = b.emit(aten("add", "Tensor"), (a, c), (T,))
    return b.region([out])


def _said(r: Region) -> list[str]:
    return [text for text, _ in sequence(r)]


def test_operators_types_literals_and_groups_in_the_order_of_their_use() -> None:
    assert _said(_region("y", "7")) == ["all_reduce(f64[3], sum, group 0)", "all_reduce(f64[3], sum, group 1)"]
    assert _said(_region("y", "9")) == _said(_region("y", "7"))  # the group beside has another name elsewhere
    assert fingerprint(_said(_region("y"))) != fingerprint(_said(_region("y", "7")))


def test_which_one_is_repeated_belongs_to_the_sequence() -> None:
    assert _said(_region("x"))[1] == "repeats 0: all_reduce(f64[3], sum, group 0)"
    assert _said(_region("y"))[1] == _said(_region("a"))[1] == "all_reduce(f64[3], sum, group 0)"


def test_a_region_that_does_not_communicate() -> None:
    b = Builder(merge=False)
    x = b.input(T)
    r = b.region([b.emit(aten("neg"), (x,), (T,))[0]])
    assert not communicates(r)
    assert sequence(r) == []
    assert communicates(_region("x"))
