"""The number of tangents at which forward mode ceases to be the better way, found by asking at every number."""

from collections.abc import Callable

import pytest

from mlc.passes.formulas.breakeven import MOST, tangent_break

Cost = Callable[[int], tuple[float, int]]
FORWARD, OTHER = ("forward mode", "reverse mode"), ("reverse mode", "forward mode")


def line(start: float, each: float, size: int) -> Cost:
    return lambda k: (start + each * k, size * k)


def asked(forward: Cost, other: tuple[float, int], budget: int | None) -> list[bool]:
    """Whether forward mode is the better way, by number of tangents (0 is no number)."""

    def fits(c: tuple[float, int]) -> bool:
        return budget is None or c[1] <= budget

    return [False] + [fits(forward(k)) and (not fits(other) or forward(k)[0] <= other[0]) for k in range(1, MOST + 1)]


@pytest.mark.parametrize("budget", [None, 700, 90])
@pytest.mark.parametrize(("start", "each"), [(1.0, 0.1), (1.0, 0.37), (0.5, 2.0)])
def test_it_is_the_first_number_at_which_the_other_way_wins(start: float, each: float, budget: int | None) -> None:
    forward, other = line(start, each, 10), (3.1, 600)
    better = asked(forward, other, budget)
    last = max((k for k in range(MOST + 1) if better[k]), default=0)
    found = tangent_break(forward, 1, other, FORWARD, budget)
    if better[1] and last < MOST:
        assert found is not None and found.at == last + 1 and found.above
        fits = budget is None or (forward(last + 1)[1] <= budget and budget >= 600)
        assert found.why == ("time" if fits else "memory")
    back = tangent_break(forward, 500, other, OTHER, budget)
    if not better[500] and better[1]:
        assert back is not None and back.at == last and not back.above
    elif not better[500]:
        assert back is None
