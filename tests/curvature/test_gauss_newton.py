"""The Gauss-Newton matrix against dense float64 ones, its identities, its counted cost, and what
losses must tell."""

import functools

import pytest
import torch
from problems import NETWORKS, dense_gauss_newton, dense_hessian, gpt, network, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hessian_tools as ht
from hessian_tools.curvature.segments.recompute import LAYERED, STREAMED
from hessian_tools.problem.networks import NanoGPT

ROUTES = ("double backward", "tangent program")


@pytest.fixture(scope="module")
def dense():
    """name -> dense Gauss-Newton matrix, computed once."""
    return functools.cache(lambda name: dense_gauss_newton(network(name)))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_matrix_is_the_dense_one(name, route, dense):
    if (name, route) == ("lstm", "tangent program"):
        pytest.skip("recurrent layers are not traced")
    operator = ht.GaussNewtonOperator(network(name), route=route)
    assert relative_error(operator.to_dense(), dense(name)) < NETWORKS[name][3]
    assert operator.route.startswith("tangent" if route == "tangent program" else "forward")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("preset", ["tensor", "semantic", "head", "neuron"])
@pytest.mark.parametrize("name", ["hf-gpt2", "batchnorm-batch", "gpt"])
def test_every_block_is_a_slice_of_the_dense_one(name, preset, route, dense):
    problem = network(name)
    operator = ht.GaussNewtonOperator(problem, route=route)
    sizes = [p.numel() for p in problem.parameters.values()]
    numbered = dict(zip(problem.parameters, torch.arange(sum(sizes)).split(sizes), strict=True))
    for cut in ht.partition(problem.model, preset).cuts:
        entries = cut.rows({n: numbered[n].view(p.shape) for n, p in problem.parameters.items()})
        vectors = torch.randn(cut.num_blocks * 2, cut.block_size, dtype=torch.float64)
        products = operator.stacked(cut).matmat(vectors)
        for row in range(len(vectors)):
            index = entries[row // 2]
            expected = dense(name)[index][:, index] @ vectors[row]
            assert torch.allclose(products[row], expected, atol=1e-10), cut.names[row // 2]


@pytest.mark.parametrize(
    "options",
    [
        {"record": False},
        {"microbatch": 1, "record": False},
        {"segments": LAYERED},
        {"segments": STREAMED, "record": False},
        {"segments": LAYERED, "record": False, "microbatch": 2},
    ],
)
def test_no_way_to_compute_changes_the_product(options):
    torch.manual_seed(1)
    model = NanoGPT(11, 6, 2, 8, 2, tied=True).double()
    tokens = torch.randint(11, (3, 7))
    problem = ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])
    vectors = torch.randn(3, problem.num_parameters, dtype=torch.float64)
    expected = ht.GaussNewtonOperator(problem, record=True).matmat(vectors)
    found = ht.GaussNewtonOperator(problem, **options).matmat(vectors)
    assert relative_error(found, expected) < 1e-12
    block = ht.partition(problem.model, "tensor")["blocks.0.fc.weight"]
    rows = torch.randn(2, block.numel, dtype=torch.float64)
    some = ht.GaussNewtonOperator(problem, **options).block(block).matmat(rows)
    assert relative_error(some, ht.GaussNewtonOperator(problem).block(block).matmat(rows)) < 1e-12


def test_a_small_budget_cuts_the_batches_and_changes_nothing():
    model, inputs = gpt(d=16), torch.randint(11, (24, 7))
    problem = ht.Problem(model, ht.cross_entropy, [(inputs[:, :-1], inputs[:, 1:])])
    free = ht.GaussNewtonOperator(problem)
    tight = ht.GaussNewtonOperator(problem, memory=free.plan.graph_bytes)
    assert free.plan.recorded and str(tight.plan) != str(free.plan)
    vectors = torch.randn(2, problem.num_parameters)
    assert relative_error(tight.matmat(vectors), free.matmat(vectors)) < 1e-4


def pseudo_huber(outputs, batch):
    return (1 + (outputs - batch[1]) ** 2).sqrt().mean()


def entangled(outputs, batch):
    """A loss that joins the outputs of different examples."""
    return (outputs * batch[1]).sum().tanh() ** 2 + outputs.logsumexp(0).mean()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("loss", [pseudo_huber, entangled, lambda z, batch: z.mean()])
def test_any_loss_of_outputs_will_do(loss, route):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in (5, 2)]
    in_two_steps = ht.Loss(outputs=lambda model, batch: model(batch[0]), loss=loss)
    problem = ht.Problem(model, in_two_steps, batches)
    expected = dense_gauss_newton(problem)
    found = ht.GaussNewtonOperator(problem, route=route).to_dense()
    assert torch.allclose(found, expected, atol=1e-13)
    assert loss in (pseudo_huber, entangled) or not expected.any()


def test_it_is_the_hessian_where_outputs_are_linear():
    torch.manual_seed(2)
    batches = [(torch.randn(n, 6).double(), torch.randint(3, (n,))) for n in (9, 4)]
    problem = ht.Problem(nn.Linear(6, 3).double(), ht.cross_entropy, batches)
    found = ht.GaussNewtonOperator(problem).to_dense()
    assert relative_error(found, dense_hessian(problem)) < 1e-13


def test_blocks_of_a_relu_chain_are_the_hessians():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(12, 4).double(), torch.randint(3, (12,)))]
    problem = ht.Problem(model.double(), ht.cross_entropy, batches)
    hessian = dense_hessian(problem)
    found = ht.GaussNewtonOperator(problem).to_dense()
    first = 0
    for p in problem.parameters.values():
        rows = slice(first, first + p.numel())
        assert torch.allclose(found[rows, rows], hessian[rows, rows], atol=1e-13)
        first += p.numel()
    assert relative_error(found, hessian) > 0.1


def test_it_is_positive_semidefinite_where_the_hessian_is_not():
    problem = network("gpt")
    eigenvalues = torch.linalg.eigvalsh(ht.GaussNewtonOperator(problem).to_dense())
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]
    assert torch.linalg.eigvalsh(dense_hessian(problem))[0] < -1e-3 * eigenvalues[-1]


# --------------------------------------------------------------------------------- what it costs


def operations(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("route", ROUTES)
def test_a_probe_costs_four_forward_passes_and_a_block_less(route):
    torch.manual_seed(0)
    model = NanoGPT(64, 16, 4, 32, 4, tied=False)
    tokens = torch.randint(64, (4, 17))
    problem = ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])
    with problem.evaluating():
        forward = operations(lambda: problem.batch_value(problem.batches[0]))
    operator = ht.GaussNewtonOperator(problem, record=True, route=route)
    vectors = torch.randn(4, operator.size)
    operator.matmat(vectors)
    whole = operations(lambda: operator.matmat(vectors)) / 4 / forward
    assert 3.5 < whole <= 4
    blocks = []
    for block in ht.partition(model, "weights"):
        rows = torch.randn(4, block.numel)
        of_block = operator.block(block)
        of_block.matmat(rows)
        blocks.append(operations(lambda of=of_block, v=rows: of.matmat(v)) / 4 / forward)
    assert sum(blocks) / len(blocks) < 1.25
    assert blocks[-1] < 0.3


@pytest.mark.parametrize(("route", "passes"), [("double backward", 3), ("tangent program", 1)])
def test_recording_costs_a_gradient_or_a_forward_pass(route, passes):
    """The traced graph has the model's forward pass twice, which is merged."""
    problem = network("gpt", torch.float32)
    with problem.evaluating():
        forward = sum(operations(lambda b=b: problem.batch_value(b)) for b in problem.batches)
    operator = ht.GaussNewtonOperator(problem, record=True, route=route)
    v = torch.randn(1, operator.size)
    operator.matmat(v)  # which a tangent program holds against double backward's
    operator.release()
    first = operations(lambda: operator.matmat(v))
    second = operations(lambda: operator.matmat(v))
    assert 0 < first - second <= passes * forward


# ------------------------------------------------------------------------------- verification


@pytest.mark.parametrize("level", ["full", "quick"])
@pytest.mark.parametrize("name", ["layernorm", "batchnorm-batch", "gpt"])
def test_it_is_verified_against_differences_of_the_outputs(name, level):
    verification = ht.GaussNewtonOperator(network(name)).verify(level=level)
    assert verification.passed, str(verification)
    assert any(c.name == "finite difference of the outputs" for c in verification.checks)


def test_a_wrong_matrix_between_outputs_fails(monkeypatch):
    operator = ht.GaussNewtonOperator(network("gpt"))
    at = type(operator.between_outputs).at

    def wrong(self, problem, outputs, batch):
        product = at(self, problem, outputs, batch)
        return lambda rows: product(rows) * 1.01

    monkeypatch.setattr(type(operator.between_outputs), "at", wrong)
    assert not ht.GaussNewtonOperator(network("gpt")).verify(level="quick").passed


def test_a_loss_without_a_known_form_is_verified_as_well():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    batch = torch.randn(6, 3), torch.randn(6, 2)
    loss = ht.Loss(lambda model, batch: model(batch[0]), pseudo_huber)
    problem = ht.Problem(model, loss, [batch])
    for kind in (ht.GaussNewtonOperator, ht.curvature.EmpiricalFisherOperator):
        verification = kind(problem).verify()
        assert verification.passed, str(verification)


def derivatives_inside(model, batch):
    """What a physics-informed network is fitted by: a residual of its derivatives, and a value."""
    x = batch.detach().requires_grad_()
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (d2u,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
    return torch.stack([du[:, 1] - d2u[:, 0], u[:, 0]], dim=1)


def test_outputs_that_are_derivatives_themselves():
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    loss = ht.Loss(derivatives_inside, lambda z, batch: z.square().mean())
    problem = ht.Problem(model, loss, [torch.randn(9, 2).double()])
    operator = ht.GaussNewtonOperator(problem)
    assert relative_error(operator.to_dense(), dense_gauss_newton(problem)) < 1e-13
    verification = operator.verify()
    assert verification.passed and not verification.skipped, str(verification)


def test_a_model_under_autocast_is_verified_in_float64():
    torch.manual_seed(7)

    def outputs(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch[0]).float()

    def loss(z, batch):
        return nn.functional.cross_entropy(z.flatten(0, 1), batch[1].flatten())

    tokens = torch.randint(11, (2, 7))
    given = ht.Loss(outputs, loss)
    problem = ht.Problem(gpt(), given, [(tokens[:, :-1], tokens[:, 1:])])
    operator = ht.GaussNewtonOperator(problem)
    verification = operator.verify()
    assert verification.passed, str(verification)
    assert any(check.name == "rounding of bfloat16" for check in verification.checks)


# ------------------------------------------------------------------------------- what losses tell


def test_one_function_of_model_and_batch_is_told_what_is_needed():
    model = nn.Linear(3, 2)
    batch = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    problem = ht.Problem(model, lambda m, b: ht.cross_entropy(m, b), [batch])
    ht.HessianOperator(problem)
    with pytest.raises(ValueError, match=r"outputs and the loss.*apart.*pass ht.Loss\(outputs="):
        ht.GaussNewtonOperator(problem)


def test_two_steps_are_the_loss():
    model = nn.Linear(3, 2)
    batches = [(torch.randn(n, 3), torch.randint(2, (n,))) for n in (4, 2)]
    given = ht.Loss(
        outputs=lambda model, batch: model(batch[0]),
        loss=lambda z, batch: nn.functional.cross_entropy(z, batch[1]),
    )
    problem = ht.Problem(model, given, batches)
    same = ht.Problem(model, ht.cross_entropy, batches)
    assert problem.loss == same.loss and problem.counts == same.counts
    with pytest.raises(TypeError, match=r"loss is a float; pass outputs\(model, batch\)"):
        ht.Loss(outputs=lambda model, batch: model(batch[0]), loss=0.5)


def test_outputs_must_be_one_floating_tensor():
    model = nn.Linear(3, 2)
    batch = torch.randn(4, 3), torch.randn(4, 2)
    loss = ht.Loss(
        outputs=lambda model, batch: (model(batch[0]),),
        loss=lambda z, batch: (z[0] ** 2).mean(),
    )
    problem = ht.Problem(model, loss, [batch])
    with pytest.raises(ValueError, match=r"returned a tuple; one real floating tensor is needed"):
        ht.GaussNewtonOperator(problem)


def test_a_loss_without_second_derivative_is_named():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return (z**2).mean()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            (z,) = ctx.saved_tensors
            return gradient * 2 * z / z.numel()

    model = nn.Linear(3, 2)
    loss = ht.Loss(lambda model, batch: model(batch), lambda z, batch: Once.apply(z))
    problem = ht.Problem(model, loss, [torch.randn(4, 3)])
    with pytest.raises(ht.NotTwiceDifferentiable, match="once_differentiable"):
        ht.GaussNewtonOperator(problem) @ torch.randn(8)


def test_examples_that_are_ignored_count_nowhere():
    torch.manual_seed(4)
    model = gpt()
    tokens = torch.randint(11, (3, 7))
    targets = tokens[:, 1:].clone()
    targets[0, 2:] = -100
    whole = ht.Problem(model.double(), ht.cross_entropy, [(tokens[:, :-1], targets)])
    parts = [(tokens[i : i + 1, :-1], targets[i : i + 1]) for i in range(3)]
    cut = ht.Problem(model, ht.cross_entropy, parts)
    v = torch.randn(whole.num_parameters).double()
    for kind in (ht.GaussNewtonOperator, ht.FisherOperator, ht.curvature.EmpiricalFisherOperator):
        assert relative_error(kind(cut) @ v, kind(whole) @ v) < 1e-12


def test_everything_that_takes_a_curvature_operator_takes_it():
    problem = network("gpt", torch.float32)
    operator = ht.GaussNewtonOperator(problem)
    dense = dense_gauss_newton(network("gpt"))
    tensors = ht.partition(problem.model, "tensor")
    assert relative_error(torch.from_numpy(ht.dense_block(operator, tensors).matrix), dense) < 1e-10
    assert ht.coupling(operator, tensors, progress=False).curvature == "Gauss-Newton matrix"
    spectra = ht.blockwise_slq(operator, tensors, progress=False)
    assert spectra.curvature == "Gauss-Newton matrix"
    conditioning = ht.structure.block_conditioning(operator, tensors, progress=False)
    extremes = ht.structure.block_extremes(operator, tensors, progress=False)
    assert conditioning.curvature == extremes.curvature == "Gauss-Newton matrix"
    report = ht.check_partition(operator, ht.partition(problem.model, "adam_mini"), progress=False)
    assert "Gauss-Newton matrix-vector products" in str(report)
    readings = ht.js_heterogeneity(spectra)
    assert any("readings of the Gauss-Newton matrix" in note for note in readings.notes)
    scaled = ht.PreconditionedOperator(
        operator, {n: p.detach().abs() + 1 for n, p in problem.parameters.items()}
    )
    assert scaled.title == "preconditioned Gauss-Newton matrix" and scaled.verify().passed
