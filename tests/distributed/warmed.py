"""Imported by the server that test processes are forked from: what the first call of a process costs is paid once."""

import torch
from torch import nn

import mlc
from tests.distributed.world import run  # noqa: F401 (imports torch.distributed)


def _loop(model: nn.Module, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    opt = torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-3)
    for _ in range(2):
        opt.zero_grad()
        (scale * model(x)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    return model(x).sum()


torch.set_num_threads(1)
_model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
mlc.compile(_loop)(
    _model, torch.ones((), dtype=torch.float64, requires_grad=True), torch.ones(4, 3).double()
).backward()
