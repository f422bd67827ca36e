"""Scale of the loss: c A has c times the spectrum of A, from float32's smallest to its largest."""

import numpy as np
import pytest
import torch
from problems.planted import FakeHessian, cut_of, random_symmetric

import hessian_tools as ht
from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.symmetric import DenseOperator, DiagonalOperator
from hessian_tools.errors import NumericalError
from hessian_tools.spectra.lanczos import lanczos, resume
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.slq import blockwise_slq, slq

POWERS = (-100, -63, -30, 0, 30, 63, 100)  # of two: 1e-30 to 1e30
MODES = ("full", "local", "none")
SPECTRUM = np.random.default_rng(5).standard_normal(120) ** 3 + 0.3


def operator(factor, dtype=torch.float32):
    matrix = torch.as_tensor(random_symmetric(SPECTRUM)).to(torch.float32)
    return DenseOperator(matrix.to(dtype) * factor)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("power", POWERS)
def test_powers_of_two_change_no_digit(power, mode):
    settings = {"num_probes": 3, "num_steps": 9, "reorthogonalize": mode, "exact": False}
    factor = 2.0**power
    reference = slq(operator(1.0), **settings)
    found = slq(operator(factor), **settings)
    assert (found.status, found.steps.tolist()) == ("complete", [9, 9, 9])
    np.testing.assert_array_equal(found.nodes, reference.nodes * factor)
    np.testing.assert_allclose(found.weights, reference.weights, atol=1e-12)
    for p in range(1, 9):
        expected = reference.moment(p).times(factor**p)
        assert found.moment(p).value == pytest.approx(expected.value, rel=1e-9)
    assert found.rms.value == pytest.approx(factor * reference.rms.value, rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [1e-30, 1e-25, 1e-19, 3e-10, 1e18, 1e25, 1e30])
def test_ritz_values_lie_inside_the_spectrum_at_every_scale(factor, mode):
    found = slq(
        operator(factor), num_probes=2, num_steps=20, reorthogonalize=mode, exact=False, seed=1
    )
    truth = np.linalg.eigvalsh(random_symmetric(SPECTRUM)) * factor
    assert found.status == "complete"
    slack = 1e-5 * np.abs(truth).max()
    assert found.nodes.min() >= truth[0] - slack
    assert found.nodes.max() <= truth[-1] + slack
    for end, value in ((found.smallest, truth[0]), (found.largest, truth[-1])):
        assert abs(end.value - value) <= end.residual_bound + slack


@pytest.mark.parametrize("power", [-900, -540, 540, 900])
def test_float64_has_the_same_care(power):
    factor = 2.0**power
    found = lanczos(operator(factor, torch.float64), torch.ones(2, 120), 8)
    reference = lanczos(operator(1.0, torch.float64), torch.ones(2, 120), 8)
    np.testing.assert_array_equal(found.alphas, reference.alphas * factor)
    np.testing.assert_array_equal(found.betas, reference.betas * factor)
    assert found.status == reference.status


@pytest.mark.parametrize("factor", [1e-30, 1e-22, 1.0, 1e22, 1e30])
def test_start_vectors_of_any_length(factor):
    start = torch.linspace(-1, 2, 240).view(2, 120)
    found = lanczos(operator(1.0), start * factor, 6)
    reference = lanczos(operator(1.0), start, 6)
    np.testing.assert_allclose(found.alphas, reference.alphas, rtol=2e-4, atol=1e-4)
    norms = (start.double() * factor).norm(dim=1)
    np.testing.assert_allclose(found.start_norms, norms, rtol=1e-5)


def test_runs_go_on_in_their_unit():
    factor = 2.0**-95
    long = lanczos(operator(factor), torch.ones(1, 120), 12)
    run = lanczos(operator(factor), torch.ones(1, 120), 5, keep_state=True)
    run = resume(operator(factor), run.state, 12)
    np.testing.assert_allclose(run.alphas, long.alphas, rtol=1e-3, atol=1e-3 * factor)
    assert run.status == ("complete",)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20, 1e30])
def test_breakdowns_are_found_at_every_scale(factor, mode):
    levels = torch.tensor([-1.0, 2.0, 5.0]).repeat_interleave(20) * factor
    start = torch.as_tensor(np.random.default_rng(0).standard_normal((2, 60)))
    found = lanczos(DiagonalOperator(levels), start, 9, reorthogonalize=mode)
    assert found.status == ("breakdown",) * 2
    assert found.steps.tolist() == [3, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_nonfinite_products_are_found_at_every_scale(factor, value):
    diagonal = torch.linspace(-1, 1, 40) * factor
    diagonal[3] = value
    with pytest.raises(NumericalError, match="NaN or inf, first at Lanczos step 1"):
        slq(DiagonalOperator(diagonal), num_probes=2, num_steps=4, exact=False)


def of_blocks(factor, exact):
    names = ("a[0]", "a[1]", "a[2]")
    matrices = {
        name: random_symmetric(SPECTRUM[index::3] * 4.0**index, seed=index) * factor
        for index, name in enumerate(names)
    }
    hessian = FakeHessian(matrices, torch.float32)
    return blockwise_slq(
        hessian,
        Partition((cut_of(names, 40),)),
        num_probes=3,
        num_steps=8,
        exact=exact,
        progress=False,
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("power", [-100, -64, 64, 100])
def test_blocks_and_scale_free_readings(power, exact):
    reference = of_blocks(1.0, exact)
    found = of_blocks(2.0**power, exact)
    for name in reference:
        nodes = reference[name].nodes * 2.0**power
        np.testing.assert_allclose(found[name].nodes, nodes, rtol=1e-9, atol=0)
        assert found[name].status == reference[name].status
    readings = ["curvature", "log", "wasserstein"]
    one = ht.js_heterogeneity(reference, readings=readings).every_reading
    other = ht.js_heterogeneity(found, readings=readings).every_reading
    for name in ("scale", *readings):
        assert other[name].mean == pytest.approx(one[name].mean, rel=1e-9)
        assert other[name].standard_error == pytest.approx(one[name].standard_error, rel=1e-6)


@pytest.mark.parametrize("level", [0.0, -3.0, 1e-25, 1e16, 1e25, -1e30])
@pytest.mark.parametrize("exact", [True, False])
def test_blocks_of_one_eigenvalue(level, exact):
    """c I has the one node c, and is no different from itself; so has a matrix that is zero."""
    identity = DiagonalOperator(torch.full((30,), level))
    found = slq(identity, num_probes=2, num_steps=50, exact=exact)
    np.testing.assert_allclose(found.nodes, np.float32(level), rtol=1e-6)
    assert found.rms.value == pytest.approx(abs(np.float32(level)), rel=1e-6)
    assert found.trace.value == pytest.approx(30 * np.float32(level), rel=1e-6)
    density = ht.spectral_density(found)
    assert density.grid_mass == pytest.approx(1, abs=1e-3)
    readings = ["unnormalised", "wasserstein", "curvature"]
    alike = ht.js_heterogeneity({"a": found, "b": found}, readings=readings)
    assert alike.readings["unnormalised"].mean == pytest.approx(0, abs=1e-9)
    assert alike.readings["wasserstein"].mean == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("num_probes", [1, 3])
@pytest.mark.parametrize("factor", [1e-25, 1.0, 1e25])
def test_one_step_has_both_of_its_moments(num_probes, factor):
    """u'A^2 u of each probe, from a single product: alpha^2 + beta^2."""
    signs = np.sign(np.random.default_rng(1).standard_normal(50))
    values = np.linspace(-1, 1, 50) * factor
    found = slq(
        DiagonalOperator(torch.as_tensor(values * signs).float()),
        num_probes=num_probes,
        num_steps=1,
        exact=False,
    )
    # Rademacher probes have no variance on a diagonal
    assert found.moment(2).value == pytest.approx(np.mean(values**2), rel=1e-6)
    assert found.rms.value == pytest.approx(np.sqrt(np.mean(values**2)), rel=1e-6)
    with pytest.raises(ValueError, match=r"power is 3; 1 Lanczos steps .* take 2 steps or more"):
        found.moment(3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_moments_to_twice_the_steps_against_the_dense_matrix(steps, mode):
    matrix = random_symmetric(SPECTRUM)
    found = slq(
        DenseOperator(torch.as_tensor(matrix)),
        num_probes=2,
        num_steps=steps,
        probes="gaussian",
        reorthogonalize=mode,
        name="b",
        exact=False,
    )
    probes = draw_probes("gaussian", 0, "b", 2, 120, dtype=torch.float64).numpy()
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    for p in range(2 * steps + 1):
        images = probes @ np.linalg.matrix_power(matrix, p)
        exact = (images * probes).sum(1).mean()
        assert found.moment(p).value == pytest.approx(exact, rel=1e-9)
    with pytest.raises(ValueError, match=f"power is {2 * steps + 1}"):
        found.moment(2 * steps + 1)


def test_an_invariant_subspace_has_every_moment():
    low_rank = DiagonalOperator(torch.tensor([4.0] + [0.0] * 63, dtype=torch.float64))
    found = slq(low_rank, num_probes=2, num_steps=5, exact=False)
    assert found.status == "breakdown"
    for p in (1, 2, 9, 40):
        assert found.moment(p).value == pytest.approx(4.0**p / 64, rel=1e-9)


@pytest.mark.parametrize("power", [-1, 1.5, True, "2"])
def test_powers_that_are_no_moment(power):
    found = slq(operator(1.0), num_probes=1, num_steps=3, exact=False)
    with pytest.raises(ValueError, match="an integer of at least 0"):
        found.moment(power)


def test_a_moment_beyond_float64_is_told():
    found = slq(operator(1e-30), num_probes=1, num_steps=8, exact=False)
    with pytest.raises(NumericalError, match="beyond float64"):
        found.moment(12)


def of_level(level, spread=0.0):
    values = level * torch.linspace(1 - spread, 1 + spread, 20, dtype=torch.float64)
    return slq(DiagonalOperator(values), num_probes=4, num_steps=9)


@pytest.mark.parametrize("level", [1e-25, 1.0, 1e25])
def test_blocks_that_are_alike_have_no_heterogeneity_at_any_scale(level):
    alike = {name: of_level(level, 0.5) for name in "ab"}
    assert ht.js_heterogeneity(alike).verdict.decision == "no heterogeneity found"


EXTREMES = {  # eigenvalues, their rms
    "one entry": [-2.0],
    "negative definite": np.linspace(-3, -1, 40),
    "huge condition": np.logspace(-15, 15, 40),
    "rank one": [7.0] + [0.0] * 39,
    "two levels": [-1.0] * 20 + [1.0] * 20,
    "zero": [0.0] * 40,
}


@pytest.mark.parametrize("num_probes", [1, 2])
@pytest.mark.parametrize("num_steps", [1, 2, 100])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes_have_their_closed_forms(kind, exact, num_steps, num_probes):
    """Rademacher probes know trace and Frobenius norm of a diagonal without error."""
    values = np.asarray(EXTREMES[kind])
    diagonal = DiagonalOperator(torch.as_tensor(values))
    found = slq(diagonal, num_probes=num_probes, num_steps=num_steps, exact=exact)
    scale = np.abs(values).max()
    assert found.trace.value == pytest.approx(values.sum(), rel=1e-9, abs=1e-9 * scale)
    assert found.frobenius.value == pytest.approx(np.linalg.norm(values), rel=1e-9)
    for end in (found.smallest, found.largest):
        distance = np.abs(values - end.value).min()
        assert distance <= end.residual_bound + 1e-9 * scale
    assert ht.spectral_density(found, grid="symlog").grid_mass == pytest.approx(1, abs=1e-3)
