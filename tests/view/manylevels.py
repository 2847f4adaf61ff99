"""Level graphs of any size, made by hand: what pictures must stay readable for."""

import torch

import mlc
from mlc.ir.core import Region, Var
from mlc.ir.program import Flow, Input, Level
from mlc.ir.types import Loc, TensorType


def many(n: int, nested: bool) -> mlc.Program:
    """``n`` levels, each inside the one before or all side by side, with flows between neighbours."""
    t = TensorType(torch.float32, (128, 64), (64, 1), torch.device("cpu"))
    v = Var(t)
    levels = [Level("L0", 0, "", 1, ("lr",), (), 0, Loc("many.py", 3, "many"))]
    flows = []
    for i in range(1, n):
        name, depth = f"L{i}", i if nested else 1
        trains = tuple(f"net{i}.layers.{k}.weight" for k in range(i % 4 + 1))
        levels.append(Level(name, depth, "Adam", 5, trains, ("lr",), 2 * i, Loc("many.py", 10 + i, "many")))
        flows.append(Flow("gradient", name, name))
        flows.append(Flow("value", "lr", name, why="loss"))
        up = f"L{i - 1}" if nested else "L0"
        flows.append(Flow("response", name, up))
        if nested and i > 1:
            flows.append(Flow("value", up, name, why="trained above"))
        if i % 3 == 0:
            flows.append(Flow("stop", "lr", name, False, Loc("many.py", 40 + i), "detach()"))
    return mlc.Program("many", Region((v,), (), (v,)), (Input("lr", "meta", t),), 1, tuple(levels), tuple(flows))
