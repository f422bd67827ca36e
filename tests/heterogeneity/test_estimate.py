"""What probes and steps leave uncertain, against the law of the probes drawn, and against truth.

The short form of experiments/coverage.py.
"""

import numpy as np
import pytest
import torch
from problems.planted import exact, quadrature

import hessian_tools as ht
from hessian_tools.curvature.symmetric import DiagonalOperator
from hessian_tools.heterogeneity.comparison import compared
from hessian_tools.heterogeneity.estimate import Z, probe_variance, quantile, with_fewer_steps
from hessian_tools.heterogeneity.measure import GridSettings, Workspace
from hessian_tools.heterogeneity.readings import READINGS
from hessian_tools.spectra.gauss import ritz
from hessian_tools.spectra.lanczos import lanczos
from hessian_tools.spectra.quadrature import Quadrature

SEEDS = 120


def network_like(scale, seed, size=300):
    rng = np.random.default_rng(seed)
    bulk = 1e-4 * 10 ** rng.normal(0, 0.7, size - 20) * rng.choice([1, -0.3], size - 20)
    return scale * np.append(bulk, 10 ** rng.uniform(-1.5, 0, 20))


FAMILIES = {
    "scaled": [network_like(scale, seed) for seed, scale in enumerate((1.0, 0.3, 0.05, 0.002))],
    "identical": [network_like(1.0, 0)] * 4,
}


def drawn(eigenvalues, probes, steps, seed):
    """Quadratures of one block, a run after the other, from Gaussian probes."""
    rng = np.random.default_rng(seed)
    start = torch.from_numpy(rng.standard_normal((SEEDS * probes, len(eigenvalues))))
    run = lanczos(DiagonalOperator(torch.from_numpy(eigenvalues)), start, steps)
    tables = [*ritz(run.alphas, run.betas, run.steps), run.steps]
    for first in range(0, SEEDS * probes, probes):
        rows = [table[first : first + probes] for table in tables]
        size = len(eigenvalues)
        yield Quadrature(*rows, size, probes * steps, "complete", "gaussian", "full")


@pytest.mark.parametrize("probes", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_intervals_cover(family, probes):
    blocks = FAMILIES[family]
    truth = [exact(values) for values in blocks]
    columns = [drawn(values, probes, 6, seed) for seed, values in enumerate(blocks)]
    covered = {"scale": [], "curvature": []}
    for run in zip(*columns, strict=True):
        found, workspace = compared(run, list(covered), GridSettings())
        for name, hits in covered.items():
            true = READINGS[name].sample(Workspace(truth, GridSettings(), workspace.axis)).mean
            if found[name].is_resolved:
                hits.append(found[name].low - 1e-9 <= true <= found[name].high + 1e-9)
    for hits in covered.values():
        assert len(hits) > 0.9 * SEEDS
        assert np.mean(hits) > 0.9  # of 120 at 95 %, less than 0.9 comes once in 100


def test_the_law_of_a_gaussian_probe():
    """Variance of u'f(A)u over 4000 probes, f = log, against that from one mean spectrum."""
    eigenvalues = np.geomspace(1e-3, 10, 40)
    probes = np.random.default_rng(0).standard_normal((4000, 40)) ** 2
    weights = probes / probes.sum(axis=1, keepdims=True)
    values = np.log(eigenvalues)
    truth = quadrature(eigenvalues)
    truth = Quadrature(*vars(truth).values())
    once = quadrature(eigenvalues, weights[:1])
    for block, within in ((truth, 0.06), (once, 0.6)):
        sized = Quadrature(**{**vars(block), "size": 40})
        mean = sized.pooled[1] @ values
        variance, freedom = probe_variance(sized, values - mean)
        assert variance == pytest.approx((weights @ values).var(), rel=within)
        assert freedom > 10


def test_an_exact_block_has_no_error_and_unlimited_freedom():
    assert probe_variance(exact([1.0, 2.0]), np.array([-1.0, 1.0])) == (0.0, np.inf)
    assert quantile(np.zeros(2), np.full(2, np.inf)) == Z
    assert quantile(np.ones(2), np.full(2, np.inf)) == Z
    assert quantile(np.array([1.0]), np.array([2.0])) == pytest.approx(2.776, abs=1e-3)


def test_fewer_steps_are_two_thirds_and_half():
    block = quadrature(np.sort(np.random.default_rng(0).random((2, 6)), axis=1))
    shorter = with_fewer_steps([block, exact([1.0])])
    assert [blocks[0].nodes.shape[1] for blocks in shorter] == [4, 3]
    assert all(blocks[1].status == "exact" for blocks in shorter)
    assert with_fewer_steps([quadrature([[1.0]])]) == []


def test_the_floor_of_the_literature_is_what_identical_blocks_read():
    operator = DiagonalOperator(torch.from_numpy(np.linspace(0, 1, 800) ** 2))
    options = {"num_probes": 4, "num_steps": 20, "probes": "gaussian", "exact": False}
    blocks = {name: ht.slq(operator, name=name, **options) for name in "abcd"}
    js = ht.js_heterogeneity(blocks, readings=["unnormalised", "curvature"])
    reading = js.readings["unnormalised"]
    assert reading.mean > 50 and reading.floor == pytest.approx(reading.mean, rel=0.35)
    assert js.told("unnormalised").endswith(f"(floor {reading.floor:.2g})")
    assert js.verdict.decision == "no heterogeneity found"
