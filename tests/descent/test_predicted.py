"""Predicted progress against closed forms, simulated steps and the loss itself."""

import numpy as np
import pytest
import torch
from problems import dense_hessian, network
from torch import Tensor, nn, optim

import hessian_tools as ht
from hessian_tools.curvature.hessian import HessianOperator
from hessian_tools.curvature.preconditioners import (
    DiagonalPreconditioner,
    KroneckerPreconditioner,
)
from hessian_tools.curvature.progress import product_bar
from hessian_tools.descent.methods import DIAGONAL_ONLY, solved_methods
from hessian_tools.descent.reduced import LEFT, best_rates, owners_of
from hessian_tools.descent.trajectories import best_fixed_rate, fall
from hessian_tools.problem.gradient import mean_gradient
from hessian_tools.problem.problem import Problem


class Sum(nn.Module):
    """Linear in its weights, which are three tensors of very different scales."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x[:, :4]) + self.second(30 * x[:, 4:])


def convex(loss, dtype=torch.float64, sizes=(9, 4, 12, 5, 7), seed=0) -> Problem:
    """Least squares, or softmax regression, whose Hessian is the Gauss-Newton matrix."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Sum().to(dtype)
        inputs = [torch.randn(n, 6, dtype=dtype) for n in sizes]
        if loss is ht.mse:
            targets = [torch.randn(n, 3, dtype=dtype) for n in sizes]
        else:
            targets = [torch.randint(3, (n,)) for n in sizes]
    return ht.Problem(model, loss, list(zip(inputs, targets, strict=True)))


def flat(tensors) -> np.ndarray:
    return torch.cat([t.detach().double().flatten() for t in tensors.values()]).numpy()


class Dense:
    """The same quadratic in numpy."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.hessian = dense_hessian(problem).numpy()
        self.gradient = flat(mean_gradient(problem))

    def columns(self, partition, direction=None) -> np.ndarray:
        """(P, B) the direction within each block; entries in none make a last column."""
        direction = self.gradient if direction is None else direction
        sizes = [p.numel() for p in self.problem.parameters.values()]
        numbers = torch.arange(sum(sizes)).split(sizes)
        named = zip(self.problem.parameters.items(), numbers, strict=True)
        shaped = {name: n.view(p.shape) for (name, p), n in named}
        columns = np.zeros((len(direction), len(partition)))
        for i, block in enumerate(partition):
            inside = block.as_cut().rows(shaped).flatten().numpy()
            columns[inside, i] = direction[inside]
        rest = direction * (columns == 0).all(axis=1)
        return np.column_stack([columns, rest]) if rest.any() else columns

    def best(self, columns: np.ndarray) -> tuple[float, np.ndarray]:
        matrix = columns.T @ self.hessian @ columns
        slopes = columns.T @ self.gradient
        rates = np.linalg.pinv(matrix, rcond=1e-13) @ slopes
        return slopes @ rates / 2, rates

    def fall(self, w: np.ndarray) -> float:
        return -(self.gradient @ w + w @ self.hessian @ w / 2)

    def run(self, inverse: np.ndarray, rate: float, steps: int) -> float:
        """The fall after steps of w <- w - rate P^-1 (g + A w), P^-1 = diag(inverse)."""
        w = np.zeros_like(self.gradient)
        for _ in range(steps):
            w = w - rate * inverse * (self.gradient + self.hessian @ w)
        return self.fall(w)


LOSSES = {"least squares": ht.mse, "softmax": ht.cross_entropy}


@pytest.fixture(params=LOSSES)
def dense(request) -> Dense:
    return Dense(convex(LOSSES[request.param]))


def found_for(dense: Dense, partition=None, **settings) -> ht.descent.PredictedProgress:
    return ht.predicted_progress(HessianOperator(dense.problem), partition, **settings)


@pytest.mark.parametrize("spec", ["tensor", "neuron", "column", "some"])
def test_one_step_is_the_closed_form(dense, spec):
    model = dense.problem.model
    given = {"column": {"*.weight": "column", "*": "whole"}, "some": ["first.weight"]}
    partition = ht.partition(model, given.get(spec, spec))
    found = found_for(dense, partition, rows=True)
    g = dense.gradient
    one, _ = dense.best(g[:, None])
    assert found.one_rate.one_step == pytest.approx((g @ g) ** 2 / (2 * g @ dense.hessian @ g))
    direction = g / (np.abs(g) + 1e-8)
    for line, columns in (
        (found.block_rates, dense.columns(partition)),
        (found.row_rates, dense.columns(ht.partition(model, "neuron"))),
        (found.adam, direction[:, None]),
        (found.adam_block_rates, dense.columns(partition, direction)),
    ):
        value, rates = dense.best(columns)
        assert line.one_step == pytest.approx(value, rel=1e-8)
        assert line.ratio == pytest.approx(value / one, rel=1e-8)
        assert len(line.rates) == len(rates) and not line.why
        step = columns @ line.rates  # M may be singular, and then the rates are one choice of many
        assert dense.fall(-step) == pytest.approx(value, rel=1e-7)
    assert found.blocks[: len(partition)] == partition.names
    assert found.blocks[len(partition) :] == ((LEFT,) if spec == "some" else ())


def test_the_loss_of_least_squares_falls_by_it():
    problem = convex(ht.mse)
    partition = ht.partition(problem.model, "neuron")
    found = ht.predicted_progress(HessianOperator(problem), partition)
    columns = Dense(problem).columns(partition)
    step = torch.from_numpy(columns @ found.block_rates.rates)
    before = problem.loss
    sizes = [p.numel() for p in problem.parameters.values()]
    with torch.no_grad():
        for p, piece in zip(problem.parameters.values(), step.split(sizes), strict=True):
            p -= piece.view(p.shape)
    after = Problem(problem.model, problem.loss_fn, problem.batches).loss
    assert before - after == pytest.approx(found.block_rates.one_step, rel=1e-10)
    assert found.loss == pytest.approx(before)


def test_more_rates_gain_more_and_one_block_is_one_rate(dense):
    found = found_for(dense, "tensor", rows=True)
    assert found.one_rate.ratio == 1
    assert found.row_rates.one_step >= found.block_rates.one_step >= found.one_rate.one_step
    assert found.adam_block_rates.one_step >= found.adam.one_step
    assert found.block_rates.ratio > 1.001
    single = found_for(dense, "model")
    assert single.block_rates.one_step == pytest.approx(single.one_rate.one_step, rel=1e-12)
    assert single.adam_block_rates.one_step == pytest.approx(single.adam.one_step, rel=1e-12)


def nonnegative(dense: Dense, columns: np.ndarray) -> np.ndarray:
    """The best rates that are not negative, by trying every set of blocks that move."""
    count = columns.shape[1]
    best, rates = 0.0, np.zeros(count)
    for number in range(1, 2**count):
        used = [i for i in range(count) if number >> i & 1]
        value, some = dense.best(columns[:, used])
        if value > best and (some >= 0).all():
            best, rates = value, np.zeros(count)
            rates[used] = some
    return rates


@pytest.mark.parametrize("steps", [2, 5, 40])
def test_many_steps_are_those_of_a_loop(dense, steps):
    partition = ht.partition(dense.problem.model, "tensor")
    found = found_for(dense, partition, rows=True, steps=steps)
    g = dense.gradient
    size = np.abs(g) + 1e-8
    cases = [(found.one_rate, np.ones_like(g)), (found.adam, 1 / size)]
    by_row = ht.partition(dense.problem.model, "neuron")
    for line, blocks, direction in (
        (found.block_rates, partition, g),
        (found.adam_block_rates, partition, g / size),
        (found.row_rates, by_row, g),
    ):
        rates = nonnegative(dense, dense.columns(blocks, direction))
        cases.append((line, dense.columns(blocks, np.ones_like(g)) @ rates * direction / g))
    for line, inverse in cases:
        rate = line.many_steps_rate
        simulated = dense.run(inverse, rate, steps)
        assert line.many_steps == pytest.approx(simulated, rel=1e-6)
        for factor in (0.97, 1.03):  # the best of all fixed rates
            assert dense.run(inverse, factor * rate, steps) < simulated
    assert found.one_rate.many_steps_ratio == 1
    ratio = found.block_rates.many_steps / found.one_rate.many_steps
    assert found.block_rates.many_steps_ratio == pytest.approx(ratio)


def test_a_fixed_rate_may_gain_less_in_two_steps_than_the_best_single_step():
    """The best step overshoots where curvature is high; repeated, it would diverge there."""
    found = of_bowl([1.0, 100.0], [1.0, 0.1], steps=2)
    one, several = found.one_rate.one_step, found.one_rate.many_steps
    assert one == pytest.approx(1.01**2 / (2 * (1 + 100 * 0.01)))
    assert several < 0.5 * one
    assert found.block_rates.many_steps == pytest.approx(found.block_rates.one_step)


def test_few_lanczos_steps_are_an_estimate(dense):
    exact = found_for(dense, steps=40).one_rate
    short = found_for(dense, steps=40, krylov=6).one_rate
    assert short.many_steps == pytest.approx(exact.many_steps, rel=0.05)


def test_without_room_for_a_basis(dense):
    class Tight(HessianOperator):
        krylov_bytes = 0

    found = ht.predicted_progress(Tight(dense.problem), "tensor", steps=40).methods()
    for name, line in found_for(dense, "tensor", steps=40).methods().items():
        assert found[name].many_steps == pytest.approx(line.many_steps, rel=1e-6)


def test_the_best_fixed_rate_of_a_measure():
    nodes, weights = np.array([0.0, 1e-3, 0.5, 4.0]), np.array([1.0, 2.0, 1.0, 0.5])
    for steps in (1, 3, 1000):
        value, rate, why = best_fixed_rate(nodes, weights, steps, 1e-12)
        assert not why and value == pytest.approx(fall(nodes, weights, steps, rate))
        near = [fall(nodes, weights, steps, rate * factor) for factor in (0.999, 1.001)]
        assert max(near) < value
    value, rate, _ = best_fixed_rate(np.array([2.0]), np.array([9.0]), 7, 1e-12)
    assert rate == pytest.approx(0.5) and value == pytest.approx(9 / 4)
    for bad, words in ((np.array([-1.0, 2.0]), "not positive"), (np.array([-1.0]), "largest curv")):
        value, _, why = best_fixed_rate(bad, np.ones(len(bad)), 3, 1e-12)
        assert np.isnan(value) and words in why


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_float32_agrees_with_float64(loss):
    fine, coarse = convex(loss), convex(loss, torch.float32)
    for p, q in zip(fine.parameters.values(), coarse.parameters.values(), strict=True):
        q.data.copy_(p.data)
    coarse.batches = [(x.float(), y.float() if loss is ht.mse else y) for x, y in fine.batches]
    found = [
        ht.predicted_progress(HessianOperator(problem), "tensor", steps=5)
        for problem in (fine, coarse)
    ]
    for exact, rounded in zip(*(f.methods().values() for f in found), strict=True):
        assert rounded.one_step == pytest.approx(exact.one_step, rel=1e-3)
        assert rounded.many_steps == pytest.approx(exact.many_steps, rel=1e-3)
        assert rounded.one_step_error == pytest.approx(exact.one_step_error, rel=1e-2)


# --- values that do not exist


class Bowl(nn.Module):
    """Loss c'w + w'diag(a) w / 2."""

    def __init__(self, curvature, slope) -> None:
        super().__init__()
        tensors = [torch.zeros(1, dtype=torch.float64) for _ in curvature]
        self.weights = nn.ParameterList(tensors)
        self.curvature, self.slope = curvature, slope


def bowl_loss(model: Bowl, batch) -> Tensor:
    terms = zip(model.weights, model.curvature, model.slope, strict=True)
    return sum((c * w + a * w**2 / 2).squeeze() for w, a, c in terms)


def of_bowl(curvature, slope, **settings) -> ht.descent.PredictedProgress:
    problem = ht.Problem(Bowl(curvature, slope), bowl_loss, [torch.zeros(1)])
    return ht.predicted_progress(HessianOperator(problem), "tensor", **settings)


def test_an_indefinite_matrix_gives_nan_and_says_why():
    found = of_bowl([3.0, -1.0], [1.0, 1.0], steps=3)
    assert found.one_rate.one_step == pytest.approx(4 / (2 * 2))  # g'A g = 2: bounded along g
    assert np.isnan(found.block_rates.one_step) and np.isnan(found.block_rates.rates).all()
    assert "d'A d is -1 within weights.1" in found.block_rates.why
    assert np.isnan(found.one_rate.many_steps)
    assert "not positive semidefinite: g meets" in found.one_rate.many_steps_why
    assert np.isnan(found.block_rates.many_steps_ratio)
    worse = of_bowl([1.0, -3.0], [1.0, 1.0])
    assert "d'A d is -2 within the whole direction" in worse.one_rate.why
    assert "a rate a block: d'A d is -3" in str(worse)


def test_the_hessian_of_a_network_is_no_error():
    found = ht.predicted_progress(HessianOperator(network("gpt")), "neuron", steps=3)
    assert np.isnan(found.block_rates.one_step)
    assert found.block_rates.why.startswith(("not positive", "d'A d"))


def test_a_direction_without_curvature_is_unbounded():
    found = of_bowl([2.0, 0.0], [1.0, 1.0])
    assert np.isnan(found.block_rates.one_step)
    assert "d'A d is 0 within weights.1" in found.block_rates.why
    matrix = np.array([[1.0, 1.0], [1.0, 1.0]])  # the null space is (1, -1)
    best = best_rates(matrix, np.array([1.0, 0.5]), ["a", "b"], 1e-12)
    assert np.isnan(best.decrease) and "unbounded" in best.why
    best = best_rates(matrix, np.array([1.0, 1.0]), ["a", "b"], 1e-12)
    assert best.decrease == pytest.approx(0.5) and not best.why
    indefinite = np.array([[1.0, 2.0], [2.0, 1.0]])
    best = best_rates(indefinite, np.array([1.0, 1.0]), ["a", "b"], 1e-12)
    assert "not positive semidefinite: an eigenvalue -0.33 times the largest" in best.why


def test_blocks_without_gradient_are_left_out():
    found = of_bowl([2.0, 5.0, -1.0], [1.0, 3.0, 0.0], steps=4)
    assert found.block_rates.one_step == pytest.approx(1 / 4 + 9 / 10)
    np.testing.assert_allclose(found.block_rates.rates, [0.5, 0.2, 0.0])
    assert found.block_rates.many_steps == pytest.approx(1 / 4 + 9 / 10)
    still = of_bowl([2.0, 5.0], [0.0, 0.0], steps=2)
    assert still.one_rate.one_step == still.block_rates.many_steps == 0


# --- preconditioners


def test_the_preconditioner_of_a_live_optimizer(dense):
    problem = dense.problem
    optimizer = optim.Adam(problem.model.parameters(), lr=1e-3)
    for batch in problem.batches[:3]:
        optimizer.zero_grad()
        problem.batch_loss(batch).backward()
        optimizer.step()
    dense = Dense(problem)
    p = ht.preconditioner_of(optimizer, problem)
    found = found_for(dense, "tensor", preconditioner=p, steps=6)
    d = flat(p.diagonal)
    partition = ht.partition(problem.model, "tensor")
    one, _ = dense.best((dense.gradient / d)[:, None])
    several, _ = dense.best(dense.columns(partition, dense.gradient / d))
    assert found.adam.one_step == pytest.approx(one)
    assert found.adam_block_rates.one_step == pytest.approx(several)
    simulated = dense.run(1 / d, found.adam.many_steps_rate, 6)
    assert found.adam.many_steps == pytest.approx(simulated)


def units(g: Tensor) -> Tensor:
    return torch.eye(g.numel(), dtype=g.dtype).reshape(g.numel(), *g.shape)


def test_a_kronecker_preconditioner(dense):
    problem = dense.problem
    gradient = mean_gradient(problem)
    matrices = {name: g for name, g in gradient.items() if g.ndim == 2}
    factors = {
        name: (g @ g.T + 0.1 * torch.eye(len(g)), g.T @ g + 0.1 * torch.eye(g.shape[1]))
        for name, g in matrices.items()
    }
    others = {name: torch.ones_like(g) for name, g in gradient.items() if g.ndim == 1}
    shampoo = KroneckerPreconditioner(factors, power=0.5, others=others)
    found = found_for(dense, "tensor", preconditioner=shampoo, steps=4)
    direction = flat({name: shampoo.inverse(name, g[None])[0] for name, g in gradient.items()})
    expected, _ = dense.best(direction[:, None])
    assert found.adam.one_step == pytest.approx(expected)
    roots = {
        name: torch.stack([shampoo.inverse(name, e[None])[0].flatten() for e in units(g)])
        for name, g in gradient.items()
    }
    inverse = torch.block_diag(*roots.values()).numpy()
    w = np.zeros(len(inverse))
    for _ in range(4):
        w -= found.adam.many_steps_rate * inverse @ (dense.gradient + dense.hessian @ w)
    assert found.adam.many_steps == pytest.approx(dense.fall(w))
    assert found.adam_block_rates.many_steps_why == DIAGONAL_ONLY
    assert found.adam_block_rates.one_step >= expected


# --- standard errors


def methods_at(problem: Problem, weights, preconditioner, directions=None):
    """{method: decrease} of the problem whose batches have these weights, by dense matrices."""
    gradient = 0.0
    hessian = 0.0
    for weight, batch in zip(weights, problem.batches, strict=True):
        part = Problem(problem.model, problem.loss_fn, [batch])
        gradient = gradient + weight * flat(mean_gradient(part))
        hessian = hessian + weight * dense_hessian(part).numpy()
    dense = Dense.__new__(Dense)
    dense.problem, dense.gradient, dense.hessian = problem, gradient, hessian
    partition = ht.partition(problem.model, "tensor")
    if directions is None:
        directions = gradient / flat(preconditioner.diagonal)
    return {
        "one rate": dense.best(gradient[:, None])[0],
        "a rate a block": dense.best(dense.columns(partition))[0],
        "preconditioned": dense.best(directions[:, None])[0],
        "preconditioned, a rate a block": dense.best(dense.columns(partition, directions))[0],
    }


@pytest.mark.parametrize("given", [True, False], ids=["P given", "default P"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_standard_errors_are_those_of_the_infinitesimal_jackknife(loss, given):
    problem = convex(loss)
    stream = torch.Generator().manual_seed(3)
    drawn = {
        name: torch.rand(p.shape, generator=stream, dtype=torch.float64) + 0.5
        for name, p in problem.parameters.items()
    }
    preconditioner = DiagonalPreconditioner(drawn) if given else None
    found = ht.predicted_progress(
        HessianOperator(problem), "tensor", preconditioner=preconditioner
    ).methods()
    g = flat(mean_gradient(problem))
    directions = None if given else g / (np.abs(g) + 1e-8)
    weights = np.array(problem.weights)
    base = methods_at(problem, weights, preconditioner, directions)
    squares = dict.fromkeys(found, 0.0)
    ratio_squares = dict.fromkeys(found, 0.0)
    step = 1e-6
    for i, weight in enumerate(weights):
        ends = []
        for sign in (1, -1):
            moved = (1 - sign * step) * weights
            moved[i] += sign * step
            ends.append(methods_at(problem, moved, preconditioner, directions))
        for name in found:
            ahead, behind = (end[name] for end in ends)
            squares[name] += (weight * (ahead - behind) / (2 * step)) ** 2
            ratios = [end[name] / end["one rate"] for end in ends]
            ratio_squares[name] += (weight * (ratios[0] - ratios[1]) / (2 * step)) ** 2
    correction = len(weights) / (len(weights) - 1)
    for name, line in found.items():
        assert line.one_step == pytest.approx(base[name], rel=1e-8)
        expected = (correction * squares[name]) ** 0.5
        assert line.one_step_error == pytest.approx(expected, rel=1e-4)
        expected = (correction * ratio_squares[name]) ** 0.5
        assert line.ratio_error == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_few_batches_give_no_errors_and_many_are_grouped():
    few = ht.predicted_progress(HessianOperator(convex(ht.mse, sizes=(5, 6, 7))))
    assert np.isnan(few.one_rate.one_step_error) and "they need 4 batches" in few.notes[0]
    many = convex(ht.mse, sizes=(3,) * 40)
    found = ht.predicted_progress(HessianOperator(many))
    assert 0 < found.one_rate.one_step_error < found.one_rate.one_step
    without = ht.predicted_progress(HessianOperator(many), batches_standard_error=False)
    assert np.isnan(without.one_rate.one_step_error) and not without.notes
    assert without.num_matvecs == found.num_matvecs - 4


# --- the result


def test_products_are_counted():
    problem = convex(ht.mse, sizes=(5, 6))
    operator = HessianOperator(problem)
    spent = []
    inner = operator.products

    def counted(names, count, spread, collect):
        spent.append(count)
        inner(names, count, spread, collect)

    operator.products = counted
    found = ht.predicted_progress(operator, "tensor", rows=True, steps=3)
    assert sum(spent) == found.num_matvecs == 2 * 3 + len(found.rows) + 5 * 3


def test_products_are_made_in_parts_where_memory_is_short():
    problem = convex(ht.mse)
    operator = HessianOperator(problem, microbatch=2)
    found = ht.predicted_progress(operator, "element")
    expected = ht.predicted_progress(HessianOperator(problem), "element")
    assert found.block_rates.one_step == pytest.approx(expected.block_rates.one_step)


def test_it_is_saved_and_shown(tmp_path):
    found = ht.predicted_progress(HessianOperator(convex(ht.mse)), rows=True, steps=3)
    ht.save(found, tmp_path / "progress")
    loaded = ht.load(tmp_path / "progress")
    assert loaded.blocks == found.blocks
    assert np.array_equal(loaded.row_rates.rates, found.row_rates.rates)
    text = str(found)
    assert text == str(loaded)
    assert "in the unit of the loss" in text and "3 steps" in text and "±" in text
    assert [line.split("  ")[0] for line in text.splitlines()[3:]] == list(found.methods())
    short = str(ht.predicted_progress(HessianOperator(convex(ht.mse, sizes=(5, 6)))))
    assert "no standard errors" in short and "steps" not in short


def test_arguments_that_do_not_fit():
    problem = convex(ht.mse)
    operator = HessianOperator(problem)
    with pytest.raises(TypeError, match="operator is a Problem; pass a curvature operator"):
        ht.predicted_progress(problem)
    p = DiagonalPreconditioner({n: torch.ones_like(t) for n, t in problem.parameters.items()})
    with pytest.raises(TypeError, match="operator is preconditioned already"):
        ht.predicted_progress(ht.PreconditionedOperator(operator, p))
    with pytest.raises(ValueError, match="steps is 0"):
        ht.predicted_progress(operator, steps=0)
    with pytest.raises(ValueError, match="relative_floor is 1"):
        ht.predicted_progress(operator, relative_floor=1.0)
    with pytest.raises(ValueError, match=r"rows=True needs 7 products.*max_rows is 2"):
        ht.predicted_progress(operator, rows=True, max_rows=2)
    with pytest.raises(ValueError, match="does not cover"):
        ht.predicted_progress(operator, preconditioner=DiagonalPreconditioner({}))
    problem.model.first.weight.data.fill_(float("nan"))
    with pytest.raises(ArithmeticError, match="NaN or inf"):
        ht.predicted_progress(operator)


def test_the_reduced_matrix_is_that_of_the_directions(dense):
    partition = ht.partition(dense.problem.model, "neuron")
    owners = owners_of(dense.problem, partition.cuts)
    operator = HessianOperator(dense.problem)
    gradient = mean_gradient(dense.problem)
    methods = solved_methods(
        operator, gradient, owners, None, None, 1e-8, None, product_bar(None, shown=False)
    )
    columns = dense.columns(partition)
    np.testing.assert_allclose(
        methods["blocks"].matrix, columns.T @ dense.hessian @ columns, atol=1e-12
    )
