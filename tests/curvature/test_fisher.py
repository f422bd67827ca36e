"""Fisher matrices: identities with Gauss-Newton, sums over examples one by one, and draws."""

import math

import pytest
import torch
from problems import NETWORKS, dense_gauss_newton, gpt, network, relative_error
from torch import nn

import hessian_tools as ht
from hessian_tools.curvature import EmpiricalFisherOperator, MonteCarloFisherOperator

ROUTES = ("double backward", "tangent program")


def small(loss, targets, outputs=3):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    batches = [(torch.randn(len(t), 4).double(), t) for t in targets]
    return ht.Problem(model, loss, batches)


def classes():
    return small(ht.cross_entropy, [torch.tensor([0, 2, -100, 1]), torch.tensor([1, 0])])


def probabilities():
    return small(ht.cross_entropy, [torch.rand(4, 3).double().softmax(1)])


def regression():
    return small(ht.mse, [torch.randn(4, 3).double(), torch.randn(2, 3).double()])


def pixels():
    """A class for every pixel, the classes along axis 1."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 1)).double()
    targets = torch.randint(3, (2, 4, 4))
    targets[0, 0] = -100
    return ht.Problem(model, ht.cross_entropy, [(torch.randn(2, 1, 6, 6).double(), targets)])


CASES = {f.__name__: f for f in (classes, probabilities, regression, pixels)}


@pytest.fixture(params=CASES)
def problem(request):
    return CASES[request.param]()


@pytest.mark.parametrize("route", ROUTES)
def test_the_exact_one_is_the_gauss_newton_matrix(problem, route):
    found = ht.FisherOperator(problem, route=route).to_dense()
    assert relative_error(found, dense_gauss_newton(problem)) < 1e-13


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_so_on_networks(name):
    problem = network(name)
    v = torch.randn(3, problem.num_parameters, dtype=torch.float64)
    expected = ht.GaussNewtonOperator(problem).matmat(v)
    assert relative_error(ht.FisherOperator(problem).matmat(v), expected) < 1e-12


def test_probabilities_that_do_not_add_up_are_verified_as_well():
    problem = small(ht.cross_entropy, [torch.rand(4, 3).double()])
    verification = ht.GaussNewtonOperator(problem).verify()
    assert verification.passed, str(verification)


def rows_of(problem):
    """(outputs, score of each row) of each batch, rows one by one with their own loss."""
    for batch in problem.batches:
        outputs = problem.loss_fn.outputs(problem.model, batch)
        targets = batch[1]
        if problem.loss_fn is ht.mse:
            for z, y in zip(outputs, targets, strict=True):
                yield ((z - y) ** 2).sum()
            continue
        logits = outputs.movedim(1, -1).flatten(0, -2)
        y = targets if targets.is_floating_point() else targets.flatten()
        for z, target in zip(logits, y, strict=True):
            if target.ndim or target != -100:
                yield nn.functional.cross_entropy(z[None], target[None])


def gradients_of(problem):
    parameters = list(problem.parameters.values())
    for loss in rows_of(problem):
        pieces = torch.autograd.grad(loss, parameters, retain_graph=True)
        yield torch.cat([piece.flatten() for piece in pieces])


@pytest.mark.parametrize("route", ROUTES)
def test_the_empirical_one_is_the_sum_over_examples(problem, route):
    gradients = torch.stack(list(gradients_of(problem)))
    expected = gradients.T @ gradients / sum(problem.counts)
    found = EmpiricalFisherOperator(problem, route=route).to_dense()
    assert relative_error(found, expected) < 1e-13
    assert relative_error(expected, dense_gauss_newton(problem)) > 0.05


def test_the_empirical_one_of_an_own_loss_is_the_sum_over_examples():
    torch.manual_seed(7)
    model = nn.Linear(4, 3).double()
    batches = [(torch.randn(n, 4).double(), torch.randn(n, 3).double()) for n in (5, 2)]
    loss = ht.Loss(
        outputs=lambda model, batch: model(batch[0]),
        loss=lambda z, batch: (z - batch[1]).abs().sqrt().sum(1).mean(),
    )
    problem = ht.Problem(model, loss, batches)
    parameters = list(model.parameters())
    rows = []
    for x, y in batches:
        for i in range(len(x)):
            value = loss(model, (x[i : i + 1], y[i : i + 1]))
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]))
    gradients = torch.stack(rows)
    found = EmpiricalFisherOperator(problem).to_dense()
    assert relative_error(found, gradients.T @ gradients / len(rows)) < 1e-13


@pytest.mark.parametrize("kind", [EmpiricalFisherOperator, MonteCarloFisherOperator])
@pytest.mark.parametrize("name", ["batchnorm-batch", "gpt", "hf-gpt2"])
def test_they_pass_verification(name, kind):
    verification = kind(network(name)).verify()
    assert verification.passed, str(verification)


# ---------------------------------------------------------------------------------------- draws


def scores_of_draws(problem, operator):
    """(1/N S) sum over rows and draws of g g', targets found here from the operator's noise."""
    total = torch.zeros(problem.num_parameters, problem.num_parameters, dtype=torch.float64)
    parameters = list(problem.parameters.values())
    for batch, noise in operator._drawn.batches:
        outputs = problem.loss_fn.outputs(problem.model, batch)
        for draw in noise.unbind(-1):
            if problem.loss_fn is ht.mse:
                target = (outputs + draw / math.sqrt(2)).detach()
                losses = ((outputs - target) ** 2).sum(1)
            else:
                logits = outputs.movedim(1, -1).flatten(0, -2)
                edges = logits.softmax(-1).cumsum(-1)
                target = (edges < draw.flatten()[:, None]).sum(-1)
                losses = nn.functional.cross_entropy(logits, target, reduction="none")
                if not batch[1].is_floating_point():
                    losses = losses[batch[1].flatten() != -100]
            for loss in losses:
                g = torch.autograd.grad(loss, parameters, retain_graph=True)
                g = torch.cat([piece.flatten() for piece in g])
                total += torch.outer(g, g) / noise.shape[-1]
    return total / sum(problem.counts)


@pytest.mark.parametrize("route", ROUTES)
def test_the_monte_carlo_one_is_the_mean_over_its_draws(problem, route):
    operator = MonteCarloFisherOperator(problem, num_samples=3, seed=1, route=route)
    assert relative_error(operator.to_dense(), scores_of_draws(problem, operator)) < 1e-13


def test_its_mean_over_seeds_is_the_fisher_matrix(problem):
    exact = ht.FisherOperator(problem).to_dense()
    draws = [
        MonteCarloFisherOperator(problem, num_samples=50, seed=seed).to_dense()
        for seed in range(20)
    ]
    each = torch.stack(draws)
    deviation = each.std(0) / math.sqrt(len(draws))
    z = (each.mean(0) - exact) / deviation.clamp(min=1e-12)
    assert z.square().mean().sqrt() < 1.6  # 1 for independent entries
    error = relative_error(each.mean(0), exact)
    assert error < 0.1
    assert error < relative_error(draws[0], exact) / 2


def test_its_standard_error_covers():
    problem = classes()
    v = torch.randn(problem.num_parameters, dtype=torch.float64)
    exact = ht.FisherOperator(problem) @ v
    inside = []
    for seed in range(60):
        operator = MonteCarloFisherOperator(problem, num_samples=12, seed=seed)
        product, error = operator.with_error(v)
        assert relative_error(product, operator @ v) < 1e-12
        inside.append((product - exact).abs() <= 2.2 * error)  # Student's t, 11 degrees of freedom
    assert 0.9 < torch.stack(inside).double().mean() < 0.98


def test_a_seed_gives_the_same_matrix_however_batches_are_cut():
    problem = network("gpt")
    v = torch.randn(problem.num_parameters, dtype=torch.float64)
    products = [
        MonteCarloFisherOperator(problem, seed=3, **options) @ v
        for options in ({}, {"microbatch": 1}, {"microbatch": 1, "record": False})
    ]
    assert relative_error(products[1], products[0]) < 1e-12
    assert relative_error(products[2], products[0]) < 1e-12
    assert relative_error(MonteCarloFisherOperator(problem, seed=4) @ v, products[0]) > 1e-3


def test_draws_follow_the_weights():
    problem = classes()
    operator = MonteCarloFisherOperator(problem, num_samples=2)
    operator.to_dense()
    with torch.no_grad():
        for p in problem.parameters.values():
            p.mul_(1.5)
    assert relative_error(operator.to_dense(), scores_of_draws(problem, operator)) < 1e-13


# --------------------------------------------------------------------------------------- refusals


def test_a_loss_that_names_no_distribution_is_refused():
    batch = torch.randn(4, 3), torch.randn(4, 2)
    loss = ht.Loss(lambda model, batch: model(batch[0]), lambda z, batch: (z**4).mean())
    problem = ht.Problem(nn.Linear(3, 2), loss, [batch])
    for kind in (ht.FisherOperator, MonteCarloFisherOperator):
        with pytest.raises(
            ValueError, match=r"Loss does not say from which distribution; use ht\."
        ):
            kind(problem)


@pytest.mark.parametrize("samples", [0, 1.5])
def test_samples_are_whole_numbers(samples):
    with pytest.raises(ValueError, match="num_samples is"):
        MonteCarloFisherOperator(classes(), num_samples=samples)
    with pytest.raises(ValueError, match="at least 2"):
        MonteCarloFisherOperator(classes()).with_error(torch.zeros(1))


# ------------------------------------------------------------------------------------ transformers


def labelled(model, inputs, labels):
    batch = {"input_ids": inputs, "labels": labels}
    return ht.Problem(model.double().eval(), ht.huggingface, [batch])


def test_a_language_model_of_transformers_in_two_steps():
    from problems import hf_gpt2

    torch.manual_seed(8)
    tokens = torch.randint(11, (2, 6))
    labels = tokens.clone()
    labels[0, :2] = -100
    problem = labelled(hf_gpt2(), tokens, labels)
    # the library computes its own loss in float32
    batch = (tokens[:, :-1], labels[:, 1:])
    plain = ht.Problem(problem.model, ht.cross_entropy, [batch])
    assert problem.counts == plain.counts
    v = torch.randn(problem.num_parameters, dtype=torch.float64)
    for kind in (ht.GaussNewtonOperator, ht.FisherOperator, EmpiricalFisherOperator):
        assert relative_error(kind(problem) @ v, kind(plain) @ v) < 1e-10
    fisher = MonteCarloFisherOperator(problem, num_samples=2)
    assert fisher.verify(level="quick").passed


def test_a_masked_language_model_of_transformers_in_two_steps():
    from problems import hf_bert

    torch.manual_seed(9)
    tokens = torch.randint(11, (2, 6))
    labels = torch.where(torch.rand(2, 6) < 0.5, tokens, -100)
    labels[0, 0] = -100
    labels[1, 1] = 3
    problem = labelled(hf_bert(), tokens, labels)
    plain = ht.Problem(problem.model, ht.cross_entropy, [(tokens, labels)])
    v = torch.randn(problem.num_parameters, dtype=torch.float64)
    found = ht.GaussNewtonOperator(problem) @ v
    assert relative_error(found, ht.GaussNewtonOperator(plain) @ v) < 1e-10


def test_a_model_of_transformers_with_another_loss_is_told():
    from problems import hf_gpt2

    class Weighed(type(hf_gpt2())):
        def forward(self, **inputs):
            answer = super().forward(**inputs)
            answer.loss = answer.loss + 0.1 * answer.logits.square().mean()
            return answer

    model = hf_gpt2()
    model.__class__ = Weighed
    tokens = torch.randint(11, (2, 6))
    with pytest.raises(ValueError, match=r"not known in two steps \(a loss of its logits alone"):
        ht.GaussNewtonOperator(labelled(model, tokens, tokens))


def test_fisher_of_a_gpt_in_float32_keeps_its_digits():
    torch.manual_seed(10)
    inputs = torch.randint(11, (2, 7))
    batch = inputs[:, :-1], inputs[:, 1:]
    model = gpt()
    single = ht.Problem(model, ht.cross_entropy, [batch])
    v = torch.randn(single.num_parameters)
    found = ht.FisherOperator(single) @ v
    double = ht.Problem(model.double(), ht.cross_entropy, [batch])
    assert relative_error(found.double(), ht.GaussNewtonOperator(double) @ v.double()) < 1e-5
