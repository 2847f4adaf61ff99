"""The conv net on digits in JAX, channels last, which XLA on a CPU prefers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _workloads import digits
from _workloads.workload import Workload

from _twins.twin import Tree, Twin, array, cross_entropy, sgd_update, stacked, zeros

EPS = 1e-5
STRIDES = (1, 1, 2)


def block(x: jax.Array, kernel: jax.Array, scale: jax.Array, shift: jax.Array, stride: int) -> jax.Array:
    """x: [batch, height, width, channels]; kernel: [3, 3, in, out]."""
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=layout)
    mean = x.mean((0, 1, 2))
    x = x - mean
    x = x * jax.lax.rsqrt((x * x).mean((0, 1, 2)) + EPS) * scale + shift
    return jax.nn.silu(x)


def forward(params: list[jax.Array], x: jax.Array, remat: bool) -> jax.Array:
    one = jax.checkpoint(block, static_argnums=4) if remat else block
    x = x[:, 0, :, :, None]
    for i, stride in enumerate(STRIDES):
        x = one(x, *params[3 * i : 3 * i + 3], stride)
    weight, bias = params[-2:]
    return jnp.moveaxis(x, 3, 1).reshape(len(x), -1) @ weight.T + bias


def inner(params: Tree, meta: jax.Array, batch: tuple[jax.Array, ...], remat: bool) -> jax.Array:
    images, labels, index = batch
    return (jax.nn.sigmoid(meta[index]) * cross_entropy(forward(params, images, remat), labels)).mean()


def outer(params: Tree, batch: tuple[jax.Array, ...], remat: bool) -> jax.Array:
    return cross_entropy(forward(params, batch[0], remat), batch[1]).mean()


def build(w: Workload) -> Twin:
    first = [array(p) for p in w.start(w.meta)]
    first = [jnp.transpose(p, (2, 3, 1, 0)) if p.ndim == 4 else p for p in first]

    def update(grads: Tree, params: Tree, state: Tree, meta: Tree, _: Any) -> tuple[Tree, Tree]:
        return sgd_update([digits.LR] * len(params), digits.MOMENTUM, None, grads, params, state)

    return Twin(
        meta=array(w.meta[0]),
        batches=(stacked(w.batches), ()),
        validation=tuple(map(array, w.validation)),
        start=lambda meta: (first, zeros(first)),
        loss=inner,
        outer=outer,
        update=update,
        unpack=lambda tree: [np.asarray(tree)],
    )
