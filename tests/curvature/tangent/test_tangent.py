"""Tangent programs against dense double backward, their counted operations and bytes."""

import problems
import pytest
import torch
import torch.nn.functional as F
from problems import dense_hessian, network, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hessian_tools as ht
from hessian_tools.curvature.engine.memory import measuring
from hessian_tools.curvature.tangent.graph import Untraceable, traced_gradient
from hessian_tools.curvature.tangent.linearize import linearize
from hessian_tools.curvature.tangent.route import TangentRoute
from hessian_tools.problem.networks import NanoGPT


def products(problem, names, vectors, route=None) -> list[torch.Tensor]:
    """Pooled over the batches, zeros filled in."""
    route = route or TangentRoute(problem, problem.batches)
    total = [torch.zeros_like(v) for v in vectors]
    for weight, batch in zip(problem.weights, problem.batches, strict=True):
        (found,) = route.products(batch, names, [vectors])
        for place, product in zip(total, found, strict=True):
            if product is not None:
                place.add_(product, alpha=weight)
    return total


def flat(problem: ht.Problem, probes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(probes, problem.num_parameters, generator=generator, dtype=torch.float64)


def shaped(problem: ht.Problem, vectors: torch.Tensor) -> list[torch.Tensor]:
    parameters = problem.parameters.values()
    pieces = vectors.to(problem.dtype).split([p.numel() for p in parameters], dim=1)
    return [piece.reshape(-1, *p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def full(problem: ht.Problem, vectors: torch.Tensor) -> torch.Tensor:
    found = products(problem, list(problem.parameters), shaped(problem, vectors))
    return torch.cat([product.reshape(len(vectors), -1) for product in found], dim=1)


@pytest.mark.parametrize("name", [name for name in problems.NETWORKS if name != "lstm"])
def test_whole_hessian(name):
    problem = network(name)
    vectors = flat(problem, 3)
    assert (
        relative_error(full(problem, vectors), vectors @ dense_hessian(problem))
        < problems.NETWORKS[name][-1]
    )


@pytest.mark.parametrize("name", ["gpt", "batchnorm-batch", "hf-gpt2"])
def test_diagonal_blocks(name):
    problem = network(name)
    dense, first, route = dense_hessian(problem), 0, TangentRoute(problem, problem.batches)
    for parameter, tensor in problem.parameters.items():
        size = tensor.numel()
        block = dense[first : first + size, first : first + size]
        vectors = torch.randn(2, size, dtype=torch.float64)
        (found,) = products(problem, [parameter], [vectors.reshape(2, *tensor.shape)], route)
        assert (found.reshape(2, -1) - vectors @ block).norm() <= 1e-10 * dense.norm()
        first += size


class Own(nn.Module):
    """A function of one parameter of shape (2, 3, 6, 6)."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 6, 6, dtype=torch.float64))
        self.function = function

    def forward(self, x):
        return self.function(self.weight)


OPERATIONS = {
    "cat": lambda w: torch.cat([w * w, torch.ones_like(w), w], 1).tanh(),
    "stack-unbind": lambda w: torch.stack([a.sin() for a in w.unbind(1)], 0),
    "slices": lambda w: w[:, 1:, ::2, -3:].exp() * w[:, :2, 1::2, :3],
    "select-index": lambda w: w[:, torch.tensor([0, 2, 2])].tanh() * w[:, 1:2],
    "gather": lambda w: w.gather(3, torch.tensor([0, 2]).expand(2, 3, 6, 2)).exp(),
    "roll-flip": lambda w: w.roll(2, 3).tanh() * w.flip(2),
    "pad": lambda w: F.pad(w, (1, 2)).sin(),
    "cumsum": lambda w: w.cumsum(2).sin(),
    "tril": lambda w: w.tril().exp(),
    "einsum": lambda w: torch.einsum("abij,acjk->abcik", w, w).tanh(),
    "broadcast-division": lambda w: w / (1 + w.mean((2, 3), keepdim=True) ** 2),
    "amax": lambda w: w.amax(3) * w.sum(3),
    "logsumexp": lambda w: w.logsumexp(2),
    "norm": lambda w: w / w.norm(dim=1, keepdim=True),
    "prod": lambda w: w.prod(3),
    "where": lambda w: torch.where(w > 0, w.exp(), w * w),
    "masked": lambda w: w.masked_fill(w > 1, 0.5).exp(),
    "clamp": lambda w: w.clamp(-0.5, 1.0) ** 3,
    "std": lambda w: w.std(3) * w.mean(3),
    "softplus-silu-elu": lambda w: F.softplus(w) * F.silu(w) + F.elu(w) * F.sigmoid(w) + F.leaky_relu(w) * F.mish(w),
    "gelu": lambda w: F.gelu(w) + F.gelu(w, approximate="tanh"),
    "softmax": lambda w: F.softmax(w, 1) * F.log_softmax(w, 3),
    "max-pool": lambda w: F.max_pool2d(w, 3, 2, 1).exp(),
    "avg-pool": lambda w: F.avg_pool2d(w, 2).exp() + F.adaptive_avg_pool2d(w.tanh(), 3),
    "interpolate": lambda w: F.interpolate(w, scale_factor=2, mode="bilinear").tanh(),
    "convolution": lambda w: F.conv2d(w, w[:, :, :3, :3].sin(), w[:, 0, 0, 0], stride=2, padding=1).tanh(),
    "grouped": lambda w: F.conv2d(w, w[:, :1, :3, :3].repeat(3, 1, 1, 1)[:3].sin(), groups=3).tanh(),
    "transposed": lambda w: F.conv_transpose2d(w, w[:1, :, :2, :2].transpose(0, 1).sin(), stride=2).tanh(),
    "conv of one entry": lambda w: F.conv2d(w[..., :1, :1], w[..., :3, :3].sin(), w[0, 0, 0, :2], padding=1).tanh(),
    "conv of a corner": lambda w: F.conv2d(w[..., :2, :2], w[..., :3, :3].sin(), stride=2, padding=1).tanh(),
    "conv of all": lambda w: F.conv2d(w, w.exp() / 36).tanh(),
    "conv that skips": lambda w: F.conv2d(w[..., :3, :4], w[..., :2, :4].sin(), stride=3).tanh(),
    "conv1d of one entry": lambda w: F.conv1d(w[..., 0, :1], w[..., 1, :3].sin(), padding=1).tanh(),
    "conv1d": lambda w: F.conv1d(w[0], w[1, :, :, :3].exp()).sin(),
    "matrix-vector": lambda w: (w[0, 0] @ w[1, 1, 0]).tanh() * (w[0, 1, 2] @ w[1, 2, 3]),
    "embedding": lambda w: F.embedding(torch.tensor([[0, 1, 1], [5, 0, 2]]), w[0, 0]).tanh(),
    "in-place": lambda w: F.relu(w * w - 1, inplace=True).tanh() * (w * 2).add_(w).sin(),
    "cosine": lambda w: F.cosine_similarity(w[0], w[1], dim=0),
    "group-norm": lambda w: F.group_norm(w, 3).tanh(),
    "attention": lambda w: F.scaled_dot_product_attention(w, w.sin(), w.cos(), is_causal=True),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    torch.manual_seed(0)
    targets = OPERATIONS[name](torch.randn(2, 3, 6, 6, dtype=torch.float64))
    problem = ht.Problem(
        Own(OPERATIONS[name]),
        ht.mse,
        [(torch.zeros(1), torch.randn_like(targets))],
        num_examples=len,
    )
    vectors = flat(problem, 2)
    assert relative_error(full(problem, vectors), vectors @ dense_hessian(problem)) < 1e-12


@pytest.mark.parametrize(("side", "convolutions"), [(1, 0), (2, 2)])
def test_taps_that_only_see_padding_are_not_multiplied(side, convolutions):
    """3 x 3 taps on one entry are a matrix product with the middle one; 2 x 2 entries use all."""
    model = nn.Conv2d(4, 5, 3, padding=1)
    problem = ht.Problem(
        model, ht.mse, [(torch.randn(2, 4, side, side), torch.randn(2, 5, side, side))]
    )
    nodes = traced_gradient(problem, problem.batches[0]).graph.nodes
    assert sum("convolution" in str(node.target) for node in nodes) == convolutions
    route = TangentRoute(problem, problem.batches)
    vectors = [torch.randn(1, *p.shape) for p in problem.parameters.values()]
    list(route.products(problem.batches[0], list(problem.parameters), [vectors]))
    with FlopCounterMode(display=False) as counter:
        list(route.products(problem.batches[0], list(problem.parameters), [vectors]))
    taps = 1 if side == 1 else 9 * side**2
    assert counter.get_total_flops() == 2 * (
        2 * 2 * 4 * 5 * taps
    )  # forward tangent, and that of the weight's gradient


def test_what_cannot_be_traced_is_refused_with_its_reason():
    with pytest.raises(Untraceable, match="sigmoid_"):
        TangentRoute(network("lstm"), network("lstm").batches)
    problem = ht.Problem(
        Own(lambda w: w if w.sum() > 0 else -w), lambda m, b: (m(b) ** 2).mean(), [torch.ones(1)]
    )
    with pytest.raises(Untraceable, match="DataDependent"):
        traced_gradient(problem, problem.batches[0])


REFUSED = {
    "max.dim, which has several results": lambda w: w.max(3).values * w[..., 0],
    "scatter.src with 2 differentiable": lambda w: w.scatter(3, torch.zeros(2, 3, 6, 1).long(), w[..., :1] ** 2),
    "no rule for aten.as_strided": lambda w: w.exp().as_strided((3, 6), (2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_operations_without_a_rule_are_named(reason):
    function = REFUSED[reason]
    problem = ht.Problem(Own(function), lambda m, b: (m(b) ** 2).mean(), [torch.ones(1)])
    with pytest.raises(Untraceable, match=reason):
        TangentRoute(problem, problem.batches)


def test_micro_batches_of_many_shapes_are_refused():
    def loss(model, batch):
        return (model(batch) ** 2).mean() + batch.mean()

    batches = [torch.ones(n, 2) for n in range(1, 6)]
    problem = ht.Problem(Own(torch.tanh), loss, batches)
    assert TangentRoute(problem, batches[:4]).graph_bytes > 0
    with pytest.raises(Untraceable, match="5 different shapes"):
        TangentRoute(problem, batches)


def summed_embedding(**options) -> ht.Problem:
    torch.manual_seed(0)
    tokens = torch.tensor([[0, 1, 1], [5, 0, 2]])
    model = Own(lambda w: F.embedding(tokens, w[0, 0], **options).sum(1).tanh())
    target = (torch.zeros(1), torch.randn(2, 6))
    return ht.Problem(model, ht.mse, [target], num_examples=len)


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({"padding_idx": 1}, {0: 1, 1: 0}),
        ({"scale_grad_by_freq": True}, {0: 1 / 2, 1: 1 / 2}),
    ],
)
def test_an_embeddings_gradient_has_scaled_rows(options, scales):
    """All rows are read: the gradient's rows are scaled, not the columns that tangents meet."""
    expected = dense_hessian(summed_embedding())
    for token, scale in scales.items():
        expected[6 * token : 6 * token + 6] *= scale
    vectors = flat(summed_embedding(), 2)
    products = full(summed_embedding(**options), vectors)
    assert relative_error(products, vectors @ expected.T) < 1e-12


def test_no_cotangent_is_zero():
    problem = network("mlp")
    route, names = TangentRoute(problem, problem.batches), list(problem.parameters)
    first, *others = shaped(problem, flat(problem, 2))
    zeros = [torch.zeros_like(other) for other in others]
    pair = [[first, *zeros], [first, *[None] * len(others)]]
    expected, products = route.products(problem.batches[0], names, pair)
    assert all(torch.equal(a, b) for a, b in zip(products, expected, strict=True))


def test_an_error_without_words_is_a_reason_too():
    """A model may raise anything while it is traced; its batches here are fake only then."""

    def loss(model, batch):
        if type(batch) is not torch.Tensor:
            raise NotImplementedError
        return (model(batch) ** 2).mean()

    problem = ht.Problem(Own(torch.tanh), loss, [torch.ones(1)])
    with pytest.raises(Untraceable, match="NotImplementedError"):
        traced_gradient(problem, problem.batches[0])


def test_an_optimizers_step_is_seen():
    problem = network("mlp")
    hessian = ht.HessianOperator(problem, route="tangent program")
    vector = torch.randn(hessian.size)
    before = hessian @ vector
    with torch.no_grad():
        problem.parameters["0.weight"].mul_(2.0)
    after = hessian @ vector
    expected = ht.HessianOperator(problem, route="tangent program") @ vector
    assert not torch.allclose(before, after)
    assert torch.equal(after, expected)


def gpt_problem() -> ht.Problem:
    torch.manual_seed(0)
    tokens = torch.randint(64, (2, 33))
    return ht.Problem(
        NanoGPT(64, 32, 3, 48, 4, tied=False), ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])]
    )


def operations(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_counted_operations_are_the_floor():
    problem = gpt_problem()
    route, batch = TangentRoute(problem, problem.batches), problem.batches[0]

    def forward():
        with problem.evaluating(), torch.no_grad():
            problem.batch_loss(batch)

    def cost(names, probes):
        vectors = [torch.randn(probes, *problem.parameters[name].shape) for name in names]
        next(route.products(batch, names, [vectors]))  # constants are computed once
        return (
            operations(lambda: next(route.products(batch, names, [vectors])))
            / probes
            / operations(forward)
        )

    assert cost(list(problem.parameters), 4) <= 6.0
    matrices = [name for name, p in problem.parameters.items() if p.ndim > 1]
    assert sum(cost([name], 4) for name in matrices) / len(matrices) <= 1.35
    assert cost(["head.weight"], 4) < 0.2


def test_bytes_foretold_are_the_bytes_taken():
    problem = gpt_problem()
    probes, names = 3, list(problem.parameters)
    vectors = shaped(problem, flat(problem, probes))
    route = TangentRoute(problem, problem.batches)
    with measuring(problem.device, 1 << 40) as live:
        live.restart()
        for _ in route.products(problem.batches[0], names, []):
            pass
        constants, recording = live.now, live.peak - live.now
        live.restart()
        (found,) = route.products(problem.batches[0], names, [vectors])
        passing = live.peak - constants
        del found
    assert constants == pytest.approx(route.graph_bytes, rel=0.05)
    assert recording <= route.recording_bytes + 0.15 * constants
    assert passing == pytest.approx(probes * route.row_bytes, rel=0.15)


def test_steps_that_nothing_needs_are_gone():
    problem = gpt_problem()
    traced = linearize(traced_gradient(problem, problem.batches[0]), len(problem.parameters))
    index = list(problem.parameters).index("head.weight")
    program = traced.program([index])
    assert 0 < len(program.steps) < 20 < len(traced.program(range(len(problem.parameters))).steps)
