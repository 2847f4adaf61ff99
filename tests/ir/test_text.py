"""The text form: a golden, round trips of real and of random programs, errors with line and column."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

import mlc
from mlc.ir.core import Eqn, Region, Var
from mlc.ir.digest import digest
from mlc.ir.literals import Opaque, type_text
from mlc.ir.parse import parse
from mlc.ir.program import Input, Program
from mlc.ir.text import print_region, short_files
from mlc.ir.types import SeqType, TensorType
from tests import programs
from tests.ir.regions import CPU, MUL, loop_program, random_programs, tensor, tiny

# The lines of levels are long as they are.
GOLDEN = """\
program "train" returns 1  # me/train.py:1
file "me/train.py" = "/src/me/train.py"
file "you/train.py" = "/src/you/train.py"
note "it says \\"so\\""
level "L0" [depth=0, optimizer="", trips=1, trains=("x",), reads=(), state=0, at=()]
level "L1" [depth=1, optimizer="SGD", trips=3, trains=("x",), reads=(), state=0, at=((1, 2),)]  # you/train.py:1
flow stop "x" -> "L1" [carries=False, why="detach() or no_grad()"]  # me/train.py:9 in <lambda>
{
  meta %0: f32[4] "x"
  %1: seq[f32[4], 3] = feed[trips=3] {
    draw[source=0, visit=0]() -> (f32[4])
  }
  %11: f32[4], %12: seq[f32[], 3] = loop[label="train", trips=3, reverse=True] {
    carry %2: f32[4] = %0
    const %3: f32[4] = %0
    each %4: f32[4] = %1
    %5: f32[] = aten.dot.default(%2, %4)  # me/train.py:3 in train
    %6: f32[] = aten.ones.default([])
    %7: f32[4] = grad(%5; %2; %6)  # [grad]
    %8: f32[4] = aten.sub.Tensor(%2, %7, alpha=0.5)  # me/train.py:4 in train [update]
    return %8 emit %5
    replay[carries=(0,), consts=(), seqs=(), dense=(), slots=2] {
      in %9: f32[4] "state"
      %10: f32[4] = alias(%9)
      return %10
    }
  }
  %13: f32[] = item[at=-1](%12)
  return %13, %11
}
"""


def same(p: Program) -> Program:
    """The program read back from its text, after the two things that must hold."""
    text = str(p)
    q = parse(text)
    assert str(q) == text
    assert digest(q) == digest(p)
    return q


def test_golden() -> None:
    assert str(loop_program()) == GOLDEN
    q = same(loop_program())
    assert (q.levels, q.flows, q.notes, q.loc) == tuple(
        getattr(loop_program(), k) for k in ("levels", "flows", "notes", "loc")
    )


@pytest.mark.parametrize("name", programs.ALL)
def test_traced_programs_come_back(name: str) -> None:
    p = programs.ALL[name]()
    q = same(p)
    assert (q.levels, q.flows, q.notes, q.name) == (p.levels, p.flows, p.notes, p.name)
    assert [(x.name, x.role, x.type) for x in q.inputs] == [(x.name, x.role, x.type) for x in p.inputs]


@settings(max_examples=150)
@given(random_programs())
def test_random_programs_come_back(p: Program) -> None:
    same(p)


@pytest.mark.parametrize(
    ("text", "type_"),
    [
        ("f32[]", tensor()),
        ("bf16[2,3]", tensor(2, 3, dtype=torch.bfloat16)),
        ("f32[2,3]{1,2}", TensorType(torch.float32, (2, 3), (1, 2), CPU)),
        ("bool[0,3]@cuda:0", TensorType(torch.bool, (0, 3), (3, 1), torch.device("cuda:0"))),
        ("seq[seq[i64[1], ?], 2]", SeqType(SeqType(tensor(1, dtype=torch.int64), None), 2)),
    ],
)
def test_types(text: str, type_: TensorType | SeqType) -> None:
    assert type_text(type_) == text
    v = Var(type_)
    q = same(Program("t", Region((v,), (), (v,)), (Input("v", "data", type_),), 1))
    assert q.inputs[0].type == type_


def test_a_generator_becomes_a_numbered_object() -> None:
    v, g = Var(tensor()), torch.Generator()
    e = Eqn(MUL, (v, [g, torch.Generator(), g]), (Var(tensor()),))
    q = same(Program("t", Region((v,), (e,), e.outs), (Input("v", "data", tensor()),), 1))
    assert q.region.eqns[0].args[1] == [Opaque("Generator", i) for i in (0, 1, 0)]


def test_digest_sees_what_matters_and_nothing_else() -> None:
    text = str(tiny())
    renamed = text.replace('"tiny"', '"other"').replace('"a"', '"z"').replace("%2", "%7")
    assert digest(parse(renamed)) == digest(tiny())
    for old, new in [
        ("aten.mul.Tensor", "aten.div.Tensor"),
        ("data", "state"),
        ("f32", "f64"),
        ("%0, %1", "%1, %0"),
    ]:
        assert digest(parse(text.replace(old, new))) != digest(tiny()), new


def test_short_file_names_tell_files_apart() -> None:
    files = ["/a/b/x.py", "/a/c/x.py", "/a/y.py", "/x.py", "<stdin>"]
    short = short_files(files)
    assert len(set(short.values())) == len(files)
    assert (short["/a/y.py"], short["<stdin>"], short["/a/b/x.py"]) == ("y.py", "<stdin>", "b/x.py")


def test_a_region_prints_alone() -> None:
    assert print_region(tiny().region) == (
        "{\n  in %0: f32[]\n  in %1: f32[]\n  %2: f32[] = aten.mul.Tensor(%0, %1)\n  return %2\n}\n"
    )


BAD = {
    "a value that is not there": (
        "aten.mul.Tensor(%0, %1)",
        "aten.mul.Tensor(%0, %9)",
        "%9 is not defined yet",
    ),
    "a value twice": ("%2: f32", "%1: f32", "%1 is defined again"),
    "no such operator": ("aten.mul.Tensor", "aten.mull.Tensor", "unknown operator aten.mull.Tensor"),
    "no such primitive": ("aten.mul.Tensor", "frobnicate", "unknown operator frobnicate"),
    "no such dtype": ("%2: f32", "%2: f33", "f33 is no dtype"),
    "no such word": ("(%0, %1)", "(%0, maybe)", "unknown word maybe"),
    "no such device": ("%2: f32[]", "%2: f32[]@toaster", "unknown device @toaster"),
    "strides that do not fit": ("%2: f32[]", "%2: f32[]{1}", "1 strides for 0 dimensions"),
    "attributes of the wrong name": (
        "aten.mul.Tensor(%0, %1)",
        "item[of=1](%0)",
        "unknown attributes of index",
    ),
    "gradient without groups": (
        "aten.mul.Tensor(%0, %1)",
        "grad(%0)",
        r"grad takes \(losses; values; seeds\)",
    ),
    "a stray character": ("(%0, %1)", "(%0 ! %1)", "'!' is not expected here"),
    "a stray word": ("returns", "gives", "'gives' is not expected here"),
}


@pytest.mark.parametrize("what", BAD)
def test_errors_name_line_and_column(what: str) -> None:
    old, new, message = BAD[what]
    text = str(tiny())
    line = next(i for i, x in enumerate(text.splitlines(), 1) if old in x)
    with pytest.raises(mlc.VerifyError, match=rf"line {line}, column \d+: .*{message}"):
        parse(text.replace(old, new, 1))


def test_a_text_that_ends_too_early() -> None:
    with pytest.raises(mlc.VerifyError, match="end of the text"):
        parse(str(tiny()).rsplit("return", 1)[0])


def test_a_parsed_program_is_verified() -> None:
    text = str(loop_program())
    with pytest.raises(mlc.VerifyError, match=re.escape("picks element 5 of 3")):
        parse(text.replace("at=-1", "at=5"))
    with pytest.raises(mlc.VerifyError, match="carry, then const, then each"):
        parse(text.replace("carry", "each", 1))
    with pytest.raises(mlc.VerifyError, match="0 values returned for 1 carries"):
        parse(text.replace("return %8 emit %5", "return emit %5"))


@pytest.mark.slow
def test_every_program_of_the_numerics_comes_back() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        for path in sorted((Path(__file__).parents[1] / "numerics").glob("test_*.py")):
            for program in getattr(import_module(f"tests.numerics.{path.stem}"), "SUITE", ()):
                setup = program.fresh(clone=mlc.clone) if program.clones else program.fresh()
                same(mlc.trace(setup.loop, **setup.args))
    finally:
        torch.set_default_dtype(torch.float32)
