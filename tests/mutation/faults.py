"""Every planted fault, by name."""

from tests.mutation import derivatives
from tests.mutation.fault import Fault

__all__ = ["FAULTS"]

FAULTS: dict[str, Fault] = {}
for _f in (*derivatives.FAULTS,):
    assert _f.name not in FAULTS, _f.name
    FAULTS[_f.name] = _f
