"""Crowds: a group with very many operators of its own, split into what is connected.

An optimizer step is one line for every parameter.  Operators of one group that feed each other belong together;
what feeds very many (a step count, a bias correction) joins nothing.  Union-find, O(operators + edges).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

__all__ = ["parts_of"]

HUB = 6  # readers in the group from which on an operator joins nothing


def parts_of(nodes: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Connected parts of ``nodes``, each with at least two of them, in order; the rest is left out."""
    inside = set(nodes)
    own = [(a, b) for a, b in edges if a in inside and b in inside]
    readers = Counter(a for a, _ in own)
    root = {n: n for n in nodes}

    def find(n: int) -> int:
        while root[n] != n:
            root[n] = root[root[n]]
            n = root[n]
        return n

    for a, b in own:
        if readers[a] <= HUB:
            root[find(a)] = find(b)
    parts: dict[int, list[int]] = {}
    for n in nodes:
        parts.setdefault(find(n), []).append(n)
    found = [p for p in parts.values() if len(p) > 1]
    return found if len(found) > 1 else []
