"""Whether random generators go on from where the recording left them.

A random operator is an equation that later calls run again, as long as nothing but recorded operators moved its
generator in between.  Forked or restored states, generators made or seeded in the loop, libraries that draw on their
own: all of them show as a state that is not the one left behind, whatever did it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RandomWatch", "key_of", "state_of"]


def key_of(generator: torch.Generator) -> int:
    """Identity of a generator (PyTorch hands operators another Python object for it each time); 0: the default one."""
    cdata: int = generator._cdata  # type: ignore[attr-defined]
    return 0 if cdata == torch.default_generator._cdata else cdata  # type: ignore[attr-defined]


def state_of(generator: torch.Generator | None) -> Tensor:
    """State of a generator, or of the default one."""
    return torch.get_rng_state() if generator is None else generator.get_state()


class RandomWatch:
    """States of generators as recorded operators left them."""

    def __init__(self) -> None:
        self._left: dict[int, tuple[torch.Generator | None, Tensor]] = {}
        self.start: dict[int, tuple[torch.Generator | None, Tensor]] = {}
        self.left(None)
        self.start[0] = (None, torch.get_rng_state())

    @staticmethod
    def _key(generator: torch.Generator | None) -> int:
        return 0 if generator is None else key_of(generator)

    def continues(self, generator: torch.Generator | None) -> bool:
        """Whether the generator stands where the last recorded operator left it (or was not used yet)."""
        key = self._key(generator)
        if key not in self._left:
            self.start[key] = (generator, state_of(generator))
            return True
        return bool(torch.equal(self._left[key][1], state_of(generator)))

    def left(self, generator: torch.Generator | None) -> None:
        """A recorded operator moved the generator."""
        self._left[self._key(generator)] = (generator, state_of(generator))

    def undisturbed(self) -> bool:
        """Whether every generator stands where recorded operators left it."""
        return all(torch.equal(s, state_of(g)) for g, s in self._left.values())

    def states(self) -> list[tuple[torch.Generator | None, Tensor]]:
        """The states now of all generators that were used."""
        return [(g, state_of(g)) for g, _ in self._left.values()]

    @staticmethod
    def put(states: list[tuple[torch.Generator | None, Tensor]]) -> None:
        """Set generators."""
        for g, s in states:
            if g is None:
                torch.set_rng_state(s)
            else:
                g.set_state(s)
