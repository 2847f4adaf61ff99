"""Which level stands below which: the blocks of a training, from its list of levels and what their losses read.

The list goes from bottom to top and the last level is the top.  What the losses read gives the rest:

- A level depends on another when its loss reads the other's parameters.  Levels that depend on each other, directly or
  through others, form a *block*; its *head* is the one that stands last in the list, and the others are trained
  inside of it: the head's gradient goes through their training.
- Without its head a block falls apart into smaller blocks, and so on. Blocks run in the order in which they depend on
  each other (then in that of the list), so pipelines and chains need no order of their own.
- Two heads over the same levels whose losses reach each other through these alone stand side by side: neither
  anticipates the other (each is held fixed in the other's gradient), unless the lower one says with ``response=`` how
  it is to be differentiated.  A :class:`~mlc.training.game.Game` says so for any levels.

Strongly connected components and their order are networkx's (Tarjan 1972); the recursion is one step per level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from mlc.errors import TrainingError
from mlc.training.game import Alternating, Game
from mlc.training.level import Level
from mlc.training.order.reading import Reading

__all__ = ["Block", "arrange", "flat"]

_Node = Level | Game


@dataclass(frozen=True)
class Block:
    """Heads and what is trained inside of them.

    Attributes:
        heads: The levels that step when the body has run; several stand side by side.
        body: Blocks that run before each of their steps, in order.
        alternating: Whether several heads step in turn, and not at once.
    """

    heads: tuple[Level, ...]
    body: tuple[Block, ...] = ()
    alternating: bool = False

    @property
    def name(self) -> str:
        """The heads' names."""
        return " and ".join(h.name for h in self.heads)

    def turns(self) -> list[tuple[Level, ...]]:
        """Heads that step at once, turn by turn."""
        return [(h,) for h in self.heads] if self.alternating else [self.heads]

    def levels(self) -> Iterator[Level]:
        """All levels of the block, the body's first."""
        for b in self.body:
            yield from b.levels()
        yield from self.heads

    def inner(self) -> Iterator[Level]:
        """The levels of the body."""
        for b in self.body:
            yield from b.levels()

    def lines(self, depth: int = 0) -> Iterator[str]:
        """The block as indented text, as it runs."""
        for b in self.body:
            yield from b.lines(depth + 1)
        how = " in turn" if self.alternating else " at once" if len(self.heads) > 1 else ""
        kinds = ", ".join(f"{h.name} ({type(h.optimizer).__name__}, steps={h.steps})" for h in self.heads)
        yield "  " * depth + kinds + how


def flat(given: Sequence[Any]) -> list[Level]:
    """The levels of a list in order, games opened.

    Raises:
        TrainingError: for what is no level, a level that stands in two places, or two of one name.
    """
    if isinstance(given, (Level, Game)):
        given = [given]
    if not isinstance(given, (list, tuple)) or not given:
        raise TrainingError(f"levels are {given!r}", advice="mlc.Training([inner, outer])")
    out: list[Level] = []
    for x in given:
        if isinstance(x, (list, tuple)):
            raise TrainingError(
                "a list of levels inside the list",
                advice="mlc.Simultaneous(a, b) or mlc.Alternating(a, b) for levels side by side",
            )
        if not isinstance(x, (Level, Game)):
            raise TrainingError(f"levels contain a {type(x).__name__}", advice="mlc.Level(...)")
        out += [x] if isinstance(x, Level) else list(x)
    seen: dict[str, Level] = {}
    for x in out:
        other = seen.setdefault(x.name, x)
        if other is x and out.count(x) > 1:
            raise x.refuse(
                "it stands in the list twice: above and below the levels between, a cycle that has no order",
                "each level once, from bottom to top",
            )
        if other is not x:
            raise x.refuse("another level has the same name", "one name for each")
    return out


def arrange(given: Sequence[Any], readings: Sequence[Reading]) -> tuple[Block, ...]:
    """Blocks in the order in which they run; the last one's heads contain the top level.

    Args:
        given: The list of levels and games, bottom to top.
        readings: What each level's loss reads.

    Raises:
        TrainingError: when a level has no place.
    """
    if isinstance(given, (Level, Game)):
        given = [given]
    order = _Order(list(given), readings)
    order.check_used()
    blocks = order.blocks(order.nodes)
    for b in blocks:
        _check(b)
    _check_apart(blocks)
    return blocks


class _Order:
    """Dependence between the entries of the list."""

    def __init__(self, nodes: list[_Node], readings: Sequence[Reading]) -> None:
        self.nodes = nodes
        self.readings = {r.level: r for r in readings}
        where = {x: n for n in nodes for x in _levels(n)}
        self.graph: Any = nx.DiGraph()  # from what is read to what reads it
        self.graph.add_nodes_from(range(len(nodes)))
        self.at = {n: i for i, n in enumerate(nodes)}
        for r in readings:
            reader = self.at[where[r.level]]
            self.graph.add_edges_from((self.at[where[x]], reader) for x in r.values if where[x] is not where[r.level])

    def check_used(self) -> None:
        """Every level must be read on the way to the top, and its own loss must depend on its parameters."""
        top = len(self.nodes) - 1
        reach = nx.ancestors(self.graph, top) | {top}
        for i, node in enumerate(self.nodes):
            for x in _levels(node):
                if i not in reach:
                    where = f"top level {_levels(self.nodes[top])[-1].name!r} or what it depends on"
                    raise x.refuse(
                        f"nobody reads it: its parameters enter no other loss on the way to the {where}",
                        "read its parameters in another level's loss, or train it apart; the last level is the top",
                    )
        for i, node in enumerate(self.nodes):
            below = nx.ancestors(self.graph.subgraph(range(i + 1)), i) if i else set()
            for x in _levels(node):
                trained = [y for k in below for y in _levels(self.nodes[k])]
                self._check_trains(x, trained)

    def _check_trains(self, x: Level, below: Sequence[Level]) -> None:
        """Its parameters must reach its loss: at once, or through the training of levels below."""
        if x in self.readings[x].slopes:
            return
        if any(x in self.readings[y].slopes for y in below):
            return
        raise x.refuse(
            "its loss does not depend on its parameters, nor does the training of a level below that the loss reads",
            "read them in its loss or in one of a level that stands before it in the list, without detach()",
        )

    def blocks(self, nodes: Sequence[_Node]) -> tuple[Block, ...]:
        """Blocks of some entries, in the order in which they run."""
        found = self.graph.subgraph([self.at[n] for n in nodes])
        parts = nx.condensation(found)
        first = {k: max(parts.nodes[k]["members"]) for k in parts}
        return tuple(
            self._block(sorted(parts.nodes[k]["members"]))
            for k in nx.lexicographical_topological_sort(parts, key=first.__getitem__)
        )

    def _block(self, members: list[int]) -> Block:
        head = self.nodes[members[-1]]
        if isinstance(head, Game):
            rest = [self.nodes[i] for i in members[:-1]]
            return Block(tuple(head), self.blocks(rest), isinstance(head, Alternating))
        heads, rest_at = self._beside(members)
        body = self.blocks([self.nodes[i] for i in rest_at])
        return Block(tuple(x for i in heads for x in _levels(self.nodes[i])), body)

    def _beside(self, members: list[int]) -> tuple[list[int], list[int]]:
        """The last member with those that stand beside it, and the other members."""
        heads, rest = [members[-1]], members[:-1]
        found: int | None = members[-1]
        while found is not None:
            found = next((i for i in reversed(rest) if self._stands_beside(i, heads, rest)), None)
            if found is not None:
                heads.insert(0, found)
                rest.remove(found)
        return heads, rest

    def _stands_beside(self, i: int, heads: Sequence[int], rest: Sequence[int]) -> bool:
        node = self.nodes[i]
        if not isinstance(node, Level) or node.response is not None:
            return False
        parts = nx.strongly_connected_components(self.graph.subgraph(rest))
        under = next(p for p in parts if i in p)
        if len(under) == 1 or max(under) != i:
            return False
        apart = self.graph.subgraph([k for k in [*rest, *heads] if k == i or k not in under])
        return not any(nx.has_path(apart, i, h) or nx.has_path(apart, h, i) for h in heads)


def _levels(node: _Node) -> list[Level]:
    return [node] if isinstance(node, Level) else list(node)


def _check(block: Block, below: bool = False) -> None:
    """Options of levels that have no meaning where the levels stand."""
    for b in block.body:
        _check(b, True)
    if not block.alternating and len({h.steps for h in block.heads}) > 1:
        steps = ", ".join(f"{h.name!r}: {h.steps}" for h in block.heads)
        raise block.heads[0].refuse(f"levels that step at once need equal steps ({steps})", "mlc.Alternating(...)")
    for h in block.heads:
        if h.rollback and block.body:
            raise h.refuse("rollback of a level that has levels below it", "roll back the lowest levels only")
        if h.rollback and (len(block.heads) > 1 or not below):
            raise h.refuse("nothing above it takes a gradient through it: there is nothing to roll back after",
                           "leave rollback out")  # fmt: skip
        if h.response is not None and (not below or len(block.heads) > 1):
            raise h.refuse("a response cannot apply: no level above it is differentiated through its training",
                           "leave response out, or give it to the level that is trained below")  # fmt: skip


def _check_apart(blocks: Sequence[Block]) -> None:
    """The top steps once for each step of the training; roll-back is possible right below the blocks of the top."""
    last = blocks[-1]
    if not last.alternating:
        for h in last.heads:
            if h.steps != 1:
                raise h.refuse(f"steps={h.steps} of a level at the top", "give the number of its steps to run(steps)")
    for h in last.heads:
        if h.cold:
            raise h.refuse("a cold start of a level at the top: it would never move", 'start="warm"')
    for b in blocks:
        for inner in b.body:
            for x in inner.inner():
                if x.rollback:
                    raise x.refuse(
                        f"rollback below {inner.name!r}, which itself stands below {b.name!r}",
                        "roll back levels right below a level at the top",
                    )
