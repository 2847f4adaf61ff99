"""Which operators a narrow compute dtype reaches, as tables.

The rules are those of ``torch.autocast`` with two differences that keep activations narrow: an operand that is
broadcast (a bias, a mask) or that no differentiable value enters (a dropout mask) does not widen a result, and norms
give back the dtype of what they normalise.  An operator that stands in no table computes in float32, so what is not
known here is never computed narrowly (Micikevicius et al. 2018 for the division of labour).
"""

from __future__ import annotations

from enum import Enum

from torch._ops import OpOverload

from mlc.ir.core import Op, Primitive, Stop
from mlc.ir.inplace import schema_of

__all__ = ["Role", "role_of"]


class Role(Enum):
    """What a narrow dtype does to an operator.

    Attributes:
        NARROW: Operands are cast down, results are narrow: where the time goes.
        FOLLOWS: Narrow where its operands are; an operand of the result's size in float32 makes the result float32.
        ISLAND: Computed in float32 on operands cast up; its first result has the dtype of its first operand again.
        WIDE: Computed in float32, results in float32.
    """

    NARROW = "narrow"
    FOLLOWS = "follows"
    ISLAND = "island"
    WIDE = "wide"


_NARROW = {
    "mm", "bmm", "mv", "dot", "addmm", "addmv", "addbmm", "baddbmm", "addr", "linear", "convolution",
}  # fmt: skip

# Values stay in range and rounding is that of one operation; kernels of softmax and of means compute in float32 inside.
_FOLLOWS = {
    "add", "sub", "rsub", "mul", "div", "neg", "abs", "relu", "relu6", "leaky_relu", "hardtanh", "hardswish", "gelu",
    "silu", "tanh", "sigmoid", "hardsigmoid", "threshold", "clamp", "clamp_min", "clamp_max", "maximum", "minimum",
    "where", "masked_fill", "clone", "alias", "cat", "stack", "constant_pad_nd", "reflection_pad2d",
    "replication_pad2d", "index_select", "gather", "roll", "flip", "repeat", "tril", "triu",
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "_softmax", "_safe_softmax",
}  # fmt: skip

_ISLAND = {
    "native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "_fused_rms_norm",
    "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training", "batch_norm_no_update",
}  # fmt: skip


def role_of(op: Op) -> Role:
    """The role of an operator."""
    if isinstance(op, Stop):
        return Role.FOLLOWS
    if isinstance(op, Primitive) or not isinstance(op, OpOverload) or op.namespace != "aten":
        return Role.WIDE
    name = op._schema.name.removeprefix("aten::")
    if name in _NARROW:
        return Role.NARROW
    if name in _FOLLOWS or schema_of(op).view:
        return Role.FOLLOWS
    return Role.ISLAND if name in _ISLAND else Role.WIDE
