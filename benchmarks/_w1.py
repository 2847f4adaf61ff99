"""W1, the decoder-only transformer that the design's reference numbers are about, and the loop around it.

The loop trains a copy of the model with Adam and returns a validation loss; the meta-parameters are the
initial parameters. It is written twice: as people write it (for mlc) and as a plain functional unroll under
``create_graph=True``, the exact gradient that PyTorch itself can give.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mlc

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
NORM_EPS = torch.finfo(torch.float32).eps  # what nn.RMSNorm takes in float32; said, so that float64 is the same model


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a batch."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    length: int = 256
    batch: int = 4
    vocabulary: int = 256


W1 = Shape()
W2 = Shape(layers=8, length=512)
SIX_LAYERS = Shape(layers=6)
SMALL = Shape(width=16, layers=1, heads=2, length=16, batch=2, vocabulary=32)
SMALL_DEEP = Shape(width=16, layers=2, heads=2, length=24, batch=2, vocabulary=32)


class Block(nn.Module):
    """Attention and a tanh-GELU network, each behind an RMSNorm and beside a residual; no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, NORM_EPS), nn.RMSNorm(width, NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, s, d))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LanguageModel(nn.Module):
    """Embedding, learned positions, blocks, a head of its own."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Parameter(0.02 * torch.randn(shape.length, shape.width))
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, NORM_EPS)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def ordinary(model: LanguageModel, batches: Sequence[Tensor], validation: Tensor) -> Tensor:
    """The loop as people write it; what mlc compiles."""
    fast = mlc.clone(model)
    opt = torch.optim.Adam(fast.parameters(), lr=LR, betas=(BETA1, BETA2), eps=EPS)
    for tokens in batches:
        opt.zero_grad()
        next_token(fast(tokens[:, :-1]), tokens).backward()
        opt.step()
    return next_token(fast(validation[:, :-1]), validation)


def unrolled(model: LanguageModel, batches: Sequence[Tensor], validation: Tensor) -> Tensor:
    """The same as a functional unroll. Fused attention has no double backward, so attention is spelt out."""
    names = [name for name, _ in model.named_parameters()]
    params = [p.clone() for p in model.parameters()]
    first = [torch.zeros_like(p) for p in params]
    second = [torch.zeros_like(p) for p in params]

    def loss(tokens: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, dict(zip(names, params, strict=True)), (tokens[:, :-1],))
        return next_token(logits, tokens)

    with sdpa_kernel(SDPBackend.MATH):
        for t, tokens in enumerate(batches, start=1):
            grads = torch.autograd.grad(loss(tokens), params, create_graph=True)
            first = [BETA1 * m + (1 - BETA1) * g for m, g in zip(first, grads, strict=True)]
            second = [BETA2 * v + (1 - BETA2) * g * g for v, g in zip(second, grads, strict=True)]
            params = [
                p - LR / (1 - BETA1**t) * m / ((v / (1 - BETA2**t)).sqrt() + EPS)
                for p, m, v in zip(params, first, second, strict=True)
            ]
        return loss(validation)


def problem(shape: Shape, steps: int, device: str) -> tuple[LanguageModel, list[Tensor], Tensor]:
    """Model, one batch of random tokens per inner step, and a validation batch; the same at every call."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = LanguageModel(shape).to(device)
    size = (steps + 1, shape.batch, shape.length + 1)
    tokens = torch.randint(shape.vocabulary, size, generator=generator).to(device)
    return model, list(tokens[:-1]), tokens[-1]
