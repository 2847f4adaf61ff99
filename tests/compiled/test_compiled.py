"""A call that is tried again after memory was refused draws what it would have drawn, and leaves generators there."""

import pytest
import torch
from torch import Tensor, nn

import mlc
from mlc.runtime.call import Executor


def noisy(model: nn.Module, scale: Tensor, data: list[Tensor], g: torch.Generator) -> Tensor:
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in data:
        opt.zero_grad()
        noise = torch.randn(2, 4, generator=g, dtype=torch.float64)
        nn.functional.dropout(model(x + scale * noise), 0.5).square().mean().backward()
        opt.step()
    return model(scale * torch.randn(2, 4, generator=g, dtype=torch.float64)).sum()


def setup() -> tuple[nn.Module, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    data = [torch.randn(2, 4, dtype=torch.float64) for _ in range(3)]
    return nn.Linear(4, 3).double(), torch.ones((), dtype=torch.float64, requires_grad=True), data


def generators(seed: int) -> torch.Generator:
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed + 1)


@pytest.mark.parametrize("refused", [0, 1])
def test_refused_memory_draws_the_same_numbers(refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the recorded call and at a later one: from the default generator and from one of the user's."""
    whole, calls = Executor.forward, []

    def refuses(self: Executor, *given: object) -> object:
        calls.append(self)
        run = whole(self, *given)  # type: ignore[arg-type]
        if len(calls) == refused + 1:
            raise torch.OutOfMemoryError("no")  # at the end, when everything has been drawn
        return run

    monkeypatch.setattr(Executor, "forward", refuses)
    cf = mlc.compile(noisy)
    made, other, mine = setup(), setup(), generators(5)
    with pytest.warns(mlc.MemoryWarning, match="planned again"):
        found = [cf(*made, mine) for _ in range(2)]
    state = torch.get_rng_state()
    theirs = generators(5)
    for value in found:
        torch.testing.assert_close(value.detach(), noisy(*other, theirs).detach(), rtol=1e-10, atol=1e-12)
    assert len(calls) == 3
    assert torch.equal(mine.get_state(), theirs.get_state()) and torch.equal(state, torch.get_rng_state())
    for p, q in zip(made[0].parameters(), other[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_generator_of_every_call_is_the_one_that_it_was_given() -> None:
    """Another generator at the second call: its numbers, and it is the one that goes on."""
    cf = mlc.compile(noisy)
    made, other = setup(), setup()
    for seed in (1, 2, 1):
        g = generators(seed)
        value = cf(*made, g)
        state = torch.get_rng_state()
        h = generators(seed)
        torch.testing.assert_close(value.detach(), noisy(*other, h).detach(), rtol=1e-10, atol=1e-12)
        assert torch.equal(g.get_state(), h.get_state()) and torch.equal(state, torch.get_rng_state())
