"""The contexts of `evaluating`: right second derivatives inside, and everything as before after."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from problems import dense_hessian, relative_error, transformers
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flex
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import hessian_tools as ht
from hessian_tools.problem.evaluation import evaluating
from hessian_tools.problem.kernels import REPLACEMENTS, twice_differentiable_kernels
from hessian_tools.problem.vision import torchvision

ROOT = Path(__file__).parents[2]
ROUTES = ("double backward", "tangent program")


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def difference(problem: ht.Problem, v: Tensor, step: float = 1e-5) -> Tensor:
    """H v by a central difference of the gradient that PyTorch's own kernels give."""
    parameters = list(problem.parameters.values())
    start = nn.utils.parameters_to_vector(parameters).detach()
    total = sum(problem.counts)

    def gradient(sign: int) -> Tensor:
        with torch.no_grad():
            nn.utils.vector_to_parameters(start + sign * step * v, parameters)
        pairs = zip(problem.batches, problem.counts, strict=True)
        loss = sum(problem.batch_loss(batch) * (n / total) for batch, n in pairs)
        slopes = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return nn.utils.parameters_to_vector(slopes)

    slope = (gradient(+1) - gradient(-1)) / (2 * step)
    with torch.no_grad():
        nn.utils.vector_to_parameters(start.clone(), parameters)
    return slope


def products_are_right(problem: ht.Problem, routes: Sequence[str] = ROUTES) -> None:
    v = torch.randn(problem.num_parameters, dtype=problem.dtype)
    right = difference(problem, v)
    for route in routes:
        product = ht.HessianOperator(problem, route=route) @ v
        assert relative_error(product, right) < 1e-6, route


# ------------------------------------------------------------- operations with formulas of our own


def bags(mode: str) -> Callable[[Tensor], Tensor]:
    indices, offsets = torch.tensor([0, 2, 2, 4, 1, 3]), torch.tensor([0, 2, 2])
    return lambda table: F.embedding_bag(indices, table, offsets, mode=mode, padding_idx=1)


def weighted_bag(table: Tensor, weights: Tensor) -> Tensor:
    indices = torch.tensor([[0, 2, 2], [4, 1, 3]])
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights, padding_idx=1)


def segments(reduce: str) -> Callable[[Tensor], Tensor]:
    lengths = torch.tensor([2, 0, 3])
    return lambda x: torch.segment_reduce(x, reduce, lengths=lengths, initial=0.5)


def ctc(x: Tensor, reduction: str = "mean") -> Tensor:
    targets = torch.tensor([[1, 1, 2], [3, 2, 0], [0, 0, 0]])
    lengths = torch.tensor([6, 5, 4]), torch.tensor([3, 2, 0])
    return F.ctc_loss(x.log_softmax(2), targets, *lengths, reduction=reduction)


def ctc_in_one_row(x: Tensor) -> Tensor:
    return F.ctc_loss(x.log_softmax(1), torch.tensor([1, 3]), (5,), (2,), zero_infinity=True)


def normed(dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda v, g: torch._weight_norm(v, g, dim)


HEADS = (1, 2, 3, 2)  # batch, heads, tokens, width


def attention_by(**options: object) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def chunked(reduction: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if options is None:
        pytest.skip("this version of PyTorch has no chunked loss")
    chunks = options(batch_chunk_size=2, chunking_method=None, allow_retain_graph=True)
    target = torch.tensor([2, 0, -100, 1])
    return lambda x, weight, bias: F.linear_cross_entropy(
        x, weight, target, linear_bias=bias, reduction=reduction, options=chunks
    )


ONE_LABEL, LABELS = (
    torch.tensor([2, 0, 3]),
    torch.tensor([[1, 3, -1, 0], [-1, 1, 2, 3], [0, 1, 2, -1]]),
)
MATRIX = (3, 4)
FORMULAS = {
    "weight_norm, first": (normed(0), (3, 2, 2), (3, 1, 1)),
    "weight_norm, middle": (normed(1), (3, 2, 2), (1, 2, 1)),
    "weight_norm, last": (normed(2), (3, 2, 2), (1, 1, 2)),
    "weight_norm, whole": (normed(-1), (3, 2), ()),
    "hardsigmoid": (lambda x: F.hardsigmoid(4 * x), (9,)),
    "hardsigmoid in place": (lambda x: F.hardsigmoid(4 * x, inplace=True), (9,)),
    "attention, causal": (attention_by(is_causal=True), HEADS, HEADS, HEADS),
    "attention, mask": (
        attention_by(attn_mask=torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool(), scale=0.3),
        *(HEADS, HEADS, HEADS),
    ),
    "attention, groups": (attention_by(enable_gqa=True), (1, 4, 3, 2), HEADS, HEADS),
    "multi_margin_loss": (lambda x: F.multi_margin_loss(x, ONE_LABEL, p=2, margin=0.7), MATRIX),
    "multi_margin_loss, one": (lambda x: F.multi_margin_loss(x, torch.tensor(1)), (4,)),
    "multi_margin_loss, weights": (
        lambda x: F.multi_margin_loss(x, ONE_LABEL, weight=torch.arange(1.0, 5).double()),
        MATRIX,
    ),
    "multilabel_margin_loss": (lambda x: F.multilabel_margin_loss(x, LABELS), MATRIX),
    "multilabel_margin_loss, each": (
        lambda x: F.multilabel_margin_loss(x, LABELS, reduction="none"),
        MATRIX,
    ),
    "ctc_loss": (ctc, (6, 3, 4)),
    "ctc_loss, each": (lambda x: ctc(x, "none"), (6, 3, 4)),
    "ctc_loss, one": (ctc_in_one_row, (5, 4)),
    **{
        f"cdist {p}": (lambda a, b, p=p: torch.cdist(a, b, p), (2, 2, 3), (2, 4, 3))
        for p in (0.0, 1.0, 1.5, 2.0, 3.0, float("inf"))
    },
    "cdist to itself": (lambda a: torch.cdist(a, a), MATRIX),
    "pdist": (F.pdist, MATRIX),
    "embedding_bag, sum": (bags("sum"), (5, 3)),
    "embedding_bag, mean": (bags("mean"), (5, 3)),
    "embedding_bag, max": (bags("max"), (5, 3)),
    "embedding_bag, weighted": (weighted_bag, (5, 3), (2, 3)),
    **{
        f"segment_reduce, {r}": (segments(r), (5, 2)) for r in ("sum", "mean", "prod", "max", "min")
    },
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_has_the_value_of_the_kernel_and_a_right_second_derivative(name):
    function, *shapes = FORMULAS[name]
    inputs = draws(*shapes)
    kernel = function(*inputs)
    cotangent = torch.randn_like(kernel)
    first = torch.autograd.grad(kernel, inputs, cotangent)
    with twice_differentiable_kernels():
        formula = function(*inputs)
        again = torch.autograd.grad(formula, inputs, cotangent)
        assert gradgradcheck(function, inputs, check_batched_grad=True, fast_mode=True)
    torch.testing.assert_close(formula, kernel)
    for a, b in zip(again, first, strict=True):
        torch.testing.assert_close(a, b)
    assert type(function(*inputs).grad_fn) is type(kernel.grad_fn)  # PyTorch's own again


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_chunked_loss_is_that_of_a_layer_and_cross_entropy(reduction):
    function, inputs = chunked(reduction), draws((4, 5), (3, 5), (3,))
    kernel = function(*inputs)
    with twice_differentiable_kernels():
        torch.testing.assert_close(function(*inputs), kernel)
        assert gradgradcheck(function, inputs, check_batched_grad=True, fast_mode=True)


def test_an_impossible_alignment_costs_infinity_or_nothing():
    scores = torch.randn(2, 1, 3, dtype=torch.float64).log_softmax(2).requires_grad_()
    targets = torch.tensor([[1, 1]])  # needs a blank between: three steps
    for zero in (False, True):
        kernel = F.ctc_loss(scores, targets, (2,), (2,), zero_infinity=zero)
        with twice_differentiable_kernels():
            formula = F.ctc_loss(scores, targets, (2,), (2,), zero_infinity=zero)
        assert formula.item() == kernel.item()
    (slope,) = torch.autograd.grad(formula, scores)
    assert not slope.any()


def test_distances_of_equal_points_have_derivative_zero():
    point = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    with twice_differentiable_kernels():
        for p in (1.0, 1.5, 2.0, 3.0):
            distance = torch.cdist(point, torch.ones(1, 3, dtype=torch.float64), p)
            (slope,) = torch.autograd.grad(distance.sum(), point, create_graph=True)
            assert not slope.any()
            if slope.requires_grad:
                (second,) = torch.autograd.grad(slope.sum(), point)
                assert not second.any()


@pytest.mark.parametrize("layout", ["rows", "columns", "inner", "batch"])
def test_grouped_products_are_products_of_groups(layout):
    shapes = {
        "rows": ((6, 3), (2, 3, 4)),
        "columns": ((2, 4, 3), (3, 6)),
        "inner": ((4, 6), (6, 3)),
        "batch": ((2, 3, 4), (2, 4, 5)),
    }[layout]
    a, b = draws(*shapes)
    ends = None if layout == "batch" else torch.tensor([2, 6], dtype=torch.int32)
    expected = {
        "rows": lambda: torch.cat([a[:2] @ b[0], a[2:] @ b[1]]),
        "columns": lambda: torch.cat([a[0] @ b[:, :2], a[1] @ b[:, 2:]], 1),
        "inner": lambda: torch.stack([a[:, :2] @ b[:2], a[:, 2:] @ b[2:]]),
        "batch": lambda: a @ b,
    }[layout]()
    with twice_differentiable_kernels():
        torch.testing.assert_close(torch._grouped_mm(a, b, ends), expected)
        assert gradgradcheck(lambda *x: torch._grouped_mm(*x, ends), (a, b), fast_mode=True)


def test_formulas_are_removed_after_an_exception_and_by_the_last_who_leaves():
    x = torch.randn(3, requires_grad=True)

    def twice():
        (slope,) = torch.autograd.grad(F.hardsigmoid(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.sum(), x)

    with pytest.raises(KeyError), twice_differentiable_kernels():
        with contextlib.suppress(ValueError), twice_differentiable_kernels():
            raise ValueError
        twice()  # the outer one still holds
        raise KeyError
    with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):
        twice()


def test_every_formula_is_of_an_operator_and_fault_that_is_known():
    assert {r.fault for r in REPLACEMENTS} == {"wrong", "missing"}
    names = set(torch._C._dispatch_get_all_op_names())
    assert all(r.operator in names for r in REPLACEMENTS if r.operator.startswith("aten::"))


# ------------------------------------------------------------------------------------- weight_norm


class Written(nn.Module):
    """A weight-normed linear layer written out."""

    def __init__(self, g: Tensor, v: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.g, self.v, self.bias = (nn.Parameter(t.detach().clone()) for t in (g, v, bias))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.g * self.v / self.v.norm(dim=1, keepdim=True)).T + self.bias


def classified(layer: nn.Module) -> ht.Problem:
    torch.manual_seed(1)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3)).double()
    batch = torch.randn(9, 4).double(), torch.randint(3, (9,))
    return ht.Problem(model, ht.cross_entropy, [batch])


def deprecated_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("route", ROUTES)
def test_weight_norm_has_the_hessian_of_its_formula(route):
    torch.manual_seed(0)
    layer = parametrizations.weight_norm(nn.Linear(4, 6))
    weight = layer.parametrizations.weight
    written = classified(Written(weight.original0, weight.original1, layer.bias))
    right = dense_hessian(written)
    problem = classified(layer)
    h = ht.HessianOperator(problem, route=route)
    dense = h.matmat(torch.eye(h.size, dtype=torch.float64))
    # bias, g, v of the layer stand as g, v, bias in the written one
    places = torch.cat([torch.arange(30, 36), torch.arange(30), torch.arange(36, h.size)])
    assert relative_error(dense, right[places][:, places]) < 1e-12


WEIGHT_NORMED = {
    "last dimension": lambda: parametrizations.weight_norm(nn.Linear(4, 6), dim=1),
    "whole": lambda: parametrizations.weight_norm(nn.Linear(4, 6), dim=None),
    "deprecated": lambda: deprecated_weight_norm(nn.Linear(4, 6)),
}


@pytest.mark.parametrize("kind", WEIGHT_NORMED)
def test_weight_norm_of_a_layer_is_right_by_differences(kind):
    products_are_right(classified(WEIGHT_NORMED[kind]()))


def test_weight_norm_in_a_script_is_right():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripts are deprecated
        script = torch.jit.script(normed_by_rows)
    with twice_differentiable_kernels():
        assert gradgradcheck(script, draws((3, 2), (3, 1)), fast_mode=True)


def normed_by_rows(v: Tensor, g: Tensor) -> Tensor:
    return torch._weight_norm(v, g, 0)


class ConvNet(nn.Module):
    """A weight-normed convolution and a transposed one, checkpointed or not."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv1d(2, 3, 3))
        self.second = parametrizations.weight_norm(nn.ConvTranspose1d(3, 2, 2), dim=1)
        self.checkpointed = checkpointed

    def features(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.features, x, use_reentrant=False)
        return self.features(x)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_weight_norm_of_convolutions_is_right_by_differences(checkpointed):
    batch = torch.randn(4, 2, 6).double(), torch.randint(2, (4,))
    model = ConvNet(checkpointed).double()
    routes = ROUTES[:1] if checkpointed else ROUTES
    products_are_right(ht.Problem(model, ht.cross_entropy, [batch]), routes)


# -------------------------------------------------------------- activations, losses and whole models


def test_hard_activations_are_right_by_differences():
    model = nn.Sequential(
        nn.Linear(4, 6),
        nn.Hardswish(),
        nn.Linear(6, 6),
        nn.Hardsigmoid(inplace=True),
        nn.Linear(6, 3),
    )
    batch = 2 * torch.randn(7, 4).double(), torch.randint(3, (7,))
    products_are_right(ht.Problem(model.double(), ht.cross_entropy, [batch]))


def test_a_mobile_net_is_right_by_differences():
    setting = torchvision().models.mobilenetv3.InvertedResidualConfig
    layers = [
        setting(8, 3, 8, 8, True, "HS", 2, 1, 0.5),
        setting(8, 3, 8, 8, True, "RE", 1, 1, 0.5),
    ]
    model = torchvision().models.MobileNetV3(layers, 8, num_classes=3).eval().double()
    batch = torch.randn(2, 3, 8, 8).double(), torch.tensor([0, 2])
    problem = ht.Problem(model, ht.cross_entropy, [batch], batch_stats=False)
    products_are_right(problem, ROUTES[:1])


def test_what_pytorch_differentiates_wrongly_is_what_has_a_formula():
    """The committed survey: all is right inside, and every formula has its operation there."""
    found = ht.load(ROOT / "results/twice_differentiable/result")["groups"].values()
    rows = {name: row for group in found for name, row in group.items()}
    assert {row["here"]["verdict"] for row in rows.values()} == {"right"}
    faulty = {name: row["pytorch"]["verdict"] for name, row in rows.items()}
    for replacement in REPLACEMENTS:
        verdict = {"wrong": "wrong", "missing": "refuses"}[replacement.fault]
        assert any(n.startswith(replacement.operation) and v == verdict for n, v in faulty.items())
    mended = tuple(replacement.operation for replacement in REPLACEMENTS)
    attention = ("multi_head_attention",)
    unmended = [name for name, verdict in faulty.items() if verdict != "right"]
    assert all(name.startswith(mended + attention) for name in unmended)


class Attending(nn.Module):
    """One layer of attention with a bias by distance, each token seeing one before it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.project, self.last = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = getattr(self, self.kind)(query, key, value)
        return self.last(mixed.transpose(1, 2).flatten(2).mean(1))

    def written(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = torch.arange(query.shape[2])
        distance = places[:, None] - places
        scores = query @ key.mT / 2**0.5 + 0.3 * distance
        seen = (distance >= 0) & (distance < 2)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value

    def flexible(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        size = query.shape[2]
        seen = flex.create_block_mask(near, None, None, size, size, device="cpu")
        return flex.flex_attention(query, key, value, by_distance, seen)

    def flash(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places = torch.arange(query.shape[2])
        distance = places[:, None] - places
        seen = (distance >= 0) & (distance < 2)
        bias = (0.3 * distance).to(query.dtype).masked_fill(~seen, -torch.inf)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, bias)


def by_distance(score: Tensor, batch: Tensor, head: Tensor, here: Tensor, there: Tensor) -> Tensor:
    return score + 0.3 * (here - there)


def near(batch: Tensor, head: Tensor, here: Tensor, there: Tensor) -> Tensor:
    return (here >= there) & (here - there < 2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["flexible", "flash"])
def test_attention_by_a_fused_kernel_has_the_hessian_of_its_formula(kind, route):
    torch.manual_seed(0)
    batch = torch.randn(3, 5, 4).double(), torch.randint(3, (3,))
    written, fused = Attending("written").double(), Attending(kind).double()
    fused.load_state_dict(written.state_dict())
    right = dense_hessian(ht.Problem(written, ht.cross_entropy, [batch]))
    check = flex._validate_device
    h = ht.HessianOperator(ht.Problem(fused, ht.cross_entropy, [batch]), route=route)
    assert relative_error(h.matmat(torch.eye(h.size, dtype=h.dtype)), right) < 1e-12
    assert flex._validate_device is check
    with pytest.raises((NotImplementedError, RuntimeError), match="backward"):  # again
        (slope,) = torch.autograd.grad(
            fused(batch[0]).square().sum(), fused.project.weight, create_graph=True
        )
        slope.square().sum().backward()


# ---------------------------------------------------------------------------- compiled by the user


@pytest.mark.parametrize("how", ["whole", "submodule", "in place", "function"])
def test_what_is_compiled_has_the_product_of_what_was_written(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = torch.randn(7, 4).double(), torch.randint(3, (7,))
    right = dense_hessian(ht.Problem(model, ht.cross_entropy, [batch]))
    loss, compiled = ht.cross_entropy, model
    if how == "whole":
        compiled = torch.compile(model, backend="aot_eager")
    elif how == "submodule":
        compiled = nn.Sequential(torch.compile(model[0], backend="aot_eager"), *model[1:])
    elif how == "in place":
        model.compile(backend="aot_eager")
    else:
        loss = torch.compile(ht.cross_entropy, backend="aot_eager")
    ht.cross_entropy(compiled, batch).backward()  # it is compiled before it is studied
    h = ht.HessianOperator(ht.Problem(compiled, loss, [batch]))
    for _ in range(2):
        assert relative_error(h.matmat(torch.eye(h.size, dtype=h.dtype)), right) < 1e-12
        h.expect(10**12)
    stance = torch._dynamo.eval_frame._stance
    assert stance.stance == "default"


# ------------------------------------------------------------------------------------ transformers


def mixture(implementation: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    hf = transformers()
    config = hf.MixtralConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    model = hf.MixtralForCausalLM(config).eval()
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return model


def tokens() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(11, (2, 5))
    return {"input_ids": ids, "labels": ids}


def needs_experts_implementations() -> None:
    if not hasattr(transformers().PretrainedConfig(), "_experts_implementation_internal"):
        pytest.skip("this version of transformers has one implementation of experts")


def test_a_mixture_of_experts_has_the_product_of_its_written_form():
    needs_experts_implementations()
    model, written = mixture(), mixture("eager")
    assert model.config._experts_implementation == "grouped_mm"
    problem, plain = (ht.Problem(m, ht.huggingface, [tokens()]) for m in (model, written))
    h = ht.HessianOperator(problem)
    v = torch.randn(h.size)
    right = twice_differentiated(plain, v)
    assert relative_error(h @ v, right) < 1e-5
    h.expect(10**12)
    assert relative_error(h @ v, right) < 1e-5
    assert h.verify().passed
    assert model.config._experts_implementation == "grouped_mm"


def twice_differentiated(problem: ht.Problem, v: Tensor) -> Tensor:
    """H v of a problem of one batch by PyTorch alone."""
    parameters = list(problem.parameters.values())
    with sdpa_kernel(SDPBackend.MATH):
        loss = problem.batch_loss(problem.batches[0])
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        product = torch.autograd.grad(nn.utils.parameters_to_vector(slopes) @ v, parameters)
    return nn.utils.parameters_to_vector(product)


def test_implementations_of_every_config_are_put_back_after_an_exception():
    needs_experts_implementations()
    model = mixture()
    part = model.model.layers[0].self_attn
    part.config = type(model.config)(**model.config.to_dict())
    model.config._attn_implementation_internal = "flash_attention_2"
    part.config._attn_implementation_internal = "eager"
    part.config._experts_implementation_internal = "batched_mm"

    def settings():
        configs = model.config, part.config
        return [(c._attn_implementation, c._experts_implementation) for c in configs]

    before = settings()
    with pytest.raises(RuntimeError, match="made to fail"), evaluating(model, None):
        assert settings() == [("sdpa", "eager"), ("eager", "batched_mm")]
        raise RuntimeError("made to fail")
    assert settings() == before == [("flash_attention_2", "grouped_mm"), ("eager", "batched_mm")]


def test_configs_without_these_settings_are_left_alone():
    model = nn.Linear(2, 1)
    model.config = {"_attn_implementation": "flash_attention_2"}
    with evaluating(model, None):
        assert model.config == {"_attn_implementation": "flash_attention_2"}


def test_a_recurrent_model_that_keeps_states_is_right_by_differences():
    """RWKV writes its states in place, unless it keeps none."""
    torch.manual_seed(0)
    hf = transformers()
    config = hf.RwkvConfig(
        vocab_size=11,
        context_length=8,
        hidden_size=6,
        attention_hidden_size=6,
        num_hidden_layers=2,
        intermediate_size=8,
    )
    model = hf.RwkvForCausalLM(config).eval().double()
    nn.init.normal_(model.rwkv.embeddings.weight)
    problem = ht.Problem(model, ht.huggingface, [tokens()])
    h = ht.HessianOperator(problem)
    v = torch.randn(h.size, dtype=h.dtype) / h.size**0.5
    product = h @ v
    assert model.config.use_cache
    model.config.use_cache = False
    # states are float32 in any case
    assert relative_error(product, difference(problem, v, step=1e-3)) < 1e-3
