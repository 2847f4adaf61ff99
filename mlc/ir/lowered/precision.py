"""In which dtypes the levels and flows of one program compute and store: a precision policy, resolved."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Resolved"]


class Resolved(BaseModel):
    """A policy for one program, by names of its levels; what is not named is exact.

    Attributes:
        compute: dtype of levels' losses and their gradients.
        product: dtype of the second-order products of levels (the flows from what they trained).
        store: dtype by kind of what levels' steps save for the sweep back.
        update: dtype of levels' updates.
        matmul: ``"tf32"`` where products of float32 values on CUDA are taken in TensorFloat-32; else "".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    compute: dict[str, Literal["bf16"]] = Field(default_factory=dict)
    product: dict[str, Literal["bf16"]] = Field(default_factory=dict)
    store: dict[str, dict[Literal["states", "gradients", "residuals"], Literal["bf16", "int8"]]] = Field(
        default_factory=dict
    )
    update: dict[str, Literal["float64"]] = Field(default_factory=dict)
    matmul: Literal["", "tf32"] = ""

    def __bool__(self) -> bool:
        return bool(self.compute or self.product or self.store or self.update or self.matmul)

    @property
    def rewrites(self) -> bool:
        """Whether it changes graphs (TensorFloat-32 does not)."""
        return bool(self.compute or self.product or self.store or self.update)
