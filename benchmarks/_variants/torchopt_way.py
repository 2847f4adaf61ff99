"""TorchOpt's differentiable optimizers (its functional ones) in an unrolled loop.

Its accelerated Adam is left out: it is not exact. Where an optimizer of TorchOpt takes no tensor, the workload
applies that part by hand: rates per weight to the updates, a weight decay to the gradients.
"""

from typing import Any

import torch
import torchopt
from _workloads.optimizers import Adam
from _workloads.workload import Tensors, Workload

from _variants import eager
from _variants.prepared import Prepared, of_tensors


def unrolled(w: Workload) -> Prepared:
    return Prepared(lambda: adam(w) if isinstance(w.optimizer, Adam) else sgd(w), of_tensors)


def gradients(w: Workload, params: Tensors, t: int) -> Tensors:
    return list(torch.autograd.grad(w.loss(params, w.meta, w.batches[t]), params, create_graph=True))


def adam(w: Workload) -> eager.Gradient:
    o = w.optimizer
    opt = torchopt.adam(o.lr, (o.beta1, o.beta2), o.eps, moment_requires_grad=True, use_accelerated_op=False)
    params = w.start(w.meta)
    state: Any = opt.init(params)
    for t in range(w.steps):
        updates, state = opt.update(gradients(w, params, t), state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return eager.outer(w, params)


def sgd(w: Workload) -> eager.Gradient:
    rates, momentum, decay = w.optimizer.hyper(w.meta)
    single = isinstance(rates, list)
    opt = torchopt.sgd(1.0 if single else rates, momentum=momentum, moment_requires_grad=True)
    params = w.start(w.meta)
    state: Any = opt.init(params)
    for t in range(w.steps):
        grads = gradients(w, params, t)
        if isinstance(decay, torch.Tensor):
            grads = [g + decay * p for g, p in zip(grads, params, strict=True)]
        updates, state = opt.update(grads, state, params=params, inplace=False)
        if single:
            updates = [r * u for r, u in zip(rates, updates, strict=True)]
        params = torchopt.apply_updates(params, updates, inplace=False)
    return eager.outer(w, params)
