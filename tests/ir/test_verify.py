"""Each invariant of the verifier, broken once."""

from collections.abc import Callable
from dataclasses import replace

import pytest

import mlc
from mlc.ir.core import (
    Alias,
    Custom,
    Draw,
    EffectCall,
    Eqn,
    Feed,
    Grad,
    Index,
    Loop,
    Op,
    Pack,
    Region,
    Replay,
    Stop,
    Var,
)
from mlc.ir.program import Flow, Input, Level, Program
from mlc.ir.types import Loc, SeqType, Type
from mlc.ir.verify import verify, verify_program
from tests.ir.regions import F32, MUL, loop_program, tensor, tiny

V4 = tensor(4)


def one(op: Op, ins: tuple[Type, ...], outs: tuple[Type, ...], at: Loc | None = None) -> Region:
    """A region with one equation."""
    given, made = tuple(map(Var, ins)), tuple(map(Var, outs))
    return Region(given, (Eqn(op, given, made, loc=at),), made)


def loop(body: Region | None = None, n_carry: int = 1, n_const: int = 0, trips: int | None = 3,
         ins: tuple[Type, ...] = (V4, SeqType(F32, 3)), outs: tuple[Type, ...] = (V4, SeqType(F32, 3)),
         replay: Replay | None = None) -> Region:  # fmt: skip
    """A loop over a carry and a sequence."""
    c, s = Var(V4), Var(F32)
    return one(
        Loop(Region((c, s), (), (c, s)) if body is None else body, n_carry, n_const, trips, False, "l", replay),
        ins,
        outs,
    )


def replay(carries: tuple[int, ...] = (0,), seqs: tuple[int, ...] = (), slots: int = 2) -> Replay:
    """A replay that hands its carry on."""
    v = Var(V4)
    return Replay(Region((v,), (), (v,)), carries, (), seqs, (), slots)


def unused() -> Region:
    a, b = Var(F32), Var(F32)
    return Region((a,), (Eqn(MUL, (a, b), (Var(F32),)),), (a,))


def twice() -> Region:
    a = Var(F32)
    return Region((a,), (Eqn(MUL, (a, a), (a,)),), (a,))


def from_inside() -> Region:
    """A body that reads a value of the region around it."""
    a = Var(V4)
    body = Region((), (Eqn(MUL, (a, a), (Var(V4),)),), ())
    return Region((a,), (Eqn(Loop(body, 0, 0, 2, label="l"), (), ()),), (a,))


def swapped() -> Region:
    """A carry that changes its type on the way."""
    c, s = Var(V4), Var(F32)
    return loop(Region((c, s), (), (s, s)))


def custom(present: tuple[bool, ...], n_in: int = 1) -> Region:
    a, b, g = Var(V4), Var(V4), Var(V4)
    return one(Custom("f", Region((a, b, g), (), (g,)), n_in, 1, present), (V4, V4), (V4,))


a, b = Var(F32), Var(V4)
feed = Feed((EffectCall(Draw(0, 0), (), (), (V4,)),), 3)
BROKEN: dict[str, Callable[[], Region]] = {
    "an input is listed twice": lambda: Region((a, a), (), ()),
    "2 names for 1 inputs": lambda: Region((a,), (), (), ("x", "y")),
    r"equation 0 \(aten.mul.Tensor\) reads a value that is not defined yet": unused,
    r"equation 0 \(aten.mul.Tensor\) defines a value again": twice,
    "an output is not defined": lambda: Region((a,), (), (b,)),
    r"program.l: equation 0 .* not defined yet": from_inside,
    r"\(stop\) has 0 arguments for 1 results": lambda: one(Stop(), (), (F32,)),
    r"\(alias\) result 0 changes its type from f32\[\] to f32\[4\]": lambda: one(Alias(), (F32,), (V4,)),
    r"\(grad\) has the wrong number of arguments": lambda: one(Grad(1, 1), (F32, V4), (V4,)),
    r"\(grad\) gradient 0 changes its type": lambda: one(Grad(1, 1), (F32, V4, F32), (F32,)),
    r"\(grad\) seed 0 changes its type": lambda: one(Grad(1, 1), (F32, V4, V4), (V4,)),
    r"\(loop\) has 1 arguments for a body of 2 inputs": lambda: loop(ins=(V4,)),
    r"\(loop\) has 1 results for a body of 2 outputs": lambda: loop(outs=(V4,)),
    r"\(loop\) has more carries and constants": lambda: loop(n_const=2),
    r"\(loop\) carry 0 changes its type from f32\[4\] to f32\[\]": swapped,
    r"\(loop\) argument 0 changes its type": lambda: loop(ins=(F32, SeqType(F32, 3))),
    r"\(loop\) result 0 changes its type": lambda: loop(outs=(F32, SeqType(F32, 3))),
    r"\(loop\) has a sequence of type f32\[\] for elements": lambda: loop(ins=(V4, F32)),
    r"\(loop\) has a emission of type f32\[\]": lambda: loop(outs=(V4, F32)),
    r"\(loop\) runs 3 times over a sequence of 4": lambda: loop(ins=(V4, SeqType(F32, 4))),
    r"\(loop\) replays \(1,\) of 1": lambda: loop(replay=replay(carries=(1,))),
    r"\(loop\) replays 1 carries from 0 sets with a body of 1 results": lambda: loop(replay=replay(slots=0)),
    r"\(loop\) replays with 2 values for a body of 1 inputs": lambda: loop(replay=replay(seqs=(0,))),
    r"\(pack\) makes no sequence of its 1 arguments": lambda: one(Pack(), (F32,), (SeqType(F32, 2),)),
    r"\(pack\) puts f32\[4\] into seq\[f32\[\], 1\]": lambda: one(Pack(), (V4,), (SeqType(F32, 1),)),
    r"picks from what is no sequence": lambda: one(Index(0), (F32,), (F32,)),
    r"picks element 2 of 2": lambda: one(Index(2), (SeqType(F32, 2),), (F32,)),
    r"picks f32\[4\] from seq\[f32\[\], 2\]": lambda: one(Index(0), (SeqType(F32, 2),), (V4,)),
    r"\(feed\) has 0 results for 1 drawn values": lambda: one(feed, (), ()),
    r"\(feed\) result 0 changes its type": lambda: one(feed, (), (SeqType(F32, 3),)),
    r"\(draw\) has a sequence as result": lambda: one(Draw(0, 0), (), (SeqType(F32, 3),)),
    r"\(custom\) has a backward of 1 results for 1 inputs": lambda: custom((False,)),
    r"\(custom\) has 1 results for 1 recorded ones": lambda: custom((True, False), n_in=2),
}  # fmt: skip


@pytest.mark.parametrize("message", BROKEN)
def test_broken_regions_are_refused(message: str) -> None:
    with pytest.raises(mlc.VerifyError, match=message) as e:
        verify(BROKEN[message]())
    assert "\n" not in e.value.what


def test_the_users_line_is_named() -> None:
    region = one(Stop(), (), (F32,), Loc("train.py", 5, "train"))
    with pytest.raises(mlc.VerifyError, match=r"at train\.py:5 in train"):
        verify(region)


def test_sound_programs_pass() -> None:
    for p in (tiny(), loop_program()):
        assert verify_program(p) is p
    verify(loop(trips=None))
    verify(loop(ins=(V4, SeqType(F32, None))))


def _level(name: str) -> Level:
    return Level(name, 0, "", 1, (), (), 0, None)


PROGRAMS: dict[str, Callable[[Program], Program]] = {
    "1 inputs described, 2 in the region": lambda p: replace(p, inputs=p.inputs[:1]),
    r"input x is f32\[\], described as f32\[4\]": lambda p: replace(p, inputs=(Input("x", "meta", V4), p.inputs[1])),
    "unknown role boss": lambda p: replace(p, inputs=(Input("a", "boss", F32), p.inputs[1])),
    "returns 2 of 1 results": lambda p: replace(p, n_outputs=2),
    "two levels have the same name": lambda p: replace(p, levels=(_level("L0"), _level("L0"))),
    "a value flow from a to L9": lambda p: replace(p, levels=(_level("L0"),), flows=(Flow("value", "a", "L9"),)),
    "unknown kind of flow love": lambda p: replace(p, levels=(_level("L0"),), flows=(Flow("love", "a", "L0"),)),
}


@pytest.mark.parametrize("message", PROGRAMS)
def test_broken_programs_are_refused(message: str) -> None:
    with pytest.raises(mlc.VerifyError, match=message):
        verify_program(PROGRAMS[message](tiny()))
