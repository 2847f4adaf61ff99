"""Settings of PyTorch around a check are put back."""

import torch

import mlc
from mlc.check.surroundings import placed, scaled, surroundings


def test_the_default_dtype_comes_back() -> None:
    with surroundings(torch.float64):
        assert torch.get_default_dtype() is torch.float64
    assert torch.get_default_dtype() is torch.float32


def test_budgets_grow_with_numbers() -> None:
    assert scaled({"memory": "1KiB"}, torch.float64)["memory"] == 2048
    assert scaled({"memory": "1KiB"}, torch.float32)["memory"] == "1KiB"


def test_an_error_without_a_line_gets_that_of_the_function() -> None:
    error = mlc.MlcError("something")
    placed(error, test_the_default_dtype_comes_back)
    assert "test_surroundings.py" in str(error)
