"""What comes before the first product: planning by a bound of bytes, and quick verification."""

import copy

import pytest
import torch
from problems import NETWORKS, Cubed, SilentlyWrong, network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hessian_tools as ht
from hessian_tools.curvature.engine import engine
from hessian_tools.curvature.engine.trials import SMALL_BYTES
from hessian_tools.curvature.segments.recompute import NONE
from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.problem import zoo
from hessian_tools.problem.gradient import loss_and_gradient
from hessian_tools.problem.networks import NanoGPT
from hessian_tools.problem.weights import Watch


def operations(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def small_gpt():
    """6 layers of width 192, one sequence."""
    tokens = torch.randint(64, (1, 33))
    model = NanoGPT(64, 32, layers=6, d=192, num_heads=6, tied=False)
    return ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])


@pytest.fixture
def counted():
    problem = small_gpt()
    with problem.evaluating():
        unit = operations(lambda: problem.batch_value(problem.batches[0]))
    return problem, lambda call: operations(call) / unit


def test_planning_takes_ten_forward_passes_at_most(counted):
    problem, passes = counted
    made = []
    assert passes(lambda: made.append(ht.HessianOperator(problem))) <= 10
    hessian = made[0]
    assert "at most" in hessian.route
    assert passes(lambda: hessian.plan) > 25  # which is measured
    assert "at most" not in hessian.route


def test_a_quick_verification_is_a_fifth_of_the_full_one(counted):
    problem, passes = counted
    hessian = ht.HessianOperator(problem, route="double backward")
    quick = passes(lambda: hessian.verify(level="quick"))
    hessian.release()
    full = passes(hessian.verify)
    assert quick <= 18 and quick < full / 4


@pytest.mark.parametrize("name", NETWORKS)
def test_the_bound_is_no_less_than_what_trials_measure(name):
    trials = ht.HessianOperator(network(name))._engine.trials
    bound, measured = trials.bound(), trials.footprint(NONE)
    assert bound is not None
    for examples in (1, 4, 32):
        for rows in (1, 8, 64):
            most = bound.needs([examples], recorded=True).peak(rows)
            assert most >= measured.needs([examples], recorded=True).peak(rows)


@pytest.mark.parametrize("name", ["gpt", "vgg-nano", "resnet-nano"])
def test_the_bound_holds_where_small_bytes_do_not_count(name):
    problem = small_gpt()
    if name != "gpt":
        made = zoo.load(name, seed=0, num_examples=1, image_size=32)
        problem = ht.Problem(made.model, made.loss_fn, made.batches, batch_stats=made.batch_stats)
    trials = ht.HessianOperator(problem)._engine.trials
    bound, measured = trials.bound(), trials.footprint(NONE)
    most, needed = (found.needs([1], recorded=True) for found in (bound, measured))
    for rows in (1, 8):
        assert most.peak(rows) - rows * SMALL_BYTES >= needed.peak(rows)


def test_where_the_budget_is_in_doubt_trials_decide():
    problem = network("gpt")
    trials = ht.HessianOperator(problem)._engine.trials
    needed = trials.bound().needs([3], recorded=True).peak()
    problem = network("gpt")  # nothing is known of it yet
    assert not ht.HessianOperator(problem, memory=needed)._engine.plan.bounded


def test_a_long_run_is_worth_trials_where_they_may_find_room(monkeypatch):
    monkeypatch.setattr(engine, "WORTH_TRIALS", 50)
    problem = network("gpt")
    bound = ht.HessianOperator(problem)._engine.trials.bound()
    budget = int(bound.needs([3], recorded=True).peak(4) / 0.6)
    hessian = ht.HessianOperator(network("gpt"), memory=budget)
    assert hessian._engine.plan.bounded
    few = hessian._engine.plan.rows
    hessian.announcement(products=100, blocks=1)
    assert not hessian._engine.plan.bounded and hessian._engine.plan.rows > few


@pytest.mark.parametrize("name", NETWORKS)
def test_right_operators_pass_quickly(name):
    problem = network(name)
    before = copy.deepcopy(problem.model.state_dict())
    report = ht.HessianOperator(problem).verify(level="quick")
    assert report.passed, str(report)
    assert len(report.checks) + len(report.skipped) >= 3
    after = problem.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


class Padded(nn.Module):
    """padding_idx drops the gradient of token 0, which is read."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3, padding_idx=0)
        self.last = nn.Linear(3, 2)

    def forward(self, tokens):
        return self.last(torch.tanh(self.table(tokens)).mean(1))


def half_blind(model, batch):
    """A term that is detached has neither gradient nor Hessian."""
    seen = model(batch[0]).square().mean()
    return seen + torch.tanh(model.weight.detach()).square().sum()


def padded():
    tokens = torch.tensor([[0, 1], [2, 0]])
    return ht.Problem(Padded(), ht.cross_entropy, [(tokens, torch.tensor([0, 1]))])


def detached():
    batch = (torch.randn(8, 3, dtype=torch.float64),)
    return ht.Problem(nn.Linear(3, 2, dtype=torch.float64), half_blind, [batch])


def wrong_twice():
    x = torch.randn(4, 3, dtype=torch.float64)
    y = torch.ones(4, 2, dtype=torch.float64)
    return ht.Problem(Cubed(SilentlyWrong), ht.mse, [(x, y)])


@pytest.mark.parametrize("wrong", [padded, detached, wrong_twice])
def test_what_is_wrong_is_found_quickly(wrong):
    report = ht.HessianOperator(wrong()).verify(level="quick")
    assert not report.passed, str(report)


@pytest.mark.parametrize(
    ("spoil", "failing"),
    [
        (lambda product, v: 1.01 * product, "finite difference"),
        (lambda product, v: product + 0.1 * product.roll(1, 1), "finite difference"),
    ],
)
def test_a_spoiled_product_is_found_quickly(spoil, failing):
    class Spoiled(ht.HessianOperator):
        def _matmat(self, vectors):
            return spoil(super()._matmat(vectors), vectors)

    report = Spoiled(network("mlp")).verify(level="quick")
    assert any(check.name.startswith(failing) for check in report.failures), str(report)


def test_an_asymmetric_block_is_found_quickly():
    class Skewed(SymmetricOperator):
        """A block's operator, its product shifted by a place."""

        def __init__(self, operator):
            super().__init__(operator.size, operator.dtype, operator.device)
            self.operator = operator

        def _matmat(self, vectors):
            product = self.operator.matmat(vectors)
            return product + 0.1 * product.roll(1, 1)

    class OfSkewed(ht.HessianOperator):
        def block(self, block):
            return Skewed(super().block(block))

    report = OfSkewed(network("mlp")).verify(level="quick")
    assert [check.name[:17] for check in report.failures] == ["symmetry of block"]


def test_gradients_that_share_memory_are_no_difference():
    """Of a sum autograd gives both summands one tensor, and for a plain sum an expanded one."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.randn(4, dtype=torch.float64))
            self.b = nn.Parameter(torch.randn(4, dtype=torch.float64))
            self.c = nn.Parameter(torch.randn(4, dtype=torch.float64))

        def forward(self, x):
            return torch.sin((self.a + self.b) * x).sum(1) + self.c.sum()

    def loss(model, batch):
        return model(batch).mean()

    batches = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 2)]
    problem = ht.Problem(Sum(), loss, batches)
    value, gradient = loss_and_gradient(problem)
    pooled = loss(problem.model, torch.cat(batches))
    names = dict(problem.model.named_parameters())
    expected = torch.autograd.grad(pooled, list(names.values()))
    assert value == pytest.approx(pooled.item())
    for name, right in zip(names, expected, strict=True):
        torch.testing.assert_close(gradient[name], right)
    report = ht.HessianOperator(problem).verify(level="quick")
    assert report.passed and not report.skipped, str(report)


def test_other_levels_are_refused():
    with pytest.raises(ValueError, match="level is 'half'; allowed are 'full', 'quick'"):
        ht.HessianOperator(network("mlp")).verify(level="half")


def test_lanczos_looks_at_the_weights_once_a_run(monkeypatch):
    """A look is a checksum of all weights, which on a CPU costs a tenth of a product."""
    looks = []
    change = Watch.change

    def counting(self):
        looks.append(self)
        return change(self)

    monkeypatch.setattr(Watch, "change", counting)
    problem = network("mlp")
    ht.blockwise_slq(problem, ht.partition(problem.model, "weights"), num_steps=5, exact=False)
    assert len(looks) <= 3 * len(ht.partition(problem.model, "weights"))
