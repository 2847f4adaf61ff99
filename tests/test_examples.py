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
    "ddp_reweighting": "validate_after_training",  # on several processes: tests/distributed/test_script.py
    "language_model": "validate_after_training",
    "sklearn_hyperparameters": "loss_after_fitting",
    "ridge_penalties": "unrolled",
    "imaml_digits": "unrolled",
    "pretraining": "unrolled",
    "data_selection": "loss_after_training",
    "learned_optimizer": "train_window",
}

TRAININGS = ("reweighting_levels", "architecture", "ignoring", "gan", "self_tuning")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("[!_]*.py")} == {*COMPILED, *TRAININGS}


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


@pytest.mark.parametrize("name", TRAININGS)
def test_training_agrees_with_the_plain_unroll(name: str) -> None:
    example = load(name)
    training = example.example_training()
    report = mlc.check(training.function, *training.arguments())
    assert report.ok, str(report)
    inspect.signature(example.main).bind()


@pytest.mark.slow
def test_reweighting_by_levels_has_the_gradient_of_the_loop() -> None:
    levels, loop = load("reweighting_levels"), load("reweighting")
    (x, y, _), val, _ = levels.load()
    problems, model, logits = levels.problems(x, y, *val)
    mine = mlc.Training(problems)
    batches = mine.arguments()[0]
    other, own = loop.make_net(), torch.zeros(len(y), requires_grad=True)
    other.load_state_dict(model.state_dict())
    loop.validate_after_training(other, loop.make_optimizer(other), own, batches, *val).backward()
    (loss,), _ = mine.function(batches, None)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], own.grad, rtol=1e-4, atol=1e-8)
    result = levels.main(steps=60)
    assert result["mean weight, noisy samples"] < 0.3 * result["mean weight, clean samples"]


@pytest.mark.slow
def test_the_architecture_that_is_found_is_the_best_of_all() -> None:
    result = load("architecture").main(steps=60, alone=60)
    accuracies = result["accuracies"]
    assert len(accuracies) == 9
    assert result["found"] == max(accuracies, key=accuracies.__getitem__)


@pytest.mark.slow
def test_ignoring_finds_the_corrupt_samples() -> None:
    result = load("ignoring").main(steps=80)
    assert result["mean weight, corrupt samples"] < 0.6 * result["mean weight, good samples"]
    assert result["test accuracy, learned weights"] > result["test accuracy, equal weights"] + 0.02


@pytest.mark.slow
def test_reweighting_finds_the_noisy_labels() -> None:
    result = load("reweighting").main(windows=80)
    assert result["mean weight, noisy samples"] < 0.3 * result["mean weight, clean samples"]
    learned = result["test accuracy, learned weights"]
    assert learned > result["test accuracy, without weights"] + 0.05
    assert learned > result["test accuracy, the clean samples alone"] + 0.02


@pytest.mark.slow
def test_learned_rates_beat_the_best_single_rate() -> None:
    result = load("learning_rates").main(outer_steps=200)
    single, learned = result["one rate"], result["learned rates"]
    assert learned["loss"] < 0.85 * single["loss"]
    assert learned["accuracy"] > single["accuracy"]


def test_the_gradient_that_the_learned_optimizer_steps_on_is_that_of_the_unroll() -> None:
    """Over two windows, the mean over particles beside PyTorch's own graph of both."""
    example = load("learned_optimizer")
    torch.manual_seed(0)
    data, _ = example.load()
    optimizer, (flat, state) = example.LearnedOptimizer(), example.start()
    windows = [example.draw_batches(data, 2) for _ in range(2)]
    total, p, s = 0.0, flat, state
    for batches in windows:
        for (x, y), later in batches:
            (g,) = torch.autograd.grad(example.loss_of(p, x, y), p, create_graph=True)
            s, update = optimizer(g, s)
            p = p - update
            total = total + example.loss_of(p, *later) / len(batches)
    exact = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(optimizer.parameters()))])
    response = mlc.Evolution(sigma=0.01, samples=200, persistent=True)
    step = mlc.compile(example.window, backend="interpreter", flows={"inner": response})
    for batches in windows:
        step(optimizer, flat, state, batches).backward()
    found = torch.cat([p.grad.reshape(-1) for p in optimizer.parameters()])
    spread = step.report.variances["inner"] ** 0.5  # of all weights together, in the second window, which has the most
    assert (found - exact).norm() < 2 * spread
    assert spread < exact.norm() and torch.cosine_similarity(found, exact, 0) > 0.7


@pytest.mark.slow
def test_a_learned_optimizer_is_as_good_as_tuned_momentum() -> None:
    result = load("learned_optimizer").main()
    (learned, _), (tuned, _), (before, _) = (result[k] for k in ("learned", "SGD", "learned, at first"))
    assert learned < 1.03 * tuned and learned < 0.5 * before


@pytest.mark.slow
def test_maml_adapts_in_two_steps() -> None:
    result = load("maml_sine").main(outer_steps=300)
    before, _, after = result["maml"][:3]
    assert after < 0.35 * before
    assert after < 0.35 * result["joint"][2]


@pytest.mark.slow
def test_distilled_images_train_better_than_real_ones(tmp_path: Path) -> None:
    path = tmp_path / "images.png"
    result = load("distillation").main(outer_steps=100, picture=path)
    assert result["ten learned images"] > result["ten real images"] + 0.1
    assert result["ten learned images"] > result["ten class means"]
    with Image.open(path) as picture:
        assert picture.size == (1600, 320)
        low, high = picture.getextrema()
        assert (low, high) == (0, 255)


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_penalty_per_feature_is_better_than_one_and_its_gradient_exact() -> None:
    result = load("ridge_penalties").main(outer_steps=8)
    assert all(r["error of the gradient"] < 1e-6 for r in result.values())
    assert all(r["test loss, one per feature"] < r["test loss, one penalty"] for r in result.values())
    assert all(r["penalty of noise"] > 1.5 * r["penalty of real features"] for r in result.values())


@pytest.mark.slow
def test_a_self_tuning_net_finds_the_best_penalty_of_a_grid() -> None:
    result = load("self_tuning").main(steps=300)
    assert abs(result["log penalty, tuned"] - result["log penalty, best of a grid"]) < 0.3
    assert result["validation loss, tuned net"] < result["validation loss, best of a grid"] + 0.02


@pytest.mark.slow
def test_the_gradient_composed_of_two_responses_is_that_of_all_steps() -> None:
    result = load("pretraining").main(outer_steps=5, steps=60)
    assert result["error of the composed gradient"] < 5e-3
    assert result["kilobytes, composed"] < 0.2 * result["kilobytes, all steps"]
    assert result["weight of the sure annotators"] > 0.7


@pytest.mark.slow
def test_implicit_maml_is_as_good_as_unrolled_in_less_memory() -> None:
    result = load("imaml_digits").main(outer_steps=30)
    assert result["cosine of the gradients"] > 0.99
    assert min(result["accuracy, implicit"], result["accuracy, unrolled"]) > result["accuracy, untrained"] + 0.05
    assert result["kilobytes, implicit"] < 0.3 * result["kilobytes, unrolled"]


@pytest.mark.slow
def test_the_unrolled_generator_finds_all_gaussians() -> None:
    turns, unrolled = load("gan").main(steps=400).values()
    assert unrolled["modes"] == 8
    assert turns["modes"] < 6


@pytest.mark.slow
def test_data_selection_finds_the_shuffled_pieces_within_its_budget() -> None:
    result = load("data_selection").main()
    assert result["shuffled pieces below the median"] > 0.7
    assert result["measured peak, kilobytes"] <= 4096
    assert result["test loss, learned weights"] < result["test loss, equal weights"] - 0.05
