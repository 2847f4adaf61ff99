"""What becomes of every result of a small stage, word by word."""

import torch

from mlc.passes.cost.facts import Stage, facts_of, op_name
from mlc.passes.cost.memory import liveness
from tests.passes.regions import recorded

X = torch.rand(64, 64)


def test_every_fate_of_a_stage() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = x.mm(x)  # kept over the peak: it is read behind it
        b = x.t()
        c = a.mm(b)
        d = c.mm(x)
        e = c.mm(d)
        return e.mm(d).mm(a), b.sum()

    region = recorded(f, X)
    stage = Stage("forward", region, frozenset({region.outputs[1]}), frozenset({region.outputs[0]}))
    facts = facts_of(stage)
    peak = liveness(region)[1]
    made = {v: i for i, x in enumerate(region.eqns) for v in x.outs}
    last = {v: i for i, x in enumerate(region.eqns) for v in x.inputs}
    kinds = {}
    for i, x in enumerate(region.eqns):
        (v,) = x.outs
        if v in stage.results:
            want = "result"
        elif v in stage.saved:
            want = "saved"
        elif op_name(x) == "t":
            want = "view"
        else:
            want = "kept" if i < peak < last[v] else "freed"
            line = f"#{last[v]} {op_name(region.eqns[last[v]])}"
            assert facts[x].fate.text.endswith(f"freed after {line}")
        assert facts[x].fate.kind == want, (i, facts[x])
        assert facts[x].bytes == (0 if want == "view" else v.type.numel * 4)  # type: ignore[union-attr]
        kinds[want] = made[v]
    assert set(kinds) == {"result", "saved", "view", "kept", "freed"}
