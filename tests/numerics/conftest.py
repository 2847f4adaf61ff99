"""Everything here runs in float64: also the constants that optimizers and modules create themselves."""

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for a `program` runs on every one of its module's SUITE; `refused` likewise."""
    if "program" in metafunc.fixturenames:
        programs = metafunc.module.SUITE
        metafunc.parametrize("program", programs, ids=[program.name for program in programs])
    if "refused" in metafunc.fixturenames:
        cases = metafunc.module.REFUSED
        metafunc.parametrize("refused", cases, ids=[case.loop.__name__ for case in cases])


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)


@pytest.fixture
def mlc() -> ModuleType:
    """The compiler under test, imported late so that the references can be validated without it."""
    return importlib.import_module("mlc")
