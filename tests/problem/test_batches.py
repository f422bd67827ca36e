"""Batches of any kind: what is found in them, what is copied, what is refused."""

import dataclasses
import weakref
from collections import OrderedDict, UserDict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import hessian_tools as ht
from hessian_tools.problem import CrossEntropy
from hessian_tools.problem.batches import (
    cut_batch,
    frozen,
    map_tensors,
    outline,
    tensors_of,
    with_tensors,
)


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


class Store(UserDict):
    pass


class Graph:
    """As graph libraries have it: tensors in a store, attributes looked up there."""

    def __init__(self, x, y):
        self._store = {"x": x, "y": y}
        self._parent = self  # a circle

    def __getattr__(self, name):
        try:
            return self.__dict__["_store"][name]
        except KeyError:
            raise AttributeError(name) from None


class Called:
    """As torch_geometric's graphs: an object that is also called, and leads back to itself."""

    def __init__(self, x, y):
        self._held = deque([x, y])  # a container that only torch's pytrees know
        self._owner = weakref.ref(self)

    def __call__(self):
        return self

    x = property(lambda self: self._held[0])
    y = property(lambda self: self._held[1])


def nested(x, y):
    return {"inner": [Pair(x, y), "word", 3]}


KINDS = [Called, Pair, Frozen, Slotted, Graph, lambda x, y: SimpleNamespace(x=x, y=y)]
KINDS += [lambda x, y: Store(x=x, y=y), lambda x, y: OrderedDict(x=x, y=y), nested]
X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_found_replaced_and_never_changed(kind):
    batch = kind(X, Y)
    assert [id(t) for t in tensors_of(batch)] == [id(X), id(Y)]
    doubled = map_tensors(lambda t: 2 * t, batch)
    assert type(doubled) is type(batch)
    assert torch.equal(tensors_of(doubled)[0], 2 * X)
    assert torch.equal(tensors_of(doubled)[1], 2 * Y)
    assert [id(t) for t in tensors_of(batch)] == [id(X), id(Y)]
    again = with_tensors(doubled, [X, Y])
    assert [id(t) for t in tensors_of(again)] == [id(X), id(Y)]


def test_an_object_that_is_copied_leads_back_to_the_copy():
    called = map_tensors(torch.clone, Called(X, Y))
    assert called._owner() is called
    graph = map_tensors(torch.clone, Graph(X, Y))
    assert graph._parent is graph


def test_outlines_tell_apart_what_a_trace_depends_on():
    """A recorded product is shared by batches of one outline."""
    assert outline(Called(X, Y)) != outline(Called(X, Y.float()))
    assert outline(deque([X])) != outline(deque([Y]))
    assert outline(SimpleNamespace(x=X, scale=1.0)) != outline(SimpleNamespace(x=X, scale=2.0))
    first, second = (pack_sequence([torch.ones(n), torch.ones(4 - n)]) for n in (3, 2))
    assert outline(first) != outline(second)
    assert outline(Pair(X, Y)) == outline(Pair(X + 1, Y))


def test_a_packed_sequence_keeps_the_sizes_of_its_steps():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    doubled = map_tensors(lambda t: 2 * t, packed)
    assert torch.equal(doubled.batch_sizes, packed.batch_sizes)
    assert torch.equal(doubled.data, 2 * packed.data)


def test_what_holds_no_tensor_is_passed_on():
    class Words:
        text = "a"

    words, module = Words(), nn.Linear(2, 2)
    batch = [words, module, len, "text", None, torch.float32]
    assert tensors_of(batch) == []
    assert map_tensors(lambda t: 1 / 0, batch) == batch


def own(model, batch):
    return nn.functional.cross_entropy(model(batch.x), batch.y)


@pytest.mark.parametrize("kind", KINDS[:6])
def test_the_pooled_mean_does_not_depend_on_the_cut(kind):
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randint(3, (40,))
    model = nn.Linear(4, 3)
    whole = ht.HessianOperator(ht.Problem(model, own, [kind(x, y)]))
    uneven = ht.HessianOperator(
        ht.Problem(model, own, [kind(x[:36], y[:36]), kind(x[36:], y[36:])])
    )
    assert uneven.problem.counts == [36, 4]
    torch.testing.assert_close(uneven.to_dense(), whole.to_dense(), rtol=1e-4, atol=1e-6)
    assert uneven.verify().passed
    cut = ht.HessianOperator(ht.Problem(model, own, [kind(x, y)]), microbatch=7)
    torch.testing.assert_close(cut.to_dense(), whole.to_dense(), rtol=1e-4, atol=1e-6)


def graph_loss(model, graph):
    return nn.functional.cross_entropy(graph.adj @ torch.tanh(model(graph.x)), graph.y)


def graph_of(nodes, shift):
    x, y = torch.randn(nodes, 5) + shift, torch.randint(3, (nodes,))
    graph = Graph(x, y)
    graph._store["adj"] = torch.rand(nodes, nodes) / nodes
    return graph


def test_graphs_of_one_shape_keep_their_own_data_in_a_compiled_product():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    graphs = [graph_of(10, 0), graph_of(10, 3), graph_of(4, 1)]
    problem = ht.Problem(model, graph_loss, graphs, num_examples=lambda graph: len(graph.y))
    hessian = ht.HessianOperator(problem, route="tangent program")
    v = torch.randn(hessian.size)
    parts = [ht.HessianOperator(ht.Problem(model, graph_loss, [g])) @ v for g in graphs]
    expected = (10 * parts[0] + 10 * parts[1] + 4 * parts[2]) / 24
    torch.testing.assert_close(hessian @ v, expected, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_counted_is_asked_for():
    edges = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]])
    ragged = [SimpleNamespace(x=torch.randn(3, 2), edges=edges) for _ in range(2)]

    def loss(model, batch):
        return model(batch.x).square().mean()

    with pytest.raises(ValueError, match=r"batch 0 .*different lengths.*num_examples"):
        ht.Problem(nn.Linear(2, 1), loss, ragged)
    assert ht.Problem(nn.Linear(2, 1), loss, ragged, num_examples=lambda b: len(b.x)).counts == [
        3,
        3,
    ]
    assert ht.Problem(nn.Linear(2, 1), loss, ragged[:1]).num_parameters == 3

    class Opaque:
        def __init__(self, x):
            self.read = lambda: x

    def opaque_loss(model, batch):
        return model(batch.read()).square().mean()

    hidden = [Opaque(torch.randn(3, 2)), Opaque(torch.randn(5, 2))]
    with pytest.raises(ValueError, match=r"no tensor was found.*num_examples"):
        ht.Problem(nn.Linear(2, 1), opaque_loss, hidden)


# ------------------------------------------------------------------------------- read twice


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_missing_values_are_no_difference():
    y = torch.tensor([[1.0, float("nan")], [float("nan"), 2.0]])
    loader = DataLoader(TensorDataset(torch.ones(2, 3), y), batch_size=1)
    assert len(frozen(loader)) == 2
    sparse = torch.eye(3).to_sparse()
    layouts = [sparse, sparse.to_sparse_csr(), torch.ones(2, dtype=torch.complex64)]

    class Again:
        def __iter__(self):
            return iter([[layout.clone() for layout in layouts]])

    assert len(frozen(Again())) == 1


@pytest.mark.parametrize(
    "second, named",
    [
        ([torch.tensor([1.0, 5.0, 3.0])], r"tensor 0, float32\(3,\), in 1 of 3 entries"),
        ([torch.ones(3, dtype=torch.float64)], r"float32\(3,\), then float64\(3,\)"),
        ([torch.ones(4)], r"float32\(3,\), then float32\(4,\)"),
        ([torch.ones(3), torch.ones(1)], "1 tensors, then 2"),
    ],
)
def test_other_data_is_told_as_what_it_is(second, named):
    first = [torch.tensor([1.0, 2.0, 3.0])]

    class Changing:
        times = 0

        def __iter__(self):
            self.times += 1
            return iter([first if self.times == 1 else second])

    with pytest.raises(ValueError, match=named):
        frozen(Changing())


# ------------------------------------------------------------------------------------ sparse


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, adjacency):
        return self.b(adjacency @ torch.tanh(self.a(adjacency @ x)))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_matrices_in_a_batch(layout):
    torch.manual_seed(0)
    model, x, y = Convolution(), torch.randn(12, 4), torch.randint(3, (12,))
    adjacency = (torch.rand(12, 12) < 0.3).float()
    dense = ht.HessianOperator(ht.Problem(model, ht.cross_entropy, [((x, adjacency), y)]))
    sparse = getattr(adjacency, layout)()
    hessian = ht.HessianOperator(ht.Problem(model, ht.cross_entropy, [((x, sparse), y)]))
    v = torch.randn(hessian.size)
    expected = dense @ v
    torch.testing.assert_close(hessian @ v, expected, rtol=1e-4, atol=1e-6)
    hessian.expect(10**12)
    torch.testing.assert_close(hessian @ v, expected, rtol=1e-4, atol=1e-6)
    assert hessian.verify().passed
    with pytest.raises(ValueError, match="sparse"):
        cut_batch(sparse, 0, 3, 12)


def test_embeddings_with_sparse_gradients():
    def product(sparse):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Embedding(7, 5, sparse=sparse), nn.Tanh(), nn.Linear(5, 3))
        ids = torch.randint(7, (12,))
        hessian = ht.HessianOperator(
            ht.Problem(model, ht.cross_entropy, [(ids, torch.arange(12) % 3)])
        )
        return model, hessian @ torch.ones(hessian.size)

    model, found = product(True)
    assert model[0].sparse
    torch.testing.assert_close(found, product(False)[1], rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------- class axes


def test_the_class_axis_is_never_guessed():
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 5), torch.randint(5, (2, 5))
    scale = nn.Linear(5, 5)
    with pytest.raises(ValueError, match=r"CrossEntropy.class_axis=1.*class_axis=-1"):
        ht.Problem(scale, ht.cross_entropy, [(x, y)])
    logits = scale(x)
    first = nn.functional.cross_entropy(logits, y)
    last = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    for axis, expected in [(1, first), (-1, last)]:
        problem = ht.Problem(scale, CrossEntropy(class_axis=axis), [(x, y)])
        assert problem.loss == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="class_axis is 2"):
        CrossEntropy(class_axis=2)
