"""Dead code of a recording goes evenly: what one trip of a loop needs stays in all of them."""

import torch
from torch import Tensor, nn

import mlc
from mlc.ir.core import Loop


def test_what_only_the_last_trip_needs_stays_in_all() -> None:
    """The last loss is returned: the others' are dead, but the trips must stay alike to be one loop."""

    def train(w: Tensor, xs: list[Tensor]) -> tuple[Tensor, Tensor]:
        p = nn.Parameter(torch.ones(4, dtype=torch.float64))
        opt = torch.optim.SGD([p], lr=0.1)
        for x in xs:
            opt.zero_grad()
            penalty = (p * w).exp().sum()  # of no use to the gradient
            ((p * w).sin() * x).sum().backward()
            opt.step()
        return (p * w).sum(), penalty

    w, xs = torch.rand(4, dtype=torch.float64, requires_grad=True), [torch.rand(4).double() for _ in range(4)]
    program = mlc.trace(train, w, xs)
    (op,) = [e.op for e in program.region.eqns if isinstance(e.op, Loop)]
    assert op.count == 4 and not program.notes
    cf = mlc.compile(train)
    for a, b in zip((cf(w, xs), cf(w, xs))[1], train(w, xs), strict=True):
        torch.testing.assert_close(a.detach(), b.detach())


def test_what_nobody_needs_goes() -> None:
    def train(w: Tensor, xs: list[Tensor]) -> Tensor:
        p = nn.Parameter(torch.ones(4, dtype=torch.float64))
        opt = torch.optim.SGD([p], lr=0.1)
        for x in xs:
            opt.zero_grad()
            (p * w).erfinv().sum()
            ((p * w).sin() * x).sum().backward()
            opt.step()
        return (p * w).sum()

    w, xs = torch.rand(4, dtype=torch.float64, requires_grad=True), [torch.rand(4).double() for _ in range(4)]
    assert not any("erfinv" in str(e.op) for e in mlc.trace(train, w, xs).region.walk())
