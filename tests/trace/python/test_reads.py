"""What running code read is found again, by reference, at the next call; what it did not read does not matter."""

import cProfile
import functools
import gc
import sys
import threading
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mlc
from mlc.trace.python.inputs import walk
from mlc.trace.python.names import names
from mlc.trace.python.reads import Reads
from tests.trace.python.watched import watch

HEAD = """
import functools, os, torch
from torch import nn
S = 1.0
T = torch.tensor(1.0)
U = 1.0
"""
BODY = "return x.sum() * S * T"
CASES = {
    "plain": f"def outer(x):\n    {BODY}",
    "function": f"def step(x):\n    {BODY}\ndef outer(x):\n    return step(x)",
    "library decorator": f"@torch.enable_grad()\ndef step(x):\n    {BODY}\ndef outer(x):\n    return step(x)",
    "wraps": f"""
def timed(f):
    @functools.wraps(f)
    def run(*a): return f(*a)
    return run
@timed
def step(x):
    {BODY}
def outer(x):
    return step(x)""",
    "method": f"class A:\n    def step(self, x):\n        {BODY}\na = A()\ndef outer(x):\n    return a.step(x)",
    "made inside": f"class A:\n    def step(self, x):\n        {BODY}\ndef outer(x):\n    return A().step(x)",
    "static": f"class A:\n    @staticmethod\n    def step(x):\n        {BODY}\ndef outer(x):\n    return A.step(x)",
    "property": """
class A:
    @property
    def k(self): return S * T
a = A()
def outer(x):
    return x.sum() * a.k""",
    "forward": f"""
class Net(nn.Module):
    def forward(self, x):
        {BODY}
net = Net()
def outer(x):
    return net(x)""",
    "forward, made inside": f"""
class Net(nn.Module):
    def forward(self, x):
        {BODY}
def outer(x):
    return nn.Sequential(Net())(x)""",
    "class attribute": "class C: scale = S; t = T\ndef outer(x):\n    return x.sum() * C.scale * C.t",
    "base class attribute": """
class B: scale = S; t = T
class C(B): pass
c = C()
def outer(x):
    return x.sum() * c.scale * c.t""",
    "class of an instance made inside": """
class C: scale = S; t = T
def outer(x):
    c = C()
    return x.sum() * c.scale * c.t""",
    "alias of a class": "class C: scale = S; t = T\ndef outer(x):\n    c = C\n    return x.sum() * c.scale * c.t",
    "getattr": "class C: scale = S; t = T\ndef outer(x):\n    return x.sum() * getattr(C, 'scale') * getattr(C, 't')",
    "globals()": "def outer(x):\n    return x.sum() * globals()['S'] * globals()['T']",
    "partial": """
def inner(S, T, x): return x.sum() * S * T
step = functools.partial(inner, S, T)
def outer(x):
    return step(x)""",
    "lambda in a dict": "table = {'a': lambda x: x.sum() * S * T}\ndef outer(x):\n    return table['a'](x)",
    "comprehension": "def outer(x):\n    return sum([x.sum() * S * T for _ in range(2)])",
    "nested function": f"def outer(x):\n    def step():\n        {BODY}\n    return step()",
    "callable object": f"class A:\n    def __call__(self, x):\n        {BODY}\na = A()\ndef outer(x):\n    return a(x)",
    "module": "import {helper}\ndef outer(x):\n    return {helper}.step(x)",
    "module, imported inside": "def outer(x):\n    import {helper} as h\n    return x.sum() * h.S * h.T",
    "name, imported inside": "def outer(x):\n    from {helper} import S, T\n    return x.sum() * S * T",
    "alias of a module": "import {helper}\ndef outer(x):\n    h = {helper}\n    return x.sum() * h.S * h.T",
    "module's numbers": "import {helper}\ndef outer(x):\n    return x.sum() * {helper}.S * {helper}.T",
    "dict": "CONF = {'s': S, 't': T}\ndef outer(x):\n    return x.sum() * CONF['s'] * CONF['t']",
    "hook": """
net = nn.Linear(2, 2)
def hook(m, i, o):
    return o * S * T
net.register_forward_hook(hook)
def outer(x):
    return net(x).sum()""",
    "default": "def step(x, s=S, t=T):\n    return x.sum() * s * t\ndef outer(x):\n    return step(x)",
    "cached": """
class Conf: pass
@functools.lru_cache
def conf():
    c = Conf()
    c.s, c.t = S, T
    return c
def outer(x):
    return x.sum() * conf().s * conf().t""",
    "custom backward": """
class F(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    def backward(ctx, g): return g * S * T
def outer(x):
    return torch.autograd.grad(F.apply(x).sum(), x)[0].sum()""",
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def make(name: str, text: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(HEAD + text)
        made.append(name)
        module = __import__(name)
        return module

    yield make
    for name in made:
        sys.modules.pop(name, None)


def change(m: ModuleType, helper: ModuleType, name: str, value: Any) -> None:
    for module in (m, helper):
        setattr(module, name, value)
    low = {"S": ("scale", "s", "S"), "T": ("t",)}[name]
    for owner in (getattr(m, "B", None), getattr(m, "C", None)):
        if owner is not None and low[0] in vars(owner):
            setattr(owner, low[0], value)
    if hasattr(m, "CONF"):
        m.CONF[low[-1] if name == "T" else "s"] = value
    if hasattr(m, "conf"):
        setattr(m.conf(), low[-1] if name == "T" else "s", value)
    step = getattr(m, "step", None)
    if isinstance(step, functools.partial):
        m.step = functools.partial(m.inner, m.S, m.T)
    elif isinstance(step, types.FunctionType) and step.__defaults__:
        step.__defaults__ = (m.S, m.T)


@pytest.mark.parametrize("kind", CASES)
def test_what_runs_is_followed(kind: str, load: Any) -> None:
    helper = load("reads_helper", f"def step(x):\n    {BODY}")
    m = load(f"reads_case_{list(CASES).index(kind)}", CASES[kind].replace("{helper}", "reads_helper"))
    x = torch.ones(2, 2, requires_grad=True)
    if hasattr(m, "conf"):
        m.conf()
    w = watch(m.outer, x)
    assert w.again()
    m.U = helper.U = 5.0  # nobody reads it
    m.unrelated = 3
    assert w.again()
    tensors = walk(m.outer, (x,), {}, w.found).at
    new = torch.tensor(3.0)
    path = next(p for p, t in tensors.items() if t is m.T or t is helper.T)
    change(m, helper, "T", new)
    assert walk(m.outer, (x,), {}, w.found).at[path] is new
    assert w.again(x)
    change(m, helper, "S", 3.0)
    assert not w.again(x)


def test_code_that_did_not_run_does_not_count(load: Any) -> None:
    m = load(
        "reads_branch", "def other(x):\n    return x * U\ndef outer(x, flag):\n    return other(x) if flag else x * S"
    )
    w = watch(m.outer, torch.ones(2), False)
    m.U = 7.0
    assert w.again()
    w = watch(m.outer, torch.ones(2), True)
    m.U = 8.0
    assert not w.again()


def test_a_replaced_method_is_noticed(load: Any) -> None:
    m = load("reads_method", f"class A:\n    def step(self, x):\n        {BODY}\ndef outer(x):\n    return A().step(x)")
    w = watch(m.outer, torch.ones(2))
    m.A.step = lambda self, x: x.sum()
    assert not w.again()


def test_objects_made_in_the_call_do_not_count() -> None:
    class Counter:
        made = 0

    def fn(x: torch.Tensor) -> torch.Tensor:
        c = types.SimpleNamespace(k=len(fn.__name__), other=[1, 2])
        table = {"n": c.k}
        return x * table["n"]

    w = watch(fn, torch.ones(2))
    assert all("k" not in str(k[0]) for k in w.roots.key)
    assert w.again() and Counter.made == 0


def test_a_closure_that_only_c_knows_is_found() -> None:
    scale = [2.0]

    def make(s: list[float]) -> Any:
        def hook(g: torch.Tensor) -> torch.Tensor:
            return g * s[0]

        return hook

    p = torch.ones(2, requires_grad=True)
    q = p * 1.0
    q.register_hook(make(scale))

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((q * x).sum(), p, retain_graph=True)[0]

    w = watch(fn, torch.ones(2))
    scale[0] = 3.0
    assert not w.again()


def test_other_profilers_go_on() -> None:
    seen = []
    sys.setprofile(lambda f, what, arg: seen.append(f.f_code.co_name))
    try:
        with Reads():
            walk(len, (), {})
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)
    assert "walk" in seen
    profile = cProfile.Profile()
    profile.enable()
    with Reads():
        pass
    walk(len, (), {})
    profile.disable()
    assert any("walk" in str(entry.code) for entry in profile.getstats())


def test_numpy_indices_shuffled_in_place_are_noticed() -> None:
    index, big = np.arange(8), np.zeros(9 << 20)
    data = torch.randn(8, 2)

    def fn() -> torch.Tensor:
        return data[index[:4]].sum() + float(big[0])

    w = watch(fn)
    assert w.again()
    index[:] = index[::-1].copy()
    assert not w.again()
    index[:] = index[::-1].copy()
    assert w.again()


def test_names_of_code() -> None:
    def f(self: Any, helper: Any) -> Any:
        self.n += 1
        self.log.append(helper.a.b)
        self.table["k"] = helper.c
        self.total *= 2
        self.groups.setdefault("k", []).append(1)
        torch.nn.init.zeros_(helper.w)
        return self.out

    found = names(f.__code__)
    assert ("torch", "nn", "init", "zeros_") in found.chains
    assert found.grown == {"self", "n"}
    assert {"a", "b", "c", "w", "out", "total", "groups"} <= found.reads
    assert not {"n", "log", "table"} & found.reads


def test_walks_are_cheap_to_compare() -> None:
    net = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    w = watch(lambda: net(torch.ones(2)).sum())
    assert w.found == watch(w.fn).found and hash(w.found) == hash(watch(w.fn).found)


def test_the_recorder_runs_unnoticed_and_the_users_code_does_not():
    noticed: set[tuple[str, str]] = set()
    running = False

    def profiler(frame: types.FrameType, what: str, arg: Any) -> None:
        nonlocal running
        if what == "return" and frame.f_code.co_name == "loop":
            running = False
        if what == "call" and (running or frame.f_code.co_name == "loop"):
            running = True
            noticed.add((Path(frame.f_code.co_filename).name, frame.f_code.co_name))

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return 2 * g

    def loop(p: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            (g,) = torch.autograd.grad(Double.apply(p).square().sum(), p)
            p = p - lr * g
        return p.sum()

    run = mlc.compile(loop)
    sys.setprofile(profiler)
    try:
        run(torch.ones(2, requires_grad=True), torch.tensor(0.1, requires_grad=True))
    finally:
        sys.setprofile(None)
    here = Path(__file__).name
    assert {(here, "loop"), (here, "forward"), (here, "backward")} <= noticed
    assert ("observer.py", "__torch_dispatch__") in noticed
    assert ("recorder.py", "_plain") not in noticed


def test_pauses_nest_and_end_with_the_run():
    with Reads() as reads:
        assert reads.pause() and reads.pause()
        reads.resume()
        assert sys.getprofile() is None
        reads.resume()
        assert sys.getprofile() is not None
        other: list[bool] = []
        thread = threading.Thread(target=lambda: other.append(reads.pause()))
        thread.start()
        thread.join()
        assert other == [False]
    assert not reads.pause() and sys.getprofile() is None


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_run_makes_is_told_from_what_was_there_whatever_the_user_froze(frozen: bool) -> None:
    """Also where the user's own objects are frozen, which stay so."""
    gc.unfreeze()
    if frozen:
        gc.freeze()
    try:
        count = gc.get_freeze_count()
        earlier = [0]
        with Reads() as reads:
            now = [1]
            assert reads.made_now(now)
            assert not reads.made_now(earlier)
        assert gc.get_freeze_count() == count
        assert reads._made is not None
        assert id(now) in reads._made
        assert id(earlier) not in reads._made
    finally:
        gc.freeze()
