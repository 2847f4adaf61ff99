"""What a user may ask of a level: the responses as values.

A *response* says how the derivative of what a level trained, with respect to everything that its training read, is
obtained.  :class:`Unroll` is exact and the default; all others are approximations that only a user can name.  The
values here say what was asked for and nothing of how it is done: each is a frozen dataclass, equal to another of the
same settings, and goes through JSON (:func:`written`, :func:`read`), because a plan holds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlc.errors import PlanError

__all__ = [
    "Evolution",
    "FiniteDifference",
    "FirstOrder",
    "ForwardGradient",
    "FullyFirstOrder",
    "Implicit",
    "Response",
    "Truncated",
    "Unroll",
    "read",
    "written",
]


@dataclass(frozen=True)
class Response:
    """How the derivative of what a level trained is obtained; the base of all of them, not for use itself."""

    @property
    def exact(self) -> bool:
        """Whether it is the derivative of what the level computed, up to rounding."""
        return False

    def __str__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True)
class Unroll(Response):
    """The exact derivative, through every step of the level (Maclaurin et al. 2015; Franceschi et al. 2017)."""

    @property
    def exact(self) -> bool:
        """It is."""
        return True


@dataclass(frozen=True)
class Truncated(Response):
    """Exact through the last ``steps`` steps; the state before them is a constant (Shaban et al. 2019).

    Of the earlier steps nothing is kept.  With as many steps as the level takes it is :class:`Unroll`.

    Attributes:
        steps: How many steps of the level, at least 1.

    Raises:
        PlanError: for a number that makes no sense.
    """

    steps: int

    def __post_init__(self) -> None:
        _whole(self, "steps", 1)


@dataclass(frozen=True)
class FirstOrder(Response):
    """Inner gradients are constants: no second derivative is taken (first-order MAML, Finn et al. 2017, 5.2).

    Hyperparameters of the update itself (learning rate, momentum, decay) and starting points still count.
    """


@dataclass(frozen=True)
class FiniteDifference(Response):
    """Through every step, each second-order product a central difference of gradients (DARTS, Liu et al. 2019, eq. 8).

    Attributes:
        eps: Length of the step in parameter space that a difference takes each way (absolute: the direction is
            normalised first); None: chosen from the precision and the length of the parameters,
            cbrt(machine epsilon) (1 + |theta|).

    Raises:
        PlanError: for a step that makes no sense.
    """

    eps: float | None = None

    def __post_init__(self) -> None:
        if self.eps is not None:
            _number(self, "eps", above=0.0)


_SOLVERS = ("cg", "neumann", "gmres", "nystrom")


@dataclass(frozen=True)
class Implicit(Response):
    """The implicit function theorem at the final point: a linear solve with the Hessian of the level's loss.

    With g(theta, u) the gradient that the level's update is fed, and g = 0 at its solution,
    d theta / d u = -(dg/dtheta)^-1 dg/du (Bengio 2000; Pedregosa 2016; Rajeswaran et al. 2019; Lorraine et al. 2020).
    It is exact where the level has converged.  Memory does not grow with the number of steps.

    Attributes:
        solver: ``"cg"`` (symmetric positive definite Hessians), ``"gmres"`` (any invertible one), ``"neumann"`` (a
            series; Lorraine et al. 2020), ``"nystrom"`` (low rank plus damping; Hataya and Yamada 2023).
        steps: Most products with the Hessian; None: 20 (10 for Nystrom: its rank).
        tol: Relative residual at which the solver stops.
        damping: What is added to the diagonal, at least 0 (Nystrom needs it above 0, and takes 1e-2 for 0).
        data: ``"last"``: the gradient of the last step's batch; ``"all"``: the mean over the steps.

    Raises:
        PlanError: for settings that make no sense.
    """

    solver: str = "cg"
    steps: int | None = None
    tol: float = 1e-6
    damping: float = 0.0
    data: str = "last"

    def __post_init__(self) -> None:
        _choice(self, "solver", _SOLVERS)
        if self.steps is not None:
            _whole(self, "steps", 1)
        _number(self, "tol", least=0.0)
        _number(self, "damping", least=0.0)
        _choice(self, "data", ("last", "all"))

    def __str__(self) -> str:
        given = super().__str__().removeprefix("Implicit(")
        given = given.removeprefix(f"solver={self.solver!r}").removeprefix(", ")
        return f"Implicit({self.solver!r}{', ' * (given != ')')}{given}"


@dataclass(frozen=True)
class ForwardGradient(Response):
    """Unbiased: directional derivatives along random tangents, g = E[(g.v) v] (Baydin et al. 2022; Silver et al. 2022).

    Tangents are pushed forward with the loop, so nothing is kept per step.  Its variance grows with the number of
    elements of the meta-parameters and falls with the samples.

    Attributes:
        samples: How many tangents, at least 1; their directions come from the generator of torch at the call.

    Raises:
        PlanError: for a number that makes no sense.
    """

    samples: int = 1

    def __post_init__(self) -> None:
        _whole(self, "samples", 1)


@dataclass(frozen=True)
class Evolution(Response):
    """Antithetic evolution strategies: the gradient of the loss smoothed by Gaussian noise, from values alone.

    (Salimans et al. 2017; for unrolled computations Metz et al. 2019).  It asks for no derivative of the level, and so
    works where these explode.

    Attributes:
        sigma: Standard deviation of the noise on the meta-parameters, above 0.
        samples: How many antithetic pairs, at least 1.
        persistent: Persistent evolution strategies (Vicol et al. 2021, algorithm 2): calls are windows of one long
            training whose state stands in the user's objects; particles and the sums of their perturbations live on
            from call to call, which removes the bias of truncation. It holds for all meta-parameters of the call.

    Raises:
        PlanError: for settings that make no sense.
    """

    sigma: float = 0.01
    samples: int = 1
    persistent: bool = False

    def __post_init__(self) -> None:
        _number(self, "sigma", above=0.0)
        _whole(self, "samples", 1)
        if not isinstance(self.persistent, bool):
            raise _wrong(self, "persistent", "True or False")


@dataclass(frozen=True)
class FullyFirstOrder(Response):
    """First derivatives only, by a value-function penalty (F2SA, Kwon et al. 2023; BOME, Liu et al. 2022).

    Beside the level's own run a second one trains on upper + penalty * lower; the gradient is the difference of the
    two lower gradients times the penalty. Its bias falls as 1/penalty where both have converged.

    Attributes:
        penalty: Weight of the lower loss, above 0.

    Raises:
        PlanError: for a penalty that makes no sense.
    """

    penalty: float = 10.0

    def __post_init__(self) -> None:
        _number(self, "penalty", above=0.0)


_KINDS: dict[str, type[Response]] = {
    c.__name__: c
    for c in (
        Unroll,
        Truncated,
        FirstOrder,
        FiniteDifference,
        Implicit,
        ForwardGradient,
        Evolution,
        FullyFirstOrder,
    )
}


def written(response: Response) -> dict[str, Any]:
    """A response as JSON holds it."""
    return {"kind": type(response).__name__, **asdict(response)}


def read(data: Mapping[str, Any]) -> Response:
    """A response as JSON holds it.

    Raises:
        PlanError: for what is none.
    """
    rest = dict(data)
    kind = rest.pop("kind", None)
    if kind not in _KINDS or not rest.keys() <= {f.name for f in fields(_KINDS[kind])}:
        raise PlanError(f"{dict(data)!r} is no response", advice=f"use {', '.join(_KINDS)}")
    return _KINDS[kind](**rest)


def _wrong(response: Response, name: str, advice: str) -> PlanError:
    return PlanError(f"{type(response).__name__}: {name}={getattr(response, name)!r}", advice=f"{name}: {advice}")


def _whole(response: Response, name: str, least: int) -> None:
    value = getattr(response, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _wrong(response, name, f"a whole number, at least {least}")


def _number(response: Response, name: str, *, above: float | None = None, least: float | None = None) -> None:
    value = getattr(response, name)
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or (above is not None and value <= above) or (least is not None and value < least):
        raise _wrong(response, name, f"a number above {above}" if above is not None else f"a number, at least {least}")


def _choice(response: Response, name: str, choices: tuple[str, ...]) -> None:
    if getattr(response, name) not in choices:
        raise _wrong(response, name, " or ".join(repr(c) for c in choices))
