"""The literature's cases, and quadratics shaped like measured networks."""

import numpy as np
import pytest
import torch

from hessian_tools import quadratic
from hessian_tools.quadratic.cases import shifted_and_scaled
from hessian_tools.spectra.quadrature import Quadrature


@pytest.mark.parametrize("kappa", [2000, 5000])
def test_cases_3_and_4_share_a_spectrum_and_differ_in_its_order(kappa):
    three = quadratic.case(3, kappa=kappa)
    four = quadratic.case(4, kappa=kappa)
    expected = [1, 2, 3, 99, 100, 101, kappa - 2, kappa - 1, kappa]
    for q in (three, four):
        values = torch.cat(q.eigenvalues, 1)[0].numpy()
        assert np.sort(values).tolist() == expected
    assert three.block_kappas.amax() == 3
    assert four.block_kappas.amax() == kappa - 2


def test_cases_1_and_2_keep_their_networks_order_of_heterogeneity():
    gpt2 = quadratic.case(1)
    resnet = quadratic.case(2)
    for q in (gpt2, resnet):
        assert float(q.kappa) == pytest.approx(5000)
        assert float(q.smallest) == pytest.approx(1)
    assert gpt2.block_kappas.amax() < 10
    assert resnet.block_kappas.amin() > 1000
    spreads = [q.heterogeneity().readings["wasserstein"].mean for q in (gpt2, resnet)]
    assert spreads[0] > 5 * spreads[1]


@pytest.mark.parametrize(("number", "log", "wasserstein"), [(3, 0.693, 2.03), (4, 0.081, 0.11)])
def test_heterogeneity_of_the_cases_is_the_verdicts_calibration(number, log, wasserstein):
    """The readings that the verdict rests on."""
    readings = quadratic.case(number).heterogeneity().readings
    assert readings["bounded"].mean == pytest.approx(np.log(2), rel=1e-6)
    assert readings["log"].mean == pytest.approx(log, abs=1e-3)
    assert readings["wasserstein"].mean == pytest.approx(wasserstein, abs=5e-3)


BLOCKS = [[-4.0, -3.0], [0.0, 8.0]]


def test_shifting_together_keeps_distances():
    low, high = shifted_and_scaled(BLOCKS, 100, "joint")
    assert low[0] == 1
    assert high[1] == 100
    assert np.diff(low)[0] / np.diff(high)[0] == pytest.approx(1 / 8)


def test_shifting_each_keeps_scales():
    blocks = shifted_and_scaled(BLOCKS, 100, "blocks")
    assert min(map(min, blocks)) == pytest.approx(1)
    assert max(map(max, blocks)) == pytest.approx(100)
    assert [high / low for low, high in blocks] == pytest.approx([100 / 8] * 2)


def test_what_no_shift_can_bring_to_kappa_is_refused():
    with pytest.raises(ValueError, match="from 1 to 8, more than kappa 7"):
        shifted_and_scaled(BLOCKS, 7, "blocks")
    with pytest.raises(ValueError, match="two different ones"):
        shifted_and_scaled([[2.0], [2.0]], 7, "joint")


def measured() -> Quadrature:
    """Two probes of three nodes each, most weight at zero."""
    nodes = np.array([[-1.0, 0.0, 5.0], [-2.0, 0.0, 4.0]])
    return Quadrature(
        nodes=nodes,
        weights=np.array([[0.1, 0.8, 0.1]] * 2),
        residuals=np.zeros_like(nodes),
        steps=np.array([3, 3]),
        size=99,
        num_matvecs=6,
        status="complete",
        probes="rademacher",
        reorthogonalize="full",
    )


def test_a_quadratic_from_measured_spectra():
    exact = quadratic.from_blocks([[1.0, 7.0]]).spectra()["block 1"]
    spectra = {"a": measured(), "b": exact}
    q = quadratic.from_spectra(spectra, per_block=20, kappa=50, seed=3)
    assert q.block_names == ("a", "b")
    assert q.block_sizes == (20, 2)
    assert float(q.kappa) == pytest.approx(50)
    values = q.by_block()["a"]
    above_lowest = (values - values[0]) / (values[-1] - values[0]) * 7
    assert set(np.round(above_lowest, 6)) <= {0.0, 1.0, 2.0, 6.0, 7.0}  # of -2, -1, 0, 4, 5


def test_draws_by_weight_are_mostly_the_bulk():
    q = quadratic.from_spectra({"a": measured()}, per_block=500, kappa=50, draw="weights")
    values = q.by_block()["a"]
    above_lowest = (values - values[0]) / (values[-1] - values[0]) * 7
    assert np.mean(np.abs(above_lowest - 2) < 1e-9) > 0.7
