"""Masses inside blocks against the dense Hessian: exactly, within stated errors over seeds, and the
null model."""

import dataclasses

import numpy as np
import pytest
import torch
from problems import dense_hessian, network
from problems.planted import planted
from scipy.stats import t

import hessian_tools as ht
from hessian_tools.structure.cuttings import ELEMENTS, WHOLE, cutting, judged_regions
from hessian_tools.structure.judgement import Levels, judge
from hessian_tools.structure.mass import Draws, Pilots, _jackknife
from hessian_tools.structure.pairs import Pairs
from hessian_tools.structure.probing import cost, measure


def masses(problem, claim="rows", exact=False, seed=0, **counts):
    blocks = ht.partition(problem.model, {"*": claim})
    judged = next(judged_regions(problem.model, blocks))
    told = []
    counts = {"num_probes": 8, "num_blocks": 16} | counts
    mass = measure(
        ht.HessianOperator(problem),
        judged.block,
        judged.cuttings,
        seed=seed,
        exact=exact,
        on_products=told.append,
        **counts,
    )
    assert sum(told) == mass.num_matvecs and (
        exact or mass.num_matvecs <= cost(judged.cuttings, **counts)
    )
    return mass


def by_hand(matrix, rows, columns):
    """Shares of rows, columns and the diagonal, and of rows two by two."""
    squares = (matrix**2).reshape(rows, columns, rows, columns)
    total = squares.sum()
    pairs = squares.reshape(rows // 2, 2, columns, rows // 2, 2, columns)
    found = {
        "rows": np.einsum("iaib->", squares),
        "columns": np.einsum("iaja->", squares),
        ELEMENTS: np.einsum("iaia->", squares),
        f"rows, in {rows // 2} groups": np.einsum("iuaivb->", pairs),
    }
    return {name: value / total for name, value in found.items()}


@pytest.fixture(scope="module")
def uneven():
    """12 rows, 6 columns; structure along rows, along columns, and rows of very different scale."""
    return planted((12, 6), "rows", noise=1.0, scales=torch.linspace(0.3, 2, 12))


def test_exact_shares_are_those_of_the_dense_matrix(uneven):
    matrix = dense_hessian(uneven).numpy()
    mass = masses(uneven, exact=True)
    for name, share in by_hand(matrix, 12, 6).items():
        assert mass.share(name).value == pytest.approx(share, rel=1e-10)
    within = by_hand(matrix, 12, 6)
    assert mass.share(ELEMENTS, "rows").value == pytest.approx(
        within[ELEMENTS] / within["rows"], rel=1e-10
    )
    assert mass.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-10) and mass.asymmetry < 1e-12
    assert mass.share("rows").standard_error == 0 and mass.num_matvecs == 72
    column = (matrix**2).sum(0)
    rows = column.reshape(12, 6).sum(1) / column.sum()
    alone = ((column / column.sum()) ** 2).sum()
    diagonal = within[ELEMENTS]
    expected = diagonal + (1 - diagonal) * ((rows**2).sum() - alone) / (1 - alone)
    assert mass.expected("rows") == pytest.approx(expected, rel=1e-10)
    assert mass.excess("rows").value == pytest.approx(
        (within["rows"] - expected) / (1 - expected), rel=1e-10
    )


@pytest.mark.parametrize("num_blocks", [8, 32], ids=["drawn", "all blocks"])
def test_estimates_lie_within_their_errors(uneven, num_blocks):
    exact = masses(uneven, exact=True)
    runs = [masses(uneven, seed=seed, num_blocks=num_blocks) for seed in range(60)]
    questions = [
        ("rows", WHOLE),
        ("columns", WHOLE),
        (ELEMENTS, WHOLE),
        (ELEMENTS, "rows"),
        ("rows, in 6 groups", WHOLE),
    ]
    for finer, coarser in questions:
        truth = exact.share(finer, coarser).value
        found = [run.share(finer, coarser) for run in runs]
        values, errors = (
            np.array([getattr(f, key) for f in found]) for key in ("value", "standard_error")
        )
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values)) + 0.01 * truth
        assert errors.mean() == pytest.approx(values.std(), rel=0.5)
        covered = np.mean(np.abs(values - truth) < 2.5 * errors)
        assert covered > 0.8, (finer, coarser, covered)
    expected = [run.expected("rows") for run in runs]
    assert np.mean(expected) == pytest.approx(exact.expected("rows"), rel=0.05)


def test_without_structure_nothing_exceeds_the_expected_whatever_the_scales():
    """A rank-one Hessian with rows of very different mass: shares are large, excess and contrast
    are not."""
    torch.manual_seed(0)
    vector = (
        torch.randn(20, 10, dtype=torch.float64)
        * torch.logspace(0, -1.5, 20, dtype=torch.float64)[:, None]
    )
    problem = planted((20, 10), torch.outer(vector.flatten(), vector.flatten()))
    exact = masses(problem, exact=True)
    assert exact.share("rows").value > 0.15 and abs(exact.excess("rows").value) < 0.01
    assert 0.8 < exact.contrast("rows") < 1.2
    found = masses(problem)
    assert found.expected("rows") == pytest.approx(exact.expected("rows"), rel=0.1)
    assert found.share("rows").value == pytest.approx(
        exact.share("rows").value, abs=4 * found.share("rows").standard_error
    )


def test_contrast_is_the_ratio_of_mean_squares():
    """Rows of equal mass, entries inside three times those outside: contrast 9, whatever the
    diagonal."""
    blocks = torch.eye(10, dtype=torch.float64).repeat_interleave(8, 0).repeat_interleave(8, 1)
    signs = torch.randn(80, 80, dtype=torch.float64).sign().triu(1)
    matrix = (1 + 2 * blocks) * (signs + signs.T) + 5 * torch.eye(80, dtype=torch.float64)
    mass = masses(planted((10, 8), matrix), exact=True)
    assert mass.contrast("rows") == pytest.approx(9, rel=0.02)
    at = [mass.above("rows", WHOLE, level, 0.5).value for level in (8.5, 9.5)]
    assert at[0] > 0 > at[1]


def test_statements_are_t_tests_with_the_freedom_of_their_errors(uneven):
    mass = masses(uneven, num_probes=4, num_blocks=6)
    gap = mass.above("rows", WHOLE, 4.0, 0.5)
    tests = {test.words: test for test in judge(mass, "rows", Levels()).tests}
    test = tests["rows split the tensor"]
    deviations = gap.value / gap.standard_error
    assert 3 <= gap.freedom < 9 and abs(deviations) > 0.5
    assert test.p_true == pytest.approx(t.sf(deviations, gap.freedom), rel=1e-6)
    assert test.p_false == pytest.approx(t.cdf(deviations, gap.freedom), rel=1e-6)


def test_a_seed_gives_the_same_and_another_gives_others(uneven):
    same, again, other = (masses(uneven, seed=seed).share("rows").value for seed in (1, 1, 2))
    assert same == again != other


def test_blocks_without_mass_are_never_drawn():
    matrix = torch.zeros(200, 200, dtype=torch.float64)
    matrix[:40, :40] = torch.randn(40, 40, dtype=torch.float64)
    mass = masses(planted((50, 4), matrix + matrix.T), num_blocks=12)
    assert (
        np.isfinite(mass.draws["rows"].masses[:, :1]).all()
        and (mass.draws["rows"].masses[:, 0] > 0).all()
    )


def test_a_float32_network_is_measured_as_its_float64_matrix_says():
    problem = network("gpt", torch.float32)
    blocks = ht.partition(problem.model, {"blocks.0.fc.weight": "rows"})
    judged = next(judged_regions(problem.model, blocks))
    counts = {"num_probes": 8, "num_blocks": 64, "seed": 0, "on_products": lambda count: None}
    mass = measure(
        ht.HessianOperator(problem), judged.block, judged.cuttings, exact=False, **counts
    )
    dense = ht.dense_block(problem, [judged.block]).matrix
    truth = by_hand(dense, 32, 8)
    for name in ("rows", "columns", ELEMENTS):
        found = mass.share(name)
        assert found.value == pytest.approx(truth[name], abs=4 * found.standard_error)


def test_left_out_rows_are_stood_for_by_their_stratum():
    draws = Draws(np.array([[1.0], [3.0], [10.0], [14.0]]), np.array([0, 0, 1, 1]))
    assert draws.total() == 28
    assert [draws.total(row)[0] for row in range(4)] == [30, 26, 32, 24]


def test_the_jackknife_of_a_mean_is_its_variance():
    stream = np.random.default_rng(0)
    values, strata = stream.standard_normal(12), np.repeat([0, 1], [8, 4])
    groups = [values[strata == stratum] for stratum in (0, 1)]
    means = np.array([np.delete(g, i).mean() for g in groups for i in range(len(g))])
    variance, freedom = _jackknife(means, strata)
    assert variance == pytest.approx(sum(g.var(ddof=1) / len(g) for g in groups))
    assert freedom == 7 + 3


def test_pairs_of_pilots_are_unbiased_for_squares():
    stream = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        mass = stream.exponential(size=3)
        found.append(
            Pilots(mass, np.outer(mass, mass), {})._mean_over_pairs(np.outer(mass, mass), None)
        )
    assert np.mean(found) == pytest.approx(1.0, abs=0.1)


def test_jackknife_of_means_is_their_squared_standard_error():
    """The sum of the means of two strata: s^2 / n of each, on n - 1 degrees of freedom."""
    strata = np.repeat([0, 1], [5, 8])
    values = np.random.default_rng(0).exponential(size=13)
    means = [values[strata == stratum].mean() for stratum in (0, 1)]
    replicates = []
    for row, stratum in enumerate(strata):
        left = (strata == stratum) & (np.arange(13) != row)
        replicates.append(values[left].mean() + means[1 - stratum])
    variance, freedom = _jackknife(np.array(replicates), strata)
    parts = [values[strata == stratum] for stratum in (0, 1)]
    assert variance == pytest.approx(sum(part.var(ddof=1) / len(part) for part in parts))
    assert freedom == 4 + 7


def test_entries_in_no_block_are_one_block():
    problem = planted((6, 4), "rows")
    blocks = ht.partition(problem.model, {"top": ("layer.weight", (slice(0, 2),))})
    (tensor,) = ht.partition(problem.model, "tensor")
    found = cutting("x", blocks.cuts, tensor)
    assert found.num_blocks == 2 and found.labels.tolist() == [1] * 8 + [0] * 16
    assert cutting("x", [], tensor) is None


def test_couplings_that_one_pair_alone_has_mass_for_say_nothing():
    """Without that pair there is none to divide by, so the jackknife has no error to tell."""
    mass = masses(planted((12, 6), "rows", noise=1.0))
    lonely = Pairs(np.ones(4), np.array([1.0, 0.0, 0.0, 0.0]), np.ones(4))
    spoiled = dataclasses.replace(mass, pairs={"rows": lonely})
    assert np.isnan(spoiled.coupling("rows").value)
    assert judge(spoiled, "rows", Levels()).verdict == "undecided"


@pytest.mark.parametrize(
    ("between", "within", "verdict"),
    [
        ([0.3, 0.3, 0.3, 0.3], [1, 1, 1, 1], "too fine"),
        ([100, 0.1, 0.1, 0.1], [1, 1, 1, 1], "follows"),  # one pair makes the mean
        ([0.3, 0.3, 0.3, 0.3], [1, 1, 1, 100], "follows"),  # most are close, but not on average
    ],
)
def test_blocks_are_coupled_on_average_and_most_of_them(between, within, verdict):
    mass = masses(planted((12, 6), "rows", noise=0.4), exact=True)
    pairs = Pairs(np.array(between, float), np.array(within, float), np.ones(4))
    changed = dataclasses.replace(mass, pairs={"rows": pairs})
    assert judge(changed, "rows", Levels()).verdict == verdict
