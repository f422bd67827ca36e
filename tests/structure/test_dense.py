"""Dense Hessians over any blocks, against plain double backward, in memory and on disk."""

import functools
import json
import os
import re

import numpy as np
import pytest
import torch
from problems import NETWORKS, dense_hessian, gpt, network, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hessian_tools as ht
from hessian_tools.curvature.operators import Columns
from hessian_tools.structure import dense, matrix_file
from hessian_tools.structure.matrix_file import MatrixFile


@functools.cache
def oracle(name: str) -> torch.Tensor:
    return dense_hessian(network(name))


TINY = ["mlp", "layernorm", "batchnorm-batch", "batchnorm-running", "groupnorm", "lstm", "hf-gpt2"]


def entries(problem, cuts) -> torch.Tensor:
    """Positions in the flat parameter vector, block after block."""
    sizes = [p.numel() for p in problem.parameters.values()]
    numbers = dict(zip(problem.parameters, torch.arange(sum(sizes)).split(sizes), strict=True))
    shaped = {name: numbers[name].view(p.shape) for name, p in problem.parameters.items()}
    return torch.cat([cut.rows(shaped).flatten() for cut in cuts])


@pytest.mark.parametrize("name", TINY)
def test_it_is_the_dense_hessian(name):
    problem = network(name)
    found = ht.dense_block(problem, "tensor")
    assert relative_error(torch.tensor(found.matrix), oracle(name)) < NETWORKS[name][3]
    assert found.symmetry_error < NETWORKS[name][3] and found.num_matvecs == problem.num_parameters
    assert np.array_equal(found.matrix, found.matrix.T)


def test_a_float32_problem_has_a_float64_matrix():
    single, double = network("layernorm", torch.float32), network("layernorm")
    for mine, other in zip(double.parameters.values(), single.parameters.values(), strict=True):
        mine.data.copy_(other.data)
    for (x, _), (y, _) in zip(double.batches, single.batches, strict=True):
        x.copy_(y)
    found = ht.dense_block(single, "tensor")
    assert (
        found.arithmetic == "float64 copy"
        and next(iter(single.parameters.values())).dtype == torch.float32
    )
    assert relative_error(torch.tensor(found.matrix), dense_hessian(double)) < 1e-12


@pytest.mark.parametrize(
    "preset", ["head", "neuron"]
)  # of transposed layers, fused heads, tied weights
def test_blocks_are_rows_and_columns_of_the_dense_hessian(preset):
    problem = network("hf-gpt2")
    partition, expected = ht.partition(problem.model, preset), oracle("hf-gpt2").numpy()
    found = ht.dense_block(problem, partition)
    index = entries(problem, partition.cuts).numpy()
    assert found.names == partition.names
    assert np.allclose(found.matrix, expected[np.ix_(index, index)], atol=1e-12)
    i, j = found.names[3], found.names[-2]
    at = [entries(problem, [partition[name].as_cut()]).numpy() for name in (i, j)]
    assert np.allclose(found.block(i, j), expected[np.ix_(*at)], atol=1e-12)
    assert np.shares_memory(found.block(i, j), found.matrix) and np.array_equal(
        found.block(3), found.block(i)
    )
    squares = [
        [np.sum(found.block(i, j) ** 2) for j in range(len(partition))]
        for i in range(len(partition))
    ]
    assert np.allclose(found.mass, squares, rtol=1e-10, atol=0)


def test_any_set_and_order_of_blocks():
    problem = network("hf-gpt2")
    partition = ht.partition(problem.model, "neuron")
    blocks = list(partition)
    chosen = [blocks[i] for i in (40, 7, 8, 9, 3, 90, 91, 2)]
    index = entries(problem, [block.as_cut() for block in chosen]).numpy()
    expected = oracle("hf-gpt2").numpy()[np.ix_(index, index)]
    names = [block.name for block in chosen]
    for found in (
        ht.dense_block(problem, chosen),
        ht.dense_block(problem, names, partition=partition),
    ):
        assert list(found.names) == names and np.allclose(found.matrix, expected, atol=1e-12)
    cut = partition.cuts[1]
    mixed = ht.dense_block(ht.HessianOperator(problem), [cut, blocks[-1]])
    index = entries(problem, [cut, blocks[-1].as_cut()]).numpy()
    assert np.allclose(mixed.matrix, oracle("hf-gpt2").numpy()[np.ix_(index, index)], atol=1e-12)
    assert ht.dense_block(problem, cut[2]).names == (cut.names[2],)


def test_a_block_over_several_tensors():
    problem = network("mlp")
    layers = ht.partition(problem.model, "layer")
    found = ht.dense_block(problem, [layers["2"], layers["0"]])
    index = entries(problem, [layers["2"].as_cut(), layers["0"].as_cut()]).numpy()
    assert np.allclose(found.matrix, oracle("mlp").numpy()[np.ix_(index, index)], atol=1e-12)


def test_only_the_tensors_concerned_are_live(monkeypatch):
    problem, asked = network("gpt"), []
    engine = ht.HessianOperator(problem)
    products = engine._engine.products
    monkeypatch.setattr(
        engine._engine,
        "products",
        lambda names, *rest: (asked.append(names), products(names, *rest)),
    )
    partition = ht.partition(problem.model, "tensor")
    ht.dense_block(engine, [partition.names[1], partition.names[4]], partition=partition)
    assert {tuple(names) for names in asked} == {(partition.names[1], partition.names[4])}


def test_a_column_costs_what_lies_between():
    model, tokens = (
        gpt(vocabulary=64, context=32, d=64, layers=4, tied=False),
        torch.randint(64, (2, 33)),
    )
    problem = ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])
    hessian = ht.HessianOperator(problem, record=True, route="double backward")
    cuts = ht.partition(model, "tensor").cuts
    columns, costs = Columns(hessian, cuts), []
    with problem.evaluating(), FlopCounterMode(display=False) as forward:
        problem.batch_loss(problem.batches[0])
    hessian.matmat(torch.zeros(1, hessian.size))  # records
    for cut in cuts:
        with FlopCounterMode(display=False) as counter:
            columns.products(cut, torch.zeros(2, dtype=torch.long), torch.randn(2, cut.block_size))
        costs.append(counter.get_total_flops() / 2 / forward.get_total_flops())
    assert max(costs) < 4.2 and np.mean(costs) < 3.3  # the whole Hessian's product costs 6


def test_on_disk_as_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix_file, "_TILE", 20)
    problem = network("mlp", torch.float32)
    expected = ht.dense_block(problem, "tensor")
    found = ht.dense_block(problem, "tensor", path=tmp_path / "new" / "h.npy")
    assert isinstance(found.matrix, np.memmap) and not found.matrix.flags.writeable
    assert np.array_equal(found.matrix, expected.matrix)
    assert np.isclose(found.symmetry_error, expected.symmetry_error) and np.allclose(
        found.mass, expected.mass
    )
    ht.save(found, tmp_path / "result")
    assert np.array_equal(ht.load(tmp_path / "result").matrix, expected.matrix)


def test_one_writer_has_a_file(tmp_path):
    path = tmp_path / "h.npy"
    with MatrixFile(path, 2, "x") as one:
        with pytest.raises(
            ValueError, match=rf"in use by process {os.getpid()} on .* name another"
        ):
            MatrixFile(path, 2, "x")
        one.write(np.array([[1.0, 2.0]]))
    with MatrixFile(path, 2, "x") as other:
        assert other.done == 1
        other.write(np.array([[4.0, 3.0]]))
        other.symmetrise()
        assert MatrixFile(path, 2, "x").matrix.tolist() == [[1, 3], [3, 3]]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["h.json", "h.npy"]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    problem, path, counts = network("mlp"), tmp_path / "h.npy", []
    monkeypatch.setattr(dense, "_UNITS", 8)
    write = MatrixFile.write

    def counted(self, rows):
        counts.append(len(rows))
        if sum(counts) > 30:
            raise KeyboardInterrupt
        write(self, rows)

    monkeypatch.setattr(MatrixFile, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        ht.dense_block(problem, "tensor", path=path)
    done = json.loads(path.with_suffix(".json").read_text())["done"]
    assert done == sum(counts[:-1]) > 0
    counts.clear()
    monkeypatch.setattr(
        MatrixFile, "write", lambda self, rows: (counts.append(len(rows)), write(self, rows))
    )
    found = ht.dense_block(problem, "tensor", path=path)
    assert sum(counts) == problem.num_parameters - done
    assert np.allclose(found.matrix, dense_hessian(problem), atol=1e-12)
    counts.clear()
    assert (
        np.array_equal(ht.dense_block(problem, "tensor", path=path).matrix, found.matrix)
        and not counts
    )
    with torch.no_grad():
        problem.parameters["0.bias"].add_(1e-9)
    with pytest.raises(ValueError, match="holds something else; name another file or delete it"):
        ht.dense_block(problem, "tensor", path=path)


def test_a_file_is_of_one_matrix(tmp_path):
    problem = network("mlp")
    names = list(problem.parameters)

    def scaled(size):
        return {name: torch.full_like(p, size) for name, p in problem.parameters.items()}

    hessian, ggn = ht.HessianOperator(problem), ht.GaussNewtonOperator(problem)
    draws = ht.curvature.MonteCarloFisherOperator
    several = [
        hessian,
        ggn,
        ht.EmpiricalFisherOperator(problem),
        draws(problem, seed=1),
        draws(problem, seed=2),
        ht.PreconditionedOperator(hessian, scaled(2.0)),
        ht.PreconditionedOperator(hessian, scaled(3.0)),
        ht.PreconditionedOperator(ggn, scaled(3.0)),
    ]
    path = tmp_path / "h.npy"
    for one in several:
        found = ht.dense_block(one, names, path=path)
        assert np.array_equal(ht.dense_block(one, names, path=path).matrix, found.matrix)
        for other in several:
            if other is not one:
                with pytest.raises(ValueError):
                    ht.dense_block(other, names, path=path)
        path.unlink()
        path.with_suffix(".json").unlink()


def test_refusals(tmp_path, monkeypatch):
    problem = network("mlp")
    partition = ht.partition(problem.model, "tensor")
    for arguments, told in [
        (
            {"max_size": 56},
            r"57 rows and takes 25.4 KiB, more than max_size=56.*path=.*ht.coupling",
        ),
        ({"path": tmp_path / "h.bin"}, r"name a file that ends in .npy"),
    ]:
        with pytest.raises(ValueError, match=told):
            ht.dense_block(problem, partition, **arguments)
    monkeypatch.setattr(dense, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"25.4 KiB, but 700 B are free; pass path="):
        ht.dense_block(problem, partition)
    assert ht.dense_block(problem, partition, path=tmp_path / "h.npy").matrix.shape == (57, 57)


@pytest.mark.parametrize(
    ("blocks", "error", "told"),
    [
        (lambda p: [], ValueError, "blocks is empty"),
        (lambda p: 3, TypeError, "blocks is 3; pass a Partition"),
        (lambda p: [3], TypeError, "blocks holds 3"),
        (lambda p: [p.cuts[0], p.cuts[0]], ValueError, "which overlap"),
        (
            lambda p: [*p.cuts, *ht.partition(nn.Linear(2, 2), "tensor").cuts],
            ValueError,
            "'weight', which lies in no",
        ),
    ],
)
def test_bad_blocks(blocks, error, told):
    problem = network("mlp")
    with pytest.raises(error, match=re.escape(told)):
        ht.dense_block(problem, blocks(ht.partition(problem.model, "tensor")))


def test_bad_problem_and_name():
    with pytest.raises(TypeError, match=r"problem is a Linear; pass an ht\.Problem"):
        ht.dense_block(nn.Linear(2, 2), "tensor")
    with pytest.raises(KeyError, match="no block is named 'nothing'"):
        ht.dense_block(network("mlp"), "tensor").block("nothing")


def test_a_product_that_is_not_finite_names_its_block():
    model = nn.Sequential(nn.Linear(2, 1, dtype=torch.float64))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x = torch.full(
        (3, 2), 1e200, dtype=torch.float64
    )  # finite in the gradient, squared in the Hessian
    problem = ht.Problem(model, lambda m, b: m(b).exp().mean(), [x])
    with pytest.raises(ArithmeticError, match=r"0\.weight"):
        ht.dense_block(problem, "tensor")


def test_where_no_copy_can_be_made_it_says_so():
    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("not to be copied")

    problem = ht.Problem(Uncopied(3, 2), ht.mse, [(torch.randn(4, 3), torch.zeros(4, 2))])
    with pytest.warns(RuntimeWarning, match="float32: no float64 copy could be made"):
        found = ht.dense_block(problem, "tensor")
    assert found.matrix.dtype == np.float64 and "no float64 copy" in found.arithmetic
