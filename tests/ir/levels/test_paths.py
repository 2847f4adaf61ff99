"""Paths as text and as a tree."""

from mlc.ir.levels.paths import paths_of, text_of, tree
from mlc.ir.parse import parse

TEXT = """\
program "f" returns 1
level "L0" [depth=0, optimizer="", trips=1, trains=("a", "b", "c"), reads=(), state=0]
level "L1" [depth=1, optimizer="SGD", trips=3, trains=("w",), reads=("a", "b"), state=0, declared="pre"]
level "L2" [depth=1, optimizer="SGD", trips=None, trains=("v",), reads=("c",), state=0]
flow value "a" -> "L1" [why="loss"]
flow value "b" -> "L1" [why="loss"]
flow value "c" -> "L2" [why="update"]
flow value "c" -> "L0" [carries=False, why="loss"]
flow response "L1" -> "L2"
flow response "L1" -> "L0"
flow response "L2" -> "L0"
{
  meta %0: f32[] "a"
  meta %1: f32[] "b"
  meta %2: f32[] "c"
  return %0
}
"""


def test_paths_share_prefixes_and_are_read_past() -> None:
    program = parse(TEXT)
    assert paths_of(program)[:2] == [("a", "L1", "L0"), ("a", "L1", "L2", "L0")]
    off = {("a", "L1", "L2", "L0"), ("b", "L1", "L2", "L0")}
    assert tree(program, off=off, told=lambda f: "Unroll()" if f.source == "L2" else "") == [
        "a, b -> L1 pre (value: loss)",
        "  -> L0 (response)",
        "  -> L2 (response) -> L0 (response, Unroll())  [off]",
        "c -> L2 (value: update) -> L0 (response, Unroll())",
    ]
    assert "//   -> L2 (response) -> L0 (response)" in str(program) and str(parse(str(program))) == str(program)
    assert text_of(("a", "L1", "L0")) == "a -> L1 -> L0"
