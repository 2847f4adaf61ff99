"""After the call everything stands where the loop would have left it; after an error, where it was before."""

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler

from tests.numerics.models import ConvBN, Meta, draw, task, train_loss, val_loss
from tests.numerics.program import describe, same


def everything(kind: str = "convbn") -> dict[str, Any]:
    """Arguments with all that carries state."""
    torch.manual_seed(2)
    args = task(kind).args()
    args["opt"] = AdamW(args["model"].parameters(), lr=0.05, eps=1e-3)
    args["turn"] = lr_scheduler.CosineAnnealingLR(args["opt"], T_max=5)
    args["ema"] = copy.deepcopy(args["model"])
    torch.manual_seed(3)
    return args


def loop(model, meta, batches, val, opt, turn, ema):
    model.train()
    for x, y in batches:
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()
        turn.step()
        with torch.no_grad():
            for mean, p in zip(ema.parameters(), model.parameters(), strict=True):
                mean.lerp_(p, 0.5)
            for mean, b in zip(ema.buffers(), model.buffers(), strict=True):
                mean.copy_(b)
    ema.eval()
    return val_loss(ema, val)


def snapshot(args: dict[str, Any]) -> dict[str, Any]:
    kept = {n: copy.deepcopy(describe(thing)) for n, thing in args.items()}
    for name in ("model", "meta"):
        kept[f"{name}.grad"] = [None if p.grad is None else p.grad.clone() for p in args[name].parameters()]
    return kept


def test_everything_ends_as_in_the_loop(mlc: ModuleType) -> None:
    compiled, plain = everything(), everything()
    function = mlc.compile(loop)
    for _ in range(2):
        function(**compiled)
        loop(**plain)
        for name in plain:
            same(describe(compiled[name]), describe(plain[name]), name)


def test_objects_keep_their_identity(mlc: ModuleType) -> None:
    args = everything()

    def identities() -> list:
        objects = [*args["model"].parameters(), *args["model"].buffers(), *args["meta"].parameters()]
        return [(id(t), t.data_ptr(), t.requires_grad, t.is_leaf, type(t)) for t in objects]

    before = identities()
    mlc.compile(loop)(**args).backward()
    assert identities() == before
    assert [id(p) for p in args["opt"].param_groups[0]["params"]] == [b[0] for b in before[:6]]


def test_no_hook_of_ours_stays_behind(mlc: ModuleType) -> None:
    args = everything()

    def hooks() -> list:
        opt, found = args["opt"], []
        for module in args["model"].modules():
            found += [len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)]
            found.append("forward" in vars(module))
        names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
        return [*found, *(len(getattr(opt, n)) for n in names), "step" in vars(opt), "zero_grad" in vars(opt)]

    before, patched = hooks(), (torch.Tensor.backward, torch.autograd.grad, SGD.step, F.dropout)
    mlc.compile(loop)(**args)
    assert hooks() == before
    assert patched == (torch.Tensor.backward, torch.autograd.grad, SGD.step, F.dropout)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float64


def test_inner_gradients_are_left_as_by_the_loop(mlc: ModuleType) -> None:
    compiled, plain = everything(), everything()
    mlc.compile(loop)(**compiled)
    loop(**plain)
    for a, b in zip(compiled["model"].parameters(), plain["model"].parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in compiled["meta"].parameters())


def test_gradients_there_before_the_call_count_as_in_the_loop(mlc: ModuleType) -> None:
    """A loop that accumulates without zeroing first starts from what is there."""

    def accumulate(model, meta, batches, val):
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in batches:
            train_loss(model, meta, x, y).backward()
            opt.step()
        return val_loss(model, val)

    ends = []
    for run in (mlc.compile(accumulate), accumulate):
        torch.manual_seed(4)
        args = task().args()
        for p in args["model"].parameters():
            p.grad = torch.randn_like(p)
        value = float(run(**args).detach())
        ends.append([value, {n: t.clone() for n, t in args["model"].state_dict().items()}])
    same(ends[0], ends[1], "after")


class Boom(Exception):
    pass


def exploding(model, meta, batches, val, opt, turn, ema):
    for i, (x, y) in enumerate(batches):
        opt.zero_grad()
        train_loss(model, meta, x, y).backward()
        opt.step()
        turn.step()
        if i == 1:
            raise Boom("in the user's loop")
    return val_loss(model, val)


def unsupported(model, meta, batches, val, opt, turn, ema):
    for x, y in batches:
        opt.zero_grad()
        loss = train_loss(model, meta, x, y)
        loss.backward()
        opt.step()
        turn.step()
    loss = val_loss(model, val)
    loss.register_hook(lambda g: g)
    return loss


@pytest.mark.parametrize("broken", [exploding, unsupported])
def test_an_error_in_the_loop_leaves_everything_untouched(broken, mlc: ModuleType) -> None:
    args = everything()
    before, draws = snapshot(args), torch.get_rng_state()
    with pytest.raises((Boom, mlc.MlcError)) as error:
        mlc.compile(broken)(**args)
    assert error.type is Boom or broken is unsupported
    same(snapshot(args), before, "after the error")
    assert torch.equal(torch.get_rng_state(), draws)
    mlc.compile(loop)(**args).backward()
    assert args["meta"].source.grad is not None


def test_an_error_of_the_data_leaves_everything_untouched(mlc: ModuleType) -> None:
    """Later calls draw the data without running the loop's Python: the loader may fail half way."""

    def failing(good: int):
        for i in range(4):
            if i == good:
                raise Boom("no more data")
            yield draw("convbn")

    args = everything()
    function = mlc.compile(loop)
    function(**{**args, "batches": failing(9)})
    before, draws = snapshot(args), torch.get_rng_state()
    with pytest.raises(Boom):
        function(**{**args, "batches": failing(2)})
    same(snapshot(args), before, "after the error")
    del draws


def test_an_error_in_the_forward_of_a_later_call(mlc: ModuleType) -> None:
    """An index out of range is found while running, after steps were taken."""

    def train(model, meta, batches):
        opt = Adam(model.parameters(), lr=0.05, eps=1e-3)
        for x, y in batches:
            opt.zero_grad()
            (meta(x.double()[:, :1]).sigmoid() * F.cross_entropy(model(x).mean(1), y)).mean().backward()
            opt.step()
        return F.cross_entropy(model(batches[0][0]).mean(1), batches[0][1])

    torch.manual_seed(0)
    model, meta = nn.Embedding(7, 3), nn.Linear(1, 1)
    batches = [(torch.randint(0, 7, (4, 5)), torch.randint(0, 3, (4,))) for _ in range(3)]
    function = mlc.compile(train)
    function(model, meta, batches)
    before = model.weight.detach().clone()
    batches[2][0][0, 0] = 99
    with pytest.raises((IndexError, RuntimeError, mlc.MlcError)):
        function(model, meta, batches)
    assert torch.equal(model.weight.detach(), before)


def test_batch_norm_s_counters(mlc: ModuleType) -> None:
    torch.manual_seed(0)
    model, meta = ConvBN(), Meta()

    def train():
        opt = SGD(model.parameters(), lr=0.1)
        for x, y in [draw("convbn")] * 3:
            opt.zero_grad()
            train_loss(model, meta, x, y).backward()
            opt.step()
        model.eval()
        return val_loss(model, draw("convbn"))

    function = mlc.compile(train)
    function()
    assert model.norm.num_batches_tracked == 3 and not model.training
    model.train()
    function()
    assert model.norm.num_batches_tracked == 6


def test_the_report_is_measured(mlc: ModuleType) -> None:
    function, args = mlc.compile(loop), everything()
    function(**args).backward()
    assert function.program is not None and function.plan is not None
    assert str(function.program)
    assert function.report is not None
