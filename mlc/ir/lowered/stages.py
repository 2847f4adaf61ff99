"""Graphs on the way to the runtime: the joint graph of values and hypergradients, and the two stages cut out of it."""

from __future__ import annotations

from dataclasses import dataclass

from mlc.ir.core import Region
from mlc.ir.lowered.storage import Storage

__all__ = ["Joint", "Stages"]


@dataclass(frozen=True)
class Joint:
    """Values and hypergradients of a program in one region, before anything is decided about memory.

    Attributes:
        region: ``(inputs, cotangents) -> (results, hypergradients)``.
        n_inputs: Number of inputs of the program.
        n_results: Number of its results.
        cotangents: Output positions that have a cotangent input.
        gradients: Input positions that have a hypergradient.
        handed: Results that become the user's and live on.
        storage: In which dtypes its loops emit what their adjoints read; None: as it is computed.
    """

    region: Region
    n_inputs: int
    n_results: int
    cotangents: tuple[int, ...]
    gradients: tuple[int, ...]
    handed: frozenset[int] = frozenset()
    storage: Storage | None = None


@dataclass(frozen=True)
class Stages:
    """Executable form of a program, before code generation.

    Attributes:
        forward: ``inputs -> (results, saved)``.
        backward: ``(saved, cotangents) -> hypergradients``; None when nothing is differentiated.
        n_results: Number of results of the program at the head of ``forward``'s outputs.
        saved: Which ``forward`` outputs and which program inputs the backward stage reads: ``("out", i)`` or
            ``("in", i)``.
        cotangents: Output positions that have a cotangent input.
        gradients: Input positions (meta-parameters) in the order of ``backward``'s results.
        handed: Results that become the user's and live on (:attr:`mlc.ir.program.Program.handed`).
    """

    forward: Region
    backward: Region | None
    n_results: int
    saved: tuple[tuple[str, int], ...]
    cotangents: tuple[int, ...]
    gradients: tuple[int, ...]
    handed: frozenset[int] = frozenset()
