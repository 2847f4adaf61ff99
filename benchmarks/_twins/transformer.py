"""The transformer of ``_w1.py`` in JAX: blocks stacked and scanned, so that XLA compiles one block."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _twins.twin import Tree, Twin, adam_numbers, adam_update, array, cross_entropy, stacked, zeros
from _w1 import NORM_EPS
from _workloads.workload import Workload

BLOCK = ("norm1.weight", "norm2.weight", "qkv.weight", "out.weight", "up.weight", "down.weight")


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPS) * weight


def block(x: jax.Array, p: dict[str, jax.Array], heads: int) -> jax.Array:
    """x: [batch, length, width]; weights as PyTorch has them, [out, in]."""
    b, s, d = x.shape
    qkv = (rms_norm(x, p["norm1.weight"]) @ p["qkv.weight"].T).reshape(b, s, 3, heads, d // heads)
    q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))
    scores = jnp.einsum("bhqc,bhkc->bhqk", q, k) * (d // heads) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -jnp.inf)
    attended = jnp.einsum("bhqk,bhkc->bhqc", jax.nn.softmax(scores), v)
    x = x + jnp.moveaxis(attended, 1, 2).reshape(b, s, d) @ p["out.weight"].T
    hidden = jax.nn.gelu(rms_norm(x, p["norm2.weight"]) @ p["up.weight"].T, approximate=True)
    return x + hidden @ p["down.weight"].T


def loss(params: Tree, tokens: jax.Array, remat: bool, heads: int) -> jax.Array:
    one = partial(block, heads=heads)
    one = jax.checkpoint(one, prevent_cse=False) if remat else one
    x = params["embed.weight"][tokens[:, :-1]] + params["positions"]
    x, _ = jax.lax.scan(lambda x, p: (one(x, p), None), x, params["blocks"])
    logits = rms_norm(x, params["norm.weight"]) @ params["head.weight"].T
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
