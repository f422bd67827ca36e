"""Streams: the same batches for all, every example once an epoch, a part held out."""

import itertools

import pytest
import torch
from torch import nn

import hessian_tools as ht
from hessian_tools.problem.data import TOKENIZERS, image_batches, image_source
from hessian_tools.training import problem_stream, zoo_stream
from hessian_tools.training.sources import Images, Place, Text, WholeBatches


def numbered(count, batch_size):
    """A Problem whose examples are their own numbers."""
    inputs = torch.arange(count, dtype=torch.float32)[:, None]
    batches = list(zip(inputs.split(batch_size), inputs.split(batch_size), strict=True))
    return ht.Problem(nn.Linear(1, 1), ht.mse, batches)


def seen(stream, steps):
    return [int(x) for step in range(steps) for x in stream.batch(step)[0].flatten()]


def test_a_batch_is_a_function_of_seed_and_step():
    stream = zoo_stream("gpt-nano", batch_size=3, context=16)
    later = stream.batch(7)
    again = zoo_stream("gpt-nano", batch_size=3, context=16)
    for step in range(10):
        again.batch(step)
    assert all(map(torch.equal, later, again.batch(7)))
    assert all(map(torch.equal, later, stream.batch(7)))
    assert not torch.equal(later[0], stream.with_seed(1).batch(7)[0])
    first = itertools.islice(iter(stream), 2)
    assert all(torch.equal(x, stream.batch(i)[0]) for i, (x, _) in enumerate(first))


def test_every_epoch_visits_all_examples_once_in_another_order():
    stream = problem_stream(numbered(40, 40), batch_size=5)
    assert stream.source.size == 36
    epochs = seen(stream, 36)
    first, second = epochs[:36], epochs[36:72]
    held_out = {int(x) for inputs, _ in stream.held_out() for x in inputs.flatten()}
    assert sorted(first) == sorted(second) and first != second
    assert len(held_out) == 4 and set(first) | held_out == set(range(40))


def test_the_order_of_examples_does_not_depend_on_the_batch_size():
    stream = problem_stream(numbered(50, 7))
    assert stream.batch_size == 7
    assert seen(stream.with_batch_size(3), 40) == seen(stream.with_batch_size(60), 2)


def test_text_is_cut_at_other_places_in_every_epoch_and_held_out_at_its_end():
    tokens = torch.arange(1000)
    text = Text(tokens, context=10)
    starts = [{int(text.batch([Place(0, e, n)])[0][0, 0]) % 10 for n in range(50)} for e in (0, 1)]
    assert all(len(offsets) == 1 for offsets in starts) and starts[0] != starts[1]
    inputs, targets = text.batch([Place(0, 0, n) for n in range(text.size)])
    assert torch.equal(inputs + 1, targets) and inputs.shape == (text.size, 10)
    (held_inputs, held_targets), *_ = text.held_out(32)
    assert torch.equal(held_inputs + 1, held_targets)
    assert int(targets.max()) < int(held_inputs.min()) == 900


def test_masked_text_masks_fifteen_percent():
    stream = zoo_stream("bert-nano", batch_size=8, context=40)
    inputs, targets = stream.batch(0)
    counted = targets != -100
    assert counted.sum(1).tolist() == [6] * 8
    assert (inputs[~counted] != TOKENIZERS["byte"].mask).all()
    assert torch.equal(stream.batch(0)[0], inputs) and not torch.equal(stream.batch(1)[0], inputs)


def test_images_are_those_of_the_zoo_and_a_tenth_is_held_out():
    source = image_source()
    stream = Images(source, 28, 1)
    (everything,) = image_batches(
        source, num_examples=source.size, batch_size=source.size, image_size=28, channels=1
    )
    known = {image.numpy().tobytes() for image in everything[0]}
    images, labels = stream.batch([Place(0, 0, n) for n in range(20)])
    assert stream.size == 3600 and labels.shape == (20,)
    drawn = {image.numpy().tobytes() for image in images}
    held = {image.numpy().tobytes() for batch, _ in stream.held_out(64) for image in batch}
    assert drawn < known and held < known and not drawn & held


def test_batches_that_cannot_be_cut_are_taken_as_they_are():
    torch.manual_seed(0)
    batches = [{"x": torch.randn(n, 2), "y": torch.randn(3)} for n in range(2, 14)]

    def loss(model, batch):
        return model(batch["x"]).square().mean() + batch["y"].sum() * 0

    problem = ht.Problem(nn.Linear(2, 1), loss, batches, num_examples=lambda b: len(b["x"]))
    stream = problem_stream(problem)
    assert isinstance(stream.source, WholeBatches) and stream.batch_size is None
    lengths = [len(stream.batch(step)["x"]) for step in range(11)]
    (held_out,) = stream.held_out()
    assert sorted([*lengths, len(held_out["x"])]) == list(range(2, 14))
    with pytest.raises(
        ValueError, match="cannot be had: the batches of this problem hold no plain"
    ):
        stream.with_batch_size(4)


def test_a_loss_that_is_no_mean_over_examples_keeps_its_batches_whole():
    def contrastive(model, batch):
        z = model(batch)
        return (z @ z.T).logsumexp(1).mean()

    batches = [torch.randn(6, 3) for _ in range(3)]
    problem = ht.Problem(nn.Linear(3, 2), contrastive, batches)
    assert problem_stream(problem).batch_size is None


def test_nothing_is_held_out_of_few_examples():
    stream = problem_stream(numbered(6, 6))
    assert stream.held_out() == [] and stream.source.size == 6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: zoo_stream("gpt3"), "'gpt3' is not in the zoo; it has resnet18"),
        (
            lambda: zoo_stream("mlp", batch_size=0),
            "batch_size must be a whole number of at least 1, got 0",
        ),
        (lambda: Text(torch.arange(20), 10), "a text of 20 tokens is too short"),
    ],
)
def test_what_cannot_be_streamed(call, words):
    with pytest.raises(ValueError, match=words):
        call()
