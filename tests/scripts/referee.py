"""Runs a script eagerly and compiled, and holds one against the other.

Every run has a fresh working folder, fresh arguments and all generators seeded. What it leaves is described as a flat
mapping: whatever the arguments reach (modules, optimizers, schedulers, generators, arrays, meters), what it returned,
the generators of torch, NumPy and Python, the files with their contents. The gradient's referee is central differences
of the plain script at several step sizes.
"""

import contextlib
import io
import os
import random
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.numerics.reference import directional, directions
from tests.scripts.script import Arguments, Script
from torch import Tensor, nn

FIRST, SECOND = 3, 4  # seeds of the first and the second call
STEP_SIZES = (2.5e-4, 6.3e-5, 1.6e-5, 4e-6)
SHARP = 2e-6  # how far apart the two best estimates by differences may be, relative
DURATION = re.compile(r"\d+(\.\d+)? ?m?s\b")


@dataclass
class Outcome:
    """What one run left."""

    loss: Tensor
    metas: dict[str, Tensor]
    printed: str
    left: dict[str, Any]


def play(script: Script, main: Callable[..., Any], seed: int, shift: Mapping[str, Tensor] | None = None) -> Outcome:
    """Run `main` on fresh arguments, the meta-parameters moved by `shift`."""
    with folder() as here, contextlib.redirect_stdout(io.StringIO()) as out:
        seed_all(seed)
        args = script.make()
        metas = script.metas(args)
        with torch.no_grad():
            for name, by in (shift or {}).items():
                metas[name].add_(by)
        seed_all(1000 + seed)
        result = main(**args)
        left = describe_all(args, result, metas, here)
    return Outcome(script.loss(result), metas, DURATION.sub("(time)", out.getvalue()), left)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A fresh working folder, so that scripts may write files by bare names."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def describe_all(args: Arguments, result: Any, metas: Mapping[str, Tensor], here: Path) -> dict[str, Any]:
    left: dict[str, Any] = {}
    skip = {id(t) for t in metas.values()}  # an inner backward() of a compiled call does not accumulate into these
    describe(args, "args", left, set(), skip)
    describe(result, "returned", left, set(), skip)
    left["generator"] = torch.get_rng_state()
    left["numpy"] = str(np.random.get_state())
    left["python"] = str(random.getstate())
    for path in sorted(here.rglob("*")):
        name = f"file {path.relative_to(here)}"
        if path.suffix in (".pt", ".pth"):
            describe(torch.load(path, weights_only=False), name, left, set(), skip)
        elif path.is_file():
            left[name] = path.read_text()
    return left


def describe(thing: Any, name: str, left: dict[str, Any], seen: set[int], skip: set[int]) -> None:
    """Add everything that `thing` reaches to `left`, by path."""
    if isinstance(thing, bool | int | float | str | type(None)):
        left[name] = thing
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    parts: Any = ()
    if isinstance(thing, Tensor):
        left[name] = thing.detach().clone()
        left[name + " type"] = f"{type(thing).__name__} {thing.dtype} grad={thing.requires_grad and thing.is_leaf}"
        if thing.is_leaf and thing.requires_grad and id(thing) not in skip:
            left[name + ".grad"] = None if thing.grad is None else thing.grad.detach().clone()
    elif isinstance(thing, np.ndarray):
        left[name] = torch.from_numpy(thing.copy()) if thing.dtype.kind in "iuf" else str(thing)
    elif isinstance(thing, torch.Generator):
        left[name] = thing.get_state()
    elif isinstance(thing, nn.Module):
        parts = [*thing.named_parameters(), *thing.named_buffers()]
        left[name + ".training"] = thing.training
    elif isinstance(thing, torch.optim.Optimizer):
        parts = thing.state_dict().items()
    elif isinstance(thing, Mapping):
        parts = thing.items()
    elif isinstance(thing, list | tuple):
        parts = enumerate(thing)
    elif isinstance(thing, torch.utils.data.DataLoader):
        parts = [("dataset", thing.dataset), ("generator", thing.generator)]
    elif hasattr(thing, "__dict__") and not callable(thing) and not isinstance(thing, type):
        parts = vars(thing).items()
    for key, part in list(parts):
        describe(part, f"{name}.{key}", left, seen, skip)


def differences_between(got: Mapping[str, Any], want: Mapping[str, Any], tol: float) -> list[str]:
    """Where two descriptions differ, one line each."""
    found = [f"{name} is missing" for name in want if name not in got]
    found += [f"{name} is left over" for name in got if name not in want]
    for name in want:
        if name in got:
            reason = unequal(got[name], want[name], tol)
            if reason:
                found.append(f"{name}: {reason}")
    return found


def unequal(one: Any, two: Any, tol: float) -> str:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape != two.shape or one.dtype != two.dtype:
            return f"{one.dtype} {tuple(one.shape)} for {two.dtype} {tuple(two.shape)}"
        if not two.is_floating_point():
            return "" if torch.equal(one, two) else "values differ"
        close = torch.allclose(one, two, rtol=0, atol=1e-12 + tol * float(two.abs().max() if two.numel() else 0))
        return "" if close else "off by more than rounding"
    if type(one) is not type(two):
        return f"{type(one).__name__} for {type(two).__name__}"
    if isinstance(one, float):
        return "" if one == two or abs(one - two) <= 1e-12 + tol * abs(two) else "off by more than rounding"
    return "" if one == two else f"{one!r:.60} for {two!r:.60}"


@dataclass(frozen=True)
class Slope:
    """The derivative along one direction, by differences of the plain script."""

    along: dict[str, Tensor]
    value: float
    spread: float

    @property
    def sharp(self) -> bool:
        return self.spread <= SHARP * max(abs(self.value), 1e-8)


def slopes(script: Script, seed: int, directed: tuple[int, ...]) -> list[Slope]:
    """Derivatives of the loss along random directions."""
    with folder():
        metas = script.metas(script.make())
    given = cut_values(script, seed) if script.frozen else []
    found = []
    for number in directed:
        along = directions(metas, number)

        def at(h: float, along: dict[str, Tensor] = along) -> float:
            shift = {n: h * t for n, t in along.items()}
            with replaced(script, replay(given) if script.frozen else None):
                return float(play(script, script.main, seed, shift).loss.detach())

        found.append(Slope(along, *directional(at, STEP_SIZES)))
    return found


def cut_values(script: Script, seed: int) -> list[Any]:
    """What the function that cuts gives at the unmoved meta-parameters, call by call."""
    given = []
    cut = getattr(script.module, script.frozen)

    def keep(*args: Any) -> Any:
        given.append(cut(*args))
        return given[-1]

    with replaced(script, keep):
        play(script, script.main, seed)
    return given


def replay(given: list[Any]) -> Callable[..., Any]:
    """A function that gives these values, one a call."""
    values = iter(given)
    return lambda *args: next(values)


@contextlib.contextmanager
def replaced(script: Script, by: Callable[..., Any] | None) -> Iterator[None]:
    """The script with another function in the place of the one that cuts."""
    if by is None:
        yield
        return
    cut = getattr(script.module, script.frozen)
    setattr(script.module, script.frozen, by)
    try:
        yield
    finally:
        setattr(script.module, script.frozen, cut)


@dataclass(frozen=True)
class Plain:
    """The plain script at one seed: what it leaves, and its slopes."""

    outcome: Outcome
    slopes: list[Slope]


def plain(script: Script, seed: int) -> Plain:
    with quiet():
        return Plain(play(script, script.main, seed), slopes(script, seed, (1, 2) if seed == FIRST else (3,)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What eager PyTorch or mlc warn of is no matter here; that they run is."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def problems(script: Script, compile_: Callable[..., Any], expected: Mapping[int, Plain]) -> Iterator[str]:
    """Compile the script, call it for each seed, and hold every call against the plain script.

    Yields:
        What is wrong, one line each, without numbers that rounding may change. An exception ends it.
    """
    compiled = compile_(script.main, **script.options)
    for call, seed in enumerate(expected, start=1):
        want = expected[seed]
        with quiet():
            try:
                got = play(script, compiled, seed)
                found = torch.autograd.grad(got.loss, list(got.metas.values()), allow_unused=True)
            except Exception as error:
                if os.environ.get("SCRIPTS_DEBUG"):
                    traceback.print_exc()
                yield f"call {call}: {type(error).__name__}: {str(error).splitlines()[0]}"
                return
        if call == 1 and got.printed != want.outcome.printed:  # Python runs at the first call
            yield f"call 1 prints {other_line(got.printed, want.outcome.printed)}"
        wrong = differences_between(got.left, want.outcome.left, script.values)
        if wrong:
            yield f"call {call} leaves {wrong[0]} ({len(wrong)} of {len(want.outcome.left)} differ)"
        for slope in want.slopes:
            yield from wrong_slope(script, call, dict(zip(got.metas, found, strict=True)), slope)


def wrong_slope(script: Script, call: int, gradients: Mapping[str, Tensor | None], slope: Slope) -> Iterator[str]:
    missing = [name for name, g in gradients.items() if g is None]
    if missing:
        yield f"call {call}: no gradient of {', '.join(missing)}"
        return
    value = sum(float((g * slope.along[name]).sum()) for name, g in gradients.items() if g is not None)
    if not abs(value - slope.value) <= script.tol * abs(slope.value) + slope.spread:
        off = abs(value - slope.value) / abs(slope.value)
        yield f"call {call}: the gradient is not the slope of differences: off by {off:.0e}"


def other_line(got: str, want: str) -> str:
    """The first line that differs."""
    for one, two in zip(got.splitlines() + [""], want.splitlines() + [""], strict=False):
        if one != two:
            return f"{one!r} for {two!r}"
    return "more lines or fewer"
