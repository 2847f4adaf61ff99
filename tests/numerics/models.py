"""Small float64 models, their data, and the meta-parameters that reach every part of a step."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3


class ConvBN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
        self.head = nn.Linear(27, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.norm(self.conv(x))).flatten(1))


class LSTMNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.head(out[:, -1])


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(7, 8), nn.Parameter(torch.randn(5, 8) * 0.1)
        self.blocks = nn.Sequential(Block(8, 2))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x) + self.place).mean(1))


class Meta(nn.Module):
    """A weight for each class in the training loss, and the logarithm of an L2 coefficient."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Parameter(torch.randn(CLASSES))
        self.log_l2 = nn.Parameter(torch.tensor(-3.0))

    def forward(self, losses: Tensor, y: Tensor) -> Tensor:
        return (torch.sigmoid(self.source)[y] * losses).mean()

    def penalty(self, params: Any) -> Tensor:
        return self.log_l2.exp() * sum(p.square().sum() for p in params)


@dataclass
class Task:
    """Everything a loop needs: `args()` are its arguments."""

    model: nn.Module
    meta: Meta
    batches: list[tuple[Tensor, Tensor]]
    val: tuple[Tensor, Tensor]

    def args(self) -> dict[str, Any]:
        return {"model": self.model, "meta": self.meta, "batches": self.batches, "val": self.val}


def train_loss(model: Any, meta: Meta, x: Tensor, y: Tensor) -> Tensor:
    """The inner loss, for a module and for a Learner alike."""
    return meta(F.cross_entropy(model(x), y, reduction="none"), y) + meta.penalty(model.parameters())


def val_loss(model: Any, val: tuple[Tensor, Tensor]) -> Tensor:
    """The outer loss."""
    return F.cross_entropy(model(val[0]), val[1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


MODELS = {"mlp": mlp, "convbn": ConvBN, "lstm": LSTMNet, "transformer": Transformer}
SHAPES = {"mlp": (6, 4), "convbn": (4, 1, 5, 5), "lstm": (4, 3, 2), "transformer": (4, 5)}


def draw(kind: str) -> tuple[Tensor, Tensor]:
    """One batch for the model `kind`."""
    shape = SHAPES[kind]
    x = torch.randint(0, 7, shape) if kind == "transformer" else torch.randn(shape)
    return x, torch.randint(0, CLASSES, shape[:1])


def task(kind: str = "mlp", steps: int = 3) -> Task:
    """A fresh, deterministic task (the caller seeds)."""
    return Task(MODELS[kind](), Meta(), [draw(kind) for _ in range(steps)], draw(kind))
