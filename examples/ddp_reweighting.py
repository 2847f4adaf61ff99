"""Learn how much each example counts on many processes, with DistributedDataParallel; 1, 2 or 4 give the same result.

    torchrun --nproc-per-node=2 examples/ddp_reweighting.py

Every process trains on its part of each batch, as in any ``torchrun`` script; the loop is an ordinary one.  The
network that weighs the examples is the meta-parameter: it is wrapped in ``DistributedDataParallel`` as well, so its
hypergradient is averaged over processes, like any ``.grad``.  Some labels are wrong, and it learns which.
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mlc


@mlc.compile
def validate_after_training(model, weigh, batches, val):
    """Train on weighted examples, then evaluate on clean ones."""
    opt = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-4)
    for x, y, told in batches:
        opt.zero_grad()
        losses = F.cross_entropy(model(x), y, reduction="none")
        (weigh(told).squeeze(-1) * losses).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    return F.cross_entropy(model(val[0]), val[1])


def examples(n, g):
    """Points in two classes; a hint that is higher where the label is wrong."""
    x = torch.randn(n, 2, generator=g)
    y = (x[:, 0] > 0).long()
    wrong = torch.rand(n, generator=g) < 0.4
    told = wrong.float()[:, None] + 0.3 * torch.randn(n, 1, generator=g)
    return x, torch.where(wrong, 1 - y, y), told.to(x.dtype), y


def part(t, rank, n):
    """This process's part of a batch."""
    return t.chunk(n)[rank]


def networks(seed=0):
    """A classifier, and the network that weighs its examples."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), nn.Sequential(nn.Linear(1, 1), nn.Sigmoid())


def problem(rank, n):
    """This process's part of the training batches and of the clean examples."""
    g = torch.Generator().manual_seed(0)  # the same data everywhere, of which each process takes its part
    train = [examples(32, g) for _ in range(4)]
    x, _, _, y = examples(32, g)
    return [tuple(part(t, rank, n) for t in batch[:3]) for batch in train], (part(x, rank, n), part(y, rank, n))


def example_args():
    """Arguments for one process."""
    return (*networks(), *problem(0, 1))


def main(steps=8):
    """Train the weights; returns the validation losses, averaged over processes."""
    torch.set_default_dtype(torch.float64)
    if "RANK" not in os.environ:  # run by plain python: a world of one
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    batches, val = problem(rank, n)
    start, _ = networks()
    model, weigh = map(DistributedDataParallel, networks())
    meta = torch.optim.Adam(weigh.parameters(), lr=0.3)
    history = []
    for _ in range(steps):
        model.module.load_state_dict(start.state_dict())
        meta.zero_grad()
        loss = validate_after_training(model, weigh, batches, val)
        loss.backward()
        meta.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        history.append(float(mean) / n)
    if rank == 0:
        print(f"{n} process{'es' * (n > 1)}: validation loss {history[0]:.10f} -> {history[-1]:.10f}")
        right, wrong = weigh.module(torch.tensor([[0.0], [1.0]])).flatten().tolist()
        print(f"weight of a right label {right:.3f}, of a wrong one {wrong:.3f}")
    dist.destroy_process_group()
    return history


if __name__ == "__main__":
    main()
