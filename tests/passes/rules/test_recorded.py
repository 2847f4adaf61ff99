"""Recorded rules: what they depend on, and that they are recorded once."""

import torch

from mlc.ir.builder import Builder
from mlc.ir.types import TensorType
from mlc.passes.autodiff.transpose import forward_rule
from mlc.passes.rules.recorded import reverse_rule, signature
from tests.passes.regions import recorded as region_of

X = torch.rand(4, dtype=torch.float64)


def test_a_rule_is_recorded_once_per_signature() -> None:
    one, two = (region_of(lambda x: x.tanh(), X).eqns[0] for _ in range(2))
    t = one.outs[0].type
    assert reverse_rule(one, (True,), (t,)) is reverse_rule(two, (True,), (t,))
    assert forward_rule(one, (t,)) is forward_rule(two, (t,))
    other = region_of(lambda x: x.tanh(), X.float()).eqns[0]
    assert reverse_rule(other, (True,), (other.outs[0].type,)) is not reverse_rule(one, (True,), (t,))


def test_a_rule_depends_on_what_is_active() -> None:
    e = region_of(lambda x, y: x * y, X, X).eqns[0]
    t = e.outs[0].type
    rules = [reverse_rule(e, active, (t,)) for active in ((True, True), (True, False), (False, True))]
    assert [len(r.region.outputs) for r in rules] == [2, 1, 1]
    assert len({id(r) for r in rules}) == 3


def test_a_rule_depends_on_the_default_dtype() -> None:
    """Formulas make tensors of numbers, whose type is the default one."""
    b = Builder()
    x = b.input(TensorType.of(X))
    b.emit(torch.ops.aten.tanh.default, (x,), (TensorType.of(X),))
    before = torch.get_default_dtype()
    found = set()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            found.add(signature(b.eqns[0]))
    finally:
        torch.set_default_dtype(before)
    assert len(found) == 2
