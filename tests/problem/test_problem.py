"""Problem: weights, refusals, and a model that comes back as it was."""

import copy

import pytest
import torch
from problems import (
    ConvNet,
    dense_hessian,
    hf_bert,
    hf_gpt2,
    hf_llama,
    network,
    relative_error,
    transformers,
)
from torch import nn

import hessian_tools as ht


@pytest.fixture
def linear():
    return nn.Linear(3, 2)


def pair(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 3), torch.randint(2, (n,))


def test_uneven_batches_and_ignored_tokens_give_the_pooled_mean():
    problem = network("gpt")
    (x1, y1), (x2, y2) = problem.batches
    assert problem.counts == [2 * 6 - 3, 6 - 3]
    pooled = ht.Problem(
        problem.model, ht.cross_entropy, [(torch.cat([x1, x2]), torch.cat([y1, y2]))]
    )
    assert abs(pooled.loss - problem.loss) < 1e-12
    assert relative_error(ht.HessianOperator(problem).to_dense(), dense_hessian(pooled)) < 1e-10


@pytest.mark.parametrize("axis", ["last", "first"])
def test_class_axis_is_found(axis):
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Parameter(torch.randn(2, 5, 3))

        def forward(self, x):
            return self.scores if axis == "last" else self.scores.movedim(-1, 1)

    targets = torch.randint(3, (2, 5))
    targets[0, 1] = -100
    problem = ht.Problem(Pixels(), ht.cross_entropy, [(torch.zeros(2), targets)])
    chosen = torch.log_softmax(problem.model.scores, -1).gather(
        -1, targets.clamp_min(0)[..., None]
    )[..., 0]
    assert problem.counts == [9]
    assert abs(problem.loss + float(chosen[targets >= 0].detach().mean())) < 1e-6


def test_class_probabilities_count_as_examples(linear):
    problem = ht.Problem(
        linear, ht.cross_entropy, [(torch.randn(5, 3), torch.softmax(torch.randn(5, 2), 1))]
    )
    assert problem.counts == [5]


@pytest.mark.parametrize("causal", [True, False])
def test_huggingface_counts_shifted_labels_only_where_the_model_shifts_them(causal):
    model = (hf_gpt2() if causal else hf_bert()).double()
    tokens = torch.randint(11, (3, 6))
    labels = tokens.clone()
    labels[0, 2:] = -100
    batches = [
        {"input_ids": tokens[:1], "labels": labels[:1]},
        {"input_ids": tokens[1:], "labels": labels[1:]},
    ]
    problem = ht.Problem(model, ht.huggingface, batches)
    assert problem.counts == ([1, 10] if causal else [2, 12])
    with torch.no_grad():
        pooled = float(model(input_ids=tokens, labels=labels).loss)
    assert abs(problem.loss - pooled) < 1e-6


def test_batch_encoding_and_data_loader_are_taken(linear):
    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    x, y = pair(6)
    data = [{"x": x[i], "y": y[i]} for i in range(6)]
    loaded = ht.Problem(linear, loss_fn, torch.utils.data.DataLoader(data, batch_size=4))
    encoded = ht.Problem(linear, loss_fn, [transformers().BatchEncoding({"x": x, "y": y})])
    assert loaded.counts == [4, 2]
    assert abs(loaded.loss - encoded.loss) < 1e-6


def test_num_examples_can_be_said(linear):
    problem = ht.Problem(linear, ht.cross_entropy, [pair(4), pair(4)], num_examples=lambda batch: 3)
    assert problem.counts == [3, 3]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": pair()}, ValueError, "failed on batch 0"),
        ({"batches": {"x": 1}}, TypeError, r"batches is a dict; .*\[batch\]"),
        ({"batches": 3}, TypeError, "batches is a int"),
        ({"model": 3}, TypeError, "model is a int"),
        ({"loss_fn": None}, TypeError, "loss_fn is a NoneType"),
        (
            {"model": nn.Linear(3, 2).requires_grad_(False)},
            ValueError,
            "no parameter that requires grad",
        ),
        ({"loss_fn": lambda m, b: m(b[0])}, ValueError, r"shape \(4, 2\), not a real scalar"),
        ({"loss_fn": lambda m, b: 1.0}, ValueError, "returned a float"),
        (
            {"loss_fn": lambda m, b: m(b[0]).sum() * float("nan")},
            ht.NumericalError,
            "loss of batch 0 is nan",
        ),
        (
            {"loss_fn": lambda m, b: m(b[0]).detach().sum()},
            ValueError,
            "does not depend on any parameter",
        ),
        (
            {"loss_fn": lambda m, b: m(b[0]).sum() * torch.rand(())},
            ValueError,
            "two evaluations .* differ",
        ),
        (
            {"batches": [(torch.randn(2, 3), torch.full((2,), -100))]},
            ValueError,
            "0 valid examples",
        ),
        ({"loss_fn": ht.mse}, ValueError, "make them equal"),
    ],
)
def test_bad_input_gets_one_clear_error(linear, change, error, words):
    arguments = {"model": linear, "loss_fn": ht.cross_entropy, "batches": [pair()], **change}
    with pytest.raises(error, match=words):
        ht.Problem(**arguments)


def test_active_dropout_is_named(linear):
    with pytest.raises(ValueError, match=r"dropout is active in 1; call model.eval\(\)"):
        ht.Problem(nn.Sequential(linear, nn.Dropout(0.5)), ht.cross_entropy, [pair()])


def test_shuffling_is_refused_and_a_frozen_draw_is_not(linear):
    data = list(zip(*pair(32), strict=True))
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        ht.Problem(linear, ht.cross_entropy, loader)
    assert ht.Problem(linear, ht.cross_entropy, list(loader)).counts == [8] * 4


def test_nan_in_the_gradient_is_named_with_its_parameter():
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    # the square root has infinite slope at 0
    problem = ht.Problem(model, lambda m, x: m(x).abs().sqrt().sum(), [torch.ones(2, 3)])
    with pytest.raises(ht.NumericalError, match="gradient of weight is not finite"):
        ht.HessianOperator(problem).to_dense()


def test_batchnorm_must_be_said_and_batch_statistics_are_not_cut():
    batches = [(torch.randn(6, 1, 5, 5), torch.randint(4, (6,)))]
    with pytest.raises(ValueError, match=r"BatchNorm \(norm and 0 more\); say batch_stats=True"):
        ht.Problem(ConvNet(), ht.cross_entropy, batches)
    running = ht.Problem(ConvNet(), ht.cross_entropy, batches, batch_stats=False)
    v = torch.randn(running.num_parameters)
    whole, cut = ht.HessianOperator(running) @ v, ht.HessianOperator(running, microbatch=2) @ v
    assert relative_error(cut, whole) < 1e-4
    with pytest.raises(ValueError, match="batch statistics forbid cutting"):
        ht.HessianOperator(
            ht.Problem(ConvNet(), ht.cross_entropy, batches, batch_stats=True), microbatch=2
        )


def test_a_loss_that_is_no_mean_over_its_examples_is_not_cut(linear):
    problem = ht.Problem(linear, lambda m, b: m(b[0]).sum() ** 2, [pair(4)])
    with pytest.raises(ValueError, match=r"pieces' pooled loss .* pass num_examples="):
        ht.HessianOperator(problem, microbatch=2)


class Failing(nn.Module):
    """Fails at the second derivative's recording, after it has touched everything it can."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.calls = nn.BatchNorm1d(3), nn.Dropout(0.5), 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        self.calls += 1
        if self.calls > 12:
            raise RuntimeError("made to fail")
        return self.norm(x)


def state(model: nn.Module) -> tuple:
    modes = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    return (
        modes,
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.grad for p in model.parameters()],
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_stats", [True, False])
def test_the_model_comes_back_as_it_was_also_after_an_exception(training, batch_stats):
    model = Failing()
    model.train(training)
    model.drop.eval()
    kept = copy.deepcopy(state(model))
    problem = ht.Problem(
        model, lambda m, x: m(x).pow(3).mean(), [torch.randn(4, 3)], batch_stats=batch_stats
    )
    with pytest.raises(RuntimeError, match="made to fail"):
        for _ in range(9):
            ht.HessianOperator(problem, record=False).to_dense()
    modes, values, gradients = state(model)
    assert modes == kept[0] and gradients == kept[2]
    assert all(torch.equal(values[k], kept[1][k]) for k in values)


def test_fused_attention_is_switched_for_the_call_only():
    model = hf_llama()
    model.config._attn_implementation = "flash_attention_2"
    tokens = torch.randint(11, (2, 7))
    problem = ht.Problem(model, ht.cross_entropy, [(tokens[:, :-1], tokens[:, 1:])])
    ht.HessianOperator(problem) @ torch.randn(problem.num_parameters)
    assert model.config._attn_implementation == "flash_attention_2"


def test_backends_are_put_back_after_an_exception():
    def backends():
        fast_path = torch.backends.mha.get_fastpath_enabled()
        return fast_path, torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled()

    problem = network("lstm")
    before = backends()
    with pytest.raises(RuntimeError, match="made to fail"), problem.evaluating():
        assert backends() == (False, False, False)
        raise RuntimeError("made to fail")
    assert backends() == before == (True, True, True)


def test_a_loss_that_fails_on_a_piece_is_refused_to_be_cut():
    """A graph: the adjacency's first axis is cut with the nodes, and nothing fits any more."""

    def graph_loss(model, batch):
        nodes, adjacency, targets = batch
        return nn.functional.mse_loss(adjacency @ model(nodes), targets)

    batch = (torch.randn(6, 3), torch.eye(6), torch.randn(6, 2))
    problem = ht.Problem(nn.Linear(3, 2), graph_loss, [batch])
    with pytest.raises(ValueError, match=r"loss_fn fails on a piece of it .*cannot be multiplied"):
        problem.split(1.0, batch, 3)
    verification = ht.HessianOperator(problem).verify()
    assert verification.passed
    assert any("cut batches" in reason for reason in verification.skipped)


def test_weighted_means_are_weighted_by_the_sum_of_weights():
    """The mean of a class-weighted loss is over a sum of weights, which need not be whole."""
    weights = torch.tensor([0.2, 1.0, 5.0])
    model, x, y = nn.Linear(4, 3), torch.randn(40, 4), torch.randint(3, (40,))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], weight=weights)

    cut = ht.Problem(
        model,
        loss,
        [(x[:30], y[:30]), (x[30:], y[30:])],
        num_examples=lambda batch: float(weights[batch[1]].sum()),
    )
    assert cut.loss == pytest.approx(loss(model, (x, y)).item(), rel=1e-6)


@pytest.mark.parametrize("count", [0, -1.5, float("nan"), float("inf"), True, "3"])
def test_counts_are_positive_numbers(count):
    with pytest.raises(ValueError, match="valid examples; a positive number is needed"):
        ht.Problem(
            nn.Linear(2, 2),
            ht.mse,
            [(torch.ones(3, 2), torch.ones(3, 2))],
            num_examples=lambda batch: count,
        )


@pytest.mark.parametrize("word", ["running", "batch", 1])
def test_batch_stats_is_true_or_false(word):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match=r"pass True .* or False"):
        ht.Problem(model, ht.mse, [(torch.ones(3, 4), torch.ones(3, 8))], batch_stats=word)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_that_are_rescaled_in_every_pass_are_refused(kind):
    model = nn.Sequential(kind(5, 3, max_norm=0.1), nn.Flatten(), nn.LazyLinear(2))
    tokens = torch.tensor([[0, 1], [2, 3]])
    model(tokens)
    weight = nn.init.ones_(model[0].weight)
    batch = (tokens, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^0 has max_norm=0.1 .* set max_norm = None$"):
        ht.Problem(model, ht.cross_entropy, [batch])
    assert torch.equal(weight, torch.ones(5, 3))
    weight.requires_grad_(False)  # a constant that is rescaled once is one
    assert ht.HessianOperator(ht.Problem(model, ht.cross_entropy, [batch])).verify().passed


def test_a_loss_that_writes_into_parameters_is_refused(linear):
    def clipping(model, batch):
        with torch.no_grad():
            model.weight.clamp_(-0.5, 0.5)
        return model(batch[0]).square().mean()

    with pytest.raises(ValueError, match="writes into weight, so that its derivatives"):
        ht.Problem(linear, clipping, [(torch.randn(4, linear.in_features),)])
