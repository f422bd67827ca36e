"""Losses that differentiate inside, that exist on whole batches only, and other losses of one's own."""

import pytest
import torch
from torch import nn

import hessian_tools as ht


def dense(model, loss, batch):
    """Plain double backward, entry by entry."""
    parameters = list(model.parameters())

    def flat(out, **options):
        gradients = torch.autograd.grad(
            out, parameters, allow_unused=True, materialize_grads=True, **options
        )
        return torch.cat([g.flatten() for g in gradients])

    gradient = flat(loss(model, batch), create_graph=True)
    return torch.stack([flat(entry, retain_graph=True) for entry in gradient])


def residual(model, batch):
    """Of u' + u = 0."""
    t = batch[0].clone().requires_grad_()
    u = model(t)
    (slope,) = torch.autograd.grad(u.sum(), t, create_graph=True)
    return (slope + u).square().mean()


def penalty(model, batch):
    x = batch[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return model(x).mean() + 10 * (g.norm(dim=1) - 1).square().mean()


def forces(model, batch):
    """Energy and its negative gradient by positions."""
    positions = batch[0].clone().requires_grad_()
    energy = model(positions).sum()
    (force,) = torch.autograd.grad(-energy, positions, create_graph=True)
    return (force - batch[0].sin()).square().mean()


def one_inner_step(model, batch):
    """MAML: the loss after a step of gradient descent."""
    names, values = zip(*model.named_parameters(), strict=True)
    inner = model(batch[0]).square().mean()
    gradients = torch.autograd.grad(inner, values, create_graph=True, allow_unused=True)
    moved = {
        name: value if g is None else value - 0.1 * g
        for name, value, g in zip(names, values, gradients, strict=True)
    }
    return (torch.func.functional_call(model, moved, (batch[0],)) - 1).square().mean()


def laplacian(model, batch):
    """Second derivatives by torch.func; the gradient of the last bias is zero without memory."""

    def value(x):
        return model(x)[0]

    second = torch.vmap(torch.func.hessian(value))(batch[0])
    return (second.diagonal(dim1=-2, dim2=-1).sum(-1) - 1).square().mean()


def only_while_training(model, batch):
    """Another value without gradients, and no error there."""
    loss = model(batch[0]).square().mean()
    return 3 * loss if torch.is_grad_enabled() else loss


LOSSES = [residual, penalty, forces, one_inner_step, laplacian, only_while_training]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_product_is_that_of_double_backward(loss):
    torch.manual_seed(0)
    width = 1 if loss is residual else 3
    model = nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    batch = (torch.rand(8, width, dtype=torch.float64),)
    expected = dense(model, loss, batch)
    problem = ht.Problem(model, loss, [batch])
    assert problem.loss == pytest.approx(loss(model, batch).item())
    hessian = ht.HessianOperator(problem)
    torch.testing.assert_close(hessian.to_dense(), expected, rtol=1e-6, atol=1e-9)
    hessian.expect(10**12)
    torch.testing.assert_close(hessian.to_dense(), expected, rtol=1e-6, atol=1e-9)
    assert hessian.announcement(10, 1).startswith("plan: 10 Hessian-vector products")
    assert hessian.verify().passed
    spectra = ht.blockwise_slq(problem, ht.partition(model, "weights"), num_probes=2, num_steps=4)
    assert len(spectra) > 1


def spread(model, batch):
    return torch.relu(2 - model(batch[0]).std(0)).mean()


def correlation(model, batch):
    z, t = model(batch[0])[:, 0], batch[0][:, 0]
    return 1 - ((z - z.mean()) * (t - t.mean())).mean() / (z.std() * t.std())


@pytest.mark.parametrize("loss", [spread, correlation])
def test_losses_of_whole_batches(loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = (torch.randn(12, 4, dtype=torch.float64),)
    hessian = ht.HessianOperator(ht.Problem(model, loss, [batch]))
    torch.testing.assert_close(hessian.to_dense(), dense(model, loss, batch), rtol=1e-6, atol=1e-9)


def test_boolean_indexing_falls_back_with_the_reason():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    y[::4] = -1

    def loss(model, batch):
        keep = batch[1] >= 0
        return nn.functional.cross_entropy(model(batch[0])[keep], batch[1][keep])

    count = lambda batch: int((batch[1] >= 0).sum())  # noqa: E731
    hessian = ht.HessianOperator(ht.Problem(model, loss, [(x, y)], num_examples=count))
    v = torch.randn(hessian.size)
    before = hessian @ v
    hessian.expect(10**12)
    torch.testing.assert_close(hessian @ v, before, rtol=1e-5, atol=1e-7)
    assert "shape depends on the values" in hessian.route


def test_the_mode_is_that_of_the_problems_making():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    hessian = ht.HessianOperator(
        ht.Problem(model, ht.cross_entropy, [(torch.randn(8, 4), torch.arange(8) % 3)]),
        record=False,
    )
    v = torch.randn(hessian.size)
    before = hessian @ v
    model.train()
    assert torch.equal(hessian @ v, before)
    assert model[1].training


@pytest.mark.parametrize(
    "value, named",
    [(torch.ones(2, dtype=torch.complex64), "complex"), (torch.eye(2).to_sparse(), "sparse")],
)
def test_parameters_that_are_not_real_and_dense_are_refused(value, named):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(value)

    with pytest.raises(ValueError, match=f"parameter w is {named}"):
        ht.Problem(Own(), lambda m, b: m.w.abs().sum(), [torch.ones(1)])


def test_parameters_of_size_zero_and_without_dimensions():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.none = nn.Parameter(torch.zeros(0, 3))
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.scale * self.layer(torch.cat([x, self.none]))

    torch.manual_seed(0)
    problem = ht.Problem(Own(), ht.mse, [(torch.randn(5, 3), torch.randn(5, 2))])
    hessian = ht.HessianOperator(problem)
    assert hessian.size == 9
    assert hessian.verify().passed
    spectra = ht.blockwise_slq(problem, ht.partition(problem.model, "tensor"), num_probes=2)
    assert spectra["scale"].trace.value == pytest.approx(2 * dense_scale(problem), rel=1e-4)


def dense_scale(problem):
    """Mean square of the layer's output, half the second derivative by the scale."""
    model, (x, _) = problem.model, problem.batches[0]
    return model.layer(x).square().mean().item()
