"""A made-up citation graph: nodes of three kinds, linked mostly to their own, with noisy features."""

import torch

NODES, CLASSES, FEATURES = 24, 3, 8


def citations():
    """Edges [2, E], features [N, F], labels [N]."""
    labels = torch.arange(NODES) % CLASSES
    same = labels[:, None] == labels[None, :]
    linked = torch.rand(NODES, NODES) < torch.where(same, 0.4, 0.05)
    edges = (linked | linked.T).fill_diagonal_(False).nonzero().T
    features = torch.randn(CLASSES, FEATURES)[labels] + torch.randn(NODES, FEATURES)
    return edges, features / features.abs().sum(1, keepdim=True), labels
