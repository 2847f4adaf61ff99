"""Levels that stand side by side: none of them anticipates what another one will do.

In a list of levels each one stands below those after it, and the derivative goes through its training.  The players of
a game have no such order: each takes the gradient of its own loss with the others held where they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlc.errors import TrainingError
from mlc.training.level import Level

__all__ = ["Alternating", "Game", "Simultaneous"]


class Game:
    """Levels side by side; in a list of levels it takes the place of one.

    Attributes:
        players: The levels, in order.
    """

    def __init__(self, *players: Level) -> None:
        """Take the players.

        Args:
            *players: Two levels or more.

        Raises:
            TrainingError: for fewer, or for anything else than levels.
        """
        kind = type(self).__name__
        for p in players:
            if not isinstance(p, Level):
                raise TrainingError(f"{kind} of a {type(p).__name__}", advice=f"levels: mlc.{kind}(first, second)")
        if len(players) < 2:
            raise TrainingError(f"{kind} of {len(players)} levels", advice="two levels or more")
        self.players = players

    def __iter__(self) -> Iterator[Level]:
        return iter(self.players)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(repr(p.name) for p in self.players)})"


class Simultaneous(Game):
    """Players that step at once: all gradients are taken at the same point, then all parameters are updated."""


class Alternating(Game):
    """Players that step in turn, each ``steps`` times (a GAN: the discriminator five times, the generator once)."""
