"""Losses that know what their mean is over.

A loss function is ``loss_fn(model, batch) -> scalar mean loss of the batch``. The ready-made ones
also have ``num_examples(model, batch)``, the number of examples that the mean is over (targets that
are not ignored, for classification), by which batches are weighted.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hessian_tools.problem.batches import Batch

LossFunction = Callable[[nn.Module, Batch], Tensor]
IGNORED = -100  # the target that does not count, in PyTorch and in transformers


class CrossEntropy:
    """Mean cross-entropy (nats) over the targets that are not ``ignore_index``.

    A batch is (inputs, targets). ``inputs`` is a tensor, a tuple (passed as ``model(*inputs)``) or
    a dict (``model(**inputs)``); the output is the logits or has them as ``.logits``. Classes lie
    along the last axis (``class_axis=-1``, as language models have it) if the other axes are those
    of ``targets``, else along axis 1 (``class_axis=1``, as torch has it). Where both fit, as with
    logits (N, C, C), ``class_axis`` must be given.

    Raises:
        ValueError: for another ``class_axis``, and for logits of which both readings fit.
    """

    def __init__(self, ignore_index: int = IGNORED, class_axis: int | None = None) -> None:
        if class_axis not in (None, 1, -1):
            raise ValueError(
                f"class_axis is {class_axis!r}; classes lie along axis 1 (torch's way) or -1 (the "
                "last), or None where the shapes tell"
            )
        self.ignore_index = ignore_index
        self.class_axis = class_axis

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = _outputs_and_targets(model, batch, "cross_entropy")
        if self._are_last(logits, targets):
            logits = logits.flatten(0, -2)
            targets = targets.flatten()
        return nn.functional.cross_entropy(logits, targets, ignore_index=self.ignore_index)

    def _are_last(self, logits: Tensor, targets: Tensor) -> bool:
        """Whether the classes lie along the last axis of ``logits``."""
        fits_last = logits.shape[:-1] == targets.shape
        if logits.ndim < 3 or self.class_axis is not None:
            return fits_last and self.class_axis != 1
        fits_first = logits.shape[:1] + logits.shape[2:] == targets.shape
        if fits_last and fits_first:
            raise ValueError(
                f"logits {tuple(logits.shape)} for targets {tuple(targets.shape)} may have their "
                "classes along axis 1 or along the last; say which with "
                "ht.problem.CrossEntropy(class_axis=1) or (class_axis=-1)"
            )
        return fits_last

    def num_examples(self, model: nn.Module, batch: Batch) -> int:
        """Targets that are not ``ignore_index``; for class probabilities, their rows."""
        _, targets = _inputs_and_targets(batch, "cross_entropy")
        if targets.is_floating_point():
            return targets[:, 0].numel()
        return int((targets != self.ignore_index).sum())


class MeanSquaredError:
    """Mean over all entries of (output - target)^2.

    A batch is (inputs, targets), with inputs and outputs as for :class:`CrossEntropy`.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs, targets = _outputs_and_targets(model, batch, "mse")
        if outputs.shape != targets.shape:  # broadcasting would silently be another loss
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}; "
                "make them equal"
            )
        return nn.functional.mse_loss(outputs, targets)

    def num_examples(self, model: nn.Module, batch: Batch) -> int:
        """Entries of the targets."""
        _, targets = _inputs_and_targets(batch, "mse")
        return targets.numel()


class HuggingFace:
    """``model(**batch).loss`` of a transformers model.

    A batch is a dict or a BatchEncoding with ``labels``.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        _check_labels(batch)
        return model(**batch).loss

    def num_examples(self, model: nn.Module, batch: Batch) -> int:
        """Labels other than -100, without the first of each sequence if the model shifts labels."""
        _check_labels(batch)
        labels = batch["labels"]
        if labels.is_floating_point():
            return labels.numel()
        valid = labels != IGNORED
        if labels.ndim > 1 and bool(valid[:, 0].any()) and self._shifts_labels(model, batch):
            valid = valid[:, 1:]
        return int(valid.sum())

    def _shifts_labels(self, model: nn.Module, batch: Batch) -> bool:
        # No attribute of a model says so, but a model that shifts never reads the first label.
        masked = batch["labels"].clone()
        masked[:, 0] = IGNORED
        return torch.equal(self(model, batch), self(model, {**batch, "labels": masked}))


cross_entropy = CrossEntropy()
mse = MeanSquaredError()
huggingface = HuggingFace()


def _check_labels(batch: Batch) -> None:
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise ValueError("ht.huggingface needs batches that are dicts with a `labels` entry")


def _inputs_and_targets(batch: Batch, loss_name: str) -> tuple[Batch, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise ValueError(
            f"ht.{loss_name} needs batches (inputs, targets), targets a tensor; "
            "write loss_fn(model, batch) for other batches"
        )
    return batch[0], batch[1]


def _outputs_and_targets(model: nn.Module, batch: Batch, loss_name: str) -> tuple[Tensor, Tensor]:
    inputs, targets = _inputs_and_targets(batch, loss_name)
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, tuple | list):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    return getattr(outputs, "logits", outputs), targets
