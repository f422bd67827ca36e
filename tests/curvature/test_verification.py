"""verify(): passes right operators, and says which check fails for wrong ones."""

import copy

import pytest
import torch
from problems import NETWORKS, Cubed, SilentlyWrong, network
from torch import nn

import hessian_tools as ht
from hessian_tools.curvature.referees import finite_difference, relative_difference
from hessian_tools.problem.networks import SmallResNet, SmallVGG


@pytest.mark.parametrize("name", NETWORKS)
def test_right_operators_pass(name):
    report = ht.HessianOperator(network(name)).verify()
    assert report.passed, str(report)


def test_a_wrong_second_derivative_is_found():
    x = torch.randn(4, 3, dtype=torch.float64)
    wrong = ht.Problem(Cubed(SilentlyWrong), ht.mse, [(x, torch.ones(4, 2, dtype=torch.float64))])
    report = ht.HessianOperator(wrong).verify()
    assert [check.name for check in report.failures] == ["finite difference of the gradient"]
    assert "FAILED finite difference" in str(report)


def test_a_gradient_that_is_not_the_loss_own_is_found():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 2)

        def forward(self, tokens):
            return self.last(torch.tanh(self.table(tokens)).mean(1))

    problem = ht.Problem(
        Padded(), ht.cross_entropy, [(torch.tensor([[0, 1], [2, 0]]), torch.tensor([0, 1]))]
    )
    report = ht.HessianOperator(problem).verify()
    # padding_idx drops the gradient of token 0 where it is read
    failures = [check.name for check in report.failures]
    assert "gradient against differences of the loss" in failures, str(report)


def test_what_every_derivative_is_blind_to_is_found_by_the_loss():
    """A term that is detached has no gradient, and no Hessian either: those two agree."""

    def half_blind(model, batch):
        seen = model(batch[0]).square().mean()
        return seen + torch.tanh(model.weight.detach()).square().sum()

    batch = (torch.randn(8, 3, dtype=torch.float64),)
    problem = ht.Problem(nn.Linear(3, 2, dtype=torch.float64), half_blind, [batch])
    report = ht.HessianOperator(problem).verify()
    failures = [check.name for check in report.failures]
    assert failures == ["gradient against differences of the loss"], str(report)


@pytest.mark.parametrize("network_class", [SmallResNet, SmallVGG])
def test_kinks_do_not_disturb_the_referee(network_class):
    torch.manual_seed(0)
    batch = (torch.randn(8, 3, 16, 16), torch.randint(10, (8,)))
    stats = True if network_class is SmallResNet else None
    report = ht.HessianOperator(
        ht.Problem(network_class(), ht.cross_entropy, [batch], batch_stats=stats)
    ).verify()
    assert report.passed and report.checks[-1].name.startswith("finite difference"), str(report)


class FloatInside(nn.Module):
    """Computes in float32 whatever its parameters are."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(x.float() * self.weight.float()).sum(-1, keepdim=True)


def test_differences_know_how_coarsely_the_loss_computes():
    """Small steps change nothing there, and no change at two steps is no agreement."""
    torch.manual_seed(0)
    batch = (torch.randn(8, 6), torch.randn(8, 1))
    problem = ht.Problem(FloatInside(), ht.mse, [batch])
    v = torch.randn(6, dtype=torch.float64)
    reference = finite_difference(problem, [v])

    def exact(weight):
        return (torch.tanh(batch[0].double() * weight).sum(-1) - batch[1][:, 0]).square().mean()

    weight = problem.parameters["weight"].detach()
    product = torch.autograd.functional.hessian(exact, weight) @ v
    error = relative_difference(reference.product, [product])
    assert error < reference.uncertainty < 1e-2


class Tampered(ht.HessianOperator):
    """A HessianOperator whose products are spoilt; the one that verify() makes itself, for cut
    batches, is honest."""

    def __init__(self, problem, spoil=lambda product, vectors: product, **options):
        super().__init__(problem, **options)
        self.spoil = spoil

    def _matmat(self, vectors):
        return self.spoil(super()._matmat(vectors), vectors)


@pytest.mark.parametrize(
    ("spoil", "failing"),
    [
        (lambda hv, v: hv + 0.1 * hv.roll(1, 1), "symmetry"),
        (lambda hv, v: hv + 0.1 * v.abs(), "linearity"),
        (lambda hv, v: 1.1 * hv, "block"),
        (lambda hv, v: 1.1 * hv, "cut batches"),
        (lambda hv, v: 1.1 * hv, "finite difference"),
    ],
)
def test_every_check_can_fail(spoil, failing):
    problem = network("mlp")
    names = [check.name for check in Tampered(problem, spoil=spoil).verify().failures]
    assert any(name.startswith(failing) for name in names), names


def test_the_model_is_left_as_it_was():
    problem = network("hf-gpt2", torch.float32)
    before = copy.deepcopy(problem.model.state_dict())
    report = ht.HessianOperator(problem).verify(list(ht.partition(problem.model, "head"))[:2])
    assert report.passed and not report.skipped, str(report)
    assert all(
        torch.equal(value, before[name]) for name, value in problem.model.state_dict().items()
    )


def test_what_cannot_be_checked_is_said():
    report = ht.HessianOperator(network("batchnorm-batch")).verify()
    assert any("batch statistics" in reason for reason in report.skipped)
    no_mean = ht.Problem(nn.Linear(3, 2), lambda m, x: m(x).sum() ** 2, [torch.randn(4, 3)])
    report = ht.HessianOperator(no_mean).verify()
    assert report.passed and "pooled loss" in report.skipped[0]
