"""Low precision: float32 around a bfloat16 model, TF32 only inside products, bounded errors."""

import copy
import math

import numpy as np
import pytest
import torch
from problems import Cubed, SilentlyWrong, network, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hessian_tools as ht
from hessian_tools.curvature.engine.precision import Arithmetic, arithmetic, tf32
from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.spectra.lanczos import lanczos
from hessian_tools.spectra.probes import draw_probes

BF16 = torch.bfloat16
ROUNDOFF = torch.finfo(BF16).eps / 2  # largest relative error of rounding to nearest


def in_float64(problem: ht.Problem) -> ht.Problem:
    """The same numbers, computed in float64."""
    batches = [
        tuple(t.double() if t.is_floating_point() else t for t in batch)
        for batch in problem.batches
    ]
    model = copy.deepcopy(problem.model).double()
    return ht.Problem(model, problem.loss_fn, batches, batch_stats=problem.batch_stats)


def linear_regression(
    examples: int, features: int, dtype: torch.dtype
) -> tuple[ht.Problem, torch.Tensor]:
    """A problem whose Hessian is 2 X'X / N, and X, with entries that bfloat16 holds exactly."""
    inputs = torch.randn(examples, features).to(BF16).to(dtype)
    model = nn.Linear(features, 1, bias=False, dtype=dtype)
    return ht.Problem(
        model, ht.mse, [(inputs, torch.ones(examples, 1, dtype=dtype))]
    ), inputs.double()


class RoundedOperator(SymmetricOperator):
    """A symmetric matrix whose products pass through bfloat16: noisy, and no longer symmetric."""

    def __init__(self, matrix):
        super().__init__(len(matrix), torch.float32, "cpu")
        self.matrix = matrix.double()

    def _matmat(self, vectors):
        return (vectors.to(BF16).double() @ self.matrix).to(BF16).float()


def prescribed(eigenvalues, n):
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return (
        basis[:, : len(eigenvalues)]
        @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
        @ basis[:, : len(eigenvalues)].T
    )


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float64])
def test_vectors_are_never_narrower_than_float32(dtype):
    problem = network("gpt", dtype)
    hessian = ht.HessianOperator(problem)
    block = hessian.block(next(iter(ht.partition(problem.model, "weights"))))
    wide = torch.promote_types(dtype, torch.float32)
    for operator in (hessian, block):
        assert (
            operator.dtype == wide and operator.matmat(torch.randn(2, operator.size)).dtype == wide
        )
    assert str(dtype).removeprefix("torch.") in hessian.route
    assert {p.dtype for p in problem.model.parameters()} == {dtype}


def test_products_keep_within_the_bound_of_rounding():
    """Componentwise (Higham 2002, section 3.5), with j roundings on the way:

        |error| <= ((1 + u)^j - 1) |X'| |X| |v| c

    There are six at most: the vector, X v, its two factors, X' (.), the product; sums are float32
    and N is a power of 2.
    """
    problem, x = linear_regression(32, 20, BF16)
    hessian = ht.HessianOperator(problem)
    vectors = torch.randn(3, 20)
    exact = 2 / 32 * vectors.double() @ x.T @ x
    bound = ((1 + ROUNDOFF) ** 6 - 1) * 2 / 32 * vectors.double().abs() @ x.abs().T @ x.abs()
    error = (hessian.matmat(vectors).double() - exact).abs()
    assert (error <= bound).all()
    # float32 in disguise would be exact
    assert relative_error(hessian.matmat(vectors).double(), exact) > 1e-4


@pytest.mark.parametrize("name", ["gpt", "batchnorm-batch"])
def test_lanczos_on_noisy_products_keeps_within_the_noise(name):
    """With E the errors of the products of Q: |T - Q'AQ| <= sqrt(2) |E|_F.

    Q' A^ Q is upper Hessenberg; T mirrors its lower half, Q'AQ is symmetric, and their lower halves
    differ by Q'E's. By Weyl's inequality every node keeps to the same bound.
    """
    problem = network(name, BF16)
    hessian, exact = ht.HessianOperator(problem), ht.HessianOperator(in_float64(problem))
    start = torch.randn(2, hessian.size)
    found = lanczos(hessian, start, 12, keep_basis=True)
    assert found.status == ("complete", "complete")
    top = float(torch.linalg.eigvalsh(exact.to_dense()).max())
    noisy = torch.stack([hessian.matmat(q) for q in found.basis.unbind(1)], dim=1).double()
    for row, q in enumerate(found.basis.double()):
        products = exact.matmat(q)
        noise, slack = float((noisy[row] - products).norm()), 1e-5 * float(products.norm())
        betas = found.betas[row, :-1]
        tridiagonal = torch.from_numpy(
            np.diag(found.alphas[row]) + np.diag(betas, 1) + np.diag(betas, -1)
        )
        assert (tridiagonal - q @ products.T).norm() <= math.sqrt(2) * noise + slack
        assert float(torch.linalg.eigvalsh(tridiagonal).max()) <= top + math.sqrt(2) * noise + slack
        # trace and rms depend on the first product alone
        first = float((noisy[row, 0] - products[0]).norm())
        assert abs(found.alphas[row, 0] - float(q[0] @ products[0])) <= first + slack
        assert (
            abs(math.hypot(found.alphas[row, 0], found.betas[row, 0]) - float(products[0].norm()))
            <= first + slack
        )
        assert 1e-3 < noise / float(products.norm()) < 0.1  # there is noise, and it is bfloat16's


def test_spectra_of_a_bfloat16_model_are_near_those_in_float64():
    problem = network("layernorm", BF16)
    settings = {"num_probes": 2, "num_steps": 8, "seed": 0, "exact": False, "progress": False}
    found, expected = (
        ht.blockwise_slq(p, ht.partition(p.model, "weights"), **settings)
        for p in (problem, in_float64(problem))
    )
    for name, block in expected.items():
        # One rounding of every entry costs 0.4 %; some forty lie on the way and add up like
        # sqrt(40) where they are independent.
        relative = math.sqrt(40) * ROUNDOFF
        assert found[name].rms.value == pytest.approx(block.rms.value, rel=relative), name
        assert found[name].largest.value == pytest.approx(
            block.largest.value, abs=0.1 * block.rms.value + 0.05
        ), name


def test_micro_batches_are_summed_in_float32():
    """300 equal pieces: a bfloat16 sum stops growing once a piece is below half its last digit."""
    x, y = torch.randn(1, 8, dtype=BF16), torch.ones(1, 1, dtype=BF16)
    model = nn.Linear(8, 1, dtype=BF16)
    many = ht.Problem(model, ht.mse, [(x.repeat(300, 1), y.repeat(300, 1))])
    v = torch.randn(9)
    cut = ht.HessianOperator(many, microbatch=1, record=False) @ v
    assert relative_error(cut, ht.HessianOperator(ht.Problem(model, ht.mse, [(x, y)])) @ v) < 1e-5


def test_casts_only_where_vectors_enter_and_products_leave():
    class Casts(TorchDispatchMode):
        counted = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            target = (kwargs or {}).get("dtype")
            if function.overloadpacket.__name__ == "_to_copy" and {args[0].dtype, target} == {
                BF16,
                torch.float32,
            }:
                self.counted += 1
            return function(*args, **(kwargs or {}))

    counts = {}
    for dtype in (BF16, torch.float32):
        hessian = ht.HessianOperator(network("mlp", dtype))
        hessian.matmat(torch.randn(3, hessian.size))  # records the graphs
        with Casts() as casts:
            hessian.matmat(torch.randn(3, hessian.size))
        counts[dtype] = casts.counted
    parameters, batches = 4, 2
    assert counts[torch.float32] == 0
    assert parameters <= counts[BF16] <= 2 * parameters * batches


@pytest.mark.parametrize(
    ("eigenvalues", "least_steps"),
    [([3.0, 1.0, 0.5, 0.1, -0.2], 6), ([2.0] * 200, 1), (np.linspace(-1, 3, 200).tolist(), 30)],
)
@pytest.mark.parametrize("mode", ["full", "local", "none"])
def test_noise_neither_ends_a_run_nor_spreads(eigenvalues, least_steps, mode):
    """Exactly, the first two Krylov spaces end after 6 and 1 steps.

    Noise may hide that, but what follows is small.
    """
    operator = RoundedOperator(prescribed(eigenvalues, 200))
    settings = {
        "num_probes": 3,
        "num_steps": 30,
        "probes": "gaussian",
        "exact": False,
        "reorthogonalize": mode,
    }
    quadrature = ht.slq(operator, **settings)
    assert (quadrature.steps >= least_steps).all() and (
        least_steps < 30 or quadrature.status == "complete"
    )
    spectrum = np.array([*eigenvalues, 0.0] if len(eigenvalues) < 200 else eigenvalues)
    # of a product: the rounding of its vector and of itself
    noise = 2.01 * ROUNDOFF * np.abs(spectrum).max()
    span = quadrature.nodes.min() - spectrum.min(), spectrum.max() - quadrature.nodes.max()
    assert min(span) >= -math.sqrt(2 * 30) * noise  # sqrt(2) |E|_F over 30 products
    distance = np.abs(quadrature.nodes[..., None] - spectrum).min(axis=-1)
    assert (quadrature.weights * distance).sum(axis=1).max() <= noise
    probes = draw_probes("gaussian", 0, "", 3, 200, dtype=torch.float64)
    products = torch.nn.functional.normalize(probes, dim=1) @ operator.matrix
    assert quadrature.moment(1).value == pytest.approx(
        float((probes * products).sum(1).div(probes.norm(dim=1)).mean()), abs=noise
    )
    assert quadrature.rms.value == pytest.approx(
        float(products.square().sum(1).mean().sqrt()), abs=noise
    )


def test_a_vanishing_hessian_is_still_found_in_bfloat16():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(60, dtype=BF16))
            self.square = nn.Parameter(torch.ones(3, dtype=BF16))

        def forward(self, x):
            return x @ self.weight + (self.square**2).sum()

    problem = ht.Problem(Linear(), lambda m, x: m(x).mean(), [torch.randn(4, 60, dtype=BF16)])
    blocks = ht.partition(problem.model, ["weight"])
    found = ht.blockwise_slq(problem, blocks, num_probes=2, num_steps=9, progress=False)
    assert found["weight"].status == "breakdown" and not found["weight"].nodes.any()


@pytest.mark.parametrize("name", ["mlp", "layernorm", "batchnorm-batch", "gpt", "hf-gpt2"])
def test_verification_passes_in_bfloat16(name):
    report = ht.HessianOperator(network(name, BF16)).verify()
    assert report.passed, str(report)
    difference, rounding = report.checks[-2:]
    assert difference.name == "finite difference of the gradient" and difference.tolerance < 1e-3
    assert rounding.name == "rounding of bfloat16" and rounding.error > 1e-4


def test_verification_in_bfloat16_finds_a_broken_gradient():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 3, padding_idx=0)
            self.last = nn.Linear(3, 2)

        def forward(self, tokens):
            return self.last(torch.tanh(self.table(tokens)).mean(1))

    tokens = (
        torch.tensor([[0, 1, 5], [2, 3, 4], [4, 6, 7], [8, 1, 2]]),
        torch.tensor([0, 1, 1, 0]),
    )
    x = torch.randn(4, 3, dtype=BF16)
    broken = [
        ht.Problem(Padded().to(BF16), ht.cross_entropy, [tokens]),
        ht.Problem(Cubed(SilentlyWrong).to(BF16), ht.mse, [(x, torch.ones(4, 2, dtype=BF16))]),
    ]
    for problem in broken:
        failures = [check.name for check in ht.HessianOperator(problem).verify().failures]
        assert "finite difference of the gradient" in failures


def test_verification_finds_what_is_wrong_in_low_precision_only():
    class Spoilt(ht.HessianOperator):
        def _matmat(self, vectors):
            return super()._matmat(vectors) * (3.0 if self.problem.dtype == BF16 else 1.0)

    names = [check.name for check in Spoilt(network("mlp", BF16)).verify().failures]
    assert "rounding of bfloat16" in names and "finite difference of the gradient" not in names


SWITCHES = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]


def settings() -> list:
    """All that PyTorch says about TF32; that an interface refuses to answer counts as well."""
    values = []
    for read in (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
        *[lambda s=s: s.fp32_precision for s in (*SWITCHES, torch.backends.mkldnn.matmul)],
    ):
        try:
            values.append(read())
        except RuntimeError:
            values.append("refused")
    return values


@pytest.fixture(params=["default", "high", "medium", "cudnn off", "by operation"])
def process(request):
    """The process in one of the states that users leave it in."""
    joint = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    single = [(s, s.fp32_precision) for s in (*SWITCHES, torch.backends.mkldnn.matmul)]
    if request.param in ("high", "medium"):
        torch.set_float32_matmul_precision(request.param)
    elif request.param == "cudnn off":
        torch.backends.cudnn.allow_tf32 = False
    elif request.param == "by operation":
        SWITCHES[0].fp32_precision, SWITCHES[1].fp32_precision = "tf32", "ieee"
    yield
    torch.set_float32_matmul_precision(joint[0])
    torch.backends.cudnn.allow_tf32 = joint[1]
    for switch, value in single:
        switch.fp32_precision = value


@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_put_back_after_an_exception(process, on):
    before = settings()
    with pytest.raises(ZeroDivisionError), tf32(on):
        assert [s.fp32_precision for s in SWITCHES] == ["tf32" if on else "ieee"] * 3
        raise ZeroDivisionError
    assert settings() == before


def test_tf32_is_on_inside_products_only(monkeypatch):
    seen, failing = [], []

    def loss_fn(model, batch):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        if failing:
            raise ZeroDivisionError
        return ht.cross_entropy(model, batch)

    model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    # The flags can be moved without a card.
    card = Arithmetic(torch.float32, torch.float32, torch.device("cuda"), "tf32", False)
    monkeypatch.setattr(
        "hessian_tools.curvature.engine_operator.arithmetic", lambda model, precision: card
    )
    hessian = ht.HessianOperator(ht.Problem(model, loss_fn, [batch]), record=False)
    seen.clear()
    before = settings()
    ht.slq(hessian, num_probes=1, num_steps=3, exact=False)
    hessian.block(ht.partition(model, "weights")["weight"]).matmat(torch.randn(2, 6))
    assert len(seen) == 4 and all(seen) and settings() == before
    failing.append(True)
    with pytest.raises(ZeroDivisionError):
        hessian @ torch.randn(8)
    assert settings() == before


def test_the_arithmetic_in_effect_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    card, single = torch.device("cuda"), (torch.float32, torch.float32)
    # PyTorch's defaults
    assert Arithmetic(*single, card, "as given", convolves=False).name == "float32"
    assert Arithmetic(*single, card, "as given", convolves=True).name == "tf32"
    assert Arithmetic(*single, card, "ieee", convolves=True).name == "float32"
    assert Arithmetic(*single, card, "tf32", convolves=False).name == "tf32"
    with tf32(True):
        assert Arithmetic(*single, card, "as given", convolves=False).name == "tf32"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    old = Arithmetic(*single, card, "tf32", convolves=False)
    assert old.name == "float32" and "older than Ampere" in str(old)
    assert arithmetic(network("batchnorm-batch", torch.float32).model).convolves


def test_a_warning_says_that_there_is_no_tf32():
    problem = network("mlp", torch.float32)
    with pytest.warns(RuntimeWarning, match=r"TF32 asked for and not to be had \(device cpu\)"):
        hessian = ht.HessianOperator(problem, precision="tf32")
    assert "not to be had" in hessian.route
    v = torch.randn(hessian.size)
    assert torch.equal(hessian @ v, ht.HessianOperator(problem, precision="ieee") @ v)


def test_true_float32_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    card, single = torch.device("cuda"), (torch.float32, torch.float32)
    default = arithmetic(network("batchnorm-batch", torch.float32).model).precision
    assert default == "ieee"
    assert Arithmetic(*single, card, default, convolves=True).name == "float32"
    # whatever the default says about float32
    assert arithmetic(network("mlp", BF16).model).name == "bfloat16"


def test_a_model_of_mixed_dtypes_is_as_coarse_as_its_coarsest():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight.data = model[1].weight.data.to(BF16)
    found = arithmetic(model)
    assert (found.name, found.vectors) == ("bfloat16", torch.float32)


@pytest.mark.parametrize(
    ("dtype", "precision", "message"),
    [
        (
            torch.float16,
            "as given",
            r"torch.float16, which resolves .* use model.to\(torch.bfloat16\)",
        ),
        (torch.float32, "fp8", "precision is 'fp8'; allowed are 'ieee', 'tf32', 'as given'"),
        (
            torch.float64,
            "tf32",
            "about products in float32, but model has parameters in torch.float64",
        ),
        (BF16, "tf32", "about products in float32, but model has parameters in torch.bfloat16"),
    ],
)
def test_what_makes_no_sense_is_refused(dtype, precision, message):
    with pytest.raises(ValueError, match=message):
        ht.HessianOperator(network("mlp", dtype), precision=precision)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_on_a_card():
    problem = network("hf-gpt2", torch.float32, "cuda")
    problem = ht.Problem(
        problem.model, problem.loss_fn, [tuple(t.cuda() for t in b) for b in problem.batches]
    )
    v = torch.randn(problem.num_parameters, device="cuda")
    plain, coarse = (ht.HessianOperator(problem, precision=p) for p in ("ieee", "tf32"))
    assert 1e-5 < relative_error(coarse @ v, plain @ v) < 2e-2
    assert coarse.verify().passed
