"""What a call leaves to the user's objects is memory of their own."""

import torch

from mlc.compiled.commit import own, storages


def test_no_two_tensors_get_one_memory() -> None:
    t = torch.rand(4, 3)
    owned = storages([torch.rand(2)])
    first, second = own(t, owned), own(t, owned)
    assert first is t and torch.equal(second, t)
    assert second.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def test_what_the_gradient_still_reads_is_copied() -> None:
    t = torch.rand(4, 3)
    assert own(t, storages([[t]])) is not t


def test_a_view_is_not_handed_out_with_the_memory_behind_it() -> None:
    t = torch.rand(4, 3)
    for view in (t[1:], t.t(), t[:, :2]):
        found = own(view, set())
        assert torch.equal(found, view) and found.is_contiguous()
        assert found.untyped_storage().nbytes() == view.numel() * 4
    assert own(3, set()) == 3 and own("x", set()) == "x"
