"""Roll calls: while a call is recorded, processes compare what they are about to communicate before they do.

The run of the user's function is eager, and eager collectives that do not match hang or mix up memory.  So every
process writes down the next collective of a group (operator, type, the user's line) in the store that
``torch.distributed`` keeps for the job, reads what the others wrote, and refuses with both lines where they differ: a
collective in one branch only, other shapes, a process that has left the call or failed in it.  One exchange per
collective, at recordings only; compiled calls rely on the fingerprint of their program (:mod:`mlc.runtime.circle`).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from mlc.errors import CommunicationError
from mlc.ir.types import Loc
from mlc.runtime.circle import patience
from mlc.runtime.collectives import group_named

__all__ = ["RollCall", "rollcall"]

_LOOK = 0.5  # seconds after which those that do not come are looked for
_END = "the end of the call"
_COUNTS: Counter[str] = Counter()  # roll calls so far, by group: the same number on all of its processes
_RECORDINGS: Counter[str] = Counter()  # recordings so far, by function


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


class RollCall:
    """Roll calls of one recorded call.

    Args:
        function: Name of the user's function.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self.used: dict[str, list[int]] = {}  # ranks of the groups that the call communicates in
        self.circle: tuple[int, ...] = ()  # ranks that the call has to do with, once it is over
        _RECORDINGS[function] += 1

    def call(self, group: Any, what: str, loc: Loc | None, note: Any = None) -> list[Any]:
        """All processes of a group are about to do ``what``; their notes, by rank in the group.

        Raises:
            CommunicationError: when one of them is about to do something else, or does not come.
        """
        name = group.group_name
        ranks = self.used.setdefault(name, dist.get_process_group_ranks(group))
        if len(ranks) == 1:
            return [note]
        self._post(name, what, loc, note)
        said = self._read(name, ranks, what, loc)
        turn = _COUNTS[name]
        _COUNTS[name] += 1
        if turn:
            _store().delete_key(_key(name, turn - 1, dist.get_rank()))
        for rank, (other, where, _) in zip(ranks, said, strict=True):
            if other != what:
                place = f" at {where}" if where else ""
                raise CommunicationError(
                    f"processes do not communicate alike: here {what}, on rank {rank} {other}{place}", loc=loc,
                    advice="let every process of the group run the same collectives, on the same types, in one order",
                )  # fmt: skip
        return [n for _, _, n in said]

    def _post(self, name: str, what: str, loc: Loc | None, note: Any) -> None:
        text = json.dumps([what, str(loc) if loc is not None else "", note])
        _store().set(_key(name, _COUNTS[name], dist.get_rank()), text)

    def _read(self, name: str, ranks: Sequence[int], what: str, loc: Loc | None) -> list[Any]:
        """What every process wrote for this turn."""
        store = _store()
        keys = [_key(name, _COUNTS[name], r) for r in ranks]
        began = time.monotonic()
        pause, looked = 1e-4, began
        while not store.check(keys):
            now = time.monotonic()
            if now - looked > _LOOK:
                looked = now
                missing = [r for r, k in zip(ranks, keys, strict=True) if not store.check([k])]
                self._look_for(name, missing, what, loc)
                if missing and now - began > patience():
                    raise CommunicationError(
                        f"{what} waited {patience():.0f} s for rank{'s' * (len(missing) > 1)} "
                        f"{', '.join(map(str, missing))}", loc=loc,
                        advice="look at those processes; MLC_TIMEOUT sets the seconds to wait",
                    )  # fmt: skip
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
        return [json.loads(store.get(k)) for k in keys]

    def _look_for(self, name: str, missing: Sequence[int], what: str, loc: Loc | None) -> None:
        """Processes that have recorded this call without communicating will never come."""
        store = _store()
        for r in missing:
            if store.check([_passed(name, r)]):
                turn, function, n, how = json.loads(store.get(_passed(name, r)))
                if turn == _COUNTS[name] and function == self.function and n >= _RECORDINGS[function]:
                    _COUNTS[name] += 1
                    raise CommunicationError(
                        f"processes do not communicate alike: here {what}, on rank {r} {how}",
                        loc=loc, advice="let every process of the group run the same collectives, in one order",
                    )  # fmt: skip

    def end(self) -> None:
        """The function has returned: every process of the groups used must have come so far.

        Raises:
            CommunicationError: when one of them is about to communicate once more.
        """
        mine = sorted(self.used.items())
        met = {tuple(ranks) for _, ranks in mine}
        for name, _ in mine:
            found = self.call(group_named(name), _END, None, [list(r) for r in met])
            met.update(tuple(r) for note in found for r in note or ())
        self.circle = met.pop() if len(met) == 1 else tuple(range(dist.get_world_size())) if met else ()
        self._passing()

    def failed(self, why: BaseException) -> None:
        """The function was left by an error: tell those who wait."""
        what = f"the call failed ({type(why).__name__}: {str(why).strip().splitlines()[0] if str(why).strip() else ''})"
        for name, ranks in sorted(self.used.items()):
            if len(ranks) > 1 and not isinstance(why, CommunicationError):
                self._post(name, what, getattr(why, "loc", None), None)
                _COUNTS[name] += 1
        self._passing(what)

    def _passing(self, how: str = "nothing in the whole call") -> None:
        """Note in all other groups of this process that it passed by."""
        for group, name in list(dist.distributed_c10d._world.pg_names.items()):
            ranks = dist.get_process_group_ranks(group)
            if name not in self.used and len(ranks) > 1 and dist.get_rank() in ranks:
                note = json.dumps([_COUNTS[name], self.function, _RECORDINGS[self.function], how])
                _store().set(_passed(name, dist.get_rank()), note)


def rollcall(function: str) -> RollCall | None:
    """Roll calls for a call of this function; None where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    return RollCall(function)


def _key(group: str, turn: int, rank: int) -> str:
    return f"mlc/roll/{group}/{turn}/{rank}"


def _passed(group: str, rank: int) -> str:
    return f"mlc/passed/{group}/{rank}"
