"""Quadratures against exact moments and eigenvalues; blockwise runs on a stand-in for a Hessian."""

import numpy as np
import pytest
import torch
from problems.compared import same_quadrature
from problems.planted import FakeHessian, cut_of, random_symmetric

from hessian_tools.blocks.partition import Partition
from hessian_tools.curvature.symmetric import DenseOperator, DiagonalOperator
from hessian_tools.errors import NumericalError
from hessian_tools.spectra.gauss import ritz
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.slq import blockwise_slq, slq

SPECTRUM = np.random.default_rng(5).standard_normal(80) ** 3 + 0.3


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("mode", ["full", "local", "none"])
def test_moments_are_exact_to_degree_2m_minus_1(kind, mode):
    """v' A^p v / v'v for p <= 2m - 1, and not for 2m."""
    matrix, m = random_symmetric(SPECTRUM), 4
    found = slq(
        DenseOperator(matrix),
        num_probes=3,
        num_steps=m,
        seed=2,
        probes=kind,
        reorthogonalize=mode,
        name="b",
        exact=False,
    )
    probes = draw_probes(kind, 2, "b", 3, 80, dtype=torch.float64).numpy()
    for p in range(2 * m + 1):
        exact = np.einsum("ki,ij,kj->k", probes, np.linalg.matrix_power(matrix, p), probes) / (
            probes**2
        ).sum(axis=1)
        assert np.allclose(found.per_probe(lambda x, p=p: x**p), exact, rtol=1e-10) == (p < 2 * m)
    values = found.per_probe(lambda x: x**3)
    assert found.moment(3).value == pytest.approx(values.mean())
    assert found.moment(3).standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
    assert found.rms.value**2 == pytest.approx(found.moment(2).value)
    relative = found.moment(2).standard_error / found.moment(2).value
    for root in (found.rms, found.frobenius):
        assert root.standard_error / root.value == pytest.approx(relative / 2)
    assert (
        found.num_matvecs == 12
        and found.status == "complete"
        and (found.probes, found.reorthogonalize) == (kind, mode)
    )


def test_float32_moments():
    matrix = random_symmetric(SPECTRUM)
    found = slq(DenseOperator(matrix.astype(np.float32)), num_probes=3, num_steps=5, exact=False)
    double = slq(DenseOperator(matrix), num_probes=3, num_steps=5, exact=False)
    for p in range(10):
        assert found.moment(p).value == pytest.approx(double.moment(p).value, rel=1e-4)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_trace_and_frobenius_are_unbiased_and_their_errors_cover(kind):
    """|z| < 2 for most of 200 seeds (t, 9 degrees of freedom: 92 %); the mean over seeds within its
    own error."""
    operator = DenseOperator(random_symmetric(SPECTRUM))
    runs = [
        slq(operator, num_probes=10, num_steps=2, seed=seed, probes=kind, exact=False)
        for seed in range(200)
    ]
    truth = {
        "trace": SPECTRUM.sum(),
        "frobenius": np.linalg.norm(SPECTRUM),
        "rms": np.sqrt(np.mean(SPECTRUM**2)),
    }
    for name, value in truth.items():
        estimates = [getattr(run, name) for run in runs]
        z = np.array([(e.value - value) / e.standard_error for e in estimates])
        assert 0.85 <= (np.abs(z) < 2).mean() <= 1, name
    for power in (1, 2):
        values = np.array([run.moment(power).value for run in runs])
        assert abs(values.mean() - np.mean(SPECTRUM**power)) < 3 * values.std() / np.sqrt(200)


def test_extreme_ritz_values():
    matrix = random_symmetric(np.concatenate([[-5.0, 30.0], np.linspace(0, 1, 98)]))
    found = slq(DenseOperator(matrix), num_probes=3, num_steps=6, exact=False)
    for end, truth, pick in ((found.smallest, -5, np.min), (found.largest, 30, np.max)):
        assert abs(end.value - truth) <= end.residual_bound + 1e-10 and end.residual_bound < 0.1
        own = pick(found.nodes, axis=1)
        assert end.value == pick(own) and end.standard_error == pytest.approx(
            own.std(ddof=1) / np.sqrt(3)
        )


def test_small_operators_are_exact():
    matrix = random_symmetric(SPECTRUM)
    found = slq(DenseOperator(matrix), num_probes=4, num_steps=20)
    assert (
        found.status == "exact"
        and found.num_matvecs == 80
        and found.probes == "none"
        and found.num_probes == 1
    )
    assert np.allclose(found.nodes[0], np.sort(SPECTRUM), atol=1e-12) and np.all(
        found.weights == 1 / 80
    )
    assert found.trace.value == pytest.approx(SPECTRUM.sum()) and found.trace.standard_error == 0
    assert (
        found.frobenius.value == pytest.approx(np.linalg.norm(SPECTRUM))
        and found.largest.residual_bound == 0
    )
    assert found.asymmetry < 1e-14
    assert slq(DenseOperator(matrix), num_probes=4, num_steps=19).status == "complete"
    assert slq(DenseOperator(matrix), num_probes=1, num_steps=1, exact=True).status == "exact"


def test_exact_reports_asymmetry():
    class Skewed(DiagonalOperator):
        def _matmat(self, vectors):
            return vectors * self.diagonal + 0.1 * vectors.roll(1, dims=1)

    found = slq(Skewed(torch.ones(6, dtype=torch.float64)), num_probes=2, num_steps=3)
    matrix = np.eye(6) + 0.1 * np.roll(np.eye(6), 1, axis=1)
    assert found.asymmetry == pytest.approx(
        np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix)
    )
    assert np.allclose(found.nodes[0], np.linalg.eigvalsh((matrix + matrix.T) / 2))


@pytest.mark.parametrize(
    ("eigenvalues", "nodes"),
    [(np.zeros(50), [0]), (np.ones(50), [1]), (np.r_[7.0, np.zeros(49)], [0, 7])],
)
def test_breakdown_leaves_no_spurious_node(eigenvalues, nodes):
    found = slq(
        DenseOperator(random_symmetric(eigenvalues)), num_probes=2, num_steps=6, exact=False
    )
    assert (
        found.status == "breakdown"
        and (found.steps == len(nodes)).all()
        and found.num_matvecs == 12
    )
    assert np.abs(found.nodes[:, :, None] - nodes).min(axis=2).max() < 1e-12
    assert (found.weights[:, len(nodes) :] == 0).all() and found.residuals.max() < 1e-12
    assert found.pooled[0].size == 2 * len(nodes) and found.pooled[1].sum() == pytest.approx(1)
    assert found.frobenius.value == pytest.approx(
        np.linalg.norm(eigenvalues), abs=0.6 * np.linalg.norm(eigenvalues)
    )
    assert np.isfinite(found.frobenius.standard_error)


def test_probes_of_different_length_do_not_mix():
    """A probe inside an invariant subspace and one outside: each keeps its own nodes."""
    alphas, betas = (
        np.array([[2.0, 0, 0], [1.0, 2.0, 3.0]]),
        np.array([[1e-17, 0, 0], [0.5, 0.25, 0.1]]),
    )
    nodes, weights, residuals = ritz(alphas, betas, np.array([1, 3]))
    assert (
        nodes[0].tolist() == [2, 2, 2]
        and weights[0].tolist() == [1, 0, 0]
        and residuals[0].tolist() == [1e-17] * 3
    )
    t = np.diag(alphas[1]) + np.diag(betas[1, :2], 1) + np.diag(betas[1, :2], -1)
    values, vectors = np.linalg.eigh(t)
    assert np.allclose(nodes[1], values) and np.allclose(weights[1], vectors[0] ** 2)
    assert np.allclose(residuals[1], 0.1 * np.abs(vectors[2]))


def test_one_probe_has_no_standard_error():
    found = slq(DenseOperator(random_symmetric(SPECTRUM)), num_probes=1, num_steps=5)
    assert np.isnan(found.trace.standard_error) and np.isnan(found.largest.standard_error)


def test_without_probe():
    found = slq(DenseOperator(random_symmetric(SPECTRUM)), num_probes=3, num_steps=5)
    rest = found.without_probe(1)
    assert np.array_equal(rest.nodes, found.nodes[[0, 2]]) and np.array_equal(
        rest.steps, found.steps[[0, 2]]
    )
    exact = slq(DenseOperator(random_symmetric(SPECTRUM)), num_probes=1, num_steps=1, exact=True)
    assert exact.without_probe(0) is exact


@pytest.mark.parametrize(
    "change",
    [{"num_probes": 0}, {"num_steps": 2.5}, {"seed": "a"}, {"probes": "sphere"}, {"exact": "maybe"},
     {"num_probes": True}, {"reorthogonalize": "never"}],
)  # fmt: skip
def test_bad_arguments_are_named(change):
    (name,) = change
    with pytest.raises(ValueError, match=rf"{name} is {change[name]!r}; (it must be|allowed are)"):
        slq(DiagonalOperator(torch.ones(4)), **{"num_probes": 2, "num_steps": 2, **change})


# ---- blockwise: a stand-in for the engine, dense blocks instead of networks


def setting(**options):
    rng = np.random.default_rng(0)
    small = cut_of(["s0", "s1", "s2"], 6)
    large = cut_of(["l0", "l1", "l2", "l3", "l4"], 50)
    matrices = {
        n: random_symmetric(rng.standard_normal(cut.block_size), i)
        for cut in (small, large)
        for i, n in enumerate(cut.names)
    }
    return FakeHessian(matrices, **options), Partition((small, large)), [*small.names, *large.names]


def run(hessian, partition, **options):
    return blockwise_slq(
        hessian, partition, **{"num_probes": 2, "num_steps": 8, "progress": False, **options}
    )


def test_blocks_together_equal_each_alone():
    hessian, partition, order = setting()
    seen = []
    spectra = run(hessian, partition, seed=7, on_block=lambda name, q: seen.append(name))
    assert (
        list(spectra) == list(spectra.names) == order
        and sorted(seen) == sorted(order)
        and len(spectra) == 8
    )
    assert [len(set(names)) for names, _ in hessian.calls] == [3] * 1 + [
        5
    ] * 8  # 6 unit vectors at once, then 8 steps
    for name in order:
        alone = slq(
            DenseOperator(hessian.matrices[name]), num_probes=2, num_steps=8, seed=7, name=name
        )
        assert same_quadrature(alone, spectra[name]) and alone.status == spectra[name].status
        assert spectra[name].status == ("exact" if name[0] == "s" else "complete")
    assert spectra.num_matvecs == 3 * 6 + 5 * 16 == sum(rows for _, rows in hessian.calls)
    assert (spectra.num_probes, spectra.num_steps, spectra.seed, spectra.route, spectra.notes) == (
        2,
        8,
        7,
        "dense blocks",
        (),
    )


def test_a_list_of_blocks_and_more_probes_keep_the_probes():
    hessian, partition, _ = setting()
    chosen = [block for block in partition if block.name in ("l3", "l1")]
    assert run(hessian, chosen).names == ("l1", "l3")
    whole = run(hessian, partition)
    assert same_quadrature(run(hessian, chosen)["l3"], whole["l3"])
    more = run(hessian, chosen, num_probes=3, exact=False)["l3"]
    assert np.allclose(more.nodes[:2], whole["l3"].nodes)


def test_dtypes_see_the_same_probes():
    double, single = setting()[0], setting(dtype=torch.float32)[0]
    partition = setting()[1]
    for probes in ("rademacher", "gaussian"):
        a, b = (
            run(double, partition, probes=probes, exact=False),
            run(single, partition, probes=probes, exact=False),
        )
        assert all(
            abs(a[name].trace.value - b[name].trace.value) < 1e-4 for name in a if name[0] == "l"
        )


def test_memory_budget_cuts_blocks_then_probes_then_orthogonality():
    """A row takes 8 Lanczos and 5 work vectors of 50 float64."""
    row = (8 + 5) * 50 * 8
    reference_hessian, partition, _ = setting()
    large = Partition(partition.cuts[1:])
    reference = run(reference_hessian, large, exact=False)
    for budget, blocks, rows in ((4 * row, 2, 4), (2 * row, 1, 2), (row, 1, 1)):
        hessian, _, _ = setting(krylov_bytes=budget)
        found = run(hessian, large, exact=False)
        assert (
            max(len(names) for names, _ in hessian.calls) == blocks
            and max(n for _, n in hessian.calls) == rows
        )
        assert (
            all(same_quadrature(found[name], reference[name]) for name in found)
            and found.notes == ()
        )
        assert found.num_matvecs == 5 * 16
    hessian, _, _ = setting(krylov_bytes=row - 1)
    with pytest.warns(
        RuntimeWarning, match="l0 and 4 like it: the Lanczos basis .* does not fit .*='local'"
    ):
        found = run(hessian, large, exact=False)
    assert {q.reorthogonalize for q in found.values()} == {"local"} and len(found.notes) == 5
    assert all(
        same_quadrature(found[name], reference[name], 1e-8) for name in found
    )  # eight steps lose no orthogonality yet


def test_finished_blocks_are_not_computed_again():
    hessian, partition, order = setting()
    whole = run(hessian, partition)
    finished = {name: whole[name] for name in ("l1", "l3", "s1")}
    again, _, _ = setting()
    seen = []
    resumed = run(again, partition, finished=finished, on_block=lambda name, _: seen.append(name))
    assert resumed.names == tuple(order) and all(
        resumed[name] is finished[name] for name in finished
    )
    assert all(same_quadrature(resumed[name], whole[name]) for name in order)
    touched = {name for names, _ in again.calls for name in names}
    assert touched == set(order) - set(finished) == set(seen)
    assert resumed.num_matvecs == whole.num_matvecs


def test_nonfinite_products_name_block_and_step():
    """The others of its batch are delivered first."""
    hessian, partition, order = setting(poison="l2")
    delivered = []
    with pytest.raises(
        NumericalError, match="block l2 is NaN or inf, first at Lanczos step 3 of 8"
    ):
        run(hessian, partition, on_block=lambda name, _: delivered.append(name))
    assert set(delivered) == set(order) - {"l2"}


def test_nonfinite_products_of_exact_blocks_name_the_unit_vector(monkeypatch):
    monkeypatch.setattr(
        "hessian_tools.spectra.exact._ROWS", 6
    )  # two unit vectors a block at once: the third call has 4 and 5
    hessian, partition, _ = setting(poison="s1")
    delivered = []
    with pytest.raises(
        NumericalError, match="block s1 is NaN or inf, first for unit vector 5 of 6"
    ):
        run(hessian, partition, on_block=lambda name, _: delivered.append(name))
    assert set(delivered) == {"s0", "s2"}


def test_slq_names_the_step():
    class Broken(DiagonalOperator):
        def _matmat(self, vectors):
            return vectors * self.diagonal

    with pytest.raises(
        NumericalError, match="the operator is NaN or inf, first at Lanczos step 1 of 3"
    ):
        slq(Broken(torch.full((40,), float("inf"))), num_probes=2, num_steps=3)


def test_asymmetric_blocks_are_noted():
    hessian, partition, _ = setting()
    hessian.matrices["s1"] = np.triu(hessian.matrices["s1"])
    spectra = run(hessian, partition)
    assert len(spectra.notes) == 1 and spectra.notes[0].startswith("s1: dense block asymmetric")


def test_partition_errors():
    hessian, partition, _ = setting()
    blocks = list(partition)
    with pytest.raises(ValueError, match="names 's0' twice"):
        run(hessian, [blocks[0], blocks[0]])
    with pytest.raises(ValueError, match="holds no block"):
        run(hessian, [])
    with pytest.raises(TypeError, match="partition is 'semantic'; pass"):
        run(hessian, "semantic")
    with pytest.raises(TypeError, match="Problem"):
        run(object(), partition)


def test_blocks_are_exact_up_to_a_size():
    operator = DiagonalOperator(torch.linspace(1, 2, 60, dtype=torch.float64))
    for exact, status in ((59, "complete"), (60, "exact"), (1000, "exact")):
        assert slq(operator, num_probes=2, num_steps=5, exact=exact).status == status
    with pytest.raises(ValueError, match="exact is 0; it must be an integer of at least 1"):
        slq(operator, num_probes=2, num_steps=5, exact=0)
    with pytest.raises(ValueError, match="exact is 'never'; allowed are 'auto', True, False"):
        slq(operator, num_probes=2, num_steps=5, exact="never")
