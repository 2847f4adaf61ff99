"""Lowering through Inductor: what is compiled how often, and that a wrong kernel never gives a number."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlc
from mlc.ir.core import Eqn, Loop, Region, Var, aten
from mlc.ir.types import TensorType
from mlc.runtime.inductor import artefacts
from mlc.runtime.inductor import lowering as inductor
from mlc.runtime.inductor.artefacts import evaluate
from mlc.runtime.inductor.lowering import Inductor, Kernel
from mlc.runtime.inductor.segments import Fused, fuse, key_of
from mlc.runtime.inductor.trial import difference

MUL, ADD, EXP, MM = aten("mul", "Tensor"), aten("add", "Tensor"), aten("exp"), aten("mm")
SQUARE = TensorType(torch.float64, (4, 4), (4, 1), torch.device("cpu"))


class Built:
    """Stands for Inductor: counts, and gives what `wrong` makes of the right results."""

    def __init__(self, wrong: Callable[[list[Tensor]], list[Tensor]] = lambda results: results) -> None:
        self.keys: list[str] = []
        self.wrong = wrong

    def __call__(self, key: str, body: Region) -> Any:
        self.keys.append(key)

        def call(args: list[Tensor]) -> list[Tensor]:
            mine = list(args)
            args.clear()
            return self.wrong(evaluate(body, mine))

        return call


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_KERNELS", {})
    monkeypatch.setattr(inductor, "compile_ahead", lambda jobs: None)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    stand_in = Built()
    monkeypatch.setattr(inductor, "build", stand_in)
    return stand_in


class Writer:
    """Builds regions of 4 x 4 matrices."""

    def __init__(self, inputs: int) -> None:
        self.inputs = tuple(Var(SQUARE) for _ in range(inputs))
        self.eqns: list[Eqn] = []

    def __call__(self, op: Any, *args: Any, tag: str = "") -> Var:
        out = Var(SQUARE)
        self.eqns.append(Eqn(op, args, (out,), tag=tag))
        return out

    def region(self, *outputs: Var) -> Region:
        return Region(self.inputs, tuple(self.eqns), outputs)


def layers(count: int) -> Region:
    """x = exp(x w) * x + x, again and again."""
    w = Writer(2)
    x, weight = w.inputs
    for _ in range(count):
        x = w(ADD, w(MUL, w(EXP, w(MM, x, weight)), x), x)
    return w.region(x)


def segments(region: Region) -> list[Region]:
    return [e.op.body for e in fuse(region).eqns if isinstance(e.op, Fused)]


def values(region: Region) -> list[Tensor]:
    return [0.1 * torch.randn(4, 4, dtype=torch.float64) for _ in region.inputs]


def run(region: Region, args: list[Tensor]) -> list[Tensor]:
    return Inductor()(region, lambda e: None)(list(args))


def test_library_calls_cut_and_the_function_stays() -> None:
    region = layers(3)
    assert [e.op if not isinstance(e.op, Fused) else len(e.op.body) for e in fuse(region).eqns] == [MM, 3] * 3


def test_equal_layers_are_one_segment(built: Built) -> None:
    region = layers(5)
    args = values(region)
    assert torch.equal(run(region, args)[0], evaluate(region, args)[0])
    assert len(built.keys) == 1
    run(layers(7), args)
    assert len(built.keys) == 1, "more layers compile nothing new"


def test_independent_work_is_cut_apart_and_constants_do_not_join_it() -> None:
    w = Writer(2)
    one = w(aten("full"), [4, 4], 1.0)
    outs = [w(MUL, w(ADD, x, one), w(EXP, x)) for x in w.inputs]
    found = segments(w.region(*outs))
    assert len(found) == 2
    assert key_of(found[0]) == key_of(found[1])


def test_keys_tell_literals_types_and_wiring_apart() -> None:
    def key(literal: Any, swap: bool) -> str:
        w = Writer(2)
        x, y = w.inputs
        a = w(MUL, x, literal)
        (found,) = segments(w.region(w(aten("sub", "Tensor"), *((y, a) if swap else (a, y)))))
        return key_of(found)

    keys = {key(literal, swap) for literal in (1, 1.0, 2.0, True) for swap in (False, True)}
    assert len(keys) == 8


def test_a_recomputed_value_is_not_in_the_segment_of_its_original() -> None:
    w = Writer(1)
    (x,) = w.inputs
    first = w(EXP, w(MUL, x, x))
    again = w(EXP, w(MUL, x, x, tag="recomputed"), tag="recomputed")
    region = w.region(w(MUL, w(ADD, first, x), again))
    for body in segments(region):
        assert sum(e.op is EXP for e in body.eqns) <= 1
    args = values(region)
    assert sum(e.op is EXP for e in fuse(region).eqns) + sum(e.op is EXP for b in segments(region) for e in b.eqns) == 2
    assert torch.allclose(run_plain(fuse(region), args)[0], evaluate(region, args)[0])


def run_plain(region: Region, args: list[Tensor]) -> list[Tensor]:
    """A fused region operator by operator."""
    env = dict(zip(region.inputs, args, strict=True))
    for e in region.eqns:
        body = e.op.body if isinstance(e.op, Fused) else Region(tuple(dict.fromkeys(e.inputs)), (e,), e.outs)
        env.update(zip(e.outs, evaluate(body, [env[v] for v in body.inputs]), strict=True))
    return [env[v] for v in region.outputs]


def test_accumulating_writes_stay_with_the_interpreter() -> None:
    """Inductor on a CPU is silently wrong when they go onto an expanded zero."""
    zero, index = (
        Var(TensorType(torch.float64, (4, 4), (0, 0), SQUARE.device)),
        Var(TensorType(torch.int64, (2,), (1,), SQUARE.device)),
    )
    rows = Var(TensorType(torch.float64, (2, 4), (4, 1), SQUARE.device))
    put = Eqn(aten("index_put"), (zero, [index], rows, True), (Var(SQUARE),))
    more = Eqn(EXP, put.outs, (Var(SQUARE),))
    last = Eqn(MUL, (more.outs[0], put.outs[0]), (Var(SQUARE),))
    fused = fuse(Region((zero, index, rows), (put, more, last), last.outs))
    assert [type(e.op) is Fused for e in fused.eqns] == [False, True]


def test_a_wrong_kernel_is_found_and_left(built: Built) -> None:
    built.wrong = lambda results: [r * 1.001 for r in results]
    region = layers(2)
    args = values(region)
    with pytest.warns(mlc.LoweringWarning, match="differs from the interpreter.*Results are right"):
        assert torch.equal(run(region, args)[0], evaluate(region, args)[0])
    (kernel,) = inductor._KERNELS.values()
    assert kernel.state == "refused"
    assert torch.equal(run(region, args)[0], evaluate(region, args)[0])


def test_a_kernel_that_is_right_on_zeros_only_is_found(built: Built) -> None:
    built.wrong = lambda results: [r * 1.001 for r in results]
    w = Writer(2)
    region = w.region(w(MUL, w(ADD, *w.inputs), w.inputs[0]))
    lowered = Inductor()(region, lambda e: None)
    zeros = [torch.zeros(4, 4, dtype=torch.float64) for _ in range(2)]
    assert not lowered(list(zeros))[0].any()
    args = values(region)
    with pytest.warns(mlc.LoweringWarning):
        assert torch.equal(lowered(list(args))[0], evaluate(region, args)[0])


def test_rounding_of_what_cancels_is_no_mistake() -> None:
    """A sum that is zero but for rounding has no digits to agree in; one that is off by more has none either."""
    x = torch.randn(1000, dtype=torch.float64)
    types = [TensorType(torch.float64, (1000,), (1,), SQUARE.device), TensorType(torch.float64, (), (), SQUARE.device)]
    v, w, total = Var(types[0]), Var(types[0]), Var(types[1])
    body = Region((v, w), (Eqn(aten("cat"), ([v, w],), (Var(types[0]),)),), (total,))
    body = Region((v, w), (*body.eqns, Eqn(aten("sum"), (body.eqns[0].outs[0],), (total,))), (total,))
    args = [x, -x.flip(0)]
    mine, other = evaluate(body, args), [(args[0] + args[1].flip(0)).sum() + 3e-16]
    assert mine[0] != other[0]
    assert difference(body, args, mine, other) is None
    assert difference(body, args, mine, [mine[0] + 1e-9]) is not None


def test_trusted_kernels_run_alone(built: Built) -> None:
    region = layers(1)
    lowered = Inductor()(region, lambda e: None)
    lowered(values(region))
    (kernel,) = inductor._KERNELS.values()
    assert kernel.state == "trusted"
    built.wrong = lambda results: [r + 7 for r in results]
    args = values(region)
    assert torch.allclose(lowered(list(args))[0], evaluate(region, args)[0] + 7)


def test_what_does_not_compile_runs_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(key: str, body: Region) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(inductor, "build", broken)
    region = layers(2)
    args = values(region)
    with pytest.warns(mlc.LoweringWarning, match=r"1 of 1 segments do not compile \(RuntimeError: no compiler\)"):
        assert torch.equal(run(region, args)[0], evaluate(region, args)[0])


def test_what_fails_when_run_goes_to_the_interpreter(built: Built) -> None:
    def fail(results: list[Tensor]) -> list[Tensor]:
        raise RuntimeError("illegal instruction")

    built.wrong = fail
    region = layers(1)
    args = values(region)
    with pytest.warns(mlc.LoweringWarning, match="does not run"):
        assert torch.equal(run(region, args)[0], evaluate(region, args)[0])


def test_arguments_are_freed_and_laid_as_the_types_say(built: Built) -> None:
    w = Writer(1)
    body = segments(w.region(w(ADD, w(EXP, w.inputs[0]), 1.0)))[0]
    kernel = Kernel(key_of(body), body)
    kernel.prepare()
    seen: list[tuple[int, ...]] = []
    inner = kernel._compiled
    assert inner is not None
    kernel._compiled = lambda args: (seen.append(args[0].stride()), inner(args))[1]
    for _ in range(2):
        args = [torch.randn(4, 4, dtype=torch.float64).t()]
        x = args[0]
        assert torch.allclose(kernel(args)[0], x.exp() + 1)
        assert not args, "the list is emptied"
    assert seen == [(4, 1), (4, 1)]


def test_artefacts_are_compiled_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "folder", lambda: tmp_path)
    (body,) = segments(layers(1))
    args = [torch.randn(4, 4, dtype=torch.float64) for _ in body.inputs]
    compiled, loaded = artefacts.counts.compiled, artefacts.counts.loaded
    first = artefacts.build(key_of(body), body)(list(args))
    assert artefacts.known(key_of(body))
    second = artefacts.build(key_of(body), body)(list(args))
    assert (artefacts.counts.compiled - compiled, artefacts.counts.loaded - loaded) == (1, 1)
    for a, b, c in zip(first, second, evaluate(body, args), strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, rtol=1e-13)
        assert a.stride() == c.stride()


class Net(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * torch.sigmoid(x)
        return x


def distinct(depth: int) -> set[str]:
    """Keys of all segments of a loop with Adam."""

    def loop(net: Net, weight: Tensor, xs: list[Tensor]) -> Tensor:
        opt = torch.optim.Adam(net.parameters(), eps=1e-3)
        for x in xs:
            opt.zero_grad()
            (net(x).square() * weight).mean().backward()
            opt.step()
        return net(xs[0]).square().mean()

    weight = torch.ones(4, requires_grad=True)
    stages = mlc.plan(mlc.trace(loop, Net(depth), weight, [torch.randn(3, 4) for _ in range(4)])).stages
    assert stages is not None
    assert stages.backward is not None
    return {key_of(body) for r in bodies(stages.forward, stages.backward) for body in segments(r)}


def bodies(*regions: Region) -> Iterator[Region]:
    for region in regions:
        yield region
        yield from bodies(*[e.op.body for e in region.eqns if isinstance(e.op, Loop)])


def test_more_layers_of_the_same_shape_add_no_segment() -> None:
    assert distinct(7) <= distinct(5)


def test_the_backend_is_a_field_of_the_plan_and_checked() -> None:
    def loop(x: Tensor) -> Tensor:
        return (x * 2).sum()

    program = mlc.trace(loop, torch.ones(2, requires_grad=True))
    assert mlc.plan(program, backend="inductor").backend == "inductor"
    assert mlc.plan(program).backend == "interpreter"
    with pytest.raises(mlc.PlanError, match='use "auto", "interpreter" or "inductor"'):
        mlc.plan(program, backend="magic")


def trained(net: Net, weight: Tensor, xs: list[Tensor]) -> Tensor:
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for x in xs:
        opt.zero_grad()
        (net(x).square() * weight).mean().backward()
        opt.step()
    return net(xs[0]).square().mean()


def test_a_program_warns_of_nothing(built: Built) -> None:
    weight = torch.ones(4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlc.compile(trained, backend="inductor")(Net(2), weight, [torch.randn(3, 4) for _ in range(3)]).backward()
    assert built.keys
    assert weight.grad is not None


def test_the_measured_peak_counts_what_kernels_give(built: Built) -> None:
    """Kernels allocate where no dispatch mode looks; what they give is most of what the interpreter holds."""

    def peak(backend: str) -> int:
        fn = mlc.compile(trained, backend=backend)
        for _ in range(2):
            fn(Net(2), torch.ones(4, requires_grad=True), [torch.randn(64, 4) for _ in range(9)]).backward()
            assert fn.report is not None
            peaks.append(fn.report.peak_bytes)
        return peaks[-1]

    peaks: list[int] = []
    whole = peak("interpreter")
    assert not built.keys
    assert 0.6 * whole <= peak("inductor") <= whole
    assert {k.state for k in inductor._KERNELS.values()} == {"trusted"}
    assert peaks[0] == whole and peaks[2] > peaks[3], "trials hold more"
