"""Every planted fault, by name."""

from tests.mutation import derivatives, front, passes, planning, runtime
from tests.mutation.fault import Fault

__all__ = ["FAULTS"]

FAULTS: dict[str, Fault] = {}
for _f in (*derivatives.FAULTS, *passes.FAULTS, *planning.FAULTS, *runtime.FAULTS, *front.FAULTS):
    assert _f.name not in FAULTS, _f.name
    FAULTS[_f.name] = _f
