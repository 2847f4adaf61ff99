"""W1 and W2: the transformer of ``_w1.py``, four steps of Adam, the initial parameters as meta-parameters."""

from collections.abc import Sequence
from dataclasses import asdict

import _measure
import _w1
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from _workloads.optimizers import Adam
from _workloads.workload import Workload, applied, values

STEPS = 4


def w1(quick: bool, dtype: torch.dtype) -> Workload:
    return build("W1", _w1.SMALL if quick else _w1.W1, 2 if quick else STEPS, dtype)


def w2(quick: bool, dtype: torch.dtype) -> Workload:
    return build("W2", _w1.SMALL_DEEP if quick else _w1.W2, 2 if quick else STEPS, dtype)


def build(name: str, shape: _w1.Shape, steps: int, dtype: torch.dtype) -> Workload:
    model, batches, validation = _w1.problem(shape, steps, _measure.DEVICE)
    model = model.to(dtype)
    forward = applied(model)

    def outer(params: Sequence[Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        (tokens,) = batch
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no double backward
            return _w1.next_token(forward(params, tokens[:, :-1]), tokens)

    return Workload(
        name=name,
        shape={"steps": steps, **asdict(shape)},
        fn=_w1.ordinary,
        args=(model, batches, validation),
        model=model,
        meta=list(model.parameters()),
        batches=[(tokens,) for tokens in batches],
        validation=(validation,),
        start=list,
        loss=lambda params, meta, batch: outer(params, batch),
        outer=outer,
        optimizer=Adam(_w1.LR, _w1.BETA1, _w1.BETA2, _w1.EPS),
        initial=values(model),
    )
