"""A workload as pure JAX functions of pytrees, steps as a scan: what MixFlow-MG and default JAX differentiate."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _workloads.optimizers import Adam
from _workloads.workload import Batch
from torch import Tensor

Tree = Any


@dataclass(frozen=True)
class Twin:
    """One workload for JAX.

    Attributes:
        meta: Meta-parameters.
        batches: The inner steps' batches, stacked over steps, and what the optimizer needs per step.
        validation: The batch of the outer loss.
        start: Meta-parameters to (first parameters, optimizer state).
        loss: (parameters, meta-parameters, batch, block remat?) to the inner loss.
        outer: (parameters, validation batch, block remat?) to the outer loss.
        update: (gradients, parameters, state, meta-parameters, numbers of this step) to parameters and state.
        unpack: A gradient (of meta's structure) to arrays in the order of the workload's meta-parameters.
    """

    meta: Tree
    batches: Tree
    validation: Tree
    start: Callable[[Tree], tuple[Tree, Tree]]
    loss: Callable[[Tree, Tree, Tree, bool], jax.Array]
    outer: Callable[[Tree, Tree, bool], jax.Array]
    update: Callable[[Tree, Tree, Tree, Tree, Tree], tuple[Tree, Tree]]
    unpack: Callable[[Tree], list[np.ndarray]]


def array(x: Tensor) -> jax.Array:
    """A JAX array with a tensor's values; indices become int32."""
    x = x.detach().cpu()
    return jnp.asarray(x.int().numpy() if x.dtype == torch.int64 else x.numpy())


def stacked(batches: list[Batch]) -> tuple[jax.Array, ...]:
    return tuple(array(torch.stack(xs)) for xs in zip(*batches, strict=True))


def zeros(tree: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, tree)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of each example; logits [..., classes], labels [...]."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def adam_numbers(adam: Adam, steps: int) -> tuple[jax.Array, jax.Array]:
    """Per step: the rate after bias correction, and the root that corrects the second moment (from float64)."""
    t = np.arange(1, steps + 1)
    rates, roots = adam.lr / (1 - adam.beta1**t), np.sqrt(1 - adam.beta2**t)
    return jnp.asarray(rates, jnp.float32), jnp.asarray(roots, jnp.float32)


def adam_update(adam: Adam, grads: Tree, params: Tree, state: Tree, numbers: Tree) -> tuple[Tree, Tree]:
    rate, root = numbers
    first = jax.tree.map(lambda m, g: adam.beta1 * m + (1 - adam.beta1) * g, state[0], grads)
    second = jax.tree.map(lambda v, g: adam.beta2 * v + (1 - adam.beta2) * g * g, state[1], grads)
    moved = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) / root + adam.eps), params, first, second)
    return moved, (first, second)


def sgd_update(rates: Tree, momentum: Any, decay: Any, grads: Tree, params: Tree, state: Tree) -> tuple[Tree, Tree]:
    """``rates``: of the parameters' structure; ``state``: the momentum, or () without one; ``decay``: or None."""
    if decay is not None:
        grads = jax.tree.map(lambda g, p: g + decay * p, grads, params)
    if state != ():
        grads = jax.tree.map(lambda v, g: momentum * v + g, state, grads)
    moved = jax.tree.map(lambda p, r, g: p - r * g, params, rates, grads)
    return moved, grads if state != () else ()
