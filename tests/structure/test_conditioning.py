"""Adam's preconditioner inside blocks and extreme eigenvalues, against numpy, theory and published
behaviour."""

import re

import numpy as np
import pytest
import torch
from problems import dense_hessian, network
from scipy.linalg import expm

import hessian_tools as ht
from hessian_tools.problem.gradient import mean_gradient

GENERATOR = np.random.default_rng(0)


def rotated(
    size: int, kappa: float, angle: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Q diag(1 .. kappa) Q' with Q = expm(angle S), and its gradient at a Gaussian start."""
    skew = generator.standard_normal((size, size))
    q = expm(angle * (skew - skew.T) / np.sqrt(2))
    matrix = q * np.linspace(1, kappa, size) @ q.T
    return matrix, matrix @ generator.standard_normal(size)


# FACTS' published behaviour, medians of tau and r; angles that give its tau
@pytest.mark.parametrize(
    ("size", "kappa", "angles", "taus", "ratios"),
    [
        (
            20,
            100,
            (0, 0.01, 0.029, 0.098, 0.35),
            (1.00, 0.90, 0.76, 0.49, 0.34),
            (0.40, 0.70, 1.23, 5.9, 9.2),
        ),
        (
            50,
            500,
            (0, 0.01, 0.03, 0.098, 0.3),
            (1.00, 0.79, 0.55, 0.29, 0.24),
            (0.22, 2.0, 5.8, 15.5, 20.0),
        ),
    ],
)
def test_adam_helps_near_diagonal_matrices_and_harms_dense_ones(size, kappa, angles, taus, ratios):
    generator = np.random.default_rng(0)
    for angle, tau, r in zip(angles, taus, ratios, strict=True):
        pairs = [rotated(size, kappa, angle, generator) for _ in range(120)]
        found = ht.structure.adam_conditioning(
            np.stack([m for m, _ in pairs]), np.stack([g for _, g in pairs])
        )
        assert np.median(found.tau) == pytest.approx(tau, abs=0.02)
        assert 0.6 < np.median(found.r) / r < 1.6, (size, angle, np.median(found.r))
        assert (
            np.allclose(found.kappa, kappa) and not found.negative.any() and not found.dropped.any()
        )


def test_it_is_what_numpy_says():
    factor = GENERATOR.standard_normal((3, 8, 8))
    matrix, gradient = factor @ factor.transpose(0, 2, 1), GENERATOR.standard_normal((3, 8))
    found = ht.structure.adam_conditioning(matrix, gradient)
    for i in range(3):
        values = np.linalg.eigvals(
            matrix[i] / np.abs(gradient[i])[:, None]
        )  # D H itself, not symmetric
        assert np.isclose(found.kappa[i], np.linalg.cond(matrix[i]))
        assert np.isclose(found.kappa_adam[i], values.real.max() / values.real.min())
        assert np.isclose(found.r[i], found.kappa_adam[i] / found.kappa[i])
        assert np.isclose(found.tau[i], np.abs(np.diag(matrix[i])).sum() / np.abs(matrix[i]).sum())
    single = ht.structure.adam_conditioning(matrix[1], gradient[1])
    assert np.isclose(single.kappa, found.kappa[1]) and np.shape(single.r) == ()
    with_eps = ht.structure.adam_conditioning(
        matrix[1], gradient[1], eps=1e9
    )  # the preconditioner is a constant then
    assert np.isclose(with_eps.r, 1.0)


def test_a_diagonal_matrix_with_its_own_gradient():
    start = np.array([0.5, -2.0, 1.0, 4.0])
    found = ht.structure.adam_conditioning(
        np.diag([1.0, 10.0, 100.0, 1000.0]), np.array([1.0, 10.0, 100.0, 1000.0]) * start
    )
    assert (
        found.tau == 1 and np.isclose(found.kappa, 1000) and np.isclose(found.kappa_adam, 8)
    )  # of 1 / |start|


def test_negative_and_vanishing_eigenvalues_are_told():
    matrix = np.diag([4.0, -2.0, -1.0, 1e-20, 0.0])
    found = ht.structure.adam_conditioning(matrix, np.ones(5))
    assert (found.kappa, found.negative, found.dropped) == (4, 2, 2)
    assert (found.kappa_adam, found.negative_adam, found.dropped_adam) == (4, 2, 2)
    assert ht.structure.adam_conditioning(matrix, np.ones(5), relative_floor=0.3).kappa == 2
    assert ht.structure.adam_conditioning(matrix, np.ones(5), relative_floor=0.3).dropped == 3
    zero = ht.structure.adam_conditioning(np.zeros((2, 2)), np.ones(2))
    assert np.isnan(zero.kappa) and np.isnan(zero.r) and np.isnan(zero.tau) and zero.dropped == 2


def test_coordinates_without_gradient():
    matrix, gradient = np.diag([1.0, 8.0, 1000.0]), np.array([1.0, 2.0, 0.0])
    found = ht.structure.adam_conditioning(matrix, gradient)
    assert found.without_gradient == 1 and np.isclose(found.kappa, 1000)
    assert np.isclose(found.kappa_adam, 4) and np.isclose(found.r, 0.5) and found.dropped_adam == 0
    assert ht.structure.adam_conditioning(matrix, gradient, eps=1e-8).without_gradient == 0
    assert np.isnan(ht.structure.adam_conditioning(matrix, np.zeros(3)).r)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((np.eye(3), np.ones(2)), "matrix has shape (3, 3) and gradient (2,)"),
        ((np.eye(2) * np.nan, np.ones(2)), "holds NaN or inf"),
    ],
)
def test_bad_matrices(arguments, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        ht.structure.adam_conditioning(*arguments)
    with pytest.raises(ValueError, match="eps is -1"):
        ht.structure.adam_conditioning(np.eye(2), np.ones(2), eps=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_of_a_network(dtype):
    problem = network("layernorm", dtype)
    partition = ht.partition(problem.model, "neuron")
    found = ht.structure.block_conditioning(problem, partition)
    referee = network("layernorm")
    for mine, given in zip(referee.parameters.values(), problem.parameters.values(), strict=True):
        mine.data.copy_(given.data)
    dense = dense_hessian(referee).numpy()
    gradient = torch.cat([g.flatten() for g in mean_gradient(referee).values()]).numpy()
    sizes = [p.numel() for p in problem.parameters.values()]
    numbers = dict(zip(problem.parameters, torch.arange(sum(sizes)).split(sizes), strict=True))
    shaped = {name: numbers[name].view(p.shape) for name, p in problem.parameters.items()}
    assert found.names == partition.names and found.num_matvecs == problem.num_parameters
    assert found.arithmetic == ("float64" if dtype == torch.float64 else "float64 copy")
    for i, block in enumerate(partition):
        index = block.as_cut().rows(shaped)[0].numpy()
        values = np.linalg.eigvalsh(dense[np.ix_(index, index)])
        assert found.sizes[i] == len(index)
        if dtype == torch.float64:  # batches differ by rounding otherwise
            assert found.values.negative[i] == (values < -1e-14 * np.abs(values).max()).sum()
            expected = ht.structure.adam_conditioning(dense[np.ix_(index, index)], gradient[index])
            if found.values.dropped[i] == expected.dropped == 0:
                assert np.isclose(
                    found.values.kappa[i], np.abs(values).max() / np.abs(values).min(), rtol=1e-6
                )
                assert np.isclose(found.values.kappa_adam[i], expected.kappa_adam, rtol=1e-4)
        assert np.isclose(
            found.values.tau[i],
            np.abs(np.diag(dense))[index].sum() / np.abs(dense[np.ix_(index, index)]).sum(),
            rtol=1e-3,
        )
    assert (found.symmetry_error < 1e-6).all()


def test_the_gradient_is_that_of_the_pooled_loss():
    problem = network("mlp")  # uneven batches
    with problem.evaluating():
        pairs = zip(problem.batches, problem.counts, strict=True)
        loss = sum(problem.batch_loss(batch) * n / sum(problem.counts) for batch, n in pairs)
    expected = torch.autograd.grad(loss, list(problem.parameters.values()))
    for mine, other in zip(mean_gradient(problem).values(), expected, strict=True):
        assert torch.allclose(mine, other)


def test_some_blocks_of_some_cuts():
    problem = network("mlp")
    partition = ht.partition(problem.model, "neuron")
    found = ht.structure.block_conditioning(problem, partition, num_blocks=2, max_size=5, seed=1)
    every = ht.structure.block_conditioning(problem, partition, max_size=5)
    assert [note.split(":")[0] for note in found.notes] == ["0.weight", "0.bias", "2.weight"]
    assert len(every.names) == 7 and len(found.names) == 3 and "exceed max_size=5" in every.notes[0]
    for name, kappa in zip(found.names, found.values.kappa, strict=True):
        assert np.isclose(
            kappa, every.values.kappa[every.names.index(name)], rtol=1e-6, equal_nan=True
        )
    with pytest.raises(ValueError, match=r"max_size is 1, but the smallest block has \d+ entries"):
        ht.structure.block_conditioning(
            problem, [block for block in partition if block.numel > 1], max_size=1
        )
    with pytest.raises(ValueError, match="num_blocks 0"):
        ht.structure.block_conditioning(problem, partition, num_blocks=0)


def test_extremes_of_all_blocks():
    problem = network("lstm")
    partition = ht.partition(problem.model, "tensor")
    found, dense = (
        ht.structure.block_extremes(problem, partition, num_steps=10),
        ht.dense_block(problem, partition),
    )
    assert found.names == dense.names and found.num_matvecs == sum(
        min(10, size) for size in found.sizes
    )
    for i, name in enumerate(found.names):
        values = np.linalg.eigvalsh(dense.block(name))
        scale = np.abs(values).max()
        exact = found.status[i] == "exact"
        for value, bound, end in (
            (found.largest[i], found.largest_bound[i], values[-1]),
            (found.smallest[i], found.smallest_bound[i], values[0]),
        ):
            assert np.abs(values - value).min() <= bound + 1e-10 * scale, name
            assert (value - end) * (1 if end == values[-1] else -1) <= 1e-10 * scale, name
            assert not exact or np.isclose(value, end, atol=1e-10 * scale)
        assert np.isclose(found.top[i], scale, rtol=0.02)
    assert {"exact", "complete"} <= set(found.status)


def test_extremes_grow_tight_with_steps():
    problem = network("layernorm")
    partition = ht.partition(problem.model, "tensor")
    few, many = (
        ht.structure.block_extremes(problem, partition, num_steps=steps) for steps in (3, 20)
    )
    assert few.largest_bound.max() > 10 * many.largest_bound.max()
    assert (few.largest <= many.largest + 1e-12).all() and (
        few.smallest >= many.smallest - 1e-12
    ).all()


def test_results_are_saved(tmp_path):
    problem = network("mlp")
    for result in (
        ht.structure.block_conditioning(problem, "tensor"),
        ht.structure.block_extremes(problem, ht.partition(problem.model, "tensor")),
    ):
        ht.save(result, tmp_path / "result")
        assert ht.load(tmp_path / "result").names == result.names
    assert np.array_equal(ht.load(tmp_path / "result").largest, result.largest)
