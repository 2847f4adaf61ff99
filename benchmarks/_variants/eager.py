"""What PyTorch itself offers: unrolling, a checkpoint per step, and a reverse loop that redoes each step.

All three are exact and differentiate in reverse over reverse. They differ in what is alive: the graph of all
steps, or the states of all steps and the graph of one.
"""

import torch
from _workloads.workload import Tensors, Workload
from torch import Tensor
from torch.utils.checkpoint import checkpoint

State = list[Tensors]
Gradient = tuple[Tensor, list[Tensor]]


def step(w: Workload, t: int, params: Tensors, state: State, meta: Tensors, graph: bool) -> tuple[Tensors, State]:
    """One inner step, ``t`` from 0; with ``graph`` its result is differentiable."""
    grads = torch.autograd.grad(w.loss(params, meta, w.batches[t]), params, create_graph=graph)
    return w.optimizer.update(t + 1, grads, params, state, meta)


def outer(w: Workload, params: Tensors) -> Gradient:
    loss = w.outer(params, w.validation)
    return loss.detach(), list(torch.autograd.grad(loss, w.meta))


def plain(w: Workload) -> Gradient:
    """Keep the graph of every step."""
    params = w.start(w.meta)
    state = w.optimizer.init(params)
    for t in range(w.steps):
        params, state = step(w, t, params, state, w.meta, graph=True)
    return outer(w, params)


def checkpointed(w: Workload) -> Gradient:
    """torch.utils.checkpoint around each step, everything that it reads handed over as arguments.

    The reentrant kind: the other one recomputes whenever the step's own gradient unpacks a saved tensor.
    """
    params = w.start(w.meta)
    state = w.optimizer.init(params)
    count = len(params)

    def one(t: int, *flat: Tensor) -> tuple[Tensor, ...]:
        graph = torch.is_grad_enabled()  # off in the sweep, on when a step is redone
        p, m = list(flat[:count]), list(flat[len(flat) - len(w.meta) :])
        s = split(list(flat[count : len(flat) - len(w.meta)]), count)
        with torch.enable_grad():
            p = p if graph else [x.detach().requires_grad_() for x in p]
            p, s = step(w, t, p, s, m, graph)
        return (*p, *(x for xs in s for x in xs))

    for t in range(w.steps):
        flat = checkpoint(one, t, *params, *(x for xs in state for x in xs), *w.meta, use_reentrant=True)
        params, state = list(flat[:count]), split(list(flat[count:]), count)
    loss = w.outer(params, w.validation)
    loss.backward()  # reentrant checkpoints refuse torch.autograd.grad
    found = [torch.zeros_like(m) if m.grad is None else m.grad for m in w.meta]
    for x in (*w.meta, *w.start(w.meta)):
        x.grad = None
    return loss.detach(), found


def reverse(w: Workload) -> Gradient:
    """Save every state, then go backwards: redo one step with its graph and pull the cotangents through.

    This is reverse mode as hypertorch has it (Grazzi et al. 2020, arXiv 2006.16218): its hypergradient by
    iterative differentiation over a list of saved iterates, here with the optimizer's state among them.
    """
    meta = w.meta
    params = leaves(w.start(meta))
    state = w.optimizer.init(params)
    states = []
    for t in range(w.steps):
        states.append((params, state))
        params, state = step(w, t, params, state, meta, graph=False)
        params, state = leaves(params), [leaves(xs) for xs in state]
    loss = w.outer(params, w.validation)
    cotangents = list(torch.autograd.grad(loss, params))
    cotangents += [torch.zeros_like(x) for xs in state for x in xs]
    total = [torch.zeros_like(m) for m in meta]
    for t in reversed(range(w.steps)):
        params, state = states.pop()
        pulled = pull(w, t, params, state, cotangents)
        cotangents, more = pulled[: -len(meta)], pulled[-len(meta) :]
        total = [a + b for a, b in zip(total, more, strict=True)]
    first = w.start(meta)
    return loss.detach(), [a + b for a, b in zip(total, through(first, meta, cotangents[: len(first)]), strict=True)]


def pull(w: Workload, t: int, params: Tensors, state: State, cotangents: Tensors) -> Tensors:
    """Cotangents of what step ``t`` reads (parameters, state, meta-parameters), given those of its result."""
    state = [leaves(xs) for xs in state]
    moved, after = step(w, t, params, state, w.meta, graph=True)
    read = [*params, *(x for xs in state for x in xs), *w.meta]
    results = [*moved, *(x for xs in after for x in xs)]
    return list(torch.autograd.grad(results, read, cotangents, materialize_grads=True, allow_unused=True))


def through(first: Tensors, meta: Tensors, cotangents: Tensors) -> Tensors:
    """What the cotangents of the first parameters are for the meta-parameters."""
    return list(torch.autograd.grad(first, meta, cotangents, materialize_grads=True, allow_unused=True))


def leaves(values: Tensors) -> Tensors:
    return [x.detach().requires_grad_() for x in values]


def split(flat: Tensors, count: int) -> State:
    return [flat[i : i + count] for i in range(0, len(flat), count)]
