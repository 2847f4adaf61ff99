"""Norms of what loops carry."""

import torch

from mlc.ir.watch import Watch
from mlc.runtime.interpreter.meter import Meter


def test_cotangents_are_taken_as_they_enter_and_tangents_as_they_leave() -> None:
    trips = [[torch.tensor([3.0 * k, 4.0]), torch.zeros(1)] for k in (1, 0)]
    for kind, expected in (("adjoint", [5.0]), ("tangent", [4.0])):
        m = Meter(Watch("L1", kind, (0, 1), True))
        m.enter(trips[0])
        m.leave(trips[1])
        assert m.read().norms.tolist() == expected


def test_several_dtypes_and_no_trip() -> None:
    m = Meter(Watch("L1", "adjoint", (0, 1), False))
    assert m.read().norms.tolist() == []
    m.enter([torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([4.0])])
    assert m.read().norms.tolist() == [5.0]
