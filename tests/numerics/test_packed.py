"""Packed sequences: lengths are numbers that later calls must find again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mlc

H = 1e-5
KINDS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


class Net(nn.Module):
    def __init__(self, kind: str, batch_first: bool) -> None:
        super().__init__()
        self.first = batch_first
        self.rnn = KINDS[kind](3, 2, batch_first=batch_first, bidirectional=kind == "gru")
        self.out = nn.Linear(4 if kind == "gru" else 2, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        packed = pack_padded_sequence(x, lengths, batch_first=self.first, enforce_sorted=False)
        h, n = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(h.sum(1) / n.unsqueeze(1))


def make(kind: str, first: bool, lengths: list[int], shift: float = 0.0) -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = Net(kind, first).double()
    w = torch.zeros(4, dtype=torch.float64) + shift * torch.arange(4.0)
    data = [(torch.randn(4, 5, 3).double(), torch.tensor(lengths), torch.randint(3, (4,))) for _ in range(2)]
    return net, w.requires_grad_(), data


def train(net: nn.Module, w: Tensor, data: Any) -> Tensor:
    opt = torch.optim.SGD(net.parameters(), lr=0.3)
    for x, n, y in data:
        opt.zero_grad()
        (w.sigmoid() * F.cross_entropy(net(x, n), y, reduction="none")).mean().backward()
        opt.step()
    x, n, y = data[0]
    return F.cross_entropy(net(x, n), y)


@pytest.mark.parametrize("first", [True, False], ids=["batch first", "time first"])
@pytest.mark.parametrize("kind", KINDS)
def test_differences_with_these_and_with_other_lengths(kind: str, first: bool) -> None:
    compiled = mlc.compile(train)
    for lengths, recordings in (([5, 2, 3, 1], 1), ([5, 2, 3, 1], 1), ([4, 4, 1, 2], 2)):
        args = make(kind, first, lengths)
        value = compiled(*args)
        assert value.item() == pytest.approx(train(*make(kind, first, lengths)).item(), rel=1e-12)
        (got,) = torch.autograd.grad(value, [args[1]])
        up, down = (train(*make(kind, first, lengths, s)).item() for s in (H, -H))
        assert (got @ torch.arange(4.0).double()).item() == pytest.approx((up - down) / (2 * H), rel=1e-6)
        assert compiled.recordings == recordings
