"""Where results are once a call is over, and particles that are saved and loaded by name."""

import pytest
import torch
from torch import nn

import mlc
from mlc.compiled.particles import Particles, placed
from mlc.ir.opaque.estimates import Recall
from mlc.trace.capture import Effect, Ref
from mlc.trace.python.places import Roots
from mlc.trace.python.state import Fresh, New

D = torch.float64


def test_results_are_found_in_everything_that_a_call_may_write() -> None:
    w, made, kept = nn.Parameter(torch.zeros(2)), torch.ones(2), {"a": [torch.ones(3)]}
    opt = torch.optim.Adam([w])
    opt.state[w]["exp_avg"] = made
    module = nn.Module()
    module.register_buffer("mean", made)
    module.kept = kept
    w.grad = torch.ones(2)
    log = [torch.zeros(1), torch.ones(1)]
    effects = [
        Effect("copy", w, None, None, Ref(0)),
        Effect("state", opt, None, (w, "exp_avg"), Fresh(Ref(1), torch.float32)),
        Effect("buffers", module, None, "mean", Fresh(Ref(2), torch.float32)),
        Effect("attr", module, None, "kept", New(dict, [("a", New(list, [Fresh(Ref(3), torch.float32)]))])),
        Effect("grad", w, None, None, Fresh(Ref(4), torch.float32)),
        Effect("append", log, None, None, [Fresh(Ref(5), torch.float32)]),
        Effect("attr", module, None, "gone", Ref(6)),
    ]
    found = placed(effects, Roots())
    expected = {0: w, 1: made, 2: made, 3: kept["a"][0], 4: w.grad, 5: log[1]}
    assert found.keys() == expected.keys() and all(len(ts) == 1 and ts[0] is expected[i] for i, ts in found.items())


def test_particles_are_loaded_by_name_or_refused() -> None:
    w = torch.zeros(2, dtype=D)
    mine = Particles()
    window = mine.begin(Recall("inner", (0,), (), 1), mlc_program(), [w], [w])
    assert window.states == {} and mine.generator is not None
    mine.count = 3
    state = mine.state_dict({id(w): "w"})
    other = Particles()
    other.load_state_dict(state, {"w": torch.ones(2, dtype=D)})
    assert other.count == 3 and other.generator is not None
    assert torch.equal(other.generator.get_state(), mine.generator.get_state())
    with pytest.raises(mlc.PlanError, match="saved for v") as caught:
        other.load_state_dict({**state, "sums": [{"name": "v", "sums": []}]}, {"w": w})
    assert caught.value.advice


def mlc_program() -> mlc.Program:
    def fit(w: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
        return (w * eta).sum()

    return mlc.trace(fit, torch.zeros(2), torch.ones(2, requires_grad=True))
