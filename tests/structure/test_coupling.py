"""Coupling by probing, against exact norms of dense Hessians and planted problems."""

import functools
import itertools
import re

import numpy as np
import pytest
import torch
from problems import gpt, network
from torch import Tensor, nn

import hessian_tools as ht
from hessian_tools.curvature.operators import Columns
from hessian_tools.structure.coupling import PILOT, layer_namer
from hessian_tools.structure.coupling_result import PLACES
from hessian_tools.structure.dense import cuts_of
from hessian_tools.structure.draws import BlockGrid

SEEDS = 60


class Planted(nn.Module):
    """A quadratic loss with a given Hessian over two tensors."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Parameter(torch.randn(6, 2).double()),
            nn.Parameter(torch.randn(len(matrix) - 12).double()),
        )
        self.matrix = matrix

    def forward(self, _: Tensor) -> Tensor:
        w = torch.cat([self.a.flatten(), self.b])
        return w @ self.matrix @ w / 2


def planted(matrix: Tensor) -> ht.Problem:
    return ht.Problem(Planted(matrix), lambda model, batch: model(batch), [torch.zeros(1)])


ROWS = {f"a{i}": ("a", (slice(i, i + 1),)) for i in range(6)} | {"b": "b"}


@functools.cache
def random_planted() -> ht.Problem:
    generator = torch.Generator().manual_seed(1)
    factors = (
        torch.randn(17, 17, generator=generator, dtype=torch.float64)
        * torch.logspace(0, -2, 17).double()
    )
    return planted(factors @ factors.T - 0.3 * torch.eye(17, dtype=torch.float64))


@functools.cache
def runs(
    num_blocks: int | None, num_probes: int, num_pilot: int = 2
) -> tuple[ht.structure.Coupling, list[ht.structure.Coupling]]:
    problem, hessian = random_planted(), ht.HessianOperator(random_planted())
    partition = ht.partition(problem.model, ROWS)
    options = {
        "exact": False,
        "num_probes": num_probes,
        "num_blocks": num_blocks,
        "num_pilot": num_pilot,
    }
    found = [ht.coupling(hessian, partition, seed=seed, **options) for seed in range(SEEDS)]
    return ht.coupling(problem, partition, exact=True), found


def test_exact_is_the_dense_matrix():
    exact, _ = runs(None, 8)
    matrix = random_planted().model.matrix.numpy()
    bounds = [0, 2, 4, 6, 8, 10, 12, 17]
    spans = [slice(*pair) for pair in itertools.pairwise(bounds)]
    squares = np.array([[np.sum(matrix[i, j] ** 2) for j in spans] for i in spans])
    assert exact.exact and exact.num_matvecs == 17 and np.allclose(exact.mass, squares)
    norms = np.sqrt(squares)
    assert np.allclose(exact.normalised, norms / np.sqrt(np.outer(np.diag(norms), np.diag(norms))))
    inside, a = np.trace(squares), squares[:6, :6]
    expected = [
        inside,
        a.sum() - np.trace(a),
        2 * squares[6, :6].sum(),
        0.0,
    ]  # one module: a and b are one layer
    assert np.allclose(
        [exact.shares[place].value for place in PLACES], np.array(expected) / squares.sum()
    )
    assert exact.tensor_shares["a"].value == pytest.approx(np.trace(a) / a.sum())
    assert exact.tensor_shares["b"].value == 1 and np.allclose(
        exact.tensor_mass[0], [a.sum(), squares[6, :6].sum()]
    )
    for errors in (exact.mass_error, exact.normalised_error, exact.tensor_mass_error):
        assert not errors.any()
    assert all(share.standard_error == 0 for share in exact.shares.values())


def scores(values: np.ndarray, errors: np.ndarray, exact: np.ndarray | float) -> np.ndarray:
    return (values - exact)[errors > 0] / errors[errors > 0]


# Student's t with k - 1 = 7 degrees of freedom has 91 % within two standard errors
@pytest.mark.parametrize("quantity", ["mass", "normalised", "tensor_mass"])
def test_estimates_are_right_within_their_errors(quantity):
    exact, found = runs(None, 8)
    pairs = [(getattr(c, quantity), getattr(c, f"{quantity}_error")) for c in found]
    covered = (
        np.abs(np.concatenate([scores(*pair, getattr(exact, quantity)) for pair in pairs])) < 2
    )
    assert 0.84 < covered.mean() < 0.97, covered.mean()
    if quantity != "normalised":  # a root is not unbiased
        mean = np.mean([value for value, _ in pairs], axis=0)
        spread = np.std([value for value, _ in pairs], axis=0, ddof=1) / np.sqrt(SEEDS)
        assert (np.abs(mean - getattr(exact, quantity)) <= 4 * spread + 1e-12).all()


def test_errors_of_two_probes_and_of_two_draws():
    """sd / sqrt(2) with one degree of freedom is half the difference; a total of two draws has
    twice that."""
    problem = random_planted()
    partition = ht.partition(problem.model, ROWS)
    probed = ht.coupling(problem, partition, num_probes=2, exact=False)
    first, second = probed.squares[:, np.arange(len(probed.columns)), probed.columns]
    errors = np.diag(probed.mass_error)[probed.columns]
    assert np.allclose(errors, np.abs(first - second) / 2) and errors.any()
    drawn = ht.coupling(problem, partition, num_probes=3, exact=False, num_blocks=2)
    masses = drawn.by_group[:, :, 0].mean(0) * drawn.weights
    one, other = masses[drawn.group_of[drawn.columns] == 0]
    assert drawn.tensor_mass_error[0, 0] == pytest.approx(abs(one - other)) and one != other


def test_errors_are_what_estimates_vary_by():
    _, found = runs(None, 8)
    varied = np.var([c.mass for c in found], axis=0, ddof=1)
    stated = np.mean([c.mass_error**2 for c in found], axis=0)
    diagonal = np.eye(len(varied), dtype=bool)
    for entries in (diagonal, ~diagonal):
        ratio = stated[entries].sum() / varied[entries].sum()
        assert 0.75 < ratio < 1.4, ratio


def by_hand(squares: list, **changed) -> ht.structure.Coupling:
    """The Coupling of squares (k, D, S) of blocks that are all in one tensor, a column each."""
    table = np.array(squares, float)
    count = table.shape[1]
    fields = {
        "names": tuple("abc"[:count]),
        "groups": ("t",),
        "layers": ("t",),
        "group_of": np.zeros(count, int),
        "num_blocks": np.array([count]),
        "columns": np.arange(count),
        "weights": np.ones(count),
        "drawn": np.array([False]),
        "squares": table,
        "by_group": table.sum(2, keepdims=True),
        "exact": False,
        "num_matvecs": count * len(table),
        "seed": 0,
        "probes": "rademacher",
        "route": "by hand",
    }
    return ht.structure.Coupling(**fields | changed)


def test_errors_across_probes_by_hand():
    # column 0 is (1, 2), then (3, 6); column 1 is (4, 5), then (4, 9)
    found = by_hand([[[1, 2], [4, 5]], [[3, 6], [4, 9]]])
    assert found.mass.tolist() == [[2, 4], [4, 7]]
    # variances of the means: 1 and 4 in column 0, 0 and 4 in column 1; columns are independent
    assert np.allclose(found.mass_error, [[1, np.sqrt(4 + 0) / 2], [np.sqrt(4 + 0) / 2, 2]])
    # sums of the columns: 3 and 9, whose mean has variance 9; 9 and 13, 4
    assert np.allclose(found.tensor_mass_error, np.sqrt(9 + 4))


def test_errors_across_draws_by_hand():
    squares = [[[1, 0, 0], [0, 2, 0], [0, 0, 6]]]
    found = by_hand(squares, drawn=np.array([True]), num_blocks=np.array([9]))
    # draws of 1, 2 and 6: their variance is 14 / 2, that of the sum of three 3 times as large
    assert np.allclose(found.tensor_mass, 9) and np.allclose(found.tensor_mass_error, np.sqrt(21))
    doubled = by_hand(
        squares, drawn=np.array([True]), num_blocks=np.array([9]), weights=np.full(3, 2.0)
    )
    assert np.allclose(doubled.tensor_mass_error, 2 * np.sqrt(21))


# the errors of a ratio of few draws are those of a linearisation: too small at 3 draws (73 % of
# these within two)
@pytest.mark.parametrize("num_blocks", [None, 5])
def test_shares_are_right_within_their_errors(num_blocks):
    exact, found = runs(num_blocks, 8 if num_blocks is None else 2)
    covered = []
    for place in PLACES[:3]:
        shares = [c.shares[place] for c in found]
        covered += [abs(s.value - exact.shares[place].value) < 2 * s.standard_error for s in shares]
        mean, spread = np.mean([s.value for s in shares]), np.std([s.value for s in shares])
        assert (
            abs(mean - exact.shares[place].value) < 0.5 * spread
        )  # the bias of a ratio, and chance
    assert (0.8 if num_blocks else 0.84) < np.mean(covered) < 0.985, np.mean(covered)
    assert all(sum(s.value for s in c.shares.values()) == pytest.approx(1) for c in found)


@pytest.mark.parametrize("num_pilot", [0, 2])
def test_drawn_blocks_give_unbiased_totals(num_pilot):
    exact, found = runs(3, 2, num_pilot)
    masses = np.array([c.tensor_mass for c in found])
    spread = masses.std(0, ddof=1) / np.sqrt(SEEDS)
    assert (np.abs(masses.mean(0) - exact.tensor_mass) < 3.5 * spread).all()
    errors = np.mean([c.tensor_mass_error**2 for c in found], axis=0)
    assert np.allclose(errors[0, 0], masses.var(0, ddof=1)[0, 0], rtol=0.6)
    assert all(
        c.drawn.tolist() == [True, False] and len(c.columns) == 4 and c.num_blocks[0] == 6
        for c in found
    )
    assert {c.num_matvecs for c in found} == {8 + num_pilot}


def test_the_pilot_finds_the_heavy_blocks():
    matrix = torch.eye(17, dtype=torch.float64) * 0.01
    matrix[4, 4] = 100.0
    problem = planted(matrix)
    partition = ht.partition(problem.model, ROWS)
    options = {"exact": False, "num_blocks": 2, "num_probes": 1}
    guided, even = (
        [
            ht.coupling(problem, partition, seed=seed, num_pilot=pilot, **options)
            for seed in range(20)
        ]
        for pilot in (1, 0)
    )
    assert all("a2" in c.names for c in guided) and not all("a2" in c.names for c in even)
    again = next(
        c for c in guided if len(c.names) < len(c.columns)
    )  # drawn twice: one block, two columns
    assert np.isclose(again.mass[again.names.index("a2"), again.names.index("a2")], 1e4 + 1e-4)


@pytest.mark.parametrize("probes", ["rademacher", "gaussian"])
def test_planted_blocks_have_exactly_no_coupling(probes):
    matrix = torch.zeros(17, 17, dtype=torch.float64)
    for first in range(0, 12, 2):
        factor = torch.randn(2, 2, dtype=torch.float64)
        matrix[first : first + 2, first : first + 2] = factor @ factor.T
    matrix[12:, 12:] = 1.0
    problem = planted(matrix)
    found = ht.coupling(
        problem, ht.partition(problem.model, ROWS), exact=False, num_probes=2, probes=probes
    )
    off = ~np.eye(7, dtype=bool)
    assert (
        (found.mass[off] == 0).all()
        and (found.normalised[off] == 0).all()
        and (np.diag(found.mass) > 0).all()
    )
    assert found.shares["block"].value == 1 and [found.shares[p].value for p in PLACES[1:]] == [
        0,
        0,
        0,
    ]
    wrong = {f"c{i}": ("a", (slice(None), slice(i, i + 1))) for i in range(2)} | {
        "b": "b"
    }  # across the planted blocks
    assert (
        ht.coupling(problem, ht.partition(problem.model, wrong), exact=False).shares["tensor"].value
        > 0.05
    )


def test_blocks_that_are_transposed_heads_and_tied():
    problem = network("hf-gpt2")
    partition = ht.partition(problem.model, "head")
    exact = ht.coupling(problem, partition, exact=True)
    found = ht.coupling(problem, partition, exact=False, num_probes=24)
    strong = exact.mass > 1e-4 * exact.mass.max()
    assert np.allclose(found.mass[strong], exact.mass[strong], rtol=1.0)
    assert abs(np.log(found.mass[strong] / exact.mass[strong])).mean() < 0.2
    assert found.names == partition.names and exact.num_matvecs == problem.num_parameters
    for place in PLACES:
        share, expected = found.shares[place], exact.shares[place].value
        assert abs(share.value - expected) < 4 * share.standard_error + 1e-6, place


def test_a_float32_problem_and_a_block_over_several_tensors():
    problem = network("mlp", torch.float32)
    layers = ht.partition(problem.model, "layer")
    exact, found = (
        ht.coupling(problem, layers, exact=True),
        ht.coupling(problem, layers, exact=False, num_probes=64),
    )
    assert exact.groups == ("0.weight + 0.bias", "2.weight + 2.bias") and exact.layers == ("0", "2")
    assert np.allclose(found.mass, exact.mass, rtol=0.4) and found.shares[
        "tensor"
    ].value == pytest.approx(0, abs=1e-6)


def test_auto_is_exact_where_that_costs_no_more():
    partition = ht.partition(random_planted().model, ROWS)
    assert ht.coupling(random_planted(), partition, num_probes=3).exact  # 17 products against 21
    assert not ht.coupling(random_planted(), partition, num_probes=2).exact
    assert not ht.coupling(random_planted(), partition, num_probes=3, exact=False).exact


def test_layers_are_those_of_the_transformer():
    name = layer_namer(gpt(layers=2))
    layers = {name(parameter) for parameter, _ in gpt(layers=2).named_parameters()}
    inside = [layer for layer in layers if layer.rpartition(".")[2].isdigit()]
    assert len(inside) == 2 and len(layers) > 3
    assert layer_namer(nn.Sequential(nn.Linear(2, 2)))("0.weight") == "0"
    problem = random_planted()
    found = ht.coupling(
        problem, ht.partition(problem.model, ROWS), exact=True, layers=lambda name: name
    )
    assert found.shares["layer"].value == 0 and found.shares["across"].value > 0


def test_one_probe_has_no_error_over_blocks_that_are_all_taken():
    partition = ht.partition(random_planted().model, ROWS)
    found = ht.coupling(random_planted(), partition, exact=False, num_probes=1)
    assert np.isnan(found.mass_error).all() and np.isnan(found.shares["block"].standard_error)
    assert np.isnan(found.normalised_error).all()


def test_the_numbers_depend_on_the_seed_alone(monkeypatch):
    problem = network("mlp")
    partition = ht.partition(problem.model, "neuron")
    options = {"exact": False, "num_blocks": 2, "num_probes": 3, "seed": 7}
    expected = ht.coupling(problem, partition, **options)
    monkeypatch.setattr(Columns, "rows", property(lambda self: 2))  # as with little memory
    again = ht.coupling(problem, partition, **options)
    assert again.names == expected.names and np.allclose(
        again.squares, expected.squares, atol=1e-15
    )
    assert not np.allclose(
        ht.coupling(problem, partition, **options | {"seed": 8}).by_group, expected.by_group
    )


def test_a_run_goes_on_from_its_columns(monkeypatch):
    problem, kept = network("mlp"), {}
    partition = ht.partition(problem.model, "neuron")
    options = {"exact": False, "num_blocks": 2, "num_probes": 2}

    def keep(label, column):
        kept[label] = column
        if len(kept) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ht.coupling(problem, partition, on_column=keep, **options)
    expected, rows = ht.coupling(problem, partition, **options), []
    products = Columns.products
    monkeypatch.setattr(
        Columns,
        "products",
        lambda self, cut, at, v: (rows.append(len(v)), products(self, cut, at, v))[1],
    )
    found = ht.coupling(problem, partition, finished=kept, **options)
    assert PILOT in kept and sum(rows) == 2 * (len(expected.columns) - 3)
    assert np.array_equal(found.squares, expected.squares) and np.array_equal(
        found.weights, expected.weights
    )


def test_it_is_saved_and_loaded(tmp_path):
    _, found = runs(3, 2)
    ht.save(found[0], tmp_path / "coupling")
    loaded = ht.load(tmp_path / "coupling")
    assert np.array_equal(loaded.mass, found[0].mass) and loaded.shares == found[0].shares


def test_thousands_of_blocks_by_a_few_columns():
    model = nn.Sequential(nn.Embedding(3000, 2), nn.Flatten(), nn.Linear(6, 3)).double()
    problem = ht.Problem(
        model, ht.cross_entropy, [(torch.randint(30, (8, 3)), torch.randint(3, (8,)))]
    )
    partition = ht.partition(model, "neuron")
    found = ht.coupling(problem, partition, num_blocks=6, num_probes=2, exact=False)
    assert len(found.names) <= 6 + 3 + 1 and found.num_blocks.max() == 3000
    seen = [
        block
        for block in partition
        if "row=" not in block.name or int(block.name[9:].strip("row=]")) < 30
    ]
    exact = ht.coupling(problem, seen, exact=True)  # the other rows are zero
    for place in PLACES:
        share = found.shares[place]
        assert abs(share.value - exact.shares[place].value) < 4 * share.standard_error + 1e-12, (
            place
        )
    with pytest.raises(
        ValueError, match=r"num_blocks=None asks for a table of 3,00\d columns.*num_blocks=8"
    ):
        ht.coupling(problem, partition, num_probes=16, exact=False)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_probes": 0}, "num_probes is 0"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"probes": "uniform"}, "probes is 'uniform'"),
        ({"exact": "never"}, "exact is 'never'"),
        ({"num_blocks": 0}, "num_blocks is 0"),
    ],
)
def test_bad_arguments(options, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        ht.coupling(network("mlp"), "tensor", **options)


def test_chances_of_draws_are_as_stated():
    problem = random_planted()
    grid = BlockGrid(cuts_of(ht.partition(problem.model, ROWS), problem), str, 4)
    pilot = np.array([0.0, 0.0, 1.0, 3.0, 0.0, 0.0, 5.0])
    drawn = [draw for seed in range(500) for draw in grid.draws(seed, pilot) if draw.label != "b"]
    chances = 0.25 / 6 + 0.75 * np.array([0, 0, 0.25, 0.75, 0, 0])
    counts = np.bincount([draw.block for draw in drawn], minlength=6)
    assert np.allclose(counts / len(drawn), chances, atol=0.04)
    assert all(np.isclose(draw.weight, 1 / (4 * chances[draw.block])) for draw in drawn)
