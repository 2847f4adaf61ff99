"""Every linear solver against the matrix's own solution, and what it says where there is none."""

import pytest
import torch

from mlc.errors import SolverError
from mlc.linear.solvers import (
    SOLVERS,
    Packing,
    Solve,
    bicgstab,
    cg,
    direct,
    gmres,
    neumann,
    normal_cg,
    nystrom,
)

N = 20


def spd(condition: float, n: int = N, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.logspace(0, torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)) @ q.T


def skewed(condition: float) -> torch.Tensor:
    """Positive definite, not symmetric."""
    a = torch.randn(N, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return spd(condition) + 0.5 * (a - a.T)


def right(n: int = N) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(name: str, a: torch.Tensor, b: torch.Tensor, **settings: object) -> Solve:
    if name == "normal_cg":
        settings["transposed"] = a.T.__matmul__
    if name == "direct":
        settings.pop("steps", None)
    return SOLVERS[name](a.__matmul__, b, **settings)


def error(solve: Solve, a: torch.Tensor, b: torch.Tensor) -> float:
    exact = torch.linalg.solve(a, b)
    return float((solve.x - exact).norm() / exact.norm())


@pytest.mark.parametrize("condition", [7.0, 650.0])
@pytest.mark.parametrize("name", ["cg", "gmres", "bicgstab", "normal_cg", "direct"])
def test_symmetric_systems_to_ten_digits(name: str, condition: float) -> None:
    a, b = spd(condition), right()
    solve = run(name, a, b, tol=1e-13, steps=500)
    assert solve.converged and solve.residual <= 1e-13
    assert error(solve, a, b) < 1e-10
    assert solve.curvature is not None and 0.999 <= solve.curvature <= condition


@pytest.mark.parametrize("name", ["gmres", "bicgstab", "normal_cg", "direct"])
def test_systems_that_are_not_symmetric(name: str) -> None:
    a, b = skewed(50.0), right()
    assert error(run(name, a, b, tol=1e-13, steps=500), a, b) < 1e-10


def test_restarted_gmres_comes_to_the_same() -> None:
    a, b = skewed(20.0), right()
    short = gmres(a.__matmul__, b, restart=6, steps=500, tol=1e-12)
    assert short.converged and short.iterations > 12
    assert error(short, a, b) < 1e-10


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"nystrom"}))
def test_damping_is_added_to_the_diagonal(name: str) -> None:
    a, b = spd(7.0), right()
    solve = run(name, a, b, damping=0.5, tol=1e-12, steps=500)
    assert error(solve, a + 0.5 * torch.eye(N, dtype=torch.float64), b) < 1e-10
    assert solve.curvature is None or solve.curvature >= 0.999  # A's own, without the damping


@pytest.mark.parametrize("name", ["cg", "gmres", "bicgstab", "normal_cg", "neumann"])
def test_a_warm_start_at_the_solution_needs_no_iteration(name: str) -> None:
    a, b = spd(7.0), right()
    solve = run(name, a, b, x0=torch.linalg.solve(a, b), tol=1e-10)
    assert solve.converged and solve.iterations == 0 and solve.products >= 1


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_zero_right_hand_sides(name: str) -> None:
    solve = run(name, spd(7.0), torch.zeros(N, dtype=torch.float64), damping=0.1)
    assert solve.converged and solve.residual == 0.0 and not solve.x.any()


def test_cg_ends_after_as_many_steps_as_there_are_eigenvalues() -> None:
    a = torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0, 9.0], dtype=torch.float64))
    assert cg(a.__matmul__, right(5), tol=1e-12).iterations == 3


def test_one_product_per_cg_step_and_one_to_check() -> None:
    a, b = spd(7.0), right()
    solve = cg(a.__matmul__, b, tol=1e-8)
    assert solve.converged and solve.products == solve.iterations + 1


def test_cg_is_monotone_in_steps_and_says_when_it_stops_short() -> None:
    a, b = spd(650.0), right()
    short = cg(a.__matmul__, b, steps=3)
    assert not short.converged and short.iterations == 3
    assert short.residual == pytest.approx(float((b - a @ short.x).norm() / b.norm()), rel=1e-9)


def test_cg_stopped_short_comes_nearer_though_its_residual_grows() -> None:
    values = torch.logspace(0, 3, N, dtype=torch.float64)
    a, b = torch.diag(values), values**-0.5
    found = [cg(a.__matmul__, b, steps=k, tol=0.0) for k in range(1, 8)]
    assert min(s.residual for s in found) > 1.5  # of the first one, x = 0
    errors = [error(s, a, b) for s in found]
    assert all(later < earlier for earlier, later in zip([1.0, *errors], errors, strict=False))


@pytest.mark.parametrize("name", ["cg", "gmres", "direct"])
def test_negative_curvature_is_seen_and_the_system_still_solved(name: str) -> None:
    a = torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.0, -2.0], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    solve = run(name, a, b, tol=1e-11)
    assert solve.curvature is not None and solve.curvature < 0
    assert error(solve, a, b) < 1e-9


@pytest.mark.parametrize("name", ["cg", "gmres", "bicgstab", "normal_cg", "direct", "neumann"])
def test_singular_systems_without_a_solution_do_not_converge(name: str) -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    solve = run(name, a, torch.ones(3, dtype=torch.float64))
    assert not solve.converged and solve.residual > 0.1
    assert bool(solve.x.isfinite().all())


@pytest.mark.parametrize("name", ["cg", "gmres", "normal_cg", "direct"])
def test_singular_systems_with_a_solution(name: str) -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    solve = run(name, a, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert solve.converged
    assert torch.allclose(solve.x, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("steps", [5, 20])
def test_neumann_follows_its_series(steps: int) -> None:
    a, b = spd(7.0), right()
    s = 0.1
    solve = neumann(a.__matmul__, b, steps=steps, scale=s, tol=0.0)
    shrink, term, total = torch.eye(N, dtype=torch.float64) - s * a, b, torch.zeros_like(b)
    for _ in range(steps):
        total, term = total + s * term, shrink @ term
    assert torch.allclose(solve.x, total, rtol=1e-12, atol=1e-14)
    assert solve.products == solve.iterations == steps


def test_neumann_finds_a_scale() -> None:
    a, b = spd(7.0), right()
    solve = neumann(a.__matmul__, b, steps=400, tol=1e-12)
    assert solve.converged and error(solve, a, b) < 1e-10


def test_neumann_that_diverges_says_so_and_stays_finite() -> None:
    a, b = spd(650.0), right()
    solve = neumann(a.__matmul__, b, steps=10_000, scale=0.1)
    assert not solve.converged and solve.iterations < 100
    assert bool(solve.x.isfinite().all())


def test_nystrom_is_exact_with_all_columns_and_for_low_rank() -> None:
    a, b = spd(7.0), right()
    eye = torch.eye(N, dtype=torch.float64)
    full = nystrom(a.__matmul__, b, rank=N, damping=0.1)
    assert error(full, a + 0.1 * eye, b) < 1e-10 and full.converged and full.iterations == N
    thin = torch.randn(N, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low = thin @ thin.T
    for damping in (1.0, 1e-6):
        exact = torch.linalg.solve(low + damping * eye, b)
        found = nystrom(low.__matmul__, b, rank=4, damping=damping)
        assert float((found.x - exact).norm() / exact.norm()) < 1e-7
    part = nystrom(a.__matmul__, b, rank=5, damping=0.1)
    assert not part.converged and part.products == 6


def test_nystrom_draws_its_columns_from_the_generator() -> None:
    a, b = spd(650.0), right()
    seeds = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
    first, same, other = (nystrom(a.__matmul__, b, rank=5, damping=0.1, generator=g).x for g in seeds)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_nan_is_an_error(name: str) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")

    settings = {"transposed": broken} if name == "normal_cg" else {}
    with pytest.raises(SolverError, match="NaN or infinity"):
        SOLVERS[name](broken, right(), damping=0.1, **settings)
    with pytest.raises(SolverError, match="NaN or infinity"):
        run(name, spd(7.0), right() * float("inf"), damping=0.1)


@pytest.mark.parametrize("solver", [cg, gmres, bicgstab])
def test_float32_reaches_what_float32_can(solver: object) -> None:
    a, b = spd(50.0).float(), right().float()
    solve = solver(a.__matmul__, b, steps=500)
    assert solve.converged and solve.x.dtype == torch.float32
    impossible = solver(a.__matmul__, b, tol=1e-12, steps=100_000)
    assert not impossible.converged and impossible.residual < 1e-5
    assert impossible.iterations < 10_000  # stops where rounding does


def test_normal_cg_takes_the_nearest_least_squares_solution() -> None:
    a = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    solve = normal_cg(a.__matmul__, torch.tensor([2.0, 2.0], dtype=torch.float64), transposed=a.T.__matmul__)
    assert torch.allclose(solve.x, torch.ones(2, dtype=torch.float64))
    assert torch.allclose(direct(a.__matmul__, torch.full((2,), 2.0, dtype=torch.float64)).x, solve.x)


def test_packing_there_and_back() -> None:
    tensors = (torch.randn(2, 3), torch.randn(()), torch.randn(4, dtype=torch.float64), torch.randn(0))
    packing = Packing.of(tensors)
    flat = packing.flat(tensors)
    assert flat.shape == (11,) and flat.dtype == torch.float64
    for before, after in zip(tensors, packing.parts(flat), strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)
    assert Packing.of((torch.randn(2, dtype=torch.bfloat16),)).dtype == torch.float32


@pytest.mark.parametrize("b", [torch.ones(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float16)])
def test_right_hand_sides_are_flat_and_wide(b: torch.Tensor) -> None:
    with pytest.raises(SolverError, match="flat"):
        cg(lambda x: x, b)
