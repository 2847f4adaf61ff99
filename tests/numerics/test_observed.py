"""The first call really runs: programs whose recording was once not what ran."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlc

X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def judge(fn: Callable[..., Tensor], *args, at: float = 0.3, tol: float = 1e-6, calls: int = 2) -> None:
    """Values of two calls are eager's; the gradient by the first argument is the slope."""

    def plain(v: float) -> float:
        torch.manual_seed(0)
        return fn(torch.tensor(v, requires_grad=True), *args).item()

    w = torch.tensor(at, requires_grad=True)
    compiled = mlc.compile(fn)
    for _ in range(calls):
        torch.manual_seed(0)
        out = compiled(w, *args)
        assert abs(out.item() - plain(at)) <= 1e-9 * max(abs(plain(at)), 1)
        (g,) = torch.autograd.grad(out, w)
        e = 1e-5
        slope = (plain(at + e) - plain(at - e)) / (2 * e)
        assert abs(g.item() - slope) <= tol * max(abs(slope), 1)


def test_two_leaves_of_equal_zeros_are_two():
    def fn(w):
        out = torch.zeros(())
        for _ in range(3):
            a, b = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
            loss = ((a + w) * X).sum() ** 2 + ((b - w) * X * X).sum() ** 2 + (a * a).sum()
            (g,) = torch.autograd.grad(loss, a)
            out = out + (g * g).sum() * w
        return out

    judge(fn)


def test_a_gradient_by_weights_that_are_zero():
    def fn(w):
        p = torch.ones(3).requires_grad_()
        eps = torch.zeros(3, requires_grad=True)
        (g,) = torch.autograd.grad((eps * (p * X - 1) ** 2).sum(), p, create_graph=True)
        (by,) = torch.autograd.grad((((p - w * g) - X) ** 2).sum(), eps)
        return (by / by.sum() * X).sum() * w

    judge(fn)


@pytest.mark.parametrize("make", [lambda x: x.detach(), lambda x: x + 1, lambda x: x.detach().clone()])
def test_leaves_made_of_one_value_are_apart(make):
    def fn(w):
        a, b = make(X).requires_grad_(), make(X).requires_grad_()
        (g,) = torch.autograd.grad(((3 * a + b) ** 2 * w).sum(), a, create_graph=True)
        return (g * g).sum() * w

    judge(fn)


@pytest.mark.filterwarnings("ignore:the gradient taken at")
def test_players_that_train_each_other():
    def fn(w):
        a, b = torch.ones(3).requires_grad_(), torch.zeros(3).requires_grad_()
        one, two = torch.optim.SGD([a], lr=0.1), torch.optim.SGD([b], lr=0.1)
        for _ in range(3):
            one.zero_grad()
            ((a - b) ** 2 * w * X).sum().backward()
            one.step()
            two.zero_grad()
            ((b + a * w - X) ** 2).sum().backward()
            two.step()
        return ((a - b - X) ** 2).sum()

    judge(fn)


def test_unflatten_and_attention_inside():
    def fn(w):
        net = nn.MultiheadAttention(4, 2)
        opt = torch.optim.SGD(net.parameters(), lr=w)
        x = torch.linspace(-1, 1, 24).reshape(3, 2, 4)
        for _ in range(2):
            opt.zero_grad()
            (net(x, x, x)[0] - x.flip(0)).square().mean().backward()
            opt.step()
        return net(x, x, x)[0].square().mean() + x.unflatten(0, (3, 1)).sum()

    judge(fn)


def test_items_made_in_inference_mode():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X[:, None].repeat(2, 2)), batch_size=2)

    def fn(w, loader):
        p = torch.ones(2).requires_grad_()
        opt = torch.optim.SGD([p], lr=w)
        seen = 0.0
        for _ in range(2):
            for (x,) in loader:
                opt.zero_grad()
                (x @ p - 1).square().mean().backward()
                opt.step()
            with torch.inference_mode():
                for (x,) in loader:
                    seen += (x @ p).sum().item()
        return (p * p).sum()

    judge(fn, loader, at=0.02)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_products_with_sparse_matrices_of_data(layout):
    s = getattr(torch.diag(X) + torch.eye(3).flip(0), layout)()
    x = torch.linspace(-1, 1, 6).reshape(3, 2)

    def fn(w, s):
        p = torch.ones(2, 2).mul(0.1).requires_grad_()
        opt = torch.optim.SGD([p], lr=0.01)
        for _ in range(3):
            opt.zero_grad()
            ((torch.mm(s, x @ p) + torch.sparse.mm(s, x @ p) - 1) ** 2).mul(w).mean().backward()
            opt.step()
        return torch.mm(s, x @ p).square().mean()

    judge(fn, s)


def test_sparse_made_inside_of_data():
    def fn(w):
        at = torch.tensor([[0, 1, 2], [2, 0, 1]])
        adj = torch.sparse_coo_tensor(at, torch.ones(3), (3, 3), check_invariants=True).to_dense()
        p = X.clone().requires_grad_()
        opt = torch.optim.SGD([p], lr=w)
        for _ in range(2):
            opt.zero_grad()
            (adj @ p - 1).square().mean().backward()
            opt.step()
        return F.softplus(p).sum()

    judge(fn)


def test_states_that_are_only_rounding():
    def fn(w):
        net = nn.MultiheadAttention(4, 2)
        opt = torch.optim.Adam(net.parameters(), lr=0.01, eps=1e-3)
        x = torch.linspace(-1, 1, 24).reshape(3, 2, 4)
        for _ in range(2):
            opt.zero_grad()
            (w * (net(x, x, x)[0] - x.flip(0)).square().mean()).backward()
            opt.step()
        net_out.update(opt.state_dict())
        return net(x, x, x)[0].square().mean()

    net_out: dict = {}
    judge(fn, calls=1)


def test_parameters_rebound_to_views_of_one_vector():
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    def fn(w):
        net = nn.Linear(3, 2)
        opt = torch.optim.SGD(net.parameters(), lr=w)
        for k in range(3):
            old = parameters_to_vector(net.parameters())
            opt.zero_grad()
            (net(X * (k + 1)) - 1).square().mean().backward()
            opt.step()
            with torch.no_grad():
                vector_to_parameters(0.9 * parameters_to_vector(net.parameters()) + 0.1 * old, net.parameters())
        return net(X).square().sum()

    judge(fn, at=0.01, tol=1e-4)


def test_rademacher_probes():
    def fn(w):
        p = X.clone().requires_grad_()
        opt = torch.optim.SGD([p], lr=w)
        for _ in range(2):
            opt.zero_grad()
            (p * (torch.randint_like(p, 2) * 2 - 1)).sum().square().backward()
            opt.step()
        return (p * X).sum()

    judge(fn)


def test_evaluation_of_batchnorm_in_inference_mode():
    def fn(w):
        net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        opt = torch.optim.SGD(net.parameters(), lr=w)
        x = torch.stack([X, X.flip(0), X * X])
        for _ in range(2):
            net.train()
            opt.zero_grad()
            (net(x) - 1).square().mean().backward()
            opt.step()
            net.eval()
            with torch.inference_mode():
                assert net(x).square().mean().item() >= 0
        return net(x).square().mean()

    judge(fn, at=0.01)


def test_retained_gradients_of_results():
    def fn(w):
        p, total = X.mul(0.2).requires_grad_(), torch.zeros(())
        for _ in range(3):
            h = torch.tanh(p * X)
            h.retain_grad()
            p.grad = None
            ((h - X) ** 2 * w).sum().backward()
            with torch.no_grad():
                p -= 0.1 * p.grad
            total = total + h.grad.square().sum()
        return total

    judge(fn)


@pytest.mark.parametrize("write", [
    lambda p, lr: p.data.sub_(lr * p.grad.data),
    lambda p, lr: p.data.copy_(p.data - lr * p.grad),
])  # fmt: skip
def test_updates_by_hand_through_data(write):
    def fn(w):
        p = X.mul(0.2).requires_grad_()
        for _ in range(3):
            p.grad = None
            (p * X - 1).square().sum().backward()
            write(p, w)
        return (p * X).square().sum()

    judge(fn, at=0.02)


def test_files_are_written_at_every_call(tmp_path):
    def fn(w):
        p = X.mul(0.2).requires_grad_()
        (p * X * w).sum().square().backward()
        with torch.no_grad():
            p -= 0.1 * p.grad
        torch.save({"p": p}, tmp_path / "p.pt")
        with open(tmp_path / "log.txt", "a") as f:
            f.write(f"{p.sum().item():.3f} ")
        return (p * p).sum()

    compiled, w = mlc.compile(fn), torch.tensor(0.3, requires_grad=True)
    for k in range(2):
        (tmp_path / "p.pt").unlink(missing_ok=True)
        compiled(w)
        assert (tmp_path / "p.pt").exists()
        assert len((tmp_path / "log.txt").read_text().split()) == k + 1


def test_lazy_modules_made_inside():
    def fn(w):
        net = nn.Sequential(nn.LazyLinear(2), nn.Tanh(), nn.LazyLinear(1))
        net(X)
        opt = torch.optim.SGD(net.parameters(), lr=w)
        for _ in range(2):
            opt.zero_grad()
            (net(X) - 1).square().mean().backward()
            opt.step()
        return net(X).square().sum()

    judge(fn, at=0.05)
