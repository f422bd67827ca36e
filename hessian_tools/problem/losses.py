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
    along the last axis if the other axes are those of ``targets``, else along axis 1.
    """

    def __init__(self, ignore_index: int = IGNORED) -> None:
        self.ignore_index = ignore_index

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = _outputs_and_targets(model, batch, "cross_entropy")
        if logits.ndim == targets.ndim + 1 and logits.shape[:-1] == targets.shape:
            logits = logits.flatten(0, -2)
            targets = targets.flatten()
        return nn.functional.cross_entropy(logits, targets, ignore_index=self.ignore_index)

    def num_examples(self, model: nn.Module, batch: Batch) -> int:
        """Targets that are not ``ignore_index``; for class probabilities, their rows."""
        targets = batch[1]
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
        return batch[1].numel()


class HuggingFace:
    """``model(**batch).loss`` of a transformers model.

    A batch is a dict or a BatchEncoding with ``labels``.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            raise ValueError("ht.huggingface needs batches that are dicts with a `labels` entry")
        return model(**batch).loss

    def num_examples(self, model: nn.Module, batch: Batch) -> int:
        """Labels other than -100, without the first of each sequence if the model shifts labels."""
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


def _outputs_and_targets(model: nn.Module, batch: Batch, loss_name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"ht.{loss_name} needs batches (inputs, targets); "
            "write loss_fn(model, batch) for other batches"
        )
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, tuple | list):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    return getattr(outputs, "logits", outputs), targets
