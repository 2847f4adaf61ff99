"""Origins: tags as equations hold them, read back; an adjoint loop knows the loop it differentiates."""

import pytest

from mlc.ir.core import Loop, Region
from mlc.ir.origin import Origin


@pytest.mark.parametrize("origin", Origin)
def test_a_tag_is_its_origin_with_or_without_a_number(origin: Origin) -> None:
    assert Origin.of(str(origin)) is origin
    if origin:
        assert Origin.of(f"{origin} 3") is origin


def test_an_unknown_tag_has_none() -> None:
    assert Origin.of("of a pass of one's own") is Origin.NONE


def test_titles_are_for_people() -> None:
    body = Region((), (), ())
    assert Loop(body, 0, 0, 3, label="train", derived=(Origin.ADJOINT, Origin.TANGENT)).title == "adjoint tangent train"
    assert Loop(body, 0, 0, 3).title == ""
