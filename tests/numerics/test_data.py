"""Where batches come from: lists, loaders, generators, dicts, dataclasses, counters; and what is logged."""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from tests.numerics.models import CLASSES, Meta, Task, draw, mlp, task, train_loss, val_loss
from tests.numerics.program import Program, Setup, Suite, check_compiled, check_reference
from tests.numerics.reference import Learner

SUITE = Suite()


def test_reference(program: Program) -> None:
    check_reference(program)


def test_compiled(program: Program, mlc: ModuleType) -> None:
    check_compiled(program, mlc)


def step(model, meta, opt, x: Tensor, y: Tensor) -> Tensor:
    opt.zero_grad()
    loss = train_loss(model, meta, x, y)
    loss.backward()
    opt.step()
    return loss


def run_reference(model, meta, batches, val):
    learner = Learner(model)
    for x, y in batches:
        learner.step(SGD, learner.grads(train_loss(learner, meta, x, y)), lr=0.1, momentum=0.9)
    return val_loss(learner, val)


def over(loop, batches=None, unpack=tuple, **more) -> Setup:
    """A program whose batches have the form `batches(list of pairs)` and read back as `unpack(batch)`."""
    given = task("mlp", 4)
    shaped = (batches or list)(given.batches)

    def reference(model, meta, batches, val, **_):
        return run_reference(model, meta, [unpack(b) for b in batches], val)

    return Setup(loop, reference, {**given.args(), "batches": shaped, **more})


def optimizer(model) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


# --- containers


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Batch:
    image: Tensor
    label: Tensor
    source: str = "here"


@SUITE.add()
def generator() -> Setup:
    def loop(model, meta, batches, val):
        opt = optimizer(model)
        for x, y in batches:
            step(model, meta, opt, x, y)
        return val_loss(model, val)

    return over(loop, lambda pairs: (pair for pair in pairs))


@SUITE.add()
def dicts() -> Setup:
    def loop(model, meta, batches, val):
        opt = optimizer(model)
        for batch in batches:
            step(model, meta, opt, batch["x"], batch["y"])
        return val_loss(model, val)

    return over(loop, lambda ps: [{"x": x, "y": y} for x, y in ps], lambda b: (b["x"], b["y"]))


@SUITE.add()
def dataclasses_and_tuples() -> Setup:
    def loop(model, meta, batches, val):
        opt = optimizer(model)
        for one, two in batches:
            step(model, meta, opt, one.image, one.label)
            step(model, meta, opt, two.x, two.y)
        return val_loss(model, val)

    def shape(pairs):
        return [(Batch(*a), Pair(*b)) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]

    def reference(model, meta, batches, val):
        flat = [pair for one, two in batches for pair in ((one.image, one.label), tuple(two))]
        return run_reference(model, meta, flat, val)

    return Setup(loop, reference, over(loop, shape).args)


@SUITE.add()
def one_tensor_indexed_by_step() -> Setup:
    def loop(model, meta, batches, val):
        xs, ys = batches
        opt = optimizer(model)
        for t in range(len(xs)):
            step(model, meta, opt, xs[t], ys[t])
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        return run_reference(model, meta, list(zip(*batches, strict=True)), val)

    given = task("mlp", 4)
    stacked = tuple(torch.stack(parts) for parts in zip(*given.batches, strict=True))
    return Setup(loop, reference, {**given.args(), "batches": stacked})


@SUITE.add()
def the_same_batch_every_step() -> Setup:
    def loop(model, meta, batches, val):
        opt = optimizer(model)
        (x, y) = batches
        for _ in range(5):
            step(model, meta, opt, x, y)
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        return run_reference(model, meta, [batches] * 5, val)

    given = task("mlp", 1)
    return Setup(loop, reference, {**given.args(), "batches": given.batches[0]})


@SUITE.add()
def slices_and_epochs() -> Setup:
    def loop(model, meta, batches, val):
        x, y = batches
        opt = optimizer(model)
        for _epoch in range(2):
            for start in range(0, len(x), 4):
                step(model, meta, opt, x[start : start + 4], y[start : start + 4])
        return val_loss(model, val)

    def reference(model, meta, batches, val):
        x, y = batches
        parts = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 12, 4)]
        return run_reference(model, meta, parts * 2, val)

    data = torch.randn(12, 4), torch.randint(0, CLASSES, (12,))
    return Setup(loop, reference, {**task().args(), "batches": data})


@SUITE.add()
def while_with_a_counter() -> Setup:
    def loop(model, meta, batches, val):
        opt = optimizer(model)
        t = 0
        while t < len(batches):
            step(model, meta, opt, *batches[t])
            t += 1
        return val_loss(model, val)

    return over(loop)


@SUITE.add()
def while_until_the_data_end() -> Setup:
    def loop(model, meta, batches, val):
        opt = optimizer(model)
        stream = iter(batches)
        while True:
            try:
                x, y = next(stream)
            except StopIteration:
                break
            step(model, meta, opt, x, y)
        return val_loss(model, val)

    return over(loop)


@SUITE.add()
def batches_of_unequal_size() -> Setup:
    """A last batch that is smaller: an irregular loop."""

    def loop(model, meta, batches, val):
        opt = optimizer(model)
        for x, y in batches:
            step(model, meta, opt, x, y)
        return val_loss(model, val)

    return over(loop, lambda pairs: [*pairs[:-1], tuple(t[:3] for t in pairs[-1])])


# --- loaders


class Lists(Dataset):
    """A dataset that returns dictionaries of tensors and numbers."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        return {"x": self.x[i] * 2, "y": int(self.y[i])}


def dataset(n: int = 12) -> TensorDataset:
    return TensorDataset(torch.randn(n, 4), torch.randint(0, CLASSES, (n,)))


def loader_args() -> dict:
    args = task().args()
    del args["batches"]
    return {**args, "loader": dataset()}


@SUITE.add()
def loader_made_inside_and_shuffled() -> Setup:
    def loop(model, meta, loader, val):
        device = next(model.parameters()).device
        loader = DataLoader(loader, batch_size=4, shuffle=True)
        opt = optimizer(model)
        for _epoch in range(2):
            for i, (x, y) in enumerate(loader):
                x, y = x.to(device), y.to(device, non_blocking=True)
                loss = step(model, meta, opt, x, y)
                if i % 2 == 0:
                    print(f"[{i * len(x)}/{len(loader.dataset)}] loss {loss.item():.4f} of {len(loader)}")
        return val_loss(model, val)

    def reference(model, meta, loader, val):
        loader = DataLoader(loader, batch_size=4, shuffle=True)
        return run_reference(model, meta, (pair for _ in range(2) for pair in loader), val)

    return Setup(loop, reference, loader_args())


@SUITE.add()
def loader_passed_in_under_a_progress_bar() -> Setup:
    def loop(model, meta, loader, val):
        opt = optimizer(model)
        for epoch in range(2):
            bar = tqdm(loader, desc=f"epoch {epoch}")
            for x, y in bar:
                loss = step(model, meta, opt, x, y)
                bar.set_postfix(loss=loss.item())
        return val_loss(model, val)

    def reference(model, meta, loader, val):
        return run_reference(model, meta, (pair for _ in range(2) for pair in loader), val)

    args = loader_args()
    return Setup(loop, reference, {**args, "loader": DataLoader(args["loader"], batch_size=4, shuffle=True)})


@SUITE.add()
def shuffling_and_dropout_share_the_generator() -> Setup:
    def loop(model, meta, loader, val):
        opt = optimizer(model)
        for batch in DataLoader(loader, batch_size=3, shuffle=True, drop_last=True):
            step(model, meta, opt, batch["x"], batch["y"])
        return val_loss(model, val)

    def reference(model, meta, loader, val):
        batches = DataLoader(loader, batch_size=3, shuffle=True, drop_last=True)
        return run_reference(model, meta, ((b["x"], b["y"]) for b in batches), val)

    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, CLASSES))
    args = loader_args()
    return Setup(loop, reference, {**args, "model": model, "loader": Lists(*dataset(10).tensors)})


@SUITE.add()
def two_loaders_in_step() -> Setup:
    """Training and validation loaders zipped, the outer loss summed over the validation batches."""

    def losses(model, pairs):
        return torch.stack([val_loss(model, pair) for pair in pairs]).mean()

    def loop(model, meta, train, held):
        opt = optimizer(model)
        for (x, y), (vx, _) in zip(train, held, strict=True):
            step(model, meta, opt, torch.cat([x, vx.to(x.dtype)]), torch.cat([y, y[: len(vx)]]))
        return losses(model, held)

    def reference(model, meta, train, held):
        learner = Learner(model)
        for (x, y), (vx, _) in zip(train, held, strict=True):
            loss = train_loss(learner, meta, torch.cat([x, vx]), torch.cat([y, y[: len(vx)]]))
            learner.step(SGD, learner.grads(loss), lr=0.1, momentum=0.9)
        return losses(learner, held)

    loaders = {"train": DataLoader(dataset(12), batch_size=4), "held": DataLoader(dataset(6), batch_size=2)}
    return Setup(loop, reference, {"model": mlp(), "meta": Meta(), **loaders})


# --- learned data, logging


@SUITE.add()
def distilled_data() -> Setup:
    """The training inputs and their soft labels are the meta-parameters."""

    def loss_of(model, meta):
        return F.cross_entropy(model(meta["x"]), meta["y"].softmax(1))

    def loop(model, meta, val):
        opt = optimizer(model)
        for _ in range(4):
            opt.zero_grad()
            loss_of(model, meta).backward()
            opt.step()
        return val_loss(model, val)

    def reference(model, meta, val):
        learner = Learner(model)
        for _ in range(4):
            learner.step(SGD, learner.grads(loss_of(learner, meta)), lr=0.1, momentum=0.9)
        return val_loss(learner, val)

    meta = {
        "x": torch.randn(CLASSES, 4, requires_grad=True),
        "y": (3 * torch.eye(CLASSES)).requires_grad_(),
    }
    return Setup(loop, reference, {"model": mlp(), "meta": meta, "val": draw("mlp")})


@SUITE.add()
def logging_every_other_step() -> Setup:
    def loop(model, meta, batches, val):
        opt = optimizer(model)
        history, running = [], 0.0
        for i, (x, y) in enumerate(batches):
            loss = step(model, meta, opt, x, y)
            history.append(loss.item())
            running += loss.item()
            if i % 2 == 1:
                print(f"step {i}: loss {loss.item():.4f}, running {running / (i + 1):>8.3f}")
                print("accuracy", (model(x).argmax(1) == y).double().mean().item(), loss)
        return val_loss(model, val)

    return over(loop)


@SUITE.add()
def logging_with_old_formats() -> Setup:
    def loop(model, meta, batches, val):
        opt = optimizer(model)
        for i, (x, y) in enumerate(batches):
            loss = step(model, meta, opt, x, y)
            print("step %d loss %.3f" % (i, loss.item()))  # noqa: UP031
            print("step {} loss {:.3f}".format(i, round(loss.item(), 3)))  # noqa: UP032
        return val_loss(model, val)

    return over(loop)


def test_what_is_logged_is_a_placeholder_or_right(capsys, mlc: ModuleType) -> None:
    def loop(model, meta, batches, val):
        opt = optimizer(model)
        for i, (x, y) in enumerate(batches):
            loss = step(model, meta, opt, x, y)
            print(f"loss {loss.item():.6f}")
            if i % 2 == 0:
                print(f"loss {loss.item()}")
        return val_loss(model, val)

    def logged(run) -> list[str]:
        torch.manual_seed(4)
        run(**Task(mlp(), Meta(), [draw("mlp") for _ in range(4)], draw("mlp")).args())
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss ")]
        return [line.removeprefix("loss ") for line in lines]

    plain, compiled = logged(loop), logged(mlc.compile(loop))
    assert compiled, "nothing was printed while tracing"
    for word in compiled:
        try:
            number = float(word)
        except ValueError:
            continue  # a placeholder that nobody takes for a number
        assert number != number or any(abs(number - float(p)) < 1e-5 for p in plain), word
