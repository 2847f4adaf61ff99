"""The perceptron and its two training runs in JAX."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _workloads.workload import Workload

from _twins.twin import Tree, Twin, array, cross_entropy, sgd_update, stacked, zeros


def forward(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """params: weight [out, in] and bias of each layer in turn."""
    *hidden, last = zip(params[::2], params[1::2], strict=True)
    for weight, bias in hidden:
        x = jnp.tanh(x @ weight.T + bias)
    return x @ last[0].T + last[1]


def loss(params: list[jax.Array], batch: tuple[jax.Array, jax.Array], remat: bool) -> jax.Array:
    """``remat`` recomputes what lies between the pre-activations, the layers being this net's blocks."""
    one = jax.checkpoint(forward, policy=jax.checkpoint_policies.dots_saveable) if remat else forward
    return cross_entropy(one(params, batch[0]), batch[1]).mean()


def numbers(meta: Tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in meta]


def twin(w: Workload, update: Any, momentum: bool) -> Twin:
    first = [array(p) for p in w.start(w.meta)]
    return Twin(
        meta=[array(m) for m in w.meta],
        batches=(stacked(w.batches), ()),
        validation=tuple(map(array, w.validation)),
        start=lambda meta: (first, zeros(first) if momentum else ()),
        loss=lambda params, meta, batch, remat: loss(params, batch, remat),
        outer=loss,
        update=update,
        unpack=numbers,
    )


def rates(w: Workload) -> Twin:
    def update(grads: Tree, params: Tree, state: Tree, meta: Tree, _: Any) -> tuple[Tree, Tree]:
        return sgd_update([jnp.exp(m) for m in meta], 0.0, None, grads, params, state)

    return twin(w, update, momentum=False)


def hyperparameters(w: Workload) -> Twin:
    def update(grads: Tree, params: Tree, state: Tree, meta: Tree, _: Any) -> tuple[Tree, Tree]:
        rate, momentum, decay = jnp.exp(meta[0]), jax.nn.sigmoid(meta[1]), jnp.exp(meta[2])
        return sgd_update([rate] * len(params), momentum, decay, grads, params, state)

    return twin(w, update, momentum=True)
