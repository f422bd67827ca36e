"""Segments: the plain route's derivatives, pruned, put back, in the memory of the boundaries."""

import functools

import pytest
import torch
import torch.nn.functional as F
from problems import HF_TINY, _images, _tokens, gpt, relative_error, transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hessian_tools as ht
from hessian_tools.curvature.engine.double_backward import DoubleBackward
from hessian_tools.curvature.engine.memory import LiveBytes
from hessian_tools.curvature.segments.recompute import (
    NONE,
    Segments,
    applied,
    recomputing,
    repeated_layers,
)
from hessian_tools.curvature.segments.segment import segment
from hessian_tools.problem import vision
from hessian_tools.problem.networks import SmallResNet

DEEP = {**HF_TINY, "num_hidden_layers": 3}
FINE = {  # every kind, so fine that tiny networks have several blocks of queries and chunks of rows
    "layers": Segments(layers=True),
    "attention": Segments(queries=2),
    "loss": Segments(logits=22),
    "all": Segments(layers=True, queries=2, logits=22),
}


def hf(kind: str, config: str, **options) -> nn.Module:
    return getattr(transformers(), kind)(getattr(transformers(), config)(**options)).eval()


def resnet18() -> nn.Module:
    vision.repair()
    from torchvision.models import resnet18 as build

    return build(num_classes=4)


GPT2 = {
    "vocab_size": 11,
    "n_positions": 6,
    "n_embd": 8,
    "n_layer": 3,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# name -> (model, batches, Problem's keywords, number of layers, error that float64 reaches)
DEEP_NETWORKS = {
    "gpt": (lambda: gpt(layers=3), lambda: _tokens((2, 1), 6, 11), {}, 3, 1e-12),
    "hf-gpt2": (lambda: hf("GPT2LMHeadModel", "GPT2Config", **GPT2), lambda: _tokens((2, 1), 6, 11), {}, 3, 1e-12),
    "hf-bert": (
        lambda: hf("BertForMaskedLM", "BertConfig", vocab_size=11, pad_token_id=None, **DEEP),
        lambda: _tokens((2, 1), 6, 11), {}, 3, 1e-12,
    ),
    "hf-vit": (
        lambda: hf("ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, num_channels=1, num_labels=4,
                   **DEEP),
        lambda: _images((3,), 8), {}, 3, 1e-12,
    ),
    "hf-llama-gqa": (
        lambda: hf("LlamaForCausalLM", "LlamaConfig", vocab_size=11, num_key_value_heads=1, **DEEP),
        lambda: _tokens((2, 1), 6, 11), {}, 3, 1e-6,
    ),
    "resnet": (
        lambda: SmallResNet((4, 4, 6), 4), lambda: [(x.repeat(1, 3, 1, 1), y) for x, y in _images((5,), 8)],
        {"batch_stats": True}, 3, 1e-12,
    ),
}  # fmt: skip


@functools.cache
def deep(name: str) -> ht.Problem:
    build, data, keywords, _, _ = DEEP_NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = build().double(), data()
    return ht.Problem(
        model,
        ht.cross_entropy,
        [(x.double() if x.is_floating_point() else x, y) for x, y in batches],
        **keywords,
    )


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("kind", list(FINE))
@pytest.mark.parametrize("name", list(DEEP_NETWORKS))
def test_segments_change_no_product(name, kind, record):
    problem, allowed = deep(name), DEEP_NETWORKS[name][4]
    plain = ht.HessianOperator(problem, record=record, segments=NONE)
    hessian = ht.HessianOperator(problem, record=record, segments=FINE[kind])
    vectors = torch.randn(
        2, hessian.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert relative_error(hessian.matmat(vectors), plain.matmat(vectors)) < allowed
    if kind == "all":
        assert "batched" in hessian.route
        for block in list(ht.partition(problem.model, "semantic"))[::5]:
            rows = vectors[:, : block.numel]
            assert torch.allclose(
                hessian.block(block).matmat(rows), plain.block(block).matmat(rows), atol=allowed
            )


def test_verification_passes_in_segments():
    verification = ht.HessianOperator(deep("gpt"), segments=FINE["all"]).verify()
    assert verification.passed and not verification.skipped, str(verification)


@pytest.mark.parametrize("name", list(DEEP_NETWORKS))
def test_layers_are_found(name):
    assert len(repeated_layers(deep(name).model)) == DEEP_NETWORKS[name][3]


def test_layers_of_torchvision_are_found_and_keep_their_product():
    model = resnet18().double().eval()
    assert len(repeated_layers(model)) == 8 and not repeated_layers(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    )
    problem = ht.Problem(
        model,
        ht.cross_entropy,
        [(torch.randn(2, 3, 16, 16).double(), torch.tensor([0, 3]))],
        batch_stats=True,
    )
    statistics = {k: v.clone() for k, v in model.state_dict().items()}
    block = ht.partition(model, "weights")["layer4.1.conv2.weight"]
    v = torch.randn(block.numel, dtype=torch.float64)
    products = [
        ht.HessianOperator(problem, record=True, segments=s).block(block) @ v
        for s in (NONE, FINE["layers"])
    ]
    assert relative_error(products[1], products[0]) < 1e-10
    assert all(torch.equal(v, statistics[k]) for k, v in model.state_dict().items())


ATTENTION = {  # (queries, keys, heads, heads of keys) and keywords
    "plain": ((7, 7, 2, 2), {}),
    "causal": ((7, 7, 2, 2), {"is_causal": True}),
    "causal, fewer keys": ((7, 4, 2, 2), {"is_causal": True}),
    "causal, more keys": ((7, 9, 2, 2), {"is_causal": True}),
    "scaled": ((7, 7, 2, 2), {"scale": 0.3}),
    "grouped": ((7, 7, 4, 2), {"enable_gqa": True, "is_causal": True}),
    "boolean mask": ((7, 5, 2, 2), {"attn_mask": torch.rand(7, 5) > 0.2}),
    "mask for each head": ((7, 5, 2, 2), {"attn_mask": torch.randn(3, 2, 7, 5).double()}),
    "mask for all queries": ((7, 5, 2, 2), {"attn_mask": torch.randn(3, 1, 1, 5).double()}),
    "learned mask": ((7, 5, 2, 2), {"attn_mask": torch.randn(2, 7, 5).double().requires_grad_()}),
}


def second_derivative(function, inputs) -> list[torch.Tensor]:
    """Of sum(function^3) along fixed directions."""
    gradients = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
    directions = [
        torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(i))
        for i, x in enumerate(inputs)
    ]
    return torch.autograd.grad(gradients, inputs, directions)


@pytest.mark.parametrize("case", list(ATTENTION))
def test_attention_by_blocks_of_queries_is_attention(case):
    (queries, keys, heads, key_heads), options = ATTENTION[case]
    shapes = [(3, heads, queries, 4), (3, key_heads, keys, 4), (3, key_heads, keys, 5)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    learned = [m for m in [options.get("attn_mask")] if m is not None and m.requires_grad]

    def attend(query, key, value, *_):
        return F.scaled_dot_product_attention(query, key, value, **options)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = second_derivative(attend, inputs + learned)
        with applied(Segments(queries=3), nn.Identity()):
            found = second_derivative(attend, inputs + learned)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected, strict=True))


LOSS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "other index": {"ignore_index": 2},
    "weights": {"weight": torch.rand(5).double()},
    "smoothed": {"label_smoothing": 0.1},
}


@pytest.mark.parametrize("case", [*LOSS, "probabilities", "images"])
def test_cross_entropy_by_chunks_is_cross_entropy(case):
    shape = (9, 5, 3) if case == "images" else (9, 5)
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (9, 3) if case == "images" else (9,))
    target[1] = 2
    target[4] = target[4] if case == "other index" else -100
    if case == "probabilities":
        target = torch.softmax(torch.randn(9, 5, dtype=torch.float64), 1)

    def loss(logits):
        return F.cross_entropy(logits, target, **LOSS.get(case, {}))

    expected = second_derivative(loss, [logits])
    with applied(Segments(logits=10), nn.Identity()):
        found = second_derivative(loss, [logits])
    assert torch.allclose(found[0], expected[0], atol=1e-12)


class Nested(nn.Module):
    """Nested arguments and outputs: whole numbers, no gradient, and no tensor among them."""

    def forward(self, given, scale=None, flag=True):
        x, y = given["x"], given["more"][0]
        return {
            "product": x.tanh() * y.sin() * scale,
            "square": (x**2, x.argmax()),
            "fixed": x.detach(),
            "flag": flag,
        }


def test_nested_arguments_and_results():
    x, y = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.randn(4, dtype=torch.float64)

    def run(through):
        def function(x, y):
            out = through(Nested(), {"x": x, "more": [y]}, scale=scale)
            assert out["flag"] is True and int(out["square"][1]) == int(x.argmax())
            return out["product"] + out["square"][0] * out["fixed"].detach()

        return second_derivative(function, [x, y])

    expected = run(lambda module, *args, **kwargs: module(*args, **kwargs))
    assert all(torch.allclose(a, b) for a, b in zip(run(segment), expected, strict=True))


def test_what_is_neither_tensor_nor_plain_value_is_left_alone():
    class Cache(list):
        pass

    cache, x = Cache(), torch.randn(3, requires_grad=True)

    def function(x, cache):
        cache.append(1)
        return x**3

    kept = {"cache": type("Store", (), {"append": lambda self, value: cache.append(value)})()}
    (second,) = second_derivative(lambda x: segment(function, x, **kept), [x])
    assert len(cache) == 1 and second.abs().sum() > 0  # called once, not recomputed


def test_everything_is_put_back():
    model, kept = gpt(layers=2), (F.scaled_dot_product_attention, F.cross_entropy)
    model.blocks[0].forward = own = model.blocks[0].forward
    with pytest.raises(KeyError), applied(FINE["all"], model):
        assert F.cross_entropy is not kept[1] and "forward" in vars(model.blocks[1])
        raise KeyError
    assert kept == (F.scaled_dot_product_attention, F.cross_entropy)
    assert vars(model.blocks[0])["forward"] is own and "forward" not in vars(model.blocks[1])


def test_a_block_runs_only_what_lies_downstream():
    problem = deep("gpt")
    hessian = ht.HessianOperator(problem, record=True, segments=FINE["layers"])
    hessian.matmat(torch.zeros(1, hessian.size))  # records

    def counted(name: str) -> int:
        block = hessian.block(ht.partition(problem.model, "tensor")[name])
        with FlopCounterMode(display=False) as counter:
            block.matmat(torch.randn(1, block.size, dtype=torch.float64))
        return counter.get_total_flops()

    first, last = counted("blocks.0.fc.weight"), counted("blocks.2.fc.weight")
    assert last < 0.5 * first
    plain = ht.HessianOperator(problem, record=False, segments=NONE)
    with FlopCounterMode(display=False) as counter:
        plain.matmat(torch.randn(1, plain.size, dtype=torch.float64))
    assert first < 0.9 * counter.get_total_flops()


def peak(route: DoubleBackward, problem: ht.Problem, names: list[str]) -> int:
    vectors = [torch.zeros(1, *problem.parameters[name].shape) for name in names]
    with LiveBytes() as live:
        list(route.products(problem.batches[0], names, [vectors]))
    return live.peak


def test_memory_of_attention_and_loss_grows_with_the_context_not_its_square():
    segments, peaks = Segments(queries=16, logits=16 * 11), {}
    for length in (64, 128, 256):
        model, tokens = (
            gpt(context=length, layers=2, d=4, tied=False),
            torch.randint(11, (1, length + 1)),
        )
        problem = ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])
        for kind in (NONE, segments):
            name = ["blocks.0.attention.query.weight"]
            peaks[kind, length] = peak(DoubleBackward(problem, segments=kind), problem, name)
    growth = {
        kind: (peaks[kind, 256] - peaks[kind, 128]) / (peaks[kind, 128] - peaks[kind, 64])
        for kind in (NONE, segments)
    }
    assert growth[NONE] > 3.5 and growth[segments] < 2.2


def test_only_boundaries_are_kept():
    kept = {}
    for layers in (4, 8):
        model, tokens = gpt(context=16, layers=layers, d=8), torch.randint(11, (2, 17))
        problem = ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])
        with LiveBytes() as live:
            route = DoubleBackward(problem, recorded=True, segments=Segments(layers=True))
            list(route.products(problem.batches[0], list(problem.parameters), []))
            kept[layers] = live.now
    weights = sum(p.numel() for p in model.blocks[0].parameters())
    boundary = 2 * 16 * 8  # what comes in, and the gradient of what goes out
    floats_a_layer = (kept[8] - kept[4]) / 4 / 4
    assert floats_a_layer <= weights + 2.5 * boundary  # its gradient and its boundary


def test_layers_that_read_more_than_their_arguments_are_not_segments():
    class Reading(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.shared = [shared]  # not registered: no parameter of the layer

        def forward(self, x):
            return torch.tanh(self.inner(x)) * self.shared[0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.layers = nn.Sequential(*(Reading(self.scale) for _ in range(2)))

        def forward(self, x):
            return self.layers(x)

    problem = ht.Problem(Model(), ht.mse, [(torch.randn(4, 3), torch.randn(4, 3))])
    with pytest.raises(ValueError, match="read more than their arguments"):
        ht.HessianOperator(problem, segments=Segments(layers=True))


def test_layers_with_a_cache_of_keys_are_segments_too():
    """A cache is an object that a layer fills, so that it could not run again."""
    model = hf("GPT2LMHeadModel", "GPT2Config", **{**GPT2, "n_layer": 6})
    assert model.config.use_cache
    tokens = torch.randint(11, (4, 6))
    problem = ht.Problem(model, ht.huggingface, [{"input_ids": tokens, "labels": tokens}])
    kept = {}
    for segments in (NONE, Segments(layers=True)):
        with recomputing(problem, segments), LiveBytes() as live:
            loss = problem.batch_loss(problem.batches[0])
            kept[segments] = live.now
            del loss
    assert kept[Segments(layers=True)] < 0.5 * kept[NONE]
    assert model.config.use_cache
