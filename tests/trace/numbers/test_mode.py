"""Numbers as operands of torch: value, dtype and shape of eager PyTorch with the plain number, and the link is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlc.trace.numbers.links import Linked
from mlc.trace.numbers.mode import NumberMode
from tests.trace.numbers.ledger import FakeLedger

SHAPES = [
    ((), torch.float32), ((3,), torch.float32), ((2, 3), torch.float64), ((3,), torch.bfloat16), ((), torch.float16),
    ((3,), torch.int64), ((), torch.int32), ((3,), torch.bool), ((2,), torch.complex64), ((3,), torch.uint8),
]  # fmt: skip
VALUES = [0.7, -1.5, 2.0, 3, -2, 0, True, 1 + 2j, 300]


def tensor(shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * 2 + 3).to(dtype)


LINKED = {
    "add": lambda x, n: x + n,
    "radd": lambda x, n: n + x,
    "sub": lambda x, n: x - n,
    "rsub": lambda x, n: n - x,
    "mul": lambda x, n: n * x,
    "div": lambda x, n: x / n,
    "rdiv": lambda x, n: n / x,
    "floordiv": lambda x, n: x // n,
    "rfloordiv": lambda x, n: n // x,
    "mod": lambda x, n: x % n,
    "rmod": lambda x, n: n % x,
    "div_floor": lambda x, n: torch.div(x, n, rounding_mode="floor"),
    "eq": lambda x, n: x == n,
    "lt": lambda x, n: n < x,
    "ge": lambda x, n: x.ge(n),
    "add_alpha": lambda x, n: x.add(x, alpha=n),
    "sub_alpha": lambda x, n: torch.sub(x, x, alpha=n),
    "where": lambda x, n: torch.where(x != 3, x, n),
    "where_numbers": lambda x, n: torch.where(x != 3, n, 2),
    "where_method": lambda x, n: x.where(x != 3, n),
    "iadd": lambda x, n: x.clone().add_(n),
    "imul": lambda x, n: x.clone().mul_(n),
    "fill": lambda x, n: x.clone().fill_(n),
    "masked_fill": lambda x, n: x.masked_fill(x != 3, n),
    "full": lambda x, n: torch.full((2, 3), n),
    "full_like": lambda x, n: torch.full_like(x, n),
    "new_full": lambda x, n: x.new_full((2,), n),
    "full_dtype": lambda x, n: torch.full((2,), fill_value=n, dtype=torch.float64),
    "tensor": lambda x, n: torch.tensor(n),
    "tensor_list": lambda x, n: torch.tensor([[n, 1], [2, n]]),
    "tensor_dtype": lambda x, n: torch.tensor([n, n], dtype=torch.float64),
    "as_tensor": lambda x, n: torch.as_tensor([n]),
    "new_tensor": lambda x, n: x.new_tensor([n, 1.0]),
    "scalar_tensor": lambda x, n: torch.scalar_tensor(n),
    "addmul": lambda x, n: torch.mul(x, other=n),
    "aten": lambda x, n: torch.ops.aten.mul(x, n),
    "foreach_mul": lambda x, n: torch._foreach_mul([x, x], n)[1],
    "foreach_add": lambda x, n: torch._foreach_add([x], [x], alpha=n)[0],
    "fmod": lambda x, n: torch.fmod(x, n),
    "xlogy": lambda x, n: torch.xlogy(x, n),
    "radd_inplace": lambda x, n: x.clone().__iadd__(n),
    "true_divide": lambda x, n: torch.true_divide(x, n),
    "and": lambda x, n: x & n,
    "ror": lambda x, n: n | x,
    "xor": lambda x, n: x ^ n,
    "clamp": lambda x, n: x.clamp(min=n),
    "clamp2": lambda x, n: torch.clamp(x, -10, n),
    "clip_": lambda x, n: x.clone().clamp_(max=n),
    "clamp_min": lambda x, n: x.clamp_min(n),
}
FLOATS = {
    "pow": lambda x, n: x.abs() ** n,
    "rpow": lambda x, n: n**x,
    "pow_": lambda x, n: x.clone().abs_().pow_(n),
    "addcmul": lambda x, n: x.addcmul(x, x, value=n),
    "addcdiv_": lambda x, n: x.clone().addcdiv_(x, x + 9, value=n),
    "lerp": lambda x, n: x.lerp(x * 2, n),
    "setitem": lambda x, n: set_item(x, n),
    "index_fill": lambda x, n: fill_index(x, n),
    "foreach_addcmul": lambda x, n: torch._foreach_addcmul([x], [x], [x], value=n)[0],
    "foreach_lerp": lambda x, n: torch._foreach_lerp([x], [x + 1], n)[0],
    "foreach_add_": lambda x, n: foreach_add_(x, n),
    "index_add": lambda x, n: x.reshape(-1).index_add(0, IDX, x.reshape(-1)[:1], alpha=n),
    "scatter": lambda x, n: x.reshape(-1).scatter(0, IDX, n),
    "float_power": lambda x, n: torch.float_power(x.abs(), n),
    "addmm": lambda x, n: torch.addmm(MAT.to(x.dtype), MAT.to(x.dtype), MAT.to(x.dtype), beta=n, alpha=n),
    "baddbmm": lambda x, n: torch.baddbmm(MAT[None].to(x.dtype), MAT[None].to(x.dtype), MAT[None].to(x.dtype), alpha=n),
    "addmv_": lambda x, n: torch.ones(2, dtype=x.dtype).addmv_(MAT.to(x.dtype), MAT[0].to(x.dtype), beta=n),
}
IDX, MAT = torch.tensor([0]), torch.tensor([[1.0, 2.0], [3.0, 5.0]])


def set_item(x, n):
    x = x.clone()
    x[...] = n
    return x


def fill_index(x, n):
    return x.reshape(-1).index_fill(0, IDX, n)


def foreach_add_(x, n):
    x = x.clone()
    torch._foreach_add_([x], [x * 2], alpha=n)
    return x


def attempt(f, *args):
    try:
        return f(*args)
    except (RuntimeError, TypeError, NotImplementedError, ValueError, IndexError, ZeroDivisionError) as e:
        return type(e)


def close(a, b):
    if not isinstance(b, Tensor):
        return a == b
    assert a.dtype == b.dtype and a.shape == b.shape, (a, b)
    tol = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-6, torch.complex64: 2e-6}.get(a.dtype, 1e-13)
    return torch.allclose(a, b, rtol=tol, atol=tol, equal_nan=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", [*LINKED, *FLOATS])
def test_operators_equal_eager_and_keep_the_link(name, mode):
    f, linked = {**LINKED, **FLOATS}[name], 0
    if not mode and name in ("tensor", "tensor_list", "tensor_dtype", "as_tensor", "new_tensor"):
        pytest.skip("a list is only seen by the mode")
    for shape, dtype in SHAPES:
        for v in VALUES:
            x, ledger = tensor(shape, dtype), FakeLedger()
            want = attempt(f, x, v)
            n = ledger.number(v)
            if mode:
                with NumberMode():
                    got = attempt(f, x, n)
            else:
                got = attempt(f, x, n)
            assert close(got, want), (shape, dtype, v, got, want)
            if not ledger.guards and isinstance(want, Tensor):
                linked += 1
                if not depends(f, x, v, mode):
                    raise AssertionError((shape, dtype, v, "the link is lost without a guard"))
    assert linked >= (6 if name not in ("and", "ror", "xor") else 3), linked


def depends(f, x, v, mode):
    """The result is computed from the number's tensor: it follows when the tensor holds another value."""
    if isinstance(v, complex) or (isinstance(v, bool)) or x.dtype in (torch.bool,):  # noqa: SIM101
        return True
    ledger = FakeLedger()
    n = ledger.number(v)
    n._tensor = n.tensor.clone().fill_(float("nan")) if isinstance(v, float) else n.tensor + 1
    with NumberMode():
        other = attempt(f, x, n)
    plain = attempt(f, x, float("nan") if isinstance(v, float) else v + 1)
    return isinstance(other, type) or isinstance(plain, type) or close(other, plain) or ledger.guards


REFUSED = {
    "dropout": (lambda x, n: F.dropout(x, n, training=False), 0.5),
    "reshape": (lambda x, n: x.reshape(n, -1), 3),
    "index": (lambda x, n: x[n], 1),
    "slice": (lambda x, n: x[:n], 2),
    "zeros": (lambda x, n: torch.zeros(n), 3),
    "dim": (lambda x, n: x.sum(n), 0),
    "arange": (lambda x, n: torch.arange(n), 4),
    "leaky": (lambda x, n: F.leaky_relu(x, n), 0.1),
    "normal": (lambda x, n: torch.ones(2).uniform_(0, n, generator=torch.Generator().manual_seed(0)), 2.0),
    "topk": (lambda x, n: x.topk(n).values, 2),
    "Tensor": (lambda x, n: torch.Tensor([n]), 0.5),
    "setitem_index": (lambda x, n: set_at(x, n), 1),
    "linspace": (lambda x, n: torch.linspace(0, n, 3), 0.5),
    "ipow": (lambda x, n: x.long() ** n, 2),
    "softplus": (lambda x, n: F.softplus(x, beta=n), 2.0),
    "layer_norm": (lambda x, n: F.layer_norm(x, (3,), eps=n), 0.1),
    "eps": (lambda x, n: torch.full((n,), 2.0), 3),
}


def set_at(x, n):
    x = x.clone()
    x[n] = 0.0
    return x


@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_no_tensor_gets_the_guarded_value(name):
    f, v = REFUSED[name]
    x, ledger = tensor((3,), torch.float32), FakeLedger()
    with NumberMode():
        got = f(x, ledger.number(v))
    assert close(got, f(x, v)) and v in ledger.outcomes()


def test_functions_of_torch_in_python_are_entered():
    ledger = FakeLedger()
    n, p = ledger.number(0.5), torch.ones(3, requires_grad=True)
    with NumberMode():
        p.mul(torch.tensor([n, 1.0, 2.0])).sum().backward()
        torch.nn.utils.clip_grad_norm_([p], 2 * n)
    q = torch.ones(3, requires_grad=True)
    q.mul(torch.tensor([0.5, 1.0, 2.0])).sum().backward()
    torch.nn.utils.clip_grad_norm_([q], 1.0)
    assert torch.allclose(p.grad, q.grad)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "Adadelta"])
def test_optimizers_with_a_number_as_learning_rate(kind, foreach):
    def steps(lr):
        p = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        opt = getattr(torch.optim, kind)([p], lr=0.1, foreach=foreach)
        for k in range(3):
            opt.param_groups[0]["lr"] = lr / (k + 1)
            opt.zero_grad()
            (p**3).sum().backward()
            opt.step()
        return p.detach()

    ledger = FakeLedger()
    with NumberMode():
        got = steps(ledger.number(0.05))
    assert torch.allclose(got, steps(0.05), atol=1e-6)
    if not foreach:
        assert not any(isinstance(o, float) for o in ledger.outcomes()), ledger.guards


def test_a_list_of_tensors_becomes_a_tensor_that_follows_them():
    a, b = torch.tensor(1.5), torch.tensor([2])
    with NumberMode():
        out = torch.tensor([a, b, 3.0], dtype=torch.float64)
    assert out.tolist() == [1.5, 2, 3] and out.dtype == torch.float64


def test_derivatives_pass_beside_a_number():
    ledger = FakeLedger()
    for f in (
        lambda x, n: x * n,
        lambda x, n: x.clamp(min=n),
        lambda x, n: x.addcmul(x, x, value=n),
        lambda x, n: x**n,
    ):
        grads = []
        for n in (2.5, ledger.number(2.5)):
            x = torch.tensor([1.0, 2.5, 4.0], requires_grad=True)
            with NumberMode():
                grads.append(torch.autograd.grad(f(x, n).sum(), x)[0])
        assert torch.allclose(*grads)


def test_a_new_leaf_may_require_grad():
    ledger = FakeLedger()
    with NumberMode():
        x = torch.tensor(ledger.number(0.5), requires_grad=True)
        y = torch.full((2,), ledger.number(0.5), requires_grad=True)
    assert x.is_leaf and x.requires_grad and y.is_leaf and y.requires_grad and not ledger.guards


def test_a_number_of_another_type_than_the_tensor_is_found_in_result_type():
    ledger = FakeLedger()
    with NumberMode():
        assert torch.result_type(torch.ones(2, dtype=torch.int32), ledger.number(0.5)) == torch.float32
    assert not ledger.guards and isinstance(ledger.number(1), Linked)
