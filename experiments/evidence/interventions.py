"""One network changed step by step: the set that is never pooled with the suite.

- loss-scale: the loss times a factor. Adam does not see it and SGD's tuned rate makes up for it, so
  a reading that moves along says nothing about the gap; only clipping does see it.
- initial-scale: every weight matrix times a factor at the start.
- the scaled-layer dial, which leaves the function at the start as it is, belongs here too.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from evidence.families_of_images import PAIRS as OF_IMAGES
from evidence.families_of_text import PAIRS as OF_TEXT
from evidence.pair import Build, Data, Pair, by_name
from evidence.sources import SuiteStream
from hessian_tools.problem.batches import Batch
from hessian_tools.problem.losses import Loss, OutputLoss
from hessian_tools.training import Stream

BASES = ("mlp/relu", "resnet-groupnorm/three-blocks", "decoder-pre-norm/bytes")
LOSS_SCALES = (0.01, 0.1, 10.0, 100.0)
INITIAL_SCALES = (0.3, 0.6, 1.7, 3.0)


def scaled_loss(data: Data, factor: float) -> Data:
    """The stream with its loss times ``factor``."""

    @functools.cache
    def scaled() -> Stream:
        stream = data()
        base = stream.loss_fn
        assert isinstance(base, OutputLoss)

        def loss(outputs: Tensor, batch: Batch) -> Tensor:
            return factor * base.loss(outputs, batch)

        scaled_loss_fn = Loss(base.outputs, loss)
        return SuiteStream(stream.source, stream.batch_size, scaled_loss_fn, stream.batch_stats)

    return scaled


def scaled_start(build: Build, factor: float) -> Build:
    """The network with its weight matrices times ``factor``."""

    def scaled() -> nn.Module:
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(factor)
        return model

    return scaled


def _made(bases: dict[str, Pair]) -> Iterator[Pair]:
    for name in BASES:
        base = bases[name]
        what = name.replace("/", "-")
        for factor in LOSS_SCALES:
            data = scaled_loss(base.data, factor)
            yield Pair(f"loss-scale/{what}-{factor:g}", base.traits, base.build, data)
        for factor in INITIAL_SCALES:
            build = scaled_start(base.build, factor)
            yield Pair(f"initial-scale/{what}-{factor:g}", base.traits, build, base.data)


INTERVENTIONS = by_name(_made(by_name([*OF_IMAGES, *OF_TEXT])))
