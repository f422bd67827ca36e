"""The gradient as an ordinary backward pass leaves it, and what autograd.grad does not see of it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hessian_tools as ht
from hessian_tools.problem import mean_gradient
from hessian_tools.problem.gradient import gradient_of_backward


class Reentrant(torch.autograd.Function):
    """Checkpointing as libraries other than torch write it."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            out = ctx.function(inner)
        torch.autograd.backward(out, gradient)
        return None, inner.grad


class Adapters(nn.Module):
    """A frozen embedding, then layers in a checkpoint, as recipes for LoRA have it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(20, 8).requires_grad_(False)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 20)

    def inner(self, z):
        return self.b(torch.tanh(self.a(z)))

    def forward(self, ids):
        h = self.embed(ids).requires_grad_()
        return self.how(self.inner, h)


def plain(function, h):
    return function(h)


def reentrant(function, h):
    return checkpoint(function, h, use_reentrant=True)


def not_reentrant(function, h):
    return checkpoint(function, h, use_reentrant=False)


def foreign(function, h):
    return Reentrant.apply(function, h)


IDS = torch.arange(24).reshape(4, 6) % 20


def problem_with(how):
    torch.manual_seed(0)
    return ht.Problem(Adapters(how), ht.cross_entropy, [(IDS, IDS)])


@pytest.mark.parametrize("how", [reentrant, not_reentrant])
def test_checkpointing_changes_no_product(how):
    expected = ht.HessianOperator(problem_with(plain)).to_dense()
    hessian = ht.HessianOperator(problem_with(how))
    torch.testing.assert_close(hessian.to_dense(), expected, rtol=1e-4, atol=1e-7)
    hessian.expect(10**12)
    torch.testing.assert_close(hessian.to_dense(), expected, rtol=1e-4, atol=1e-7)
    assert hessian.verify().passed


def test_a_hidden_backward_pass_is_refused():
    problem = problem_with(foreign)
    with pytest.raises(ht.NotTwiceDifferentiable, match=r"Reentrant.*checkpoint") as refusal:
        ht.HessianOperator(problem)
    assert "a.weight" in str(refusal.value)


def test_an_optimizer_in_the_backward_pass_does_not_step():
    problem = problem_with(plain)
    before = {name: p.detach().clone() for name, p in problem.parameters.items()}

    def step(p):
        p.data.sub_(p.grad)

    for p in problem.parameters.values():
        p.register_post_accumulate_grad_hook(step)
        p.grad = torch.ones_like(p)
    found = gradient_of_backward(problem, problem.batches[0])
    for name, gradient in mean_gradient(problem).items():
        torch.testing.assert_close(found[name], gradient)
        assert torch.equal(problem.parameters[name], before[name])
        assert problem.parameters[name].grad.eq(1).all()
    problem.batch_loss(problem.batches[0]).backward()  # the hooks are there again
    assert not torch.equal(problem.parameters["a.weight"], before["a.weight"])


class WrongGradient(torch.autograd.Function):
    """x -> x^2 whose backward forgets the factor 2, and can be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * x


def test_verify_holds_the_gradient_against_the_loss():
    """The difference of a wrong gradient would confirm the products that belong to it."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)

    def loss(model, batch):
        return WrongGradient.apply(model(batch)).mean()

    found = ht.HessianOperator(ht.Problem(model, loss, [torch.randn(8, 4)])).verify()
    assert [check.name for check in found.failures] == ["gradient against differences of the loss"]
