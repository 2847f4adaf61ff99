"""PyTorch's own ways (``eager.py``), ready to be measured."""

from _workloads.workload import Workload

from _variants import eager
from _variants.prepared import Prepared, of_tensors


def plain(w: Workload) -> Prepared:
    return Prepared(lambda: eager.plain(w), of_tensors)


def checkpoint(w: Workload) -> Prepared:
    return Prepared(lambda: eager.checkpointed(w), of_tensors)


def reverse(w: Workload) -> Prepared:
    return Prepared(lambda: eager.reverse(w), of_tensors)
