"""The pipeline: every pass before and after as text, what a pass may not do, and pipelines of one's own."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.optim import SGD

import mlc
from mlc.ir.builder import dce
from mlc.ir.core import Eqn, Loop, Region, Var, aten
from mlc.ir.lowered.contract import Context, Graphs, Levers, Modes, Pass, regions
from mlc.ir.lowered.stages import Joint, Stages
from mlc.ir.parse import parse
from mlc.ir.text import print_region
from mlc.ir.verify import verify
from mlc.passes.lowering.pipeline import PIPELINE, Step, check_passes, names, run
from mlc.view.stagelist import graphs_after
from tests import golden

# Levers under which every pass has something to do on the program of tests/goldens/passes/source.txt.
LEVERS = Levers(price=1e-7, slots=2, parts=2, offload=1)
# `store` is not among them: a policy narrows float32 alone (tests/passes/precision).
CHANGING = tuple(n for n in names(PIPELINE) if n != "store")


def source() -> mlc.Program:
    return parse((golden.FOLDER / "passes" / "source.txt").read_text())


def text(graphs: Graphs) -> str:
    return "\n".join(f"{name}:\n{print_region(region)}\n" for name, region in regions(graphs))


def steps(levers: Levers = LEVERS, modes: Modes | None = None) -> list[Step]:
    found: list[Step] = []
    run(PIPELINE, source(), Context(modes or Modes(), levers=levers), [found.append])
    return found


def trained(model, rate, batches, val):  # type: ignore[no-untyped-def]
    opt = SGD(model.parameters(), lr=rate)
    for x, y in batches:
        opt.zero_grad()
        (model(x).squeeze(1) - y).square().mean().backward()
        opt.step()
    x, y = val
    return (model(x).squeeze(1) - y).square().mean()


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    rate = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    batches = [(torch.randn(6, 3, dtype=dtype), torch.randn(6, dtype=dtype)) for _ in range(6)]
    return model, rate, batches, batches[0]


def test_the_source_of_the_goldens_is_the_text_of_a_traced_program() -> None:
    lines = [re.sub(r"  # .*", "", x) for x in str(mlc.trace(trained, *arguments())).splitlines()]
    golden.check("passes/source.txt", "\n".join(x for x in lines if not x.startswith("file ")) + "\n")


@pytest.mark.parametrize("name", CHANGING)
def test_before_and_after(name: str) -> None:
    """Each pass alone, on what the one before gave: ``parse -> passes -> print``."""
    step = next(s for s in steps() if s.of.name == name)
    i = CHANGING.index(name)
    if i:  # the golden of the pass before is what this one takes
        golden.check(f"passes/{i}-{CHANGING[i - 1]}.txt", text(step.before))
    golden.check(f"passes/{i + 1}-{name}.txt", text(step.after))
    assert text(step.before) != text(step.after)


def test_passes_run_in_order_and_each_leaves_valid_graphs() -> None:
    found = steps()
    assert tuple(s.of.name for s in found) == names(PIPELINE)
    for s in found:
        for name, region in regions(s.after):
            verify(region, f"{name} after {s.of.name}")


def test_in_forward_mode_there_is_no_joint_graph() -> None:
    found = steps(modes=Modes("forward"))
    assert isinstance(found[0].after, Stages)
    assert [s.of.name for s in found] == ["differentiate", "micro-batches", "rematerialise", "offload"]


@pytest.mark.parametrize("name", [n for n in names(PIPELINE) if n != "cut" and n != "differentiate"])
def test_a_pass_without_its_lever_changes_nothing_but_order(name: str) -> None:
    """Nothing is sparse, split or offloaded that no lever asks for."""
    step = next(s for s in steps(Levers()) if s.of.name == name)
    if name in ("states", "store", "micro-batches", "offload"):
        assert step.after is step.before
    else:
        assert sum(_work(r) for _, r in regions(step.after)) <= sum(_work(r) for _, r in regions(step.before))


def _work(region: Region) -> int:
    return sum((e.op.count if isinstance(e.op, Loop) else 0) * len(e.op.body.eqns) if isinstance(e.op, Loop) else 1
               for e in region.eqns)  # fmt: skip


# ---- what a pass may not do: the verifier says which one did


def _unsorted(region: Region) -> Region:
    return Region(region.inputs, tuple(reversed(region.eqns)), region.outputs, region.names)


def _lost(region: Region) -> Region:
    return Region(region.inputs, region.eqns[:-1], region.outputs, region.names)


def _twice(region: Region) -> Region:
    return Region(region.inputs, (*region.eqns, region.eqns[-1]), region.outputs, region.names)


def _foreign(region: Region) -> Region:
    stranger = Var(region.outputs[0].type)
    return Region(region.inputs, region.eqns, (*region.outputs[:-1], stranger), region.names)


BROKEN = {"unsorted": _unsorted, "lost": _lost, "twice": _twice, "foreign": _foreign}


@dataclass(frozen=True)
class Breaks:
    """A pass as another one, whose result is broken afterwards."""

    of: Pass
    how: str

    name = property(lambda self: self.of.name)
    takes = property(lambda self: self.of.takes)
    ensures = property(lambda self: self.of.ensures)

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        found = self.of.apply(graphs, context)
        field = "region" if isinstance(found, Joint | mlc.Program) else "forward"
        return replace(found, **{field: BROKEN[self.how](getattr(found, field))})


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", names(PIPELINE))
def test_the_verifier_names_the_pass_that_breaks_a_graph(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLC_VERIFY", "1")
    broken = tuple(Breaks(p, how) if p.name == name else p for p in PIPELINE)
    with pytest.raises(mlc.VerifyError, match=f"after {name}"):
        run(broken, source(), Context(levers=LEVERS))


def test_a_pass_that_changes_what_is_returned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Fewer:
        name: ClassVar[str] = "fewer"
        takes: ClassVar[type] = Stages
        ensures: ClassVar[str] = "a result less"

        def apply(self, graphs: Graphs, context: Context) -> Graphs:
            return replace(graphs, n_results=graphs.n_results - 1)  # type: ignore[union-attr]

    monkeypatch.setenv("MLC_VERIFY", "1")
    with pytest.raises(mlc.VerifyError, match="'fewer' changed n_results"):
        run((*PIPELINE, Fewer()), source(), Context())


# ---- pipelines of one's own


@dataclass(frozen=True)
class Counted:
    """Changes nothing; remembers how many equations it saw."""

    seen: list[int]
    name: ClassVar[str] = "counted"
    takes: ClassVar[type] = Stages
    ensures: ClassVar[str] = "nothing changes"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        self.seen.append(sum(len(list(r.walk())) for _, r in regions(graphs)))
        return graphs


@dataclass(frozen=True)
class SquareByProduct:
    """``x ** 2`` as ``x * x`` in every region."""

    name: ClassVar[str] = "squares"
    takes: ClassVar[type] = Joint
    ensures: ClassVar[str] = "no power with exponent 2 is left outside of loops"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        assert isinstance(graphs, Joint)
        r = graphs.region
        eqns = tuple(self.one(e) for e in r.eqns)
        return replace(graphs, region=dce(Region(r.inputs, eqns, r.outputs, r.names)))

    def one(self, e: Eqn) -> Eqn:
        if e.op is aten("pow", "Tensor_Scalar") and e.args[1] == 2:
            return e.with_(op=aten("mul", "Tensor"), args=(e.args[0], e.args[0]))
        return e


def gradient(fn: Any) -> tuple[float, float]:
    args = arguments()
    loss = fn(*args)
    loss.backward()
    return loss.item(), args[1].grad.item()


def unrolled() -> tuple[float, float]:
    """The plain unroll, by hand."""
    model, rate, batches, (x, y) = arguments()
    params = {n: p for n, p in model.named_parameters()}

    def error(p: Any, x: Any, y: Any) -> torch.Tensor:
        return (torch.func.functional_call(model, p, x).squeeze(1) - y).square().mean()

    for bx, by in batches:
        grads = torch.autograd.grad(error(params, bx, by), list(params.values()), create_graph=True)
        params = {n: p - rate * g for (n, p), g in zip(params.items(), grads, strict=True)}
    loss = error(params, x, y)
    loss.backward()
    return loss.item(), rate.grad.item()


def pipelines() -> Iterator[tuple[str, Any]]:
    by_name = {p.name: p for p in PIPELINE}
    yield "own pass added", (*PIPELINE[:1], SquareByProduct(), *PIPELINE[1:])
    yield "pass dropped", tuple(p for p in PIPELINE if p.name != "rematerialise")
    yield "passes reordered", (*PIPELINE[:5], by_name["rematerialise"], by_name["micro-batches"], by_name["offload"])
    yield "least", (by_name["differentiate"], by_name["cut"])


@pytest.mark.parametrize(("what", "passes"), list(pipelines()), ids=[n for n, _ in pipelines()])
@pytest.mark.parametrize("memory", [None, "min"])
def test_a_pipeline_of_ones_own_gives_the_same_gradient(what: str, passes: Any, memory: Any) -> None:
    found = gradient(mlc.compile(trained, passes=passes, memory=memory))
    assert found == pytest.approx(unrolled(), rel=1e-9)


def test_an_added_pass_runs_for_every_candidate_and_is_listed() -> None:
    seen: list[int] = []
    plan = mlc.plan(source(), memory="min", passes=(*PIPELINE, Counted(seen)))
    assert len(seen) > 1 and min(seen) > 0
    assert list(graphs_after(plan))[-1] == "counted"
    assert plan.passes == (*names(PIPELINE), "counted")


def test_a_saved_plan_wants_the_passes_it_was_made_with(tmp_path: Any) -> None:
    program, passes = source(), (*PIPELINE, Counted([]))
    mlc.plan(program, passes=passes).save(tmp_path / "plan.json")
    loaded = mlc.Plan.load(tmp_path / "plan.json", program)
    with pytest.raises(mlc.PlanError, match=r"made with the passes .*counted"):
        _ = loaded.stages
    assert isinstance(mlc.Plan.load(tmp_path / "plan.json", program, passes).stages, Stages)


@pytest.mark.parametrize(
    ("passes", "why"),
    [
        ("differentiate", "passes='differentiate'"),
        (7, "passes=7"),
        ((print,), "print is no pass"),
        ((Counted,), "Counted is no pass"),
        ((*PIPELINE, PIPELINE[1]), "two are named 'residuals'"),
        (PIPELINE[1:], "none takes a program"),
    ],
)
def test_what_is_no_pipeline_is_refused(passes: Any, why: str) -> None:
    with pytest.raises(mlc.PlanError, match=why):
        check_passes(passes)
    with pytest.raises(mlc.PlanError, match=why):
        mlc.compile(trained, passes=passes)


@dataclass(frozen=True)
class Stays:
    """Gives back the program that it took."""

    name: ClassVar[str] = "stays"
    takes: ClassVar[type] = mlc.Program
    ensures: ClassVar[str] = "nothing changes"

    def apply(self, graphs: Graphs, context: Context) -> Graphs:
        return graphs


def test_passes_that_never_differentiate_are_refused() -> None:
    with pytest.raises(mlc.PlanError, match="end with a Program"):
        mlc.plan(source(), passes=(Stays(), *PIPELINE[1:]))
    assert mlc.plan(source(), passes=(Stays(), *PIPELINE)).passes[0] == "stays"


def test_passes_that_leave_no_stages_are_refused() -> None:
    with pytest.raises(mlc.PlanError, match="no stages"):
        mlc.plan(source(), passes=PIPELINE[:3])
