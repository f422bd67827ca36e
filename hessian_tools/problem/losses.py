"""Losses that know what their mean is over, and which of a model's outputs they are a loss of.

A loss function is ``loss_fn(model, batch) -> scalar mean loss of the batch``. That is all the
Hessian needs. The Gauss-Newton and Fisher matrices also need the outputs z and the loss of the
outputs apart, L = loss(z, batch), z = outputs(model, batch): :class:`Loss` is made of the two, and
the ready-made ones have both.

The ready-made ones also have ``num_examples(model, batch)``, the number of examples that the mean
is over (targets that are not ignored, for classification), by which batches are weighted, and a
``likelihood(batch)``: the distribution of targets whose negative log-likelihood they are.

Letters: N examples of a batch, C classes.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hessian_tools.problem.batches import Batch

LossFunction = Callable[[nn.Module, Batch], Tensor]
IGNORED = -100  # the target that does not count, in PyTorch and in transformers
CATEGORICAL, GAUSSIAN = "categorical", "gaussian"  # likelihoods


@runtime_checkable
class OutputLoss(Protocol):
    """A loss function that can be had in two steps."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor: ...

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """z, one floating tensor of any shape."""
        ...

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The scalar mean loss of z."""
        ...


class Loss:
    """A loss given in two steps, which the Gauss-Newton and Fisher matrices need.

    Args:
        outputs: ``outputs(model, batch)`` -> z, one floating tensor of any shape with the examples
            along its first axis.
        loss: ``loss(z, batch)`` -> scalar mean loss of the batch, twice differentiable in z. What
            it does to the model's parameters besides (weight decay, say) would be missed.

    Raises:
        TypeError: for what cannot be called.
    """

    def __init__(
        self,
        outputs: Callable[[nn.Module, Batch], Tensor],
        loss: Callable[[Tensor, Batch], Tensor],
    ) -> None:
        for name, given in (("outputs", outputs), ("loss", loss)):
            if not callable(given):
                raise TypeError(
                    f"{name} is a {type(given).__name__}; pass outputs(model, batch) -> tensor and "
                    "loss(outputs, batch) -> scalar mean loss"
                )
        self.outputs = outputs
        self.loss = loss

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(self.outputs(model, batch), batch)


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
        return self.loss(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits."""
        return _outputs(model, batch, "cross_entropy")

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean cross-entropy of given logits."""
        targets = self.targets(batch)
        if self._are_last(outputs, targets):
            outputs = outputs.flatten(0, -2)
            targets = targets.flatten()
        return nn.functional.cross_entropy(outputs, targets, ignore_index=self.ignore_index)

    def likelihood(self, batch: Batch) -> str:
        return CATEGORICAL

    def targets(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        """The classes, or the probabilities of the classes."""
        _, targets = _inputs_and_targets(batch, "cross_entropy")
        return targets

    def axis_of_classes(self, outputs: Tensor, batch: Batch) -> int:
        """The axis of the logits along which the classes lie."""
        is_last = self._are_last(outputs, self.targets(batch))
        return outputs.ndim - 1 if is_last else 1

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
        targets = self.targets(batch)
        if targets.is_floating_point():
            return targets[:, 0].numel()
        return int((targets != self.ignore_index).sum())


class MeanSquaredError:
    """Mean over all entries of (output - target)^2.

    A batch is (inputs, targets), with inputs and outputs as for :class:`CrossEntropy`. An entry's
    loss is the negative log-likelihood, but for a constant, of a Gaussian of variance 1/2.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(self.outputs(model, batch), batch)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's output."""
        return _outputs(model, batch, "mse")

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean squared error of given outputs."""
        targets = self.targets(batch)
        if outputs.shape != targets.shape:  # broadcasting would silently be another loss
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}; "
                "make them equal"
            )
        return nn.functional.mse_loss(outputs, targets)

    def likelihood(self, batch: Batch) -> str:
        return GAUSSIAN

    def targets(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        """What the outputs are held against."""
        _, targets = _inputs_and_targets(batch, "mse")
        return targets

    def num_examples(self, model: nn.Module, batch: Batch) -> int:
        """Entries of the targets."""
        return self.targets(batch).numel()


class HuggingFace:
    """``model(**batch).loss`` of a transformers model.

    A batch is a dict or a BatchEncoding with ``labels``. In two steps it is known where the loss is
    a mean over labels of ``.logits`` alone: cross-entropy of classes, of the next token where the
    model shifts labels, mean squared error, or binary cross-entropy of several labels.
    """

    ignore_index = IGNORED

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        _check_labels(batch)
        return model(**batch).loss

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of which the loss is; without each sequence's last if the model shifts labels.

        Raises:
            ValueError: the model's loss is not one of those that are known in two steps.
        """
        _check_labels(batch)
        if model not in _SHIFTS:
            _SHIFTS[model] = self._seen_to_shift(model, batch)
        logits = model(**batch).logits
        return logits[:, :-1] if _SHIFTS[model] else logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean loss of the logits that :meth:`outputs` gives."""
        targets = self.targets(batch, outputs)
        if not targets.is_floating_point():
            return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        if _is_yes_or_no(targets):
            return nn.functional.binary_cross_entropy_with_logits(outputs, targets)
        return nn.functional.mse_loss(outputs, targets)

    def likelihood(self, batch: Batch) -> str:
        labels = batch["labels"]
        if not labels.is_floating_point():
            return CATEGORICAL
        return "" if _is_yes_or_no(labels) else GAUSSIAN

    def targets(self, batch: Batch, outputs: Tensor | None = None) -> Tensor:
        """The labels; those that ``outputs`` predict, if given."""
        labels = batch["labels"]
        if outputs is None:
            return labels
        if labels.is_floating_point():
            return labels.reshape(outputs.shape)
        is_shifted = labels.ndim > 1 and outputs.shape[1] == labels.shape[1] - 1
        return labels[:, 1:] if is_shifted else labels

    def axis_of_classes(self, outputs: Tensor, batch: Batch) -> int:
        """The last axis of the logits."""
        return outputs.ndim - 1

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
        labels = batch["labels"]
        if labels.ndim < 2 or labels.is_floating_point():
            return False
        other = labels.clone()
        other[:, 0] = torch.where(labels[:, 0] == IGNORED, 0, IGNORED)
        return torch.equal(self(model, batch), self(model, {**batch, "labels": other}))

    @torch.no_grad()
    def _seen_to_shift(self, model: nn.Module, batch: Batch) -> bool:
        """Whether the model shifts labels; its loss must be that of its logits either way."""
        shifts = self._shifts_labels(model, batch)
        answer = model(**batch)
        logits = answer.get("logits") if isinstance(answer, Mapping) else None
        reason = "it has no logits"
        if isinstance(logits, Tensor):
            found = self._of_logits(logits[:, :-1] if shifts else logits, batch)
            reason = f"a loss of its logits alone would be {found:.6g}"
            expected = float(answer["loss"])
            # the model's own loss casts logits to float32
            tolerance = max(1e-5, 4 * torch.finfo(logits.dtype).eps)
            if abs(found - expected) <= tolerance * (abs(expected) + 1):
                return shifts
            reason += f", not {expected:.6g}"
        raise ValueError(
            f"the loss of {type(model).__name__} is not known in two steps ({reason}), which the "
            "Gauss-Newton and Fisher matrices need; pass ht.Loss(outputs=..., loss=...)"
        )

    def _of_logits(self, logits: Tensor, batch: Batch) -> float:
        try:
            return float(self.loss(logits, batch))
        except (RuntimeError, ValueError, IndexError):  # shapes that do not belong together
            return float("nan")


# by model: whether it shifts labels
_SHIFTS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
cross_entropy = CrossEntropy()
mse = MeanSquaredError()
huggingface = HuggingFace()


def _is_yes_or_no(labels: Tensor) -> bool:
    """Whether they are those of a model that says yes or no to each of several labels."""
    return labels.ndim > 1 and labels.shape[-1] > 1


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


def _outputs(model: nn.Module, batch: Batch, loss_name: str) -> Tensor:
    inputs, _ = _inputs_and_targets(batch, loss_name)
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    elif isinstance(inputs, tuple | list):
        outputs = model(*inputs)
    else:
        outputs = model(inputs)
    return getattr(outputs, "logits", outputs)
