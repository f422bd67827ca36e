"""Quadratics: prescribed spectra and bases, rotations, given matrices, and what is refused."""

import pytest
import torch

import hessian_tools as ht
from hessian_tools import quadratic
from hessian_tools.quadratic.construction import haar


def test_a_quadratic_has_the_eigenvalues_it_was_given_block_by_block():
    blocks = [[3.0, 1.0, 2.0], [50.0, 40.0], [700.0]]
    q = quadratic.from_blocks(blocks, seed=1, num_problems=3)
    assert q.batched
    assert q.hessian.dtype == torch.float64
    assert q.hessian.shape == (3, 6, 6)
    outside = q.hessian.clone()
    for where, block in zip(q.slices, blocks, strict=True):
        values = torch.linalg.eigvalsh(q.hessian[:, where, where])
        expected = torch.tensor(sorted(block), dtype=torch.float64)
        assert torch.allclose(values, expected.expand(3, -1), rtol=1e-12)
        outside[:, where, where] = 0
    assert not outside.any()
    assert torch.equal(q.hessian, q.hessian.mT)
    assert q.kappa.tolist() == [700.0] * 3
    assert q.block_kappas[0].tolist() == [3.0, 1.25, 1.0]


def test_bases_are_orthogonal_and_uniform():
    bases = torch.stack([haar(seed, "x", 4) for seed in range(400)])
    identity = torch.eye(4, dtype=torch.float64).expand(400, 4, 4)
    assert torch.allclose(bases @ bases.mT, identity, atol=1e-12)
    # Each entry of a Haar matrix has mean 0 and mean square 1/n. Without the signs of R's diagonal
    # the first row would never be positive.
    assert bases.mean(0).abs().max() < 0.1
    assert (bases.square().mean(0) - 0.25).abs().max() < 0.06


def test_bases_are_the_seeds_alone():
    one = quadratic.case(3, seed=5)
    many = quadratic.case(3, seed=5, num_problems=2)
    assert torch.equal(one.hessian[0], many.hessian[0])
    assert not torch.equal(many.hessian[0], many.hessian[1])
    assert not torch.equal(one.hessian, quadratic.case(3, seed=6).hessian)


def test_rotation_keeps_the_spectrum_and_leaves_the_diagonal():
    start = quadratic.case(3, num_problems=3)
    turned = quadratic.rotated(start, [0.0, 0.2, 0.4], scope="whole")
    assert turned.block_sizes == (9,)
    assert torch.allclose(torch.linalg.eigvalsh(turned.hessian), turned.eigenvalues[0], rtol=1e-9)
    assert torch.allclose(turned.hessian[0], start.hessian[0])
    assert turned.tau[2] < turned.tau[1] < turned.tau[0]


def test_rotation_within_blocks_keeps_them():
    turned = quadratic.rotated(quadratic.case(3, num_problems=3), 0.3)
    assert turned.block_sizes == (3, 3, 3)
    assert not turned.hessian[:, :3, 3:].any()


def test_a_dense_block_has_the_tau_asked_for():
    q = quadratic.dense(12, kappa=100, tau=0.6, num_problems=3)
    assert q.tau.tolist() == pytest.approx([0.6] * 3, abs=1e-6)
    values = torch.linalg.eigvalsh(q.hessian)
    expected = torch.linspace(1, 100, 12).double().expand(3, -1)
    assert torch.allclose(values, expected, rtol=1e-10)
    diagonal = quadratic.dense(6, kappa=10, tau=1.0)
    assert diagonal.tau.item() == pytest.approx(1, abs=1e-6)


SPD = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 5.0]])


def test_a_given_matrix_is_taken():
    q = quadratic.from_matrix(SPD, [2, 1])
    assert q.hessian.dtype == torch.float64
    assert q.eigenvalues[0][0].tolist() == pytest.approx([1, 3])


@pytest.mark.parametrize(
    ("matrix", "sizes", "words"),
    [
        (SPD, [1, 2], "block-diagonal"),
        (SPD + torch.triu(SPD, 1), None, "symmetric"),
        (-SPD, None, "not positive"),
        (SPD[:2], None, "shape"),
        (SPD, [2, 2], "add up to 3"),
        (SPD * float("nan"), None, "finite"),
    ],
)
def test_a_given_matrix_is_refused(matrix, sizes, words):
    with pytest.raises(ValueError, match=words):
        quadratic.from_matrix(matrix, sizes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quadratic.case(5), "cases are 1, 2, 3 and 4"),
        (lambda: quadratic.case(3, kappa=50), "at least 104"),
        (lambda: quadratic.from_blocks([]), "one or more"),
        (lambda: quadratic.from_blocks([[1.0, -2.0]]), "positive finite"),
        (lambda: quadratic.from_blocks([["a"]]), "sequence of numbers"),
        (lambda: quadratic.from_blocks([[1.0]], num_problems=0), "one N"),
        (lambda: quadratic.from_blocks([[1.0]], basis="random"), "'haar' and 'identity'"),
        (lambda: quadratic.from_blocks([[1.0], [2.0]], names=["a", "a"]), "each once"),
        (lambda: quadratic.rotated(quadratic.case(3), 0.1, scope="all"), "'blocks' and 'whole'"),
        (lambda: quadratic.rotated(quadratic.case(3), [0.1, 0.2]), "angle has 2"),
        (lambda: quadratic.dense(1, kappa=10), "at least 2"),
        (lambda: quadratic.dense(4, kappa=10, tau=0.01), "choose one above"),
        (lambda: quadratic.from_spectra({}), "holds 0 blocks"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_spectra_are_exact_quadratures():
    spectra = quadratic.case(3).spectra()
    assert isinstance(spectra, ht.BlockSpectra)
    second = spectra["block 2"]
    assert second.status == "exact"
    assert second.moment(1).value == pytest.approx(100)
    assert second.trace.value == pytest.approx(300)
