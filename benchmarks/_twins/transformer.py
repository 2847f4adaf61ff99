"""The transformer of ``_w1.py`` in JAX: blocks stacked and scanned, so that XLA compiles one block."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _w1 import NORM_EPS
from _workloads.workload import Workload

from _twins.twin import Tree, Twin, adam_numbers, adam_update, array, cross_entropy, stacked, zeros

BLOCK = ("norm1.weight", "norm2.weight", "qkv.weight", "out.weight", "up.weight", "down.weight")


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPS) * weight


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Over the last axis, the others made one: XLA's CPU backend is slow on products with two batch axes."""
    return (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], -1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal; q, k, v: [batch, heads, length, channels].

    The softmax is spelt out and divides after the product with v: second derivatives of jax.nn.softmax take
    1.7 times as long on a CPU.
    """
    s, c = q.shape[2:]
    scores = jnp.einsum("bhqc,bhkc->bhqk", q * c**-0.5, k)
    scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -jnp.inf)
    exponentials = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    return jnp.einsum("bhqk,bhkc->bhqc", exponentials, v) / exponentials.sum(axis=-1, keepdims=True)


def block(x: jax.Array, p: dict[str, jax.Array], heads: int) -> jax.Array:
    """x: [batch, length, width]; weights as PyTorch has them, [out, in]."""
    b, s, d = x.shape
    qkv = linear(rms_norm(x, p["norm1.weight"]), p["qkv.weight"]).reshape(b, s, 3, heads, d // heads)
    q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))
    x = x + linear(jnp.moveaxis(attention(q, k, v), 1, 2).reshape(b, s, d), p["out.weight"])
    hidden = jax.nn.gelu(linear(rms_norm(x, p["norm2.weight"]), p["up.weight"]), approximate=True)
    return x + linear(hidden, p["down.weight"])


def loss(params: Tree, tokens: jax.Array, remat: bool, heads: int) -> jax.Array:
    one = partial(block, heads=heads)
    one = jax.checkpoint(one, prevent_cse=False) if remat else one
    x = params["embed.weight"][tokens[:, :-1]] + params["positions"]
    x, _ = jax.lax.scan(lambda x, p: (one(x, p), None), x, params["blocks"])
    logits = linear(rms_norm(x, params["norm.weight"]), params["head.weight"])
    return cross_entropy(logits, tokens[:, 1:]).mean()


def pack(named: dict[str, jax.Array], layers: int) -> Tree:
    """Parameters by PyTorch's names, those of the blocks stacked over layers."""
    rest = {name: x for name, x in named.items() if not name.startswith("blocks.")}
    return rest | {"blocks": {k: jnp.stack([named[f"blocks.{i}.{k}"] for i in range(layers)]) for k in BLOCK}}


def unpack(tree: Tree, names: list[str]) -> list[np.ndarray]:
    found = []
    for name in names:
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            found.append(np.asarray(tree["blocks"][rest][int(layer)]))
        else:
            found.append(np.asarray(tree[name]))
    return found


def build(w: Workload) -> Twin:
    adam, heads = w.optimizer, w.shape["heads"]
    names = [name for name, _ in w.model.named_parameters()]
    named = {name: array(p) for name, p in w.model.named_parameters()}

    def update(grads: Tree, params: Tree, state: Tree, meta: Tree, numbers: Any) -> tuple[Tree, Tree]:
        return adam_update(adam, grads, params, state, numbers)

    return Twin(
        meta=pack(named, w.shape["layers"]),
        batches=(stacked(w.batches), adam_numbers(adam, w.steps)),
        validation=tuple(map(array, w.validation)),
        start=lambda meta: (meta, (zeros(meta), zeros(meta))),
        loss=lambda params, meta, batch, remat: loss(params, batch[0], remat, heads),
        outer=lambda params, batch, remat: loss(params, batch[0], remat, heads),
        update=update,
        unpack=partial(unpack, names=names),
    )
