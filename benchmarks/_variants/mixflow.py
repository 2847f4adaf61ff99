"""Hypergradients in JAX: MixFlow-MG, and what JAX does by itself.

MixFlow-MG (Kemaev et al. 2025, arXiv 2505.00793, section 3 and the listings of its appendix), written from
the paper: the gradient of the inner loss gets a derivative rule of its own that computes its vector-Hessian
and vector-mixed products forward over reverse. Blocks are rematerialised and a checkpoint stands around each
inner step; either the step's gradient is saved with the checkpoint ("saved") or it is computed again.

Blocks are rematerialised in the inner gradient and the outer loss too: without it there, the transformer takes
twice the memory and no less time.
"""

from collections.abc import Callable

import jax
from _twins.twin import Tree, Twin
from jax.ad_checkpoint import checkpoint_name

Function = Callable[[Tree, Tree, Tree, Tree], tuple[jax.Array, Tree]]
SAVED = "inner gradient"


def mixed(loss: Callable[[Tree, Tree, Tree], jax.Array]) -> Callable[[Tree, Tree, Tree], Tree]:
    """The gradient of ``loss`` for its first argument, whose own derivative is forward over reverse."""
    both = jax.grad(loss, argnums=(0, 1))

    @jax.custom_vjp
    def gradient(params: Tree, meta: Tree, batch: Tree) -> Tree:
        return jax.grad(loss)(params, meta, batch)

    def forward(params: Tree, meta: Tree, batch: Tree) -> tuple[Tree, Tree]:
        return gradient(params, meta, batch), (params, meta, batch)

    def backward(kept: Tree, cotangent: Tree) -> tuple[Tree, Tree, None]:
        params, meta, batch = kept
        # The Hessian is symmetric, so the product with v is the derivative of both gradients in direction v.
        _, (hessian, cross) = jax.jvp(lambda p: both(p, meta, batch), (params,), (cotangent,))
        return hessian, cross, None

    gradient.defvjp(forward, backward)
    return gradient


def hypergradient(twin: Twin, mix: bool, save: bool, remat: bool) -> Function:
    """(meta, batches, validation) to the outer loss and its gradient.

    Args:
        twin: The workload.
        mix: MixFlow-MG's inner gradient, or JAX's own.
        save: Whether inner gradients are saved by the checkpoint around each step.
        remat: Whether blocks of the model are rematerialised.
    """

    def loss(params: Tree, meta: Tree, batch: Tree) -> jax.Array:
        return twin.loss(params, meta, batch, remat)

    gradient = mixed(loss) if mix else jax.grad(loss)
    policy = jax.checkpoint_policies.save_only_these_names(SAVED) if save else None

    def run(meta: Tree, batches: Tree, validation: Tree) -> jax.Array:
        def step(carry: Tree, data: Tree) -> tuple[Tree, None]:
            params, state = carry
            batch, numbers = data
            grads = checkpoint_name(gradient(params, meta, batch), SAVED)
            return twin.update(grads, params, state, meta, numbers), None

        step = jax.checkpoint(step, prevent_cse=False, policy=policy)
        (params, _), _ = jax.lax.scan(step, twin.start(meta), batches)
        return twin.outer(params, validation, remat)

    return jax.value_and_grad(run)


def forward(twin: Twin) -> Function:
    """The same by forward mode through the loop, one tangent per meta-parameter, all at once."""

    def run(meta: Tree, batches: Tree, validation: Tree) -> jax.Array:
        def step(carry: Tree, data: Tree) -> tuple[Tree, None]:
            params, state = carry
            batch, numbers = data
            grads = jax.grad(lambda p: twin.loss(p, meta, batch, False))(params)
            return twin.update(grads, params, state, meta, numbers), None

        (params, _), _ = jax.lax.scan(step, twin.start(meta), batches)
        return twin.outer(params, validation, False)

    def both(meta: Tree, batches: Tree, validation: Tree) -> tuple[jax.Array, Tree]:
        def paired(m: Tree) -> tuple[jax.Array, jax.Array]:
            loss = run(m, batches, validation)
            return loss, loss

        gradient, loss = jax.jacfwd(paired, has_aux=True)(meta)
        return loss, gradient

    return both
