"""Lanczos and probes against prescribed spectra, scipy, and the identities of the process."""

import contextlib

import numpy as np
import pytest
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch.utils._python_dispatch import TorchDispatchMode

from hessian_tools.curvature.engine.memory import measuring
from hessian_tools.curvature.symmetric import DenseOperator, DiagonalOperator
from hessian_tools.spectra.gauss import ritz
from hessian_tools.spectra.lanczos import lanczos, resume
from hessian_tools.spectra.probes import draw_probes

DTYPES = (torch.float64, torch.float32)


def prescribed(eigenvalues, dtype=torch.float64, seed=0):
    """(operator, matrix, eigenvectors) with these eigenvalues and Haar eigenvectors."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((len(eigenvalues), len(eigenvalues))))[0]
    matrix = (vectors * np.asarray(eigenvalues, float)) @ vectors.T
    matrix = torch.as_tensor((matrix + matrix.T) / 2, dtype=dtype)
    return DenseOperator(matrix), matrix.double().numpy(), vectors


def starts(k, n, seed=0):
    return torch.as_tensor(np.random.default_rng(100 + seed).standard_normal((k, n)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["full", "local", "none"])
def test_recurrence_and_orthogonality(dtype, mode):
    operator, matrix, _ = prescribed(np.linspace(-1, 3, 40) ** 3, dtype)
    k, m = 3, 12
    result = lanczos(operator, starts(k, 40), m, reorthogonalize=mode, keep_basis=True)
    eps = torch.finfo(dtype).eps
    assert (
        result.status == ("complete",) * k
        and (result.steps == m).all()
        and result.num_matvecs == k * m
    )
    for i in range(k):
        q = result.basis[i].double().numpy()
        t = (
            np.diag(result.alphas[i])
            + np.diag(result.betas[i, :-1], 1)
            + np.diag(result.betas[i, :-1], -1)
        )
        rest = q @ matrix - t @ q
        assert np.abs(rest[:-1]).max() < 200 * eps * 27
        assert np.linalg.norm(rest[-1]) == pytest.approx(result.betas[i, -1], rel=1e4 * eps)
        if mode == "full":
            assert np.abs(q @ q.T - np.eye(m)).max() < 50 * eps
            assert np.abs(q @ rest[-1]).max() < 200 * eps * 27


def test_only_full_keeps_orthogonality_past_convergence():
    operator, _, _ = prescribed(np.concatenate([[100.0, 50.0], np.linspace(0, 1, 198)]))
    lost, top = {}, {}
    for mode in ("full", "local", "none"):
        result = lanczos(operator, starts(1, 200), 60, reorthogonalize=mode, keep_basis=True)
        q = result.basis[0].numpy()
        lost[mode] = np.abs(q @ q.T - np.eye(60)).max()
        top[mode] = int(
            (np.abs(ritz(result.alphas, result.betas, result.steps)[0] - 100) < 1e-6).sum()
        )
    assert lost["full"] < 1e-13 and lost["local"] > 1e-3 and lost["none"] > 1e-3
    assert top["full"] == 1 and top["local"] > 1 and top["none"] > 1


def test_local_keeps_neighbours_orthogonal_where_the_recurrence_cancels():
    """A large shift makes A q - alpha q lose digits; what is left along the last two vectors
    must go."""
    operator = DiagonalOperator(1e6 + torch.linspace(0, 1, 100, dtype=torch.float64))
    overlap = {}
    for mode in ("local", "none"):
        result = lanczos(operator, starts(1, 100), 8, reorthogonalize=mode, keep_basis=True)
        gram = np.abs((result.basis[0] @ result.basis[0].T).numpy())
        overlap[mode] = [np.diag(gram, 1).max(), np.diag(gram, 2).max()]
    assert max(overlap["local"]) < 1e-15 and min(overlap["none"]) > 1e-12


def test_a_second_pass_where_the_first_took_nearly_everything():
    """Products symmetric to 10 % only: step 10 leaves 2e-8 of a residual that lies in the old
    vectors' span."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.diag(
        torch.cat([torch.arange(1.0, 11), torch.linspace(1e-12, 1e-11, 50)])
    ).double()
    matrix[:10, :10] += 0.1 * torch.randn(10, 10, generator=generator, dtype=torch.float64)
    matrix[:10, 10:] = 1e-12 * torch.randn(10, 50, generator=generator, dtype=torch.float64)
    matrix[10:, :10] = matrix[:10, 10:].T

    class Lopsided:
        dtype, device, steady = torch.float64, torch.device("cpu"), contextlib.nullcontext

        def matmat(self, vectors):
            return vectors @ matrix.T

    start = torch.zeros(1, 60, dtype=torch.float64)
    start[:, :10] = torch.randn(1, 10, generator=generator, dtype=torch.float64)
    basis = lanczos(Lopsided(), start, 20, keep_basis=True).basis[0]
    # with one pass 7e-5
    assert (basis @ basis.T - torch.eye(20)).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_steps_give_all_eigenvalues(dtype):
    eigenvalues = np.array([-7.0, -1.0, 0.0, 0.5, 2.0, 2.5, 9.0])
    operator, _, _ = prescribed(eigenvalues, dtype)
    result = lanczos(operator, starts(2, 7), 50)
    assert (
        result.alphas.shape == (2, 7)
        and result.status == ("breakdown",) * 2
        and (result.steps == 7).all()
    )
    nodes, weights, residuals = ritz(result.alphas, result.betas, result.steps)
    assert np.allclose(nodes, eigenvalues, atol=100 * torch.finfo(dtype).eps * 9)
    assert np.allclose(weights.sum(axis=1), 1, atol=1e-14) and residuals.max() < 1e-6


def test_ritz_values_against_scipy_and_residual_bounds_hold():
    eigenvalues = np.sort(np.random.default_rng(0).standard_normal(60) ** 3)
    operator, _, _ = prescribed(eigenvalues)
    result = lanczos(operator, starts(3, 60), 15)
    nodes, _, residuals = ritz(result.alphas, result.betas, result.steps)
    for i in range(3):
        assert np.allclose(
            nodes[i], eigvalsh_tridiagonal(result.alphas[i], result.betas[i, :-1]), atol=1e-12
        )
        distance = np.abs(nodes[i][:, None] - eigenvalues).min(axis=1)
        assert (distance <= residuals[i] + 1e-12).all() and residuals[i].max() > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["full", "local", "none"])
def test_resumed_equals_one_long_run(mode, dtype):
    """In three pieces, one of them empty; row 1 ends early, in the first piece or at its end."""
    operator = DiagonalOperator(torch.linspace(-2, 5, 40, dtype=dtype))
    for end in (3, 5):
        start = starts(3, 40)
        start[1] = 0
        start[1, 3 : 40 : 12 if end == 3 else 8] = 1.0
        start[1, 35:] = 0 if end == 3 else start[1, 35:]
        long = lanczos(operator, start, 20, reorthogonalize=mode, keep_basis=True)
        run = lanczos(operator, start, 5, reorthogonalize=mode, keep_basis=True, keep_state=True)
        first = run.state
        for total in (5, 12, 20):
            run = resume(operator, run.state, total, keep_state=True)
        assert (
            run.status == long.status == ("complete", "breakdown", "complete")
            and run.num_matvecs == 60
        )
        assert np.array_equal(run.steps, long.steps) and long.steps[1] == end
        tolerance = 1e-10 if dtype == torch.float64 else 1e-3
        for part in ("alphas", "betas", "start_norms"):
            assert np.allclose(
                getattr(run, part), getattr(long, part), rtol=tolerance, atol=100 * tolerance
            )
        assert run.basis.shape == (3, 20, 40) and torch.allclose(
            run.basis, long.basis, atol=1e3 * tolerance
        )
        again = resume(operator, first, 12)  # a state may be gone on from twice
        assert (
            np.allclose(again.alphas, long.alphas[:, :12], atol=100 * tolerance)
            and again.state is None
        )


def test_a_state_holds_two_vectors_and_the_basis_only_where_it_is_needed():
    operator, _, _ = prescribed(np.linspace(-2, 5, 40))
    sizes = {
        mode: lanczos(
            operator, starts(3, 40), 7, reorthogonalize=mode, keep_state=True
        ).state.nbytes
        for mode in ("full", "local", "none")
    }
    vector = 3 * 40 * 8
    assert sizes == {"full": 9 * vector, "local": 2 * vector, "none": 2 * vector}


@pytest.mark.parametrize("mode", ["full", "local", "none"])
def test_vectors_held_at_the_peak(mode):
    """Three that rotate and the operator's product besides the start, and the basis for "full"; no
    step adds any."""
    k, n, steps = 2, 1 << 15, 9
    operator, start = DiagonalOperator(torch.linspace(-1, 1, n)), torch.ones(k, n)
    with measuring(start.device) as live:
        result = lanczos(operator, start, steps, reorthogonalize=mode)
    vectors = 4 + steps * (mode == "full")
    assert result.steps.tolist() == [steps] * k
    assert (
        vectors * start.nbytes <= live.peak <= (vectors + 1.1) * start.nbytes
    )  # and one elementwise product


@pytest.mark.parametrize("mode", ["full", "local"])
def test_a_state_is_not_written_over_by_those_who_go_on_from_it(mode):
    operator = DiagonalOperator(torch.linspace(-1, 2, 40, dtype=torch.float64))
    state = lanczos(operator, starts(2, 40), 3, reorthogonalize=mode, keep_state=True).state
    first, second = (resume(operator, state, 9) for _ in range(2))
    np.testing.assert_array_equal(first.alphas, second.alphas)
    np.testing.assert_array_equal(first.betas, second.betas)


def test_resuming_spends_only_the_new_steps():
    operator = Counted(torch.linspace(-1, 1, 30, dtype=torch.float64))
    run = lanczos(operator, starts(2, 30), 4, keep_state=True)
    resume(operator, run.state, 9)
    assert operator.calls == 9


class Counted(DiagonalOperator):
    calls = 0

    def _matmat(self, vectors):
        self.calls += 1
        return vectors * self.diagonal


def test_bad_resumptions():
    operator = DiagonalOperator(torch.linspace(-1, 1, 30, dtype=torch.float64))
    run = lanczos(operator, starts(2, 30), 4, keep_state=True)
    assert lanczos(operator, starts(2, 30), 4).state is None
    with pytest.raises(ValueError, match="num_steps is 3, but 4 steps are made"):
        resume(operator, run.state, 3)
    with pytest.raises(
        ValueError,
        match=r"operator is torch.float32 on cpu, but the run's vectors are torch.float64",
    ):
        resume(DiagonalOperator(operator.diagonal.float()), run.state, 9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_equals_looped(dtype):
    operator, _, _ = prescribed(np.linspace(-2, 5, 30), dtype)
    start = starts(4, 30)
    together = lanczos(operator, start, 10)
    for i in range(4):
        alone = lanczos(operator, start[i : i + 1], 10)
        tolerance = 1e3 * torch.finfo(dtype).eps
        assert np.allclose(alone.alphas[0], together.alphas[i], atol=tolerance)
        assert np.allclose(alone.betas[0], together.betas[i], atol=tolerance)


BREAKDOWNS = {  # name: (eigenvalues, steps to an invariant subspace from a general start)
    "zero": (np.zeros(20), 1),
    "identity": (np.ones(200), 1),
    "tiny identity": (np.full(50, 1e-12), 1),
    "rank one": (np.array([1e6] + [0.0] * 99), 2),
    "three levels": (np.repeat([-1.0, 2.0, 5.0], 20), 3),
    "size one": (np.array([-3.0]), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["full", "local", "none"])
@pytest.mark.parametrize("case", BREAKDOWNS)
def test_breakdown(case, mode, dtype):
    eigenvalues, steps = BREAKDOWNS[case]
    operator, _, _ = prescribed(eigenvalues, dtype)
    result = lanczos(operator, starts(3, len(eigenvalues)), 9, reorthogonalize=mode)
    assert (
        result.status == ("breakdown",) * 3
        and (result.steps == steps).all()
        and result.first_nonfinite is None
    )
    assert (result.alphas[:, steps:] == 0).all() and (result.betas[:, steps:] == 0).all()
    nodes, weights, _ = ritz(result.alphas, result.betas, result.steps)
    levels = np.unique(eigenvalues)
    assert (
        np.abs(nodes[:, :, None] - levels).min(axis=2).max()
        <= 1e3 * torch.finfo(dtype).eps * np.abs(levels).max()
    )
    assert (weights[:, steps:] == 0).all() and np.allclose(weights.sum(axis=1), 1, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["full", "local", "none"])
def test_breakdown_where_every_alpha_is_zero(mode, dtype):
    """[[0, B], [B', 0]] from a vector in the upper half: the scale shows in beta alone."""
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.standard_normal((20, 20)))[0] for _ in range(2))
    coupling = (left * np.repeat([1.0, 2.0], 10)) @ right
    zero = np.zeros((20, 20))
    matrix = torch.as_tensor(np.block([[zero, coupling], [coupling.T, zero]]), dtype=dtype)
    start = torch.zeros(2, 40, dtype=dtype)
    start[:, :20] = torch.as_tensor(rng.standard_normal((2, 20)))
    result = lanczos(DenseOperator(matrix), start, 9, reorthogonalize=mode)
    assert (result.alphas == 0).all()
    assert result.status == ("breakdown",) * 2 and result.steps.tolist() == [4, 4]


def test_dot_products_are_summed_in_float64():
    """alpha is the mean of these entries, 1 / 2; float32 sums lose every 1 beside 2^24."""
    large = torch.full((256,), 2.0**24)
    entries = torch.cat([large, -large, torch.ones(512)])
    order = torch.from_numpy(np.random.default_rng(0).permutation(1024))
    result = lanczos(DiagonalOperator(entries[order]), torch.ones(1, 1024), 1)
    assert result.alphas.item() == 0.5 and result.start_norms.item() == 32


def test_breakdown_is_relative_to_scale_and_not_early():
    """Small but genuine eigenvalues beside a large one are kept; scaling by any power of two
    changes no bit."""
    eigenvalues = np.concatenate([[1.0], np.linspace(1e-9, 1e-8, 30)])
    operator, matrix, _ = prescribed(eigenvalues)
    reference = lanczos(operator, starts(2, 31), 8)
    assert reference.status == ("complete",) * 2
    for factor in (2.0**-200, 2.0**200):
        scaled = lanczos(DenseOperator(matrix * factor), starts(2, 31), 8)
        assert scaled.status == reference.status and np.array_equal(
            scaled.alphas, reference.alphas * factor
        )


def test_rows_break_down_independently():
    operator = DiagonalOperator(torch.arange(1.0, 21.0, dtype=torch.float64))
    start = starts(3, 20)
    start[1] = 0
    start[1, 4] = 2.0
    result = lanczos(operator, start, 6)
    assert result.status == ("complete", "breakdown", "complete") and result.steps.tolist() == [
        6,
        1,
        6,
    ]
    assert result.alphas[1, 0] == 5 and result.start_norms[1] == 2
    alone = lanczos(operator, start[[0, 2]], 6)
    assert np.allclose(result.alphas[[0, 2]], alone.alphas, atol=1e-13)


class Poisoned(DiagonalOperator):
    """Row 1 of the product is ``value`` from the third call on."""

    calls, value = 0, float("nan")

    def _matmat(self, vectors):
        self.calls += 1
        product = super()._matmat(vectors).clone()
        if self.calls >= 3:
            product[1] = self.value
        return product


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_products_are_located_and_do_not_spread(value):
    operator = Poisoned(torch.linspace(-1, 4, 25, dtype=torch.float64))
    operator.value = value
    result = lanczos(operator, starts(3, 25), 8)
    assert result.status == (
        "complete",
        "nonfinite",
        "complete",
    ) and result.first_nonfinite.tolist() == [0, 3, 0]
    assert result.steps.tolist() == [8, 2, 8]
    assert not result.alphas[1, 2:].any() and not result.betas[1, 2:].any()
    healthy = lanczos(DiagonalOperator(operator.diagonal), starts(3, 25), 8)
    assert np.array_equal(result.alphas[[0, 2]], healthy.alphas[[0, 2]])


class Watch(TorchDispatchMode):
    """Records the calls that would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.syncs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "is_nonzero",
            "equal",
            "_unique2",
        )
        name = func.overloadpacket.__name__
        if name in waits or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            self.syncs.append(name)
        return func(*args, **(kwargs or {}))


class Meta(DiagonalOperator):
    calls = 0

    def _matmat(self, vectors):
        self.calls += 1
        return vectors * self.diagonal


@pytest.mark.parametrize("mode", ["full", "local", "none"])
def test_no_host_sync_inside_the_loop(mode):
    """On the meta device no value exists: whatever looks at one raises. The loop must reach its
    last product."""
    operator = Meta(torch.ones(30, dtype=torch.float64, device="meta"))
    with pytest.raises(NotImplementedError, match="meta"):
        lanczos(operator, torch.ones(2, 30, device="meta"), 7, reorthogonalize=mode)
    assert operator.calls == 7
    watch, seen = Watch(), []

    class Seen(DiagonalOperator):
        def _matmat(self, vectors):
            seen.append(len(watch.syncs))
            return vectors * self.diagonal

    operator = Seen(torch.linspace(-1, 1, 30, dtype=torch.float64))
    start = starts(2, 30)
    with watch:
        lanczos(operator, start, 7, reorthogonalize=mode)
    assert (
        len(seen) == 7 and seen[-1] == seen[0]
    )  # one product a step, no wait between the first and the last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"reorthogonalize": "partial"}, "'full', 'local', 'none'"),
        ({"start": torch.ones(5)}, r"\(k, n\)"),
        ({"start": torch.zeros(2, 5)}, "row 0 has norm 0"),
        ({"start": torch.full((1, 5), float("nan"))}, "row 0 has norm nan"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"start": torch.ones(1, 5), "num_steps": 3, "reorthogonalize": "full", **change}
    with pytest.raises(ValueError, match=message):
        lanczos(DiagonalOperator(torch.ones(5)), **arguments)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_probes_depend_on_seed_name_and_index_only(kind):
    probes = draw_probes(kind, 3, "a.weight", 4, 1001)
    assert probes.shape == (4, 1001) and probes.dtype == torch.float32
    assert torch.equal(draw_probes(kind, 3, "a.weight", 2, 1001), probes[:2])
    wide = draw_probes(kind, 3, "a.weight", 4, 1001, dtype=torch.float64)
    assert wide.dtype == torch.float64 and torch.equal(wide, probes.double())
    for other in (
        draw_probes(kind, 4, "a.weight", 4, 1001),
        draw_probes(kind, 3, "b.weight", 4, 1001),
    ):
        assert (other == probes).float().mean() < 0.6
    assert (probes[0] == probes[1]).float().mean() < 0.6


def test_probe_distributions():
    signs = draw_probes("rademacher", 0, "x", 8, 20_000)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / np.sqrt(160_000)
    gram = signs.double() @ signs.double().T / 20_000 - torch.eye(8)
    assert gram.abs().max() < 5 / np.sqrt(20_000)
    normal = draw_probes("gaussian", 0, "x", 8, 20_000).double()
    assert abs(float(normal.mean())) < 0.01 and abs(float(normal.var()) - 1) < 0.02
    assert abs(float((normal**4).mean()) - 3) < 0.1


def test_probes_are_frozen_in_time():
    """The stream itself is part of every stored result."""
    assert draw_probes("rademacher", 0, "frozen", 1, 12)[0].tolist() == FROZEN


FROZEN = [-1, -1, 1, 1, 1, -1, -1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "k", "n"), [("uniform", 1, 1), ("gaussian", 0, 1), ("gaussian", 1, 0)]
)
def test_bad_probe_arguments(kind, k, n):
    with pytest.raises(ValueError, match=r"probes is 'uniform'|must be at least 1"):
        draw_probes(kind, 0, "", k, n)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu():
    cpu, gpu = (
        draw_probes("gaussian", 1, "x", 2, 40, dtype=torch.float64, device=d)
        for d in ("cpu", "cuda")
    )
    assert torch.equal(cpu, gpu.cpu())
    values = torch.linspace(-1, 3, 40, dtype=torch.float64)
    here, there = (
        lanczos(DiagonalOperator(values), cpu, 10),
        lanczos(DiagonalOperator(values.cuda()), gpu, 10),
    )
    assert np.allclose(here.alphas, there.alphas, atol=1e-12)
