"""When a call may use an earlier recording."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import mlc


def fresh(seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return nn.Linear(4, 1), torch.ones((), requires_grad=True)


def over_a_loader(model: nn.Module, scale: Tensor, data: Dataset) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in DataLoader(data, batch_size=2, shuffle=True):
        opt.zero_grad()
        (model(x).squeeze(1) - scale * y).square().mean().backward()
        opt.step()
    return model(torch.ones(1, 4)).sum()


def noisy(model: nn.Module, scale: Tensor, generator: torch.Generator) -> Tensor:
    return model(scale * torch.randn(2, 4, generator=generator)).sum()


@pytest.mark.parametrize("kind", ["dataset", "list"])
def test_a_loader_made_by_the_call_reads_the_dataset_of_the_call(kind: str) -> None:
    cf = mlc.compile(over_a_loader)
    sets = []
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = torch.randn(6, 4), torch.randn(6)
        sets.append(TensorDataset(x, y) if kind == "dataset" else list(zip(x, y, strict=True)))
    for seed, data in enumerate(sets):
        found, wanted = cf(*fresh(seed), data), over_a_loader(*fresh(seed), data)
        torch.testing.assert_close(found.detach(), wanted.detach())
    cf(*fresh(0), sets[-1])
    assert cf.recordings == 3  # another object, another recording; the same one serves again


def test_a_generator_goes_on_where_it_stands() -> None:
    cf = mlc.compile(noisy)
    mine, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for _ in range(3):
        torch.testing.assert_close(cf(*fresh(0), mine).detach(), noisy(*fresh(0), other).detach())
    assert torch.equal(mine.get_state(), other.get_state())
    assert cf.recordings == 1 and not cf.program.notes


def test_another_generator_is_another_recording() -> None:
    cf = mlc.compile(noisy)
    for seed in range(3):
        mine, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        torch.testing.assert_close(cf(*fresh(0), mine).detach(), noisy(*fresh(0), other).detach())
    assert cf.recordings == 3


def test_a_number_that_decides_is_a_guard() -> None:
    def halved(model: nn.Module, scale: Tensor, bound: float) -> Tensor:
        loss = (scale * model(torch.ones(1, 4))).square().sum()
        if loss > bound:
            loss = loss / 2
        return loss

    cf = mlc.compile(halved)
    for seed in (0, 1, 2, 3, 2, 1):
        found = cf(*fresh(seed), 0.2)
        torch.testing.assert_close(found.detach(), halved(*fresh(seed), 0.2).detach())
    assert cf.recordings <= 2


def test_without_the_comparison() -> None:
    cf = mlc.compile(noisy, verify=None)
    assert cf(*fresh(0), torch.Generator()).requires_grad
    with pytest.raises(mlc.PlanError, match="verify='twice'"):
        mlc.compile(noisy, verify="twice")
