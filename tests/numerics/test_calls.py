"""A call means what the loop means: what is read anew at every call, and what makes the body run again."""

from types import ModuleType

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from tests.numerics.models import CLASSES, Meta, draw, mlp, task, train_loss, val_loss
from tests.numerics.program import Setup
from tests.numerics.reference import Learner, schedule
from tests.numerics.worlds import Twins, World, world


def new_batches(steps: int = 3, size: int = 6):
    def change(w: Setup) -> None:
        w.args["batches"] = [(torch.randn(size, 4), torch.randint(0, CLASSES, (size,))) for _ in range(steps)]

    return change


@pytest.fixture
def twins(mlc: ModuleType) -> Twins:
    pair = Twins(mlc)
    pair.call_traced()
    return pair


# --- read anew, without running the user's Python


def test_the_same_call_again(twins: Twins) -> None:
    twins.call_cached()
    twins.call_cached()


def test_new_data(twins: Twins) -> None:
    twins.change(new_batches())
    twins.call_cached()


def test_data_changed_in_place(twins: Twins) -> None:
    twins.change(lambda w: w.args["batches"][1][0].mul_(1.5))
    twins.call_cached()


def test_meta_parameters_changed_in_place(twins: Twins) -> None:
    twins.change(lambda w: w.args["meta"].source.data.add_(torch.randn(3)))
    twins.call_cached()


def test_other_modules_of_the_same_kind(twins: Twins) -> None:
    def change(w: World) -> None:
        w.args["meta"] = Meta()
        w.meta = dict(w.args["meta"].named_parameters())
        layers = [nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, CLASSES)]
        w.args["model"] = nn.Sequential(*layers)

    twins.change(change)
    twins.call()


def test_weights_loaded_between_calls(twins: Twins) -> None:
    def change(w: World) -> None:
        with torch.no_grad():
            for p in w.args["model"].parameters():
                p.copy_(torch.randn(p.shape))

    twins.change(change)
    twins.call_cached()


def test_a_parameter_replaced(twins: Twins) -> None:
    def change(w: World) -> None:
        w.args["meta"].source = nn.Parameter(torch.randn(CLASSES))
        w.meta = dict(w.args["meta"].named_parameters())

    twins.change(change)
    twins.call()


def test_a_closure_tensor_changed_in_place(twins: Twins) -> None:
    twins.change(lambda w: w.box["scale"].fill_(0.7))
    twins.call_cached()


def test_a_closure_variable_bound_to_another_tensor(twins: Twins) -> None:
    twins.change(lambda w: w.rebind(val=draw("mlp")))
    twins.call_cached()


def test_an_entry_of_a_closure_dict_replaced(twins: Twins) -> None:
    twins.change(lambda w: w.rebind(scale=torch.tensor(1.3)))
    twins.call_cached()


def test_new_random_draws(mlc: ModuleType) -> None:
    """Twins seeds every call differently; here two calls go on from one generator."""
    one, two = world(), world()
    two.args["model"].load_state_dict(one.args["model"].state_dict())
    two.args.update(meta=one.args["meta"], batches=one.args["batches"])
    two.rebind(val=one.val)
    compiled = mlc.compile(one.loop)
    values = []
    for fn, w in ((compiled, one), (two.loop, two)):
        start = {n: t.clone() for n, t in w.args["model"].state_dict().items()}
        torch.manual_seed(9)
        for _ in range(3):
            w.args["model"].load_state_dict(start)
            values.append(float(fn(**w.args).detach()))
        values.append(float(torch.rand(())))
    assert values[:4] == pytest.approx(values[4:], rel=1e-10)
    assert len(set(values[:3])) == 3


def test_more_and_fewer_steps(twins: Twins) -> None:
    for steps in (5, 2, 9, 3):
        twins.change(new_batches(steps))
        twins.call_cached()


def test_one_step(twins: Twins) -> None:
    twins.change(new_batches(1))
    twins.call()


def test_generators_are_drawn_at_every_call(mlc: ModuleType) -> None:
    drawn: list[int] = []

    def stream(seed: int):
        gen = torch.Generator().manual_seed(seed)
        for i in range(4):
            drawn.append(i)
            yield torch.randn(6, 4, generator=gen), torch.randint(0, CLASSES, (6,), generator=gen)

    def loop(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    compiled, args = mlc.compile(loop), task().args()
    for seed in (1, 2, 3):
        learner = Learner(args["model"])
        for x, y in list(stream(seed)):
            learner.step(SGD, learner.grads(train_loss(learner, args["meta"], x, y)), lr=0.1)
        drawn.clear()
        value = compiled(**{**args, "batches": stream(seed)})
        assert drawn == [0, 1, 2, 3]
        assert float(value.detach()) == pytest.approx(float(val_loss(learner, args["val"]).detach()), rel=1e-10)
    assert compiled.recordings == 1


def loader_world(inside: bool) -> World:
    data = TensorDataset(torch.randn(12, 4), torch.randint(0, CLASSES, (12,)))
    outer = DataLoader(data, batch_size=4, shuffle=True)

    def loop(model, meta, val):
        opt = SGD(model.parameters(), lr=0.1)
        loader = DataLoader(data, batch_size=4, shuffle=True) if inside else outer
        for x, y in loader:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, val):
        learner = Learner(model)
        for x, y in DataLoader(data, batch_size=4, shuffle=True):
            learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.1)
        return val_loss(learner, val)

    args = task().args()
    del args["batches"]
    made = World(loop, reference, args)
    made.data = data  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("inside", [True, False], ids=["made inside", "in the closure"])
def test_loaders_shuffle_anew(inside: bool, mlc: ModuleType) -> None:
    twins = Twins(mlc, lambda: loader_world(inside))
    twins.call_traced()
    twins.call_cached()
    twins.change(lambda w: w.data.tensors[0].mul_(0.5))
    twins.call_cached()


def warm_world() -> World:
    """Model, optimizer and scheduler outlive the calls."""

    def loop(model, meta, batches, val, opt, turn):
        for x, y in batches:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
            turn.step()
        return val_loss(model, val)

    def reference(model, meta, batches, val, opt, turn):
        learner = Learner(model)
        learner.continue_from(opt)
        table = schedule(Adam, {"lr": 0.05, "eps": 1e-3}, lambda o: lr_scheduler.StepLR(o, 4, 0.5), turn.last_epoch + 3)
        for (x, y), now in zip(batches, table[turn.last_epoch :], strict=True):
            learner.step(Adam, learner.grads(train_loss(learner, meta, x, y)), **now)
        return val_loss(learner, val)

    args = task().args()
    opt = Adam(args["model"].parameters(), lr=0.05, eps=1e-3)
    made = World(loop, reference, {**args, "opt": opt, "turn": lr_scheduler.StepLR(opt, 4, 0.5)})
    return made


@pytest.mark.slow
def test_optimizers_and_schedulers_go_on_from_where_they_are(mlc: ModuleType) -> None:
    twins = Twins(mlc, warm_world)
    for _ in range(4):
        twins.call()


# --- part of the key: the body runs again


def test_new_shapes(twins: Twins) -> None:
    twins.change(new_batches(size=5))
    twins.call_traced()
    twins.change(new_batches(size=6))
    twins.call_cached()


def test_a_python_scalar_argument(twins: Twins) -> None:
    twins.change(lambda w: w.args.update(temperature=2.0))
    twins.call_traced()


def test_a_flag_argument(twins: Twins) -> None:
    twins.change(lambda w: w.args.update(squared=True))
    twins.call_traced()


def test_a_python_scalar_in_the_closure(twins: Twins) -> None:
    twins.change(lambda w: w.rebind(lr=0.3))
    twins.call_traced()


def test_train_and_eval(twins: Twins) -> None:
    twins.change(lambda w: w.args["model"].eval())
    twins.call_traced()
    twins.change(lambda w: w.args["model"].train())
    twins.call_cached()


def test_requires_grad_of_an_inner_parameter(twins: Twins) -> None:
    twins.change(lambda w: w.args["model"][0].requires_grad_(False))
    twins.call_traced()


def test_requires_grad_of_a_meta_parameter(twins: Twins) -> None:
    def change(w: World) -> None:
        w.args["meta"].log_l2.requires_grad_(False)
        del w.meta["log_l2"]

    twins.change(change)
    twins.call_traced()


def test_an_attribute_of_a_module(twins: Twins) -> None:
    def change(w: World) -> None:
        w.args["model"][1].p = 0.6

    twins.change(change)
    twins.call_traced()


def test_a_hyperparameter_of_an_optimizer_from_outside(mlc: ModuleType) -> None:
    def make() -> World:

        def loop(model, meta, batches, val, opt):
            for x, y in batches:
                opt.zero_grad()
                train_loss(model, meta, x, y).backward()
                opt.step()
            return val_loss(model, val)

        def reference(model, meta, batches, val, opt):
            learner = Learner(model)
            for x, y in batches:
                grads = learner.grads(train_loss(learner, meta, x, y))
                learner.step(SGD, grads, lr=opt.param_groups[0]["lr"])
            return val_loss(learner, val)

        args = {**task().args(), "model": mlp()}
        made = World(loop, reference, {**args, "opt": SGD(args["model"].parameters(), lr=0.1)})
        return made

    twins = Twins(mlc, make)
    twins.call_traced()
    twins.change(lambda w: w.args["opt"].param_groups[0].update(lr=0.4))
    twins.call()


def test_the_number_of_steps_as_an_argument(mlc: ModuleType) -> None:
    def make() -> World:
        def loop(model, meta, batches, val, steps):
            opt = SGD(model.parameters(), lr=0.1)
            for t in range(steps):
                opt.zero_grad()
                train_loss(model, meta, *batches[t % 2]).backward()
                opt.step()
            return val_loss(model, val)

        def reference(model, meta, batches, val, steps):
            learner = Learner(model)
            for t in range(steps):
                grads = learner.grads(train_loss(learner, meta, *batches[t % 2]))
                learner.step(SGD, grads, lr=0.1)
            return val_loss(learner, val)

        return World(loop, reference, {**task("mlp", 2).args(), "steps": 3})

    twins = Twins(mlc, make)
    for steps in (3, 5, 1, 4):
        twins.change(lambda w, n=steps: w.args.update(steps=n))
        twins.call()
