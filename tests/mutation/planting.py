"""One fault in a process that has not imported mlc yet.

The module is compiled from changed source when it is imported, so no file of the checkout is touched.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

import pytest

from tests.mutation.fault import ROOT, Fault

__all__ = ["Planter", "Watch", "tried"]


class _Faulty(SourceFileLoader):
    """Loads a module from its source with the fault, never from a cache of compiled files."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.module, str(fault.path))
        self.fault = fault

    def get_code(self, fullname: str) -> CodeType:
        source = self.fault.planted(self.fault.path.read_text())
        return compile(source, self.path, "exec", dont_inherit=True)


class Planter(MetaPathFinder):
    """Finds the faulty module before anyone else does.

    Attributes:
        used: Whether it was imported.
    """

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.used = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.fault.module:
            return None
        self.used = True
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None and spec.origin == str(self.fault.path), spec
        spec.loader = _Faulty(self.fault)
        return spec


class Watch:
    """A plugin of pytest that remembers the first test that failed, and how many ran."""

    def __init__(self) -> None:
        self.first = ""
        self.ran = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed and not self.first:
            self.first = report.nodeid


def tried(fault: Fault | None, tests: Sequence[str]) -> dict[str, object]:
    """Plant a fault, run tests until one fails, and say what happened.

    Returns:
        The exit status of pytest (``status``), the test that failed first (``by``), how many ran (``ran``), and whether
        the faulty module was imported at all (``planted``).
    """
    planter = None if fault is None else Planter(fault)
    if planter is not None:
        loaded = [m for m in sys.modules if m == "mlc" or m.startswith("mlc.")]
        assert not loaded, f"imported before the fault could be planted: {loaded}"
        sys.meta_path.insert(0, planter)
    watch = Watch()
    options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=line", "--rootdir", str(ROOT), "-m", ""]
    status = pytest.main([*options, *tests], plugins=[watch])
    planted = planter is None or planter.used
    return {"status": int(status), "by": watch.first, "ran": watch.ran, "planted": planted}
