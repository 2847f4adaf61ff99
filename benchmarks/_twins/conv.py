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


def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """3 x 3 with padding 1, as one matrix product over shifted copies.

    XLA's CPU backend runs convolutions inside a scan about ten times as slowly as outside: with them MixFlow-MG
    took 4.8 s and 27 MB of scratch on two cores, like this 0.36 s and 59 MB, with steps unrolled 0.53 s and 275 MB.
    """
    height, width, channels = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]
    columns = jnp.concatenate(shifted, axis=-1)
    rows = columns.reshape(-1, 9 * channels) @ kernel.reshape(9 * channels, -1)
    return rows.reshape(*columns.shape[:3], -1)


def block(x: jax.Array, kernel: jax.Array, scale: jax.Array, shift: jax.Array, stride: int) -> jax.Array:
    """x: [batch, height, width, channels]; kernel: [3, 3, in, out]."""
    x = convolution(x, kernel, stride)
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
