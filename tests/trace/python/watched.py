"""Running a plain function as the first call of a compiled one does: under a world and reads."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlc.compiled.commit import commit
from mlc.trace.python.changes import Changes, changes, without
from mlc.trace.python.found import Found
from mlc.trace.python.inputs import walk
from mlc.trace.python.places import Roots
from mlc.trace.python.reads import Reads
from mlc.trace.python.world import World


@dataclass
class Watched:
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    out: Any
    world: World
    found: Found
    roots: Roots
    changes: Changes

    def key(self) -> list[Any]:
        return list(without(self.roots.key, self.changes.ignored))

    def again(self, *args: Any) -> bool:
        """Whether a later call would find what this one found."""
        now = walk(self.fn, args or self.args, {}, self.found)
        return list(without(now.key, self.changes.ignored)) == self.key()

    def commit(self, *args: Any) -> None:
        """What a later call does to the user's objects, with the values of the recorded one."""
        now = walk(self.fn, args or self.args, {}, self.found)
        commit(self.changes.all, [], now, set())


def watch(fn: Callable[..., Any], *args: Any) -> Watched:
    roots = walk(fn, args, {})
    world = World(roots)
    with Reads() as reads:
        out = fn(*args)
    found = reads.found(fn, args, {}, world)
    kept = walk(fn, args, {}, found, world)
    code = getattr(fn, "__code__", None)
    parameters = tuple(code.co_varnames[: code.co_argcount]) if code is not None else ()
    return Watched(fn, args, out, world, found, kept, changes(world, kept, found, parameters))


def failing(fn: Callable[..., Any], *args: Any) -> None:
    """A call that fails at its end: everything is put back."""
    world = World(walk(fn, args, {}))
    fn(*args)
    world.restore()


_ = copy
