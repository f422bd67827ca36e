"""z-loss: a small penalty on the logits' normaliser, which keeps them from drifting.

With Z = sum_c exp(z_c) of the logits z of a prediction, the penalty is the mean over predictions
that count of (log Z)^2, times a weight (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 5;
weight 1e-4).
"""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from hessian_tools.problem.batches import Batch
from hessian_tools.problem.losses import CATEGORICAL, LossFunction, OutputLoss

WEIGHT = 1e-4


@runtime_checkable
class _Classifying(OutputLoss, Protocol):
    """A loss of logits of which it is known where the classes lie and which targets count."""

    ignore_index: int

    def axis_of_classes(self, outputs: Tensor, batch: Batch) -> int: ...

    def targets(self, batch: Batch, outputs: Tensor | None = None) -> Tensor: ...

    def likelihood(self, batch: Batch) -> str: ...


class ZLoss:
    """A loss of logits with the penalty beside it.

    Calling it gives the sum; :meth:`parts` gives both, and :attr:`loss_fn` is the loss alone.

    Args:
        loss_fn: ``ht.cross_entropy`` or ``ht.huggingface``.
        weight: of the penalty.

    Raises:
        ValueError: a loss of which the logits are not known, or a weight below zero.
    """

    def __init__(self, loss_fn: LossFunction, weight: float = WEIGHT) -> None:
        if not isinstance(loss_fn, _Classifying):
            raise ValueError(
                f"z-loss needs the logits of a classifier, and {_name(loss_fn)} does not tell "
                "them; use ht.cross_entropy or ht.huggingface, or leave the z-loss out"
            )
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of the z-loss must be at least 0, got {weight!r}")
        self.loss_fn = loss_fn
        self.weight = weight
        self._classifying: _Classifying = loss_fn

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        loss, penalty = self.parts(model, batch)
        return loss + penalty

    def parts(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and the weighted penalty, two scalars.

        Raises:
            ValueError: the batch's targets are not classes.
        """
        known = self._classifying
        if known.likelihood(batch) != CATEGORICAL:
            raise ValueError(
                "z-loss needs targets that are classes, and these are not; leave the z-loss out"
            )
        outputs = known.outputs(model, batch)
        normaliser = outputs.logsumexp(known.axis_of_classes(outputs, batch))
        targets = known.targets(batch, outputs)
        squares = normaliser.square()
        if not targets.is_floating_point():
            squares = squares[targets != known.ignore_index]
        return known.loss(outputs, batch), self.weight * squares.mean()


def _name(loss_fn: LossFunction) -> str:
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)
