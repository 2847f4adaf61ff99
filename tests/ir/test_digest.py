"""A hash tells programs apart by everything that they compute, and by nothing else."""

from dataclasses import replace

import torch

from mlc.ir.core import Loop
from mlc.ir.digest import digest
from mlc.ir.program import Input, Program
from tests.ir.regions import loop_program
from tests.passes.regions import loop_of, recorded

X = torch.rand(3)


def of(region, role: str = "meta") -> str:
    inputs = tuple(Input(f"x{i}", role, v.type) for i, v in enumerate(region.inputs))
    return digest(Program("p", region, inputs, len(region.outputs)))


def test_names_and_objects_do_not_count() -> None:
    one, two = (recorded(lambda x: x.sin() + 1, X) for _ in range(2))
    assert of(one) == of(two)
    assert digest(loop_program()) == digest(replace(loop_program(), name="other", loc=None, notes=()))


def test_what_is_computed_counts() -> None:
    found = [
        of(recorded(f, X))
        for f in (
            lambda x: x.sin(), lambda x: x.cos(), lambda x: x.sin() + 1, lambda x: x.sin() + 2, lambda x: x.sin() + 1.0,
            lambda x: torch.ops.aten.add.Tensor(x, x), lambda x: torch.ops.aten.add.Tensor(x, x, alpha=2),
            lambda x: (x.sin(), x.cos()), lambda x: (x.cos(), x.sin()), lambda x: (x.sin(), x.sin()),
        )
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert of(recorded(lambda x: x.sin(), X.double())) not in found
    assert of(recorded(lambda x: x.sin(), X), "data") not in found


def test_what_is_handed_out_counts() -> None:
    """The same equations, other results."""
    region = recorded(lambda x: (x.sin(), x.cos()), X)
    one, two = region.outputs
    outputs = [(one, two), (two, one), (one, one), (two, two)]
    assert len({of(replace(region, outputs=o)) for o in outputs}) == len(outputs)


def test_how_a_loop_runs_counts() -> None:
    region = loop_of(lambda c, x: (c + x, c * x), [X], [], [X], trips=3, n_emit=1)
    (e,) = region.eqns
    assert isinstance(e.op, Loop)
    ops = [e.op, replace(e.op, reverse=True), replace(e.op, trips=None), replace(e.op, host=(0,))]
    assert len({of(replace(region, eqns=(e.with_(op=op),))) for op in ops}) == len(ops)
    assert of(replace(region, eqns=(e.with_(op=replace(e.op, label="train")),))) == of(region)
