"""Small real data: scikit-learn's digits as images, and the text that comes with Python."""

import functools
from codecs import decode
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset


@functools.cache
def _digits() -> tuple[Any, Any]:
    images, labels = load_digits(return_X_y=True)
    return images.reshape(-1, 1, 8, 8) / 16, labels


def digits(count: int) -> tuple[Tensor, Tensor]:
    """`count` images [count, 1, 8, 8] in the default dtype and their labels, chosen by torch's generator."""
    images, labels = _digits()
    chosen = torch.randperm(len(labels))[:count].numpy()
    return torch.tensor(images[chosen], dtype=torch.get_default_dtype()), torch.tensor(labels[chosen])


class Digits(Dataset[tuple[Tensor, int]]):
    """Digits as torchvision gives them: one image and one Python number at a time."""

    def __init__(self, count: int):
        self.images, self.targets = digits(count)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


def zen() -> str:
    """The Zen of Python (the module prints it when imported, so it is read from the file)."""
    spec = find_spec("this")
    assert spec is not None
    source = decode(Path(str(spec.origin)).read_text(), "rot13")
    return source.split('"""')[1]


def characters() -> tuple[Any, dict[str, int]]:
    """The text as an array of character numbers, and the numbers."""
    text = zen().lower()
    number = {c: i for i, c in enumerate(sorted(set(text)))}
    return np.array([number[c] for c in text], dtype=np.uint16), number


class Settings:
    """What `argparse` would have parsed."""

    def __init__(self, **values: Any):
        self.__dict__.update(values)
