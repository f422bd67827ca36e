"""What people get wrong in Python: one sentence that names the cause, its value and the way out."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hessian_tools as ht

torch.manual_seed(0)
X, Y = torch.randn(8, 4), torch.arange(8) % 2
BATCH = (X, Y)


def net(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), *more)


def problem(**options):
    return ht.Problem(net(), ht.cross_entropy, [BATCH], **options)


def hessian(**options):
    return ht.HessianOperator(problem(), **options)


def with_loss(loss):
    return ht.Problem(net(), loss, [BATCH])


def spectra(**options):
    given = problem()
    chosen = {"num_probes": 2, "num_steps": 4, "seed": 0} | options
    return ht.blockwise_slq(given, ht.partition(given.model, "weights"), **chosen)


def adaptive(**options):
    given = problem()
    chosen = {"tolerance": 0.5} | options
    return ht.adaptive_js0(given, ht.partition(given.model, "weights"), **chosen)


def checked(**options):
    given = problem()
    return ht.check_partition(given, ht.partition(given.model, "neuron"), **options)


def bare(value):
    module = nn.Module()
    module.w = nn.Parameter(value)
    return module


def twice(model):
    blocks = list(ht.partition(model, "tensor"))
    return [blocks[0], blocks[0]]


SHUFFLED = DataLoader(TensorDataset(torch.randn(64, 4), torch.arange(64) % 2), 8, shuffle=True)
EMPTY = DataLoader(TensorDataset(X[:0], Y[:0]))

# what is done, the exception, and words that its message must hold
MISUSES = {
    # a Problem
    "model is no module": (
        lambda: ht.Problem(3, ht.mse, [BATCH]),
        TypeError,
        "model is a int; pass a torch.nn.Module",
    ),
    "loss is no function": (lambda: ht.Problem(net(), 3, [BATCH]), TypeError, "loss_fn is a int"),
    "loss is a class": (
        lambda: ht.Problem(net(), nn.CrossEntropyLoss, [BATCH]),
        (TypeError, ValueError),
        "loss_fn",
    ),
    "loss takes (outputs, targets)": (
        lambda: ht.Problem(net(), nn.CrossEntropyLoss(), [BATCH]),
        ValueError,
        "loss_fn(model, batch) failed on batch 0",
    ),
    "batches is a tensor": (
        lambda: ht.Problem(net(), ht.mse, X),
        TypeError,
        "batches is a Tensor; pass an iterable",
    ),
    "batches is a dict": (lambda: ht.Problem(net(), ht.mse, {}), TypeError, "batches is a dict"),
    "batches is a word": (lambda: ht.Problem(net(), ht.mse, "x"), TypeError, "batches is a str"),
    "batches is None": (lambda: ht.Problem(net(), ht.mse, None), TypeError, "NoneType"),
    "batches is the batch": (
        lambda: ht.Problem(net(), ht.cross_entropy, BATCH),
        ValueError,
        "cross_entropy",
    ),
    "no batches": (lambda: ht.Problem(net(), ht.mse, []), ValueError, "batches is empty"),
    "an empty loader": (lambda: ht.Problem(net(), ht.mse, EMPTY), ValueError, "empty"),
    "a shuffled loader": (
        lambda: ht.Problem(net(), ht.cross_entropy, SHUFFLED),
        ValueError,
        "gives different data each time it is read (batch 0: tensor 0, float32(8, 4), in",
    ),
    "an empty batch": (
        lambda: ht.Problem(net(), ht.cross_entropy, [(X[:0], Y[:0])]),
        ValueError,
        "batch 0 has 0 valid examples",
    ),
    "no parameters": (
        lambda: ht.Problem(nn.Tanh(), ht.mse, [(X, X)]),
        ValueError,
        "no parameter that requires grad",
    ),
    "all frozen": (
        lambda: ht.Problem(net().requires_grad_(False), ht.mse, [BATCH]),
        ValueError,
        "unfreeze",
    ),
    "loss is a vector": (
        lambda: with_loss(lambda m, b: m(b[0])),
        ValueError,
        "shape (8, 2), not a real scalar tensor",
    ),
    "loss is a float": (
        lambda: with_loss(lambda m, b: 1.0),
        ValueError,
        "a float, not a real scalar",
    ),
    "loss is an integer tensor": (
        lambda: with_loss(lambda m, b: b[1].sum()),
        ValueError,
        "does not depend on any parameter",
    ),
    "loss is None": (
        lambda: with_loss(lambda m, b: None),
        ValueError,
        "a NoneType, not a real scalar",
    ),
    "loss is NaN": (
        lambda: with_loss(lambda m, b: m(b[0]).sum() * torch.nan),
        ht.NumericalError,
        "the loss of batch 0 is nan",
    ),
    "loss is infinite": (
        lambda: with_loss(lambda m, b: m(b[0]).sum() / 0),
        ht.NumericalError,
        "inf",
    ),
    "loss is complex": (
        lambda: with_loss(lambda m, b: m(b[0]).sum() * 1j),
        ValueError,
        "complex",
    ),
    "loss is detached": (
        lambda: with_loss(lambda m, b: m(b[0]).sum().detach()),
        ValueError,
        "without torch.no_grad() or .detach()",
    ),
    "loss ignores the model": (
        lambda: with_loss(lambda m, b: b[0].sum()),
        ValueError,
        "loss_fn must call the given model",
    ),
    "loss fails": (
        lambda: with_loss(lambda m, b: m(b["x"])),
        ValueError,
        "failed on batch 0 (a tuple with float32(8, 4), int64(8,)): TypeError",
    ),
    "dropout": (
        lambda: ht.Problem(net(nn.Dropout(0.5)), ht.cross_entropy, [BATCH]),
        ValueError,
        "dropout is active in 3; call model.eval()",
    ),
    "BatchNorm": (
        lambda: ht.Problem(net(nn.BatchNorm1d(2)), ht.cross_entropy, [BATCH]),
        ValueError,
        "say batch_stats=True",
    ),
    "a word for batch_stats": (
        lambda: ht.Problem(
            net(nn.BatchNorm1d(2)), ht.cross_entropy, [BATCH], batch_stats="running"
        ),
        ValueError,
        "batch_stats is 'running'; pass True",
    ),
    "counts of zero": (lambda: problem(num_examples=lambda b: 0), ValueError, "has 0 valid"),
    "negative counts": (lambda: problem(num_examples=lambda b: -3), ValueError, "has -3 valid"),
    "counts of NaN": (
        lambda: problem(num_examples=lambda b: float("nan")),
        ValueError,
        "has nan valid",
    ),
    "a count that is no function": (
        lambda: problem(num_examples=8),
        TypeError,
        "num_examples is a int",
    ),
    "complex parameters": (
        lambda: ht.Problem(
            bare(torch.ones(2, dtype=torch.complex64)), lambda m, b: m.w.abs().sum(), [X]
        ),
        ValueError,
        "parameter w is complex",
    ),
    "targets of another shape": (
        lambda: ht.Problem(net(), ht.mse, [(X, Y)]),
        ValueError,
        "outputs have shape (8, 2) and targets (8,); make them equal",
    ),
    "batches for huggingface": (
        lambda: ht.Problem(net(), ht.huggingface, [BATCH]),
        ValueError,
        "dicts with a `labels` entry",
    ),
    "a class axis": (
        lambda: ht.problem.CrossEntropy(class_axis=2),
        ValueError,
        "class_axis is 2; classes lie along axis 1",
    ),
    # an operator
    "a model for an operator": (
        lambda: ht.HessianOperator(net()),
        TypeError,
        "problem is a Sequential; pass ht.Problem(model, loss_fn, batches)",
    ),
    "a budget": (lambda: hessian(memory="lots"), ValueError, "memory is 'lots'; use \"auto\""),
    "a tiny budget": (lambda: hessian(memory=10), ValueError, "memory=10 B is too little"),
    "a route": (lambda: hessian(route="fast"), ValueError, "route is 'fast'; allowed are"),
    "a precision": (lambda: hessian(precision="tf33"), ValueError, "precision is 'tf33'; allowed"),
    "a microbatch of zero": (lambda: hessian(microbatch=0), ValueError, "microbatch is 0"),
    "a microbatch below zero": (lambda: hessian(microbatch=-2), ValueError, "microbatch is -2"),
    "float16": (
        lambda: ht.HessianOperator(
            ht.Problem(net().half(), ht.cross_entropy, [(X.half(), Y)]),
        ),
        ValueError,
        "use model.to(torch.bfloat16)",
    ),
    "a vector too long": (
        lambda: hessian() @ torch.ones(99),
        ValueError,
        "vectors has shape (99,); expected (23,)",
    ),
    "rows for @": (
        lambda: hessian() @ torch.ones(2, 23),
        ValueError,
        "use `operator @ v` for one vector, `matmat` for rows",
    ),
    "integers": (
        lambda: hessian() @ torch.ones(23, dtype=torch.long),
        TypeError,
        "vectors has dtype torch.int64; a real floating dtype",
    ),
    "complex vectors": (
        lambda: hessian() @ torch.ones(23, dtype=torch.complex64),
        TypeError,
        "complex64; a real floating dtype",
    ),
    "a list": (lambda: hessian() @ [1.0] * 23, TypeError, "vectors is a list"),
    # partitions
    "a preset": (
        lambda: ht.partition(net(), "rows"),
        ValueError,
        "rows",
    ),
    "a partition of nothing": (lambda: ht.partition(net(), []), ValueError, "spec"),
    "a partition by number": (lambda: ht.partition(net(), 3), TypeError, "spec is a int"),
    "a glob without matches": (
        lambda: ht.partition(net(), ["9.*"]),
        ValueError,
        "'9.*' matches no block or trainable parameter",
    ),
    "an axis": (
        lambda: ht.partition(net(), {"0.weight": "diagonal"}),
        ValueError,
        "'diagonal'",
    ),
    "an axis too many": (lambda: ht.partition(net(), {"0.weight": 5}), ValueError, "5"),
    "blocks twice": (
        lambda: ht.blockwise_slq(problem(), twice(net())),
        ValueError,
        "0.weight",
    ),
    "a partition of another model": (
        lambda: ht.blockwise_slq(problem(), ht.partition(nn.Linear(9, 9), "weights")),
        ValueError,
        "weight",
    ),
    "a preset where a partition is due": (
        lambda: ht.blockwise_slq(problem(), "weights"),
        TypeError,
        "weights",
    ),
    # spectra
    "no probes": (lambda: spectra(num_probes=0), ValueError, "num_probes is 0"),
    "negative probes": (lambda: spectra(num_probes=-1), ValueError, "num_probes is -1"),
    "half probes": (lambda: spectra(num_probes=2.5), (TypeError, ValueError), "num_probes is 2.5"),
    "probes in words": (lambda: spectra(num_probes="4"), (TypeError, ValueError), "num_probes is"),
    "probes by truth": (lambda: spectra(num_probes=True), (TypeError, ValueError), "num_probes"),
    "no steps": (lambda: spectra(num_steps=0), ValueError, "num_steps is 0"),
    "endless steps": (
        lambda: spectra(num_steps=float("inf")),
        (TypeError, ValueError),
        "num_steps is inf",
    ),
    "a kind of probes": (lambda: spectra(probes="cauchy"), ValueError, "'cauchy'"),
    "a seed in parts": (lambda: spectra(seed=1.5), (TypeError, ValueError), "seed is 1.5"),
    "no seed": (lambda: spectra(seed=None), (TypeError, ValueError), "seed is None"),
    "a word for orthogonality": (
        lambda: spectra(reorthogonalize="some"),
        ValueError,
        "reorthogonalize is 'some'; allowed are",
    ),
    "a start of zeros": (
        lambda: ht.lanczos(hessian(), torch.zeros(1, 23), 3),
        ValueError,
        "start row 0 has norm 0.0",
    ),
    "a start of NaN": (
        lambda: ht.lanczos(hessian(), torch.full((1, 23), torch.nan), 3),
        ValueError,
        "start row 0 has norm nan",
    ),
    "one start vector": (
        lambda: ht.lanczos(hessian(), torch.ones(23), 3),
        ValueError,
        "start has shape (23,); rows",
    ),
    "slq of a model": (lambda: ht.slq(net(), num_probes=2, num_steps=2), TypeError, "Sequential"),
    # readings
    "one block": (
        lambda: ht.js_heterogeneity({"a": spectra()["0.weight"]}),
        ValueError,
        "compares at least two",
    ),
    "a tolerance of zero": (lambda: adaptive(tolerance=0), ValueError, "tolerance is 0"),
    "a tolerance of NaN": (
        lambda: adaptive(tolerance=float("nan")),
        ValueError,
        "tolerance is nan",
    ),
    "a reading": (lambda: adaptive(reading="nothing"), ValueError, "'nothing'"),
    # structure
    "an alpha": (lambda: checked(alpha=2), ValueError, "alpha is 2"),
    "a contrast": (lambda: checked(contrast=0.5), ValueError, "contrast is 0.5"),
    "a dense block too large": (
        lambda: ht.dense_block(problem(), ht.partition(net(), "tensor"), max_size=3),
        ValueError,
        "23",
    ),
    "a block that is not there": (
        lambda: ht.partition(net(), "tensor")["9.weight"],
        KeyError,
        "9.weight",
    ),
    # files
    "a file that is not there": (
        lambda: ht.load("nowhere/result"),
        (FileNotFoundError, ValueError),
        "nowhere/result",
    ),
    "saving what is no result": (lambda: ht.save("x", 3), TypeError, "int"),
    # dense operators
    "an asymmetric matrix": (
        lambda: ht.curvature.DenseOperator(torch.tensor([[1.0, 2.0], [0.0, 1.0]])),
        ValueError,
        "matrix is not symmetric: max |A - A'| = 2",
    ),
    "an oblong matrix": (
        lambda: ht.curvature.DenseOperator(torch.ones(2, 3)),
        ValueError,
        "matrix has shape (2, 3); a square",
    ),
    "a matrix with NaN": (
        lambda: ht.curvature.DenseOperator(torch.full((2, 2), torch.nan)),
        ValueError,
        "nan",
    ),
    # quadratics
    "a case": (lambda: ht.quadratic.case(9), ValueError, "9"),
}


def test_there_are_enough():
    assert len(MISUSES) >= 60


@pytest.mark.parametrize("name", MISUSES)
def test_one_sentence_names_the_cause(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    misuse, kind, words = MISUSES[name]
    with pytest.raises(kind) as raised:
        misuse()
    message = str(raised.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 500


def test_whole_numbers_of_numpy_are_whole_numbers():
    found = spectra(num_probes=np.int64(2), num_steps=np.int32(4), seed=np.int64(0))
    expected = spectra()
    assert [q.trace.value for q in found.values()] == [q.trace.value for q in expected.values()]


def test_a_generator_is_read_once():
    once = (batch for batch in [BATCH])
    assert len(ht.Problem(net(), ht.cross_entropy, once).batches) == 1
    with pytest.raises(ValueError, match="read before is empty"):
        ht.Problem(net(), ht.cross_entropy, once)


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        spectra()["0.weight"].num_matvecs = 3
