"""Particles of one call: where they start, what is drawn for them, what they tell at the end."""

import torch

from mlc.ir.opaque.estimates import Keep, Recall
from mlc.runtime.interpreter.particles import Pairs, Window, keep_runner, recall_runner


def test_a_window_goes_on_from_what_it_was_given_and_adds_to_the_sums() -> None:
    state, meta = torch.zeros(2), torch.ones(3)
    op = Recall("inner", (0, 4), (1,), 2)
    before = Pairs([torch.ones(2)] * 2, [-torch.ones(2)] * 2)
    past = [torch.full((3,), 5.0)] * 2
    ups, here, downs, _, each, sums = Window(states={0: before}, sums={1: past}).recall(op, [state, state, meta])
    assert ups == before.up and downs == before.down
    assert len(here) == 2 and all(torch.equal(x, state) and x.data_ptr() != state.data_ptr() for x in here)
    assert all(torch.equal(s, e + 5) for s, e in zip(sums, each, strict=True)) and not torch.equal(*each)


def test_directions_repeat_with_the_seed_and_leave_the_default_generator() -> None:
    op = Recall("inner", (), (0,), 1)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = Window().recall(op, [torch.zeros(4)])[0][0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(Window().recall(op, [torch.zeros(4)])[0][0], first)
    assert not torch.equal(torch.randn(4), first)


def test_what_is_told_is_kept_and_the_rest_handed_on() -> None:
    window = Window()
    keep = keep_runner(Keep("inner", 1, (7,), (9,)), lambda: window)
    apart, sums, up, down = ([torch.full((), float(i))] for i in range(4))
    assert keep([apart, sums, up, down]) == [apart]
    assert window.level == "inner" and window.summed == {7: sums} and window.kept == {9: Pairs(up, down)}
    asked = recall_runner(Recall("inner", (0,), (), 1), lambda: window)([torch.zeros(1)])
    assert len(asked) == 2
