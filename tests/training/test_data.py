"""Feeds: what counts as data, starting over, and continuing in the middle of an epoch."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import mlc
from mlc.training.data import randomness
from mlc.training.data.feed import Feed, digest


def refuse(what: str, advice: str = "") -> mlc.TrainingError:
    return mlc.TrainingError(f"level 'x': {what}", advice=advice)


def numbered(n: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(float(n)))


def shuffled() -> Iterator[Tensor]:
    for i in torch.randperm(7):
        yield i + torch.rand(())


def mixed() -> Iterator[Any]:
    """Draws from all three libraries, anew for every batch."""
    for _ in range(5):
        yield torch.rand(2), np.random.rand(2), random.random()


OWN = torch.Generator()


def with_own_generator() -> Iterator[Tensor]:
    order = torch.randperm(6, generator=OWN)
    for i in order:
        yield i + torch.rand((), generator=OWN)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(5))


KINDS: dict[str, Any] = {
    "list": lambda: [torch.tensor(float(k)) for k in range(4)],
    "loader": lambda: DataLoader(numbered(), 3, shuffle=True),
    "loader with its generator": lambda: DataLoader(
        numbered(), 3, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "stream": lambda: DataLoader(Stream(), 2),
    "generator function": lambda: shuffled,
    "three libraries": lambda: mixed,
    "own generator": lambda: with_own_generator,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn", [0, 1, 4, 11])
def test_continues_bit_for_bit_whatever_is_drawn_in_between(kind: str, drawn: int) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(0)
    OWN.manual_seed(0)
    feed = Feed(refuse, KINDS[kind]())
    feed.peek()
    for _ in range(drawn):
        feed.draw()
        torch.rand(3), np.random.rand(), random.random()  # a training draws, too
    state, then = feed.state_dict(), randomness.plain(randomness.states(feed.generators))
    wanted = [digest(feed.draw()) for _ in range(9)]
    other = Feed(refuse, KINDS[kind]())
    torch.manual_seed(99)
    other.load_state_dict(state)
    randomness.restore(then, other.generators)
    assert (other.epoch, other.position) == (state["epoch"], state["position"])
    assert [digest(other.draw()) for _ in range(9)] == wanted
    assert other.epoch == feed.epoch


@pytest.mark.parametrize("kind", KINDS)
def test_peeking_moves_nothing(kind: str) -> None:
    feed = Feed(refuse, KINDS[kind]())
    before = randomness.plain(randomness.states(feed.generators))
    first = digest(feed.peek())
    after = randomness.plain(randomness.states(feed.generators))
    assert digest(before) == digest(after)
    assert digest(feed.draw()) == first


def test_workers() -> None:
    torch.manual_seed(0)
    feed = Feed(refuse, DataLoader(numbered(), 3, shuffle=True, num_workers=1))
    for _ in range(2):
        feed.draw()
    state, then = feed.state_dict(), randomness.states()
    wanted = [digest(feed.draw()) for _ in range(4)]
    other = Feed(refuse, DataLoader(numbered(), 3, shuffle=True, num_workers=1))
    other.load_state_dict(state)
    randomness.restore(then)
    assert [digest(other.draw()) for _ in range(4)] == wanted


def test_data_that_walks_at_random_in_between_is_refused_not_guessed() -> None:
    def walk() -> Iterator[Tensor]:
        at = torch.zeros(())
        while True:
            at = at + torch.rand(())
            yield at

    feed = Feed(refuse, walk)
    for _ in range(3):
        feed.draw()
        torch.rand(1)
    state = feed.state_dict()
    with pytest.raises(mlc.TrainingError, match="cannot be continued"):
        Feed(refuse, walk).load_state_dict(state)


def test_other_data_is_noticed() -> None:
    feed = Feed(refuse, DataLoader(numbered(), 2))
    feed.draw()
    state = feed.state_dict()
    with pytest.raises(mlc.TrainingError, match="not those that were drawn"):
        Feed(refuse, DataLoader(TensorDataset(torch.ones(10)), 2)).load_state_dict(state)
    feed = Feed(refuse, [1, 2, 3])
    for _ in range(3):
        feed.draw()
    with pytest.raises(mlc.TrainingError, match="2 batches, and 3 were drawn"):
        Feed(refuse, [1, 2]).load_state_dict(feed.state_dict())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "empty"),
        ((torch.ones(2), torch.ones(2)), "a tuple, which may be one batch or many"),
        (torch.ones(4, 2), "a Tensor, which may be"),
        ({"x": torch.ones(2)}, "a dict, which may be"),
        (iter([1, 2]), "cannot start over"),
        (shuffled(), "cannot start over"),
        (numbered(), "dataset of single samples"),
        (3, "a int"),
    ],
)
def test_what_is_no_data(data: Any, said: str) -> None:
    with pytest.raises(mlc.TrainingError, match=said):
        Feed(refuse, data)


@pytest.mark.parametrize("data", [DataLoader(numbered(2), 5, drop_last=True), lambda: iter(())])
def test_empty_when_it_is_drawn(data: Any) -> None:
    for how in ("draw", "peek"):
        with pytest.raises(mlc.TrainingError, match="empty"):
            getattr(Feed(refuse, data), how)()


def test_a_function_that_returns_a_batch() -> None:
    with pytest.raises(mlc.TrainingError, match="returned a tuple"):
        Feed(refuse, lambda: (torch.ones(2), torch.ones(2))).draw()


def test_digests_see_every_value_and_no_identity() -> None:
    class Batch:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    assert digest(Batch(torch.ones(2))) == digest(Batch(torch.ones(2)))
    assert digest(Batch(torch.ones(2))) != digest(Batch(torch.zeros(2)))
    assert digest({"a": (1, "b")}) != digest({"a": (1, "c")})
    assert digest(torch.ones(2)) != digest(torch.ones(2, dtype=torch.float64))


NUMPY, STATE, PYTHON = np.random.default_rng(), np.random.RandomState(), random.Random()


class Chosen:
    """Its batches are drawn in a method, from a generator that the module holds."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(4):
            yield NUMPY.normal(size=2), STATE.rand(), PYTHON.random()


def held() -> Iterator[Any]:
    return iter(Chosen())


@pytest.mark.parametrize("kind", [Chosen, lambda: held])
def test_generators_of_numpy_and_python_that_the_data_owns(kind: Any) -> None:
    """A peek leaves them alone, and another process continues them, at the start of an epoch and in its middle."""
    for drawn in (0, 3, 9):
        NUMPY.bit_generator.state = np.random.default_rng(5).bit_generator.state
        STATE.seed(5), PYTHON.seed(5)
        feed = Feed(refuse, kind())
        assert len(feed.generators) == 3
        first = digest(feed.peek())
        items = [digest(feed.draw()) for _ in range(drawn + 1)]
        assert items[0] == first
        state, then = feed.state_dict(), randomness.plain(randomness.states(feed.generators))
        wanted = [digest(feed.draw()) for _ in range(5)]
        NUMPY.random(7), STATE.rand(7), PYTHON.seed(1)
        other = Feed(refuse, kind())
        other.load_state_dict(state)
        randomness.restore(then, other.generators)
        assert [digest(other.draw()) for _ in range(5)] == wanted


def test_data_without_a_state_is_refused_when_it_is_continued() -> None:
    def walk() -> Iterator[Any]:
        yield random.SystemRandom().random()

    feed = Feed(refuse, walk)
    feed.draw()
    with pytest.raises(mlc.TrainingError, match="cannot be continued"):
        Feed(refuse, walk).load_state_dict(feed.state_dict())
