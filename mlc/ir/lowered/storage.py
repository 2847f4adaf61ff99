"""In which dtypes the loops of a differentiated program emit what their adjoints read, where a policy says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlc.ir.core import Var

__all__ = ["Storage"]


@dataclass(frozen=True)
class Storage:
    """Where values are saved, and how.

    Attributes:
        kinds: For each loop, by its label, the name of a dtype by kind (``"states"``, ``"gradients"``,
            ``"residuals"``); what is not named is stored as it is computed.
        gradients: Values of loop bodies that are inner gradients.
    """

    kinds: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    gradients: frozenset[Var] = frozenset()
