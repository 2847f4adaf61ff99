"""Casting of losses, before and after, as text."""

import torch

from mlc.ir.builder import Builder
from mlc.ir.core import Grad, Region, aten
from mlc.ir.types import TensorType
from mlc.ir.verify import verify
from mlc.passes.precision.compute import cast, losses_of


def tensor(*shape: int) -> TensorType:
    stride = tuple(int(torch.tensor(shape[i + 1 :]).prod()) for i in range(len(shape)))
    return TensorType(torch.float32, shape, stride, torch.device("cpu"))


def region() -> Region:
    """grad of sum(tanh(x w) + b), and the activations as a result beside it."""
    b = Builder()
    x, w, bias = b.input(tensor(8, 4), "x"), b.input(tensor(4, 4), "w"), b.input(tensor(4), "b")
    (y,) = b.emit(aten("mm"), (x, w), (tensor(8, 4),))
    (t,) = b.emit(aten("tanh"), (y,), (tensor(8, 4),))
    (z,) = b.emit(aten("add", "Tensor"), (t, bias), (tensor(8, 4),))
    (loss,) = b.emit(aten("sum"), (z,), (tensor(),))
    seed = b.one(tensor())
    (g,) = b.emit(Grad(1, 1), (loss, w, seed), (tensor(4, 4),))
    return b.region([g, t])


def ops(r: Region) -> list[str]:
    def one(e: object) -> str:
        t = e.outs[0].type  # type: ignore[attr-defined]
        name = str(e.op).removeprefix("aten.") if not isinstance(e.op, Grad) else "grad"  # type: ignore[attr-defined]
        return f"{name}:{str(t.dtype).removeprefix('torch.')}"

    return [one(e) for e in r.eqns]


def test_products_are_narrow_sums_and_what_leaves_are_not() -> None:
    r = region()
    grad = next(e for e in r.eqns if isinstance(e.op, Grad))
    found, twins = cast(r, [losses_of(grad, torch.bfloat16)])
    verify(found)
    assert ops(found) == [
        "_to_copy.default:bfloat16", "_to_copy.default:bfloat16", "mm.default:bfloat16", "tanh.default:bfloat16",
        "_to_copy.default:bfloat16", "add.Tensor:bfloat16", "_to_copy.default:float32", "sum.default:float32",
        "ones.default:float32", "grad:float32", "_to_copy.default:float32",
    ]  # fmt: skip
    assert found.outputs == r.outputs and found.inputs == r.inputs and grad in found.eqns and not twins


def test_nothing_to_cast_changes_nothing() -> None:
    r = region()
    grad = next(e for e in r.eqns if isinstance(e.op, Grad))
    assert cast(r, [losses_of(grad, None)])[0] is r


def test_a_product_of_another_dtype_has_a_loss_of_its_own() -> None:
    r = region()
    grad = next(e for e in r.eqns if isinstance(e.op, Grad))
    found, twins = cast(r, [losses_of(grad, None)], [(grad, torch.bfloat16)])
    verify(found)
    assert ops(found).count("mm.default:bfloat16") == ops(found).count("mm.default:float32") == 1
    assert twins[grad] != grad.args[:1] and twins[grad][0].type == grad.args[0].type
