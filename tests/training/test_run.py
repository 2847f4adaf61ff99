"""Runs: events, validation, early stopping, loggers, and arguments that make no sense."""

import csv
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mlc
from mlc.training import CSV, EarlyStopping, Event, Stdout, TensorBoard
from tests.training.test_graphs import bilevel


def small(**options: Any) -> mlc.Training:
    p = bilevel()
    return mlc.Training([p.level("w", 1), p.level("u")], **options)


class Kept:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))


def test_events_come_in_order_with_their_values(tmp_path: Path) -> None:
    seen: list[Event] = []
    training = small(callbacks=seen.append)
    last = training.run(3, checkpoint=tmp_path, every=2, valid=lambda: 0.5, valid_every=2)
    written = [e for e in seen if e.kind == "checkpoint"]  # each once it is on the disk
    assert [e.step for e in written] == [2, 3]
    assert str(written[0].path).endswith("step-0000000002.mlc")
    assert seen.index(written[1]) == len(seen) - 2
    seen = [e for e in seen if e.kind != "checkpoint"]
    assert [e.kind for e in seen] == ["start", "step", "step", "valid", "step", "valid", "end"]
    assert [e.step for e in seen] == [0, 1, 2, 2, 3, 3, 3]
    assert seen[1].values.keys() == {"w", "u"}
    assert seen[3].values == {"valid": 0.5}
    assert seen[-1].values == last == {**last, "valid": 0.5}


def test_loggers_get_all_values_of_a_step_at_once() -> None:
    kept, more = Kept(), Kept()
    training = small(logger=[kept, more])
    training.run(2, valid=lambda: {"loss": torch.tensor(2.0), "accuracy": 1}, valid_every=2)
    assert [list(v) for _, v in kept.rows] == [["w", "u"], ["w", "u", "valid.loss", "valid.accuracy"]]
    assert kept.rows[1][1]["valid.loss"] == 2.0
    assert kept.rows == more.rows


def test_losses_are_those_of_the_step() -> None:
    p = bilevel()
    training = mlc.Training([p.level("w", 1), p.level("u")])
    wanted = p.losses["w"](p.params, p.data["w"][0]).item()
    values = training.run(1)
    assert values["w"] == pytest.approx(wanted, rel=1e-12)
    u = p.start["u"]
    assert values["u"] == pytest.approx(p.losses["u"]({**p.params, "u": u}, p.data["u"][0]).item(), rel=1e-12)


def test_early_stopping_stops() -> None:
    values = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    stopping = EarlyStopping(patience=2)
    training = small(callbacks=[stopping])
    training.run(10, valid=lambda: next(values), valid_every=1)
    assert training.step == 4
    assert training.stopped is not None and "valid has not improved on 2 for 2 values" in training.stopped
    assert stopping.best == 2.0
    training.run(1, valid=lambda: 0.0)
    assert training.step == 5
    assert training.stopped is None


def test_early_stopping_by_a_level_where_higher_is_better_and_after_a_restart() -> None:
    stopping = EarlyStopping(2, "u", higher=True, least=1e9)
    training = small(callbacks=[stopping])
    state = training.state_dict()
    training.run(10)
    assert training.step == 3  # the first value is the best one
    other = EarlyStopping(2, "u", higher=True)
    again = small(callbacks=[other])
    again.load_state_dict({**state, "callbacks": [stopping.state_dict()]})
    assert other.best == stopping.best


def test_early_stopping_needs_its_value() -> None:
    for value in ("valid", "valid.accuracy", "loss"):
        with pytest.raises(mlc.TrainingError, match=f"waits for '{value}'.*does not produce"):
            small(callbacks=[EarlyStopping(2, value)]).run(1)
    with pytest.raises(mlc.TrainingError, match="patience=0"):
        EarlyStopping(0)


def test_a_stopped_run_stays_stopped_when_it_is_started_again(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 2:
            event.training.stop("enough")

    training = small(callbacks=[stop])
    training.run(5, checkpoint=tmp_path, every=1)
    again = small(callbacks=[stop])
    assert again.run(5, checkpoint=tmp_path, every=1) == {}
    assert (again.step, again.stopped) == (2, "enough")


def test_validation_leaves_modes_and_random_numbers_alone() -> None:
    torch.manual_seed(0)
    net, u = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 1)), nn.Parameter(torch.zeros(3))
    data = [torch.randn(4, 3)]
    levels = [
        mlc.Level("w", net, torch.optim.SGD(net.parameters(), 0.1), lambda b: net(b + u).square().mean(), data),
        mlc.Level("u", u, torch.optim.SGD([u], 0.1), lambda b: net(b).mean(), data),
    ]
    seen: list[Tensor] = []

    def valid() -> Tensor:
        net.eval()
        assert not torch.is_grad_enabled()
        return net(torch.randn(2, 3)).mean()

    training = mlc.Training(levels, callbacks=[lambda e: seen.append(torch.get_rng_state())])
    training.run(1, valid=valid)
    assert net.training and net[1].training
    assert torch.equal(seen[1], seen[2])


def test_csv_of_a_run_and_of_one_that_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "losses.csv"
    small(logger=CSV(path)).run(3)
    again = small(logger=CSV(path))
    again.step = 1  # as continued from a checkpoint after one step
    again.run(3, valid=lambda: 1.5)
    with path.open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["step"] for r in rows] == ["1", "2", "3"]
    assert [r["valid"] for r in rows] == ["", "", "1.5"]
    assert float(rows[0]["w"]) > 0


def test_csv_refuses_another_table(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(mlc.TrainingError, match="without a column 'step'"):
        CSV(tmp_path / "x.csv").log(1, {"w": 1.0})


def test_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    small(logger=Stdout(every=2)).run(3, valid=lambda: 0.25)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out] == ["2", "3"]
    assert out[1].endswith("valid 0.25")


def test_tensorboard(tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(mlc.TrainingError, match="TensorBoard is not installed"):
            TensorBoard(tmp_path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logger = TensorBoard(tmp_path)
        logger.log(3, {"inner": 0.5, "valid.loss": 0.25})
        logger.log(4, {"inner": 0.125})
        events = EventAccumulator(str(tmp_path))
        events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("inner")] == [(3, 0.5), (4, 0.125)]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"steps": 1, "every": 1}, "every= without checkpoint="),
        ({"steps": 1, "valid_every": 1}, "valid_every= without valid="),
        ({"steps": 1, "valid": 3}, "valid is a int"),
        ({"steps": 1, "valid": lambda: 1, "valid_every": 0}, "valid_every=0"),
        ({"steps": 1, "valid": lambda: None}, "validation returned a NoneType"),
        ({"steps": 1, "valid": lambda: {"x": torch.ones(2)}}, "validation returned a Tensor as 'valid.x'"),
    ],
)
def test_arguments_that_make_no_sense(args: dict[str, Any], said: str) -> None:
    with pytest.raises(mlc.TrainingError, match=said):
        small().run(**args)


def test_no_steps() -> None:
    training = small()
    assert training.run(0) == {}
    assert training.step == 0


def test_numbers_in_batches_are_told_of() -> None:
    p = bilevel()
    first, data = p.losses["w"], p.data["w"]
    w = p.params["w"]
    level = mlc.Level(
        "w", w, torch.optim.SGD([w], 0.1), lambda b: first(p.params, b[0]) * b[1],
        lambda: ((data[k % 5], 1.0 + k) for k in range(99)),
    )  # fmt: skip
    with pytest.warns(mlc.MlcWarning, match="8 of 8 steps were recorded anew"):
        mlc.Training([level, p.level("u")]).run(8)


def test_no_grad_around_a_run_changes_nothing() -> None:
    p, q = bilevel(), bilevel()
    with torch.no_grad():
        mlc.Training([p.level("w", 1), p.level("u")]).run(2)
    mlc.Training([q.level("w", 1), q.level("u")]).run(2)
    assert all(torch.equal(p.params[n], q.params[n]) for n in p.params)
    levels = [p.level("w", 1), p.level("u")]
    with torch.inference_mode(), pytest.raises(mlc.TrainingError, match="inference_mode"):
        mlc.Training(levels)


def test_a_callback_that_raises_ends_the_run_where_it_is() -> None:
    def bad(event: Event) -> None:
        if event.kind == "step" and event.step == 2:
            raise KeyError("of the user")

    training = small(callbacks=[bad])
    with pytest.raises(KeyError):
        training.run(5)
    training.run(2)
    assert training.step == 4


def test_losses_that_are_not_finite_are_told_of() -> None:
    p = bilevel()
    first = p.losses["w"]
    p.losses["w"] = lambda v, b: first(v, b) * float("inf")
    with pytest.warns(mlc.MlcWarning, match=r"after step 1 'w' is (inf|nan)"):
        mlc.Training([p.level("w", 1), p.level("u")], nonfinite=None).run(1)


def test_a_loss_that_draws_from_numpy_runs_as_python_at_every_step() -> None:
    p = bilevel()
    first = p.losses["w"]
    p.losses["w"] = lambda v, b: first(v, b) * float(np.random.rand())
    training = mlc.Training([p.level("w", 2), p.level("u")])
    training.run(2)
    assert training.recordings == 2


def test_an_optimizer_hook_of_a_lower_level_is_part_of_the_step() -> None:
    """What Betty calls param_callback: weights clamped after each step."""
    p = bilevel()
    w = p.params["w"]
    opt = torch.optim.SGD([w], lr=0.1)

    def clamp(*_: Any) -> None:
        with torch.no_grad():
            w.clamp_(-0.2, 0.2)

    opt.register_step_post_hook(clamp)
    training = mlc.Training([p.level("w", 2, optimizer=opt), p.level("u")])
    training.run(2)
    assert w.abs().max() <= 0.2
    assert mlc.check(training.function, *training.arguments()).ok
