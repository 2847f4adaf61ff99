"""What every test stands on: one thread, no network, fixed seeds, and markers that skip by themselves."""

import os
from pathlib import Path

# Before transformers is imported: models are built with random weights, and nothing may look for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Plans depend on the rates of the device: the same ones on every machine.
os.environ["MLC_RATES"] = str(Path(__file__).parent / "rates.json")

import gc

import hypothesis
import pytest
import torch

from tests.share import left_out

# One thread: sums come in one order on every machine, and the small graphs of the tests run faster so.
torch.set_num_threads(1)

# Compile times differ by machine, so no deadline; the same examples at every run.
hypothesis.settings.register_profile("mlc", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mlc")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `tests/share.py` leaves out by default; skip what is marked `gpu` where there is none."""
    chosen = [item for item in items if not item.get_closest_marker("slow")]
    left = left_out(item.nodeid for item in chosen)
    for item in chosen:
        if item.nodeid in left:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: neither collecting nor asking who holds an object looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)
