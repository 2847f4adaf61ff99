"""Every example reaches its scientific result, in a shorter run than its default, and passes mlc.check."""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import mlc

FOLDER = Path(__file__).parents[1] / "examples"
COMPILED = {
    "reweighting": "validate_after_training",
    "learning_rates": "validate_after_training",
    "maml_sine": "loss_after_adapting",
    "distillation": "loss_after_training",
    "language_model": "validate_after_training",
    "sklearn_hyperparameters": "loss_after_fitting",
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("[!_]*.py")} == set(COMPILED)


@pytest.mark.parametrize("name", COMPILED)
def test_example_agrees_with_the_plain_unroll(name: str) -> None:
    example = load(name)
    report = mlc.check(getattr(example, COMPILED[name]), *example.example_args())
    assert report.ok, str(report)


@pytest.mark.parametrize("name", COMPILED)
def test_example_args_are_the_same_every_time_and_main_needs_none(name: str) -> None:
    example = load(name)
    compiled = getattr(example, COMPILED[name])
    torch.manual_seed(1)
    first = compiled(*example.example_args())
    torch.manual_seed(2)
    torch.testing.assert_close(compiled(*example.example_args()), first)  # the first one is eager's own
    inspect.signature(example.main).bind()


def test_reweighting_finds_the_noisy_labels() -> None:
    result = load("reweighting").main(windows=80)
    assert result["mean weight, noisy samples"] < 0.3 * result["mean weight, clean samples"]
    learned = result["test accuracy, learned weights"]
    assert learned > result["test accuracy, without weights"] + 0.05
    assert learned > result["test accuracy, the clean samples alone"] + 0.02


def test_learned_rates_beat_the_best_single_rate() -> None:
    result = load("learning_rates").main(outer_steps=200)
    single, learned = result["one rate"], result["learned rates"]
    assert learned["loss"] < 0.85 * single["loss"]
    assert learned["accuracy"] > single["accuracy"]


def test_maml_adapts_in_two_steps() -> None:
    result = load("maml_sine").main(outer_steps=300)
    before, _, after = result["maml"][:3]
    assert after < 0.35 * before
    assert after < 0.35 * result["joint"][2]


def test_distilled_images_train_better_than_real_ones(tmp_path: Path) -> None:
    path = tmp_path / "images.png"
    result = load("distillation").main(outer_steps=100, picture=path)
    assert result["ten learned images"] > result["ten real images"] + 0.1
    assert result["ten learned images"] > result["ten class means"]
    with Image.open(path) as picture:
        assert picture.size == (1600, 320)
        low, high = picture.getextrema()
        assert (low, high) == (0, 255)


def test_language_model_learns_which_sources_help() -> None:
    result = load("language_model").main(windows=30)
    equal, learned = result["equal weights"], result["learned weights"]
    assert learned["loss"] < equal["loss"] - 0.05
    weights = learned["weights"]
    assert max(weights, key=weights.__getitem__) == "docstrings"
    assert weights["docstrings"] > 0.5
    assert weights["shuffled"] < 0.15
    assert weights["tables"] < 0.15


def test_scales_of_pixels_are_better_than_one_for_all() -> None:
    result = load("sklearn_hyperparameters").main(outer_steps=20)
    assert result["learned scales"]["loss"] < 0.93 * result["one scale"]["loss"]
