"""P^-1/2 A P^-1/2 against dense float64 matrices, and P against the steps that optimizers take."""

import numpy as np
import pytest
import torch
from problems import dense_hessian, network
from scipy.linalg import fractional_matrix_power
from torch import Tensor, nn, optim

import hessian_tools as ht
from hessian_tools.curvature.hessian import HessianOperator, in_float64
from hessian_tools.curvature.preconditioned import PreconditionedOperator
from hessian_tools.curvature.preconditioners import (
    DiagonalPreconditioner,
    KroneckerPreconditioner,
)
from hessian_tools.problem.gradient import mean_gradient
from hessian_tools.problem.problem import Problem


def flat(pieces) -> np.ndarray:
    return torch.cat([piece.detach().double().flatten() for piece in pieces]).numpy()


def trained(optimizer: optim.Optimizer, problem: Problem, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss = problem.batch_loss(problem.batches[step % len(problem.batches)])
        loss.backward()
        optimizer.step()


def drawn_diagonal(problem: Problem) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(p.shape, generator=stream).to(p).exp()
        for name, p in problem.parameters.items()
    }


def drawn_factors(problem: Problem) -> dict[str, tuple[Tensor, Tensor]]:
    stream = torch.Generator().manual_seed(2)

    def factor(size: int) -> Tensor:
        half = torch.randn(size, size + 2, generator=stream, dtype=torch.float64)
        return half @ half.T

    matrices = {name: p for name, p in problem.parameters.items() if p.ndim > 1}
    return {name: (factor(len(p)), factor(p[0].numel())) for name, p in matrices.items()}


def kronecker(problem: Problem, power: float) -> tuple[KroneckerPreconditioner, np.ndarray]:
    """One with diagonals for biases, and its dense P."""
    factors = drawn_factors(problem)
    others = {name: d for name, d in drawn_diagonal(problem).items() if name not in factors}
    dense = np.zeros((problem.num_parameters,) * 2)
    start = 0
    for name, p in problem.parameters.items():
        inside = slice(start, start + p.numel())
        if name in factors:
            left, right = (fractional_matrix_power(f.numpy(), power) for f in factors[name])
            dense[inside, inside] = np.kron(left, right)
        else:
            dense[inside, inside] = np.diag(others[name].numpy())
        start += p.numel()
    return KroneckerPreconditioner(factors, power=power, others=others), dense


@pytest.fixture(params=["diagonal", "shampoo", "shampoo^2"])
def case(request):
    """(problem, operator, dense P^-1/2 H P^-1/2, dense P^-1 H)."""
    problem = network("mlp")
    if request.param == "diagonal":
        diagonal = drawn_diagonal(problem)
        preconditioner, p = DiagonalPreconditioner(diagonal), np.diag(flat(diagonal.values()))
    else:
        power = 0.25 if request.param == "shampoo" else 0.5
        preconditioner, p = kronecker(problem, power)
    root = np.linalg.inv(fractional_matrix_power(p, 0.5)).real
    hessian = dense_hessian(problem).numpy()
    operator = PreconditionedOperator(HessianOperator(problem), preconditioner)
    return problem, operator, root @ hessian @ root, np.linalg.inv(p) @ hessian


def positions(problem: Problem, cut) -> np.ndarray:
    """(B, n) numbers of the blocks' entries among all."""
    sizes = [p.numel() for p in problem.parameters.values()]
    numbers = torch.arange(sum(sizes)).split(sizes)
    items = zip(problem.parameters.items(), numbers, strict=True)
    return cut.rows({name: n.view(p.shape) for (name, p), n in items}).numpy()


def test_whole_blocks_pieces_stacks_and_columns(case):
    problem, operator, oracle, _ = case
    np.testing.assert_allclose(operator.to_dense().numpy(), oracle, atol=1e-10)
    for spec in ("tensor", "neuron"):  # of "neuron" the blocks are rows of weights
        cuts = ht.partition(problem.model, spec).cuts
        columns = operator.columns(cuts)
        every = np.concatenate([positions(problem, cut).flatten() for cut in cuts])
        for cut in cuts:
            places = positions(problem, cut)
            vectors = torch.randn(cut.num_blocks, cut.block_size, dtype=torch.float64)
            rows = zip(places, vectors.numpy(), strict=True)
            expected = np.stack([oracle[np.ix_(i, i)] @ v for i, v in rows])
            found = operator.stacked(cut).matmat(vectors).numpy()
            np.testing.assert_allclose(found, expected, atol=1e-10)
            block = operator.block(cut[-1]).to_dense().numpy()
            np.testing.assert_allclose(block, oracle[np.ix_(places[-1], places[-1])], atol=1e-10)
            last = torch.tensor([cut.num_blocks - 1])
            column = columns.products(cut, last, vectors[-1:])[0].numpy()
            expected = oracle[np.ix_(every, places[-1])] @ vectors[-1].numpy()
            np.testing.assert_allclose(column, expected, atol=1e-10)


def test_a_row_is_cut_from_the_product_not_preconditioned_by_itself():
    """The block of a piece is that of P^-1/2 A P^-1/2; cutting first is another matrix."""
    problem = network("mlp")
    preconditioner, p = kronecker(problem, 0.5)
    root = np.linalg.inv(fractional_matrix_power(p, 0.5)).real
    hessian = dense_hessian(problem).numpy()
    operator = PreconditionedOperator(HessianOperator(problem), preconditioner)
    cut = ht.partition(problem.model, "neuron").cuts[0]
    inside = np.ix_(*2 * [positions(problem, cut)[0]])
    found = operator.block(cut[0]).to_dense().numpy()
    np.testing.assert_allclose(found, (root @ hessian @ root)[inside], atol=1e-10)
    cut_first = root[inside] @ hessian[inside] @ root[inside]
    assert np.abs(cut_first - found).max() > 0.1 * np.abs(found).max()


def test_it_has_the_eigenvalues_of_the_preconditioned_matrix(case):
    _, operator, _, product = case
    expected = np.sort(np.linalg.eigvals(product).real)
    found = ht.slq(operator, num_probes=1, num_steps=4, exact=True)
    np.testing.assert_allclose(found.nodes[0], expected, atol=1e-9)
    krylov = ht.slq(operator, num_probes=1, num_steps=operator.size, exact=False)
    assert krylov.nodes[0].max() == pytest.approx(expected.max(), rel=1e-8)


def test_it_goes_through_what_takes_an_operator(case):
    problem, operator, oracle, _ = case
    dense = ht.dense_block(operator, "tensor")
    np.testing.assert_allclose(dense.matrix, oracle, atol=1e-10)
    coupling = ht.coupling(operator, "tensor", exact=True, progress=False)
    np.testing.assert_allclose(coupling.mass, dense.mass, rtol=1e-8, atol=1e-12)
    report = ht.check_partition(operator, ht.partition(problem.model, "tensor"), progress=False)
    assert report.route.startswith("preconditioned; ")
    spectra = ht.blockwise_slq(operator, ht.partition(problem.model, "tensor"), num_probes=1)
    assert len(spectra.names) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["mlp", "gpt", "layernorm"])
def test_verification_after_steps_of_adam(name, dtype):
    problem = network(name, dtype)
    optimizer = optim.Adam(problem.model.parameters(), lr=1e-3)
    trained(optimizer, problem, 3)
    hessian = ht.HessianOperator(problem)
    operator = PreconditionedOperator(hessian, ht.preconditioner_of(optimizer, problem))
    assert operator.verify().passed, str(operator.verify())
    quick = operator.verify(level="quick")
    assert quick.passed, str(quick)
    with pytest.raises(ValueError, match="level is 'slow'"):
        operator.verify(level="slow")


def test_rounding_that_a_vanishing_second_moment_blows_up_is_told():
    """A bias before BatchNorm has no gradient but rounding: its d is eps, and 1 / d is 1e8."""
    passed = {}
    for dtype in (torch.float32, torch.float64):
        problem = network("batchnorm-batch", dtype)
        optimizer = optim.Adam(problem.model.parameters(), lr=1e-3)
        trained(optimizer, problem, 3)
        hessian = ht.HessianOperator(problem)
        operator = PreconditionedOperator(hessian, ht.preconditioner_of(optimizer, problem))
        passed[dtype] = operator.verify().passed
        assert operator.verify(level="quick").passed  # of A itself
    assert passed == {torch.float32: False, torch.float64: True}


def test_verification_finds_a_wrong_scaling():
    class Wrong(PreconditionedOperator):
        def rebuilt(self, problem, **settings):
            return Wrong(self.operator.rebuilt(problem, **settings), self.preconditioner)

        def reference(self, problem, direction):
            return self.operator.reference(problem, direction)

    problem = network("mlp")
    operator = Wrong(HessianOperator(problem), drawn_diagonal(problem))
    failures = operator.verify().failures
    assert [check.name for check in failures] == ["finite difference of the gradient"]


def test_the_float64_copy_takes_its_roots_in_float64():
    problem = network("mlp", torch.float32)
    diagonal = drawn_diagonal(problem)
    operator = PreconditionedOperator(HessianOperator(problem), DiagonalPreconditioner(diagonal))
    copied, words = in_float64(operator)
    assert words == "float64 copy" and isinstance(copied, PreconditionedOperator)
    roots = flat(diagonal.values()) ** -0.5
    expected = roots[:, None] * dense_hessian(copied.problem).numpy() * roots
    np.testing.assert_allclose(copied.to_dense().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(operator.to_dense().numpy(), expected, rtol=1e-3, atol=1e-5)


def test_what_the_inner_operator_offers():
    problem = network("mlp")
    hessian = HessianOperator(problem, memory="64MiB")
    operator = PreconditionedOperator(hessian, drawn_diagonal(problem))
    assert operator.krylov_bytes == hessian.krylov_bytes
    assert operator.plan is hessian.plan
    assert operator.announcement(10, 1)
    assert operator.announced == hessian.announced > 0
    assert operator.route == f"preconditioned; {hessian.route}"
    operator.expect(10)
    operator.release()
    twice = PreconditionedOperator(operator, drawn_diagonal(problem))
    assert twice.plan is hessian.plan  # it can be preconditioned again
    diagonal = flat(drawn_diagonal(problem).values())
    expected = dense_hessian(problem).numpy() / np.sqrt(np.outer(diagonal, diagonal)) ** 2
    np.testing.assert_allclose(twice.to_dense().numpy(), expected, atol=1e-9)


def test_nothing_is_made_of_what_is_zero():
    problem = network("mlp")
    hessian = HessianOperator(problem)
    operator = PreconditionedOperator(hessian, drawn_diagonal(problem))
    seen = []
    inner = hessian.products

    def watched(names, count, spread, collect):
        seen.extend(spread(slice(0, count)))
        inner(names, count, spread, collect)

    hessian.products = watched
    cuts = ht.partition(problem.model, "tensor").cuts
    operator.columns(cuts).products(cuts[0], torch.zeros(1, dtype=int), torch.ones(1, 30))
    assert [tensor is None for tensor in seen] == [False, True, True, True]


# --- P of optimizers: with beta1 = 0 a step is -lr g / d, which gives d from the step itself


class Reduced(optim.Adam):
    """Adam with one second moment a block, as an own Adam-mini may keep it."""

    def __init__(self, groups, kind: str) -> None:
        super().__init__(groups, lr=1e-3, betas=(0.0, 0.9))
        self.kind = kind

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                means, spread = reduction(self.kind, p.grad.square(), group)
                state["step"] = state.get("step", 0) + 1
                kept = state.get("exp_avg_sq", torch.zeros_like(means))
                state["exp_avg_sq"] = 0.9 * kept + 0.1 * means
                corrected = state["exp_avg_sq"].sqrt() / (1 - 0.9 ** state["step"]) ** 0.5
                p -= 1e-3 * p.grad / (spread(corrected) + group["eps"])


def reduction(kind: str, squares: Tensor, group):
    """Means over the blocks of a tensor, and how they go back."""
    if kind == "axes":
        means = squares.mean(dim=-1, keepdim=True)
        return means, lambda values: values
    if kind == "scalar":
        return squares.mean(), lambda values: values
    if kind == "runs":
        return squares.reshape(len(squares), -1).mean(1), lambda values: values.reshape(
            -1, *[1] * (squares.ndim - 1)
        )
    cuts = group["cuts"] or [{"view": (1, squares.numel()), "axes": (0,)}]
    (cut,) = cuts
    viewed = squares.reshape(cut["view"])
    others = [axis for axis in range(viewed.ndim) if axis not in cut["axes"]]
    means = viewed.mean(others)
    kept = [size if axis in cut["axes"] else 1 for axis, size in enumerate(viewed.shape)]

    def spread(values: Tensor) -> Tensor:
        return values.reshape(kept).expand(viewed.shape).reshape(squares.shape)

    return means.flatten(), spread


def columns_of(model: nn.Module):
    return ht.param_groups(model, ht.partition(model, {"*.weight": "column", "*": "whole"}))


OPTIMIZERS = {
    "adam": lambda model: optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.9), eps=1e-3),
    "adamw": lambda model: optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.0, 0.9), weight_decay=0
    ),
    "amsgrad": lambda model: optim.Adam(
        model.parameters(), lr=1e-3, betas=(0.0, 0.5), amsgrad=True
    ),
    "nadam": lambda model: optim.NAdam(model.parameters(), lr=1e-3, betas=(0.0, 0.9)),
    "radam": lambda model: optim.RAdam(model.parameters(), lr=1e-3, betas=(0.0, 0.95), eps=1e-3),
    "rmsprop": lambda model: optim.RMSprop(model.parameters(), lr=1e-3, eps=1e-3),
    "centered": lambda model: optim.RMSprop(model.parameters(), lr=1e-3, centered=True),
    "adagrad": lambda model: optim.Adagrad(model.parameters(), lr=1e-3, lr_decay=0.1),
    "one v an axis": lambda model: Reduced(model.parameters(), "axes"),
    "one v a tensor": lambda model: Reduced(model.parameters(), "scalar"),
    "one v a run": lambda model: Reduced(model.parameters(), "runs"),
    "one v a block of cuts": lambda model: Reduced(columns_of(model), "cuts"),
}


@pytest.mark.parametrize("steps", [1, 3, 9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_preconditioner_is_what_the_step_divides_by(name, steps):
    problem = network("mlp")
    optimizer = OPTIMIZERS[name](problem.model)
    trained(optimizer, problem, steps - 1)
    before = flat(problem.parameters.values())
    trained(optimizer, problem, 1)
    moved = before - flat(problem.parameters.values())
    gradient = flat(p.grad for p in problem.parameters.values())
    found = flat(ht.preconditioner_of(optimizer, problem).diagonal.values())
    rate = moved * found / gradient
    # one rate for all: its decay, and what RAdam rectifies by, are no part of P
    np.testing.assert_allclose(rate, rate[0], rtol=1e-6)
    if name not in ("radam", "adagrad"):
        np.testing.assert_allclose(rate, 1e-3, rtol=1e-6)


def test_eigenvalues_by_hand_after_three_steps_of_adam():
    problem = network("gpt")  # its embedding is tied to the output layer, and counts once
    optimizer = optim.Adam(problem.model.parameters(), lr=1e-3)
    trained(optimizer, problem, 3)
    operator = ht.PreconditionedOperator(
        ht.HessianOperator(problem), ht.preconditioner_of(optimizer, problem)
    )
    states = [optimizer.state[p] for p in problem.parameters.values()]
    d = flat((s["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8 for s in states)
    expected = np.linalg.eigvals(dense_hessian(problem).numpy() / d[:, None])
    found = np.linalg.eigvalsh(operator.to_dense().numpy())
    scale = np.abs(found).max()
    np.testing.assert_allclose(found, np.sort(expected.real), atol=1e-8 * scale)


class AdamMini(optim.Optimizer):
    """The state of the published 1.1.1: heads as runs of entries, rows, whole tensors, biases."""

    def __init__(self, model: nn.Module) -> None:
        groups = [{"params": [p], "name": name} for name, p in model.named_parameters()]
        super().__init__(groups, {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8})


def test_the_state_of_adam_mini():
    problem = network("mlp")
    optimizer = AdamMini(problem.model)
    weight, bias, last, last_bias = problem.parameters.values()
    heads = torch.tensor([[1.0], [4.0], [9.0]])  # of 10 entries each
    rows = torch.tensor([[1.0], [4.0], [16.0]])
    for p, key, v in (
        (weight, "vmean", heads),
        (bias, "v", torch.full((6,), 25.0)),
        (last, "vmean", rows),
        (last_bias, "vmean", torch.tensor(36.0)),
    ):
        optimizer.state[p] = {"m": torch.zeros_like(p), "step": 2, key: v}
    found = ht.preconditioner_of(optimizer, problem).diagonal
    correction = (1 - 0.95**2) ** 0.5
    expected = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(10).reshape(6, 5) / correction
    torch.testing.assert_close(found["0.weight"], expected + 1e-8)
    torch.testing.assert_close(found["0.bias"], torch.full((6,), 5 / correction))
    expected = torch.tensor([1.0, 2.0, 4.0])[:, None].expand(3, 6) / correction
    torch.testing.assert_close(found["2.weight"], expected + 1e-8)
    torch.testing.assert_close(found["2.bias"], torch.full((3,), 6 / correction))


def test_optimizers_that_are_not_known_or_do_not_fit():
    problem = network("mlp")
    model = problem.model
    with pytest.raises(TypeError, match=r"optimizer is a SGD.*Adam-mini.*DiagonalPreconditioner"):
        ht.preconditioner_of(optim.SGD(model.parameters(), lr=1.0), problem)
    with pytest.raises(TypeError, match="optimizer is a dict"):
        ht.preconditioner_of({}, problem)
    for fresh in (optim.Adam(model.parameters()), optim.Adagrad(model.parameters())):
        with pytest.raises(ValueError, match=r"no state for 0\.weight yet; take a step first"):
            ht.preconditioner_of(fresh, problem)
    some = optim.Adam(model[0].parameters())
    with pytest.raises(ValueError, match=r"does not train 2\.weight, 2\.bias"):
        ht.preconditioner_of(some, problem)
    foreign = optim.Adam([*model.parameters(), nn.Parameter(torch.ones(7))])
    with pytest.raises(ValueError, match=r"trains a parameter of shape \(7,\) that is none"):
        ht.preconditioner_of(foreign, problem)
    adam = optim.Adam(model.parameters())
    trained(adam, problem, 1)
    adam.state[model[2].weight]["exp_avg_sq"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"state for 2\.weight: a second moment of shape \(7,\)"):
        ht.preconditioner_of(adam, problem)
    del adam.state[model[2].weight]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"2\.weight holds step, exp_avg, but no 'exp_avg_sq'"):
        ht.preconditioner_of(adam, problem)


def test_frozen_parameters_are_none_of_the_problem():
    model = network("mlp").model
    model[0].weight.requires_grad_(False)
    problem = ht.Problem(model, ht.cross_entropy, network("mlp").batches)
    optimizer = optim.Adam(model.parameters())
    trained(optimizer, problem, 1)
    found = ht.preconditioner_of(optimizer, problem).diagonal
    assert list(found) == ["0.bias", "2.weight", "2.bias"]


def test_eps_keeps_entries_without_gradient_positive():
    problem = network("mlp")
    optimizer = optim.Adam(problem.model.parameters(), eps=0.0)
    trained(optimizer, problem, 1)
    optimizer.state[problem.model[2].bias]["exp_avg_sq"].zero_()
    with pytest.raises(ValueError, match=r"diagonal of 2\.bias holds 0; every entry must be"):
        ht.preconditioner_of(optimizer, problem)


def test_preconditioners_that_do_not_fit():
    problem = network("mlp")
    hessian = HessianOperator(problem)
    diagonal = drawn_diagonal(problem)
    with pytest.raises(TypeError, match="operator is a Problem"):
        PreconditionedOperator(problem, diagonal)
    with pytest.raises(
        ValueError, match=r"does not cover 0\.weight, 0\.bias, 2\.weight and 1 more"
    ):
        PreconditionedOperator(hessian, {})
    with pytest.raises(ValueError, match=r"holds 3\.bias, no trainable parameter"):
        PreconditionedOperator(hessian, {**diagonal, "3.bias": torch.ones(1)})
    with pytest.raises(ValueError, match=r"2\.bias has shape \(2,\), and the parameter \(3,\)"):
        PreconditionedOperator(hessian, {**diagonal, "2.bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"2\.bias holds -1"):
        PreconditionedOperator(hessian, {**diagonal, "2.bias": torch.tensor([1.0, -1.0, 1.0])})


def test_factors_that_do_not_fit():
    problem = network("mlp")
    factors = drawn_factors(problem)
    others = {name: d for name, d in drawn_diagonal(problem).items() if name not in factors}
    left, right = factors["0.weight"]
    hessian = HessianOperator(problem)
    swapped = KroneckerPreconditioner({**factors, "0.weight": (right, left)}, others=others)
    with pytest.raises(ValueError, match="sizes 5 and 6, but the parameter has shape"):
        PreconditionedOperator(hessian, swapped)
    with pytest.raises(ValueError, match=r"does not cover 0\.bias, 2\.bias"):
        PreconditionedOperator(hessian, KroneckerPreconditioner(factors))
    for bad, words in (
        ((left[:3], right), r"L of 0\.weight has shape \(3, 6\)"),
        ((left, -right), r"R of 0\.weight has eigenvalues from"),
        ((left.triu(), right), r"L of 0\.weight is not symmetric"),
        ((left * float("nan"), right), r"L of 0\.weight holds NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            KroneckerPreconditioner({"0.weight": bad})
    with pytest.raises(ValueError, match="power is 0"):
        KroneckerPreconditioner(factors, power=0)
    with pytest.raises(ValueError, match="relative_floor is 2"):
        KroneckerPreconditioner(factors, relative_floor=2)
    with pytest.raises(ValueError, match=r"0\.weight has factors and a diagonal"):
        KroneckerPreconditioner(factors, others={"0.weight": torch.ones(6, 5)})


def test_eigenvalues_below_the_floor_are_raised_to_it():
    left = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    right = torch.eye(1, dtype=torch.float64)
    floored = KroneckerPreconditioner({"w": (left, right)}, power=1, relative_floor=0.25)
    found = floored.inverse_root("w", torch.ones(1, 3, 1, dtype=torch.float64))
    torch.testing.assert_close(found.flatten().square(), torch.tensor([0.25, 1.0, 1.0]).double())


def test_convolutions_are_matrices_of_output_channels():
    problem = network("groupnorm")
    gradient = mean_gradient(problem)
    factors = {}
    for name, g in gradient.items():
        matrix = g.reshape(len(g), -1)
        factors[name] = (matrix @ matrix.T, matrix.T @ matrix)
    shampoo = KroneckerPreconditioner(factors, relative_floor=1e-6)
    shampoo.check(problem.parameters)
    g = gradient["conv.weight"]
    step = shampoo.inverse("conv.weight", g[None])[0]
    u, _, v = torch.linalg.svd(g.reshape(3, -1), full_matrices=False)
    torch.testing.assert_close(step.reshape(3, -1), u @ v)  # Shampoo's first step: U V'
