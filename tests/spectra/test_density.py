"""Densities against Gaussian mixtures in closed form, lost mass against the normal distribution."""

import time

import numpy as np
import pytest
import torch
from scipy.signal import find_peaks
from scipy.special import logsumexp
from scipy.stats import norm

import hessian_tools as ht
from hessian_tools.curvature.symmetric import DiagonalOperator
from hessian_tools.spectra.density import (
    Axis,
    SpectralGrid,
    kernel_sum,
    spanning_grid,
    spectral_density,
    symlog_axis,
)
from hessian_tools.spectra.quadrature import Quadrature


def quadrature(nodes, weights=None, **fields):
    """A Quadrature with the given (k, m) nodes."""
    nodes = np.atleast_2d(np.asarray(nodes, dtype=float))
    weights = (
        np.full(nodes.shape, 1 / nodes.shape[1]) if weights is None else np.atleast_2d(weights)
    )
    steps = (weights > 0).sum(axis=1)
    rest = {
        "size": 1000,
        "num_matvecs": nodes.size,
        "status": "complete",
        "probes": "rademacher",
        "reorthogonalize": "full",
    }
    return Quadrature(nodes, weights, np.zeros(nodes.shape), steps, **{**rest, **fields})


def random_quadrature(k, m, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return quadrature(scale * rng.standard_normal((k, m)) ** 3, rng.dirichlet(np.ones(m), size=k))


def mixture(q, points, width):
    """mean over probes of sum_i w_i N(t; t_i, width^2), written out."""
    terms = [
        w * norm.pdf(points, x, width)
        for x, w in zip(q.nodes.ravel(), q.weights.ravel(), strict=True)
    ]
    return np.sum(terms, axis=0) / q.num_probes


def test_linear_density_is_the_mixture():
    blocks = {"a": random_quadrature(3, 7), "b": random_quadrature(2, 5, seed=1)}
    found = spectral_density(blocks, num_points=501, width=0.3)
    low, high = (
        min(q.nodes.min() for q in blocks.values()),
        max(q.nodes.max() for q in blocks.values()),
    )
    assert np.allclose(found.grid, np.linspace(low - 1.5, high + 1.5, 501)) and np.array_equal(
        found.grid, found.eigenvalues
    )
    for row, q in enumerate(blocks.values()):
        assert np.allclose(found.values[row], mixture(q, found.grid, 0.3), rtol=1e-12, atol=1e-300)
    assert (
        found.names == ("a", "b")
        and found.width == 0.3
        and (found.axis.kind, found.axis.unit) == ("linear", "eigenvalue")
    )
    assert (
        np.allclose(found.grid_mass, 1 - found.lost_mass, atol=1e-6) and (found.lost_mass > 0).all()
    )


def test_symlog_density_is_a_mixture_in_decades():
    q = quadrature([[1e-3, 2.0, -50.0, 1e4]], [[0.1, 0.2, 0.3, 0.4]])
    found = spectral_density(q, grid="symlog", linear_fraction=1e-7, num_points=400)
    assert (
        found.axis == Axis("symlog", 1e-3) and found.axis.unit == "decades" and found.width == 0.2
    )
    t = np.arcsinh(q.nodes / 2e-3) / np.log(10)
    assert np.allclose(
        found.values[0], mixture(quadrature(t, q.weights), found.grid, 0.2), rtol=1e-12, atol=1e-300
    )
    assert np.allclose(found.axis.position(found.eigenvalues), found.grid)
    assert found.grid_mass[0] == pytest.approx(1, abs=1e-6)


def test_symlog_axis_definition():
    axis = Axis("symlog", 1e-4)
    x = np.array([1e-2, 1.0, 1e5])
    assert np.allclose(axis.position(x), np.log10(x / 1e-4), atol=(1e-2**2) / np.log(10))
    assert np.array_equal(axis.position(-x), -axis.position(x)) and axis.position(0.0) == 0
    tiny = np.array([1e-7, -1e-6])
    assert np.allclose(axis.position(tiny), tiny / (2e-4 * np.log(10)), rtol=1e-4)
    values = np.linspace(-9, 9, 101)
    assert np.allclose(axis.position(axis.eigenvalue(values)), values)
    assert symlog_axis(
        [quadrature([1.0, -40.0]), quadrature([3.0, 2.0])], 1e-6
    ).linthresh == pytest.approx(4e-5)
    zero = symlog_axis([quadrature([0.0, 0.0])])
    assert zero.position(np.zeros(2)).tolist() == [0, 0]


def test_scaling_the_operator_does_not_move_the_symlog_density():
    q = random_quadrature(2, 20)
    here, there = (
        spectral_density(quadrature(f * q.nodes, q.weights), grid="symlog") for f in (1, 1000)
    )
    assert np.allclose(here.grid, there.grid, atol=1e-12) and np.allclose(
        here.values, there.values, atol=1e-10
    )


def test_lost_mass_is_told_and_nothing_is_renormalised():
    q = quadrature([[-1.0, 0.5, 3.0], [0.0, 1.0, 2.0]], [[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    grid = SpectralGrid(Axis("linear"), -0.5, 2.0, 2001)
    found = spectral_density(q, grid=grid, width=0.4)
    inside = [
        w @ (norm.cdf(2.0, x, 0.4) - norm.cdf(-0.5, x, 0.4))
        for x, w in zip(q.nodes, q.weights, strict=True)
    ]
    assert found.lost_mass[0] == pytest.approx(1 - np.mean(inside), abs=1e-14)
    assert found.lost_mass[0] > 0.3
    assert found.grid_mass[0] == pytest.approx(np.mean(inside), abs=1e-3)
    coarse = spectral_density(q, grid=SpectralGrid(Axis("linear"), -2, 4, 7), width=0.01)
    assert (
        coarse.lost_mass[0] < 1e-12 and abs(coarse.grid_mass[0] - 1) > 0.5
    )  # a grid coarser than its kernel says so


def test_padded_nodes_carry_nothing():
    padded = quadrature([[1.0, 2.0, 2.0]], [[0.25, 0.75, 0.0]])
    plain = quadrature([[1.0, 2.0]], [[0.25, 0.75]])
    assert np.array_equal(
        spectral_density(padded, width=0.1).values, spectral_density(plain, width=0.1).values
    )


@pytest.mark.parametrize("spacing", [0.02, 0.5, 40.0])
def test_kernel_sum_in_log_space(spacing):
    """Against logsumexp over all pairs; at a spacing of 40 every term underflows without shift."""
    rng = np.random.default_rng(1)
    positions, weights, width = (
        rng.uniform(-100, 100, 30) + 0.3 * spacing,
        rng.dirichlet(np.ones(30)),
        0.05,
    )
    grid = SpectralGrid(Axis("linear"), -10 * spacing, 10 * spacing, 21)
    exact = logsumexp(
        np.log(weights) - ((grid.points[:, None] - positions) / width) ** 2 / 2, axis=1
    )
    values, shift = kernel_sum(grid, positions, weights, width, depth=60.0)
    assert shift <= exact.max() + 1e-9 and np.isfinite(values).all() and values.max() >= 1e-12
    with np.errstate(divide="ignore"):
        found = np.log(values) + shift
    seen = exact > exact.max() - 40
    assert seen.any() and np.allclose(found[seen], exact[seen], atol=1e-6)
    plain, _ = kernel_sum(grid, positions, weights, width)
    assert np.allclose(
        plain, np.exp(np.maximum(exact, -745.2)) * (exact > -745), rtol=1e-7, atol=1e-300
    )


def test_default_width_and_degenerate_spectra():
    q = quadrature([[0.0, 10.0]])
    assert spectral_density(q).width == 10 / 200 and spectral_density(q).grid.shape == (2_000,)
    for grid in ("linear", "symlog"):
        zero = spectral_density(quadrature([[0.0, 0.0]]), grid=grid)
        assert zero.grid_mass[0] == pytest.approx(1, abs=1e-5)


def test_fifty_thousand_points_and_a_hundred_blocks():
    blocks = {str(i): random_quadrature(10, 100, seed=i) for i in range(100)}
    grid = spanning_grid(blocks.values(), Axis("linear"), 50_000, 1.0)
    started = time.process_time()
    found = spectral_density(blocks, grid=grid, width=np.sqrt(1e-5))
    assert (
        found.values.shape == (100, 50_000) and time.process_time() - started < 60
    )  # a few seconds; slack for busy machines
    assert np.allclose(
        found.values[7, 20_000:20_050],
        mixture(blocks["7"], found.grid[20_000:20_050], np.sqrt(1e-5)),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": "log"}, "grid is 'log'"),
        ({"width": 0.0}, "width is 0"),
        ({"num_points": 1}, "1 points"),
        ({"grid": "symlog", "linear_fraction": 2.0}, "linear_fraction is 2"),
        ({"grid": SpectralGrid(Axis("linear"), 0, 1, 5)}, "width is None"),
        (
            {"grid": SpectralGrid(Axis("linear"), 0, 1, 5), "width": 1.0, "num_points": 5},
            "num_points 5",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(quadrature([[1.0, 2.0]]), **arguments)
    with pytest.raises(ValueError, match="empty"):
        spectral_density({})


# ------------------------------------------------------------------- what is not resolved


def normal(size, scale=1.0):
    return scale * np.random.default_rng(0).standard_normal(size)


def log_normal(size, decade, width):
    return 10.0 ** np.random.default_rng(1).normal(decade, width, size)


SHAPES = {
    "a bulk above zero": np.abs(normal(3000)),
    "a bulk of decades": log_normal(3000, -3, 1.2),
    "two bulks": np.concatenate([log_normal(1500, -4, 0.3), log_normal(1500, 0, 0.2)]),
    "a bulk and outliers": np.append(normal(2997, 1e-3), [1.0, 2.0, 10.0]),
    "of low rank": np.append(np.zeros(2800), log_normal(200, -1, 0.6)),
}


def count_peaks(density, floor):
    """Peaks that stand out by 40 % in what a logarithmic picture shows."""
    heights = np.log10(np.maximum(np.pad(density, 1), floor))
    return len(find_peaks(heights, prominence=0.15)[0])


@pytest.mark.parametrize("steps", [12, 40, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_spread_nodes_show_the_peaks_of_the_exact_density(shape, steps):
    eigenvalues = SHAPES[shape]
    operator = DiagonalOperator(torch.from_numpy(eigenvalues))
    found = ht.slq(operator, num_probes=4, num_steps=steps, exact=False)
    exact = ht.slq(operator, num_probes=1, num_steps=2, exact=True)
    options = {"grid": "symlog", "spread_unresolved": True}
    density = ht.spectral_density({"found": found, "exact": exact}, **options)
    floor = 0.5 / len(eigenvalues)
    shown, right = (count_peaks(values, floor) for values in density.values)
    assert shown == right
    assert density.grid_mass == pytest.approx(1, abs=1e-6)
    assert (density.values >= 0).all()


def test_resolved_nodes_are_points_however_they_are_drawn():
    operator = DiagonalOperator(torch.tensor([1.0, 2.0, 50.0], dtype=torch.float64))
    found = ht.slq(operator, num_probes=2, num_steps=3, exact=False)
    plain = ht.spectral_density(found, grid="symlog")
    spread = ht.spectral_density(found, grid="symlog", spread_unresolved=True)
    np.testing.assert_array_equal(spread.values, plain.values)


def test_a_single_node_without_resolution_is_drawn():
    operator = DiagonalOperator(torch.from_numpy(normal(2000)))
    for probes in (1, 2):
        found = ht.slq(operator, num_probes=probes, num_steps=1, exact=False)
        density = ht.spectral_density(found, grid="symlog", spread_unresolved=True)
        assert density.grid_mass == pytest.approx(1, abs=1e-6)


def test_what_is_spread_beyond_a_grid_is_lost_and_not_renormalised():
    """A grid over part of the nodes shows that part of the density, as one over all of them does."""
    operator = DiagonalOperator(torch.from_numpy(log_normal(3000, -3, 1.2)))
    found = ht.slq(operator, num_probes=4, num_steps=12, exact=False)
    whole = ht.spectral_density(found, grid="symlog", spread_unresolved=True)
    start, stop = 600, 1400
    part = SpectralGrid(whole.axis, whole.grid[start], whole.grid[stop - 1], stop - start)
    cut = ht.spectral_density(found, grid=part, width=whole.width, spread_unresolved=True)
    np.testing.assert_allclose(cut.values[0], whole.values[0, start:stop], atol=1e-9)
    assert 0.05 < cut.lost_mass[0] < 0.95
    assert cut.lost_mass + cut.grid_mass == pytest.approx(1, abs=1e-3)


def test_a_scaled_operator_has_the_scaled_quadrature():
    eigenvalues = torch.from_numpy(normal(500))
    plain, thrice = (
        ht.slq(DiagonalOperator(factor * eigenvalues), num_probes=2, num_steps=8, exact=False)
        for factor in (1, 3)
    )
    np.testing.assert_allclose(plain.scaled(3).nodes, thrice.nodes, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(plain.scaled(3).residuals, thrice.residuals, rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(plain.scaled(3).weights, plain.weights)
