"""Problem: a model, a loss and data, checked and made deterministic. The one place where a model enters.

The loss everywhere in this package is the pooled mean

    L(w) = sum_b n_b loss_b(w) / sum_b n_b,

loss_b being the mean over the n_b valid examples of batch b (for language models: tokens that are not ignored), so
nothing depends on how the data is cut into batches. Letters: n_b valid examples of a batch, P trainable parameters.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from hessian_tools.errors import NumericalError

LossFunction = Callable[[nn.Module, Any], Tensor]
# attention kernels of transformers that have no second derivative
_ONCE_DIFFERENTIABLE_ATTENTION = ("flash_attention_2", "flash_attention_3", "flex_attention")


class CrossEntropy:
    """Mean cross-entropy (nats) over the targets that are not ``ignore_index``; a batch is (inputs, targets).

    ``inputs`` is a tensor, a tuple (passed as ``model(*inputs)``) or a dict (``model(**inputs)``); the output is the
    logits or has them as ``.logits``. Class axis: the last if the others are those of ``targets``, else axis 1.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits, targets = _outputs_and_targets(model, batch, "cross_entropy")
        if logits.ndim == targets.ndim + 1 and logits.shape[:-1] == targets.shape:
            logits, targets = logits.flatten(0, -2), targets.flatten()
        return nn.functional.cross_entropy(logits, targets, ignore_index=self.ignore_index)

    def num_examples(self, model: nn.Module, batch: Any) -> int:
        """Targets that count towards the mean (all but ``ignore_index``; rows, for class probabilities)."""
        targets = batch[1]
        return (
            targets[:, 0].numel()
            if targets.is_floating_point()
            else int((targets != self.ignore_index).sum())
        )


class MeanSquaredError:
    """Mean over all entries of (output - target)^2; a batch is (inputs, targets), inputs as for cross_entropy."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        outputs, targets = _outputs_and_targets(model, batch, "mse")
        if outputs.shape != targets.shape:  # broadcasting would silently be another loss
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}; make them equal"
            )
        return nn.functional.mse_loss(outputs, targets)

    def num_examples(self, model: nn.Module, batch: Any) -> int:
        """Entries of the targets: the mean is over all of them."""
        return batch[1].numel()


class HuggingFace:
    """``model(**batch).loss`` of a transformers model; a batch is a dict or BatchEncoding with ``labels``."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            raise ValueError("ht.huggingface needs batches that are dicts with a `labels` entry")
        return model(**batch).loss

    def num_examples(self, model: nn.Module, batch: Any) -> int:
        """Labels that count towards the mean: not -100, and not the first of a sequence where the model shifts them."""
        labels = batch["labels"]
        if labels.is_floating_point():
            return labels.numel()
        valid = labels != -100
        if labels.ndim < 2 or not bool(valid[:, 0].any()):
            return int(valid.sum())
        # Whether a model shifts its labels is not written anywhere; whether the first label matters shows it.
        masked = labels.clone()
        masked[:, 0] = -100
        shifted = torch.equal(self(model, batch), self(model, {**batch, "labels": masked}))
        return int(valid[:, 1:].sum() if shifted else valid.sum())


cross_entropy = CrossEntropy()
mse = MeanSquaredError()
huggingface = HuggingFace()


class Problem:
    """A model, a loss and data whose curvature is asked for.

    Args:
        model: any ``nn.Module``; parameters with ``requires_grad`` are the variables, tied ones counted once. It is
            evaluated in its own mode and comes back exactly as it was (mode, gradients, buffers, attention kernel).
        loss_fn: ``loss_fn(model, batch)`` -> scalar mean loss of the batch; ``ht.cross_entropy``, ``ht.mse`` and
            ``ht.huggingface`` are ready-made.
        batches: iterable of batches (tuples, dicts, BatchEncoding, a DataLoader); they are kept, on the model's device.
        batch_stats: must be said for a model with BatchNorm: True normalises by each batch's own statistics (as in
            training; a batch can then not be cut), False by the running ones. The running statistics never change.
        num_examples: ``num_examples(batch)`` -> the number of examples the batch's mean is over. Default: what the
            ready-made losses count (tokens that are not ignored), else the length of the batch's first tensor.

    Attributes: ``parameters`` {name: tensor}, ``num_parameters`` P, ``batches``, ``counts`` (n_b of each batch),
    ``loss`` (the pooled mean, a float), ``device``, ``dtype``, ``batch_stats`` and ``num_examples`` as given, and
    ``samples``, (n, batch) of one and of two examples, on which to learn about the loss (the first batch, where it
    cannot be cut).

    Raises:
        ValueError: no batches, no trainable parameter, a loss that is no scalar or does not depend on the parameters,
            a loss that fails, BatchNorm without ``batch_stats``, two evaluations that differ.
        NumericalError: a loss that is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Iterable[Any],
        *,
        batch_stats: bool | None = None,
        num_examples: Callable[[Any], int] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn is a {type(loss_fn).__name__}; pass loss_fn(model, batch) -> scalar loss"
            )
        self.model, self.loss_fn, self.num_examples = model, loss_fn, num_examples
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                "model has no parameter that requires grad; call model.requires_grad_() or unfreeze some"
            )
        devices = {p.device for p in self.parameters.values()}
        if len(devices) > 1:
            raise ValueError(
                f"model lies on {sorted(map(str, devices))}; move it to one device with model.to(device)"
            )
        self.device = devices.pop()
        self.dtype = functools.reduce(
            torch.promote_types, (p.dtype for p in self.parameters.values())
        )
        self.num_parameters = sum(p.numel() for p in self.parameters.values())
        self.batch_stats = _stated_batch_stats(model, batch_stats)
        self.batches = [to_device(batch, self.device) for batch in _frozen(batches)]
        with self.evaluating(), torch.no_grad():
            self.counts = [
                self._checked_count(batch, index) for index, batch in enumerate(self.batches)
            ]
            losses = [
                float(self._checked_loss(batch, index)) for index, batch in enumerate(self.batches)
            ]
            again = [float(self.batch_loss(batch)) for batch in self.batches]
        self._refuse_differing(losses, again)
        self.samples = self._samples()
        with self.evaluating(), torch.enable_grad():
            if not any(self.batch_loss(batch).requires_grad for _, batch in self.samples):
                raise ValueError(
                    "the loss does not depend on any parameter that requires grad (it has no gradient): loss_fn must "
                    "call the given model, without torch.no_grad() or .detach()"
                )
        total = sum(self.counts)
        self.loss = sum(n * loss for n, loss in zip(self.counts, losses, strict=True)) / total
        self.weights = [n / total for n in self.counts]

    def batch_loss(self, batch: Any) -> Tensor:
        """loss_fn on one batch; call it inside :meth:`evaluating`."""
        return self.loss_fn(self.model, batch)

    def count(self, batch: Any) -> int:
        """n_b, the examples of a batch that count; 0 for a piece of ignored tokens only."""
        own = getattr(self.loss_fn, "num_examples", None)
        if self.num_examples is not None:
            return self.num_examples(batch)
        return own(self.model, batch) if own is not None else batch_length(batch) or 1

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model as it is differentiated: BatchNorm as stated, attention by a kernel with second derivatives.

        Everything is put back on leaving, also after an exception.
        """
        norms = (
            [m for m in self.model.modules() if isinstance(m, _BatchNorm)]
            if self.batch_stats is not None
            else []
        )
        modes = [(m, m.training, m.track_running_stats) for m in norms]
        buffers = [(b, b._version, b.clone()) for b in self.model.buffers()]
        configs = {
            id(c): c for m in self.model.modules() if (c := getattr(m, "config", None)) is not None
        }
        kernels = [(c, getattr(c, "_attn_implementation", None)) for c in configs.values()]
        fastpath = torch.backends.mha.get_fastpath_enabled()
        try:
            for norm in (
                norms
            ):  # without tracking, neither the running statistics nor their counter is touched
                norm.training = bool(self.batch_stats)
                if self.batch_stats:
                    norm.track_running_stats = False
            for config, kernel in kernels:
                if kernel in _ONCE_DIFFERENTIABLE_ATTENTION:
                    config._attn_implementation = "sdpa"
            torch.backends.mha.set_fastpath_enabled(False)
            has_rnn = any(isinstance(m, nn.RNNBase) for m in self.model.modules())
            cudnn = _without_cudnn() if has_rnn else contextlib.nullcontext()
            with cudnn, sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            for config, kernel in kernels:
                if kernel in _ONCE_DIFFERENTIABLE_ATTENTION:
                    config._attn_implementation = kernel
            for module, training, tracking in modes:
                module.training, module.track_running_stats = training, tracking
            with torch.no_grad():
                for buffer, version, value in buffers:
                    if buffer._version != version:
                        buffer.copy_(value)

    def split(self, weight: float, batch: Any, size: int) -> list[tuple[float, Any]]:
        """A batch of ``weight`` in L, or a piece of one, in pieces of at most ``size`` examples with their weights.

        Raises:
            ValueError: when the pieces' weighted loss is not the batch's (batch statistics, a loss that is not the mean
                over the examples counted, tensors of different lengths): cutting would silently be another problem.
        """
        length = batch_length(batch)
        if length is None or length <= size:
            return [(weight, batch)]
        advice = "raise `memory` or pass smaller batches"
        if self.batch_stats:
            raise ValueError(
                f"a batch of {length} exceeds the memory budget and batch statistics forbid cutting it: {advice}"
            )
        pieces = [
            cut_batch(batch, first, min(first + size, length), length)
            for first in range(0, length, size)
        ]
        with self.evaluating(), torch.no_grad():
            whole = float(self.batch_loss(batch))
            counted = [(n, piece) for piece in pieces if (n := self.count(piece))]
            total = sum(n for n, _ in counted)
            mean = sum(n * float(self.batch_loss(piece)) for n, piece in counted) / total
        if not math.isclose(
            mean, whole, rel_tol=_tolerance(self.dtype), abs_tol=_tolerance(self.dtype)
        ):
            raise ValueError(
                f"a batch of {length} must be cut to fit the memory budget, but its pieces' pooled loss {mean:.7g} is "
                f"not its loss {whole:.7g}: pass num_examples= (what the loss is a mean over), or {advice}"
            )
        return [(weight * n / total, piece) for n, piece in counted]

    def _explained(self, evaluate: Callable[[], Any], index: int) -> Any:
        try:
            return evaluate()
        except (ArithmeticError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"loss_fn(model, batch) failed on batch {index} ({_described(self.batches[index])}): "
                f"{type(error).__name__}: {error}; `batches` must be an iterable of batches that loss_fn can take"
            ) from error

    def _checked_count(self, batch: Any, index: int) -> int:
        count = self._explained(lambda: self.count(batch), index)
        if not isinstance(count, int) or count < 1:
            raise ValueError(
                f"batch {index} has {count!r} valid examples; a whole number, at least 1, is needed"
            )
        return count

    def _checked_loss(self, batch: Any, index: int) -> Tensor:
        loss = self._explained(lambda: self.batch_loss(batch), index)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            found = (
                f"shape {tuple(loss.shape)}"
                if isinstance(loss, Tensor)
                else f"a {type(loss).__name__}"
            )
            raise ValueError(
                f"loss_fn returned {found}, not a scalar tensor; return the mean loss (loss.mean())"
            )
        if not torch.isfinite(loss):
            raise NumericalError(
                f"the loss of batch {index} is {float(loss)}, before any derivative"
            )
        return loss

    def _samples(self) -> list[tuple[int, Any]]:
        batch, length = self.batches[0], batch_length(self.batches[0])
        if length and length > 2 and not self.batch_stats:
            with contextlib.suppress(Exception), self.evaluating(), torch.no_grad():
                found = [(size, cut_batch(batch, 0, size, length)) for size in (1, 2)]
                for _, cut in found:  # a model may need whole batches; then it gets one
                    self.batch_loss(cut)
                return found
        return [(length or 1, batch)]

    def _refuse_differing(self, first: Sequence[float], second: Sequence[float]) -> None:
        tolerance = _tolerance(self.dtype)
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            if not math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance):
                random = [
                    name or type(module).__name__
                    for name, module in self.model.named_modules()
                    if isinstance(module, nn.modules.dropout._DropoutNd)
                    and module.training
                    and module.p > 0
                ]
                reason = (
                    f"dropout is active in {', '.join(random[:3])}"
                    if random
                    else "something in it is random"
                )
                raise ValueError(
                    f"two evaluations of the loss on batch {index} differ ({a:.7g}, {b:.7g}): {reason}; "
                    "call model.eval() and take randomness out of loss_fn (BatchNorm can still use batch_stats=True)"
                )


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """``value`` with every tensor in it on ``device``, floating ones cast where ``dtype`` is given."""
    return _mapped(
        value, lambda t: t.to(device, dtype if dtype and t.is_floating_point() else t.dtype)
    )


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a batch, in order."""
    found: list[Tensor] = []
    _mapped(value, lambda t: (found.append(t), t)[1])  # type: ignore[func-returns-value]
    return found


def with_tensors(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """``batch`` with its tensors, in the order of :func:`tensors_of`, replaced by ``tensors``."""
    replacements = iter(tensors)
    return _mapped(batch, lambda _: next(replacements))


def batch_length(batch: Any) -> int | None:
    """Examples along the first axis of the batch's first tensor; None without such an axis."""
    return next((t.shape[0] for t in tensors_of(batch) if t.ndim > 0), None)


def cut_batch(batch: Any, first: int, last: int, length: int) -> Any:
    """Examples first..last of a batch of ``length``. Raises ValueError for a tensor of another length."""

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim and tensor.shape[0] != length:
            raise ValueError(
                f"a batch must be cut to fit the memory budget, but holds tensors of lengths {length} and "
                f"{tensor.shape[0]}; raise `memory` or pass smaller batches"
            )
        return tensor[first:last] if tensor.ndim else tensor

    return _mapped(batch, cut)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):  # BatchEncoding too: a plain dict is what model(**batch) needs
        return {key: _mapped(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, function) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, function) for item in value)
    return value


def _outputs_and_targets(model: nn.Module, batch: Any, name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"ht.{name} needs batches (inputs, targets); write loss_fn(model, batch) for other batches"
        )
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        outputs = model(**inputs)
    else:
        outputs = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    return getattr(outputs, "logits", outputs), targets


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    # torch.backends.cudnn.flags would also switch TF32 on, and raises where the process has set TF32 by operation
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def _stated_batch_stats(model: nn.Module, batch_stats: bool | None) -> bool | None:
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return None
    if batch_stats is None and any(m.track_running_stats for _, m in norms):
        raise ValueError(
            f"model has BatchNorm ({norms[0][0] or 'the model itself'} and {len(norms) - 1} more); say batch_stats=True"
            " (each batch's own statistics, as in training) or batch_stats=False (the running ones)"
        )
    return True if batch_stats is None else batch_stats


def _frozen(batches: Any) -> list[Any]:
    if isinstance(batches, Mapping | Tensor | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}; pass an iterable of batches, e.g. [batch] for a single one"
        )
    frozen = list(batches)
    if not frozen:
        raise ValueError(
            "batches is empty; pass at least one batch (a generator that was read before is empty, too)"
        )
    if isinstance(batches, tuple | list) or iter(batches) is batches:
        return frozen
    for index, (one, two) in enumerate(
        zip(frozen, batches, strict=False)
    ):  # a loader that shuffles shows it here
        first, second = tensors_of(one), tensors_of(two)
        if len(first) != len(second) or not all(
            torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True)
        ):
            raise ValueError(
                f"batches gives different data each time it is read (first in batch {index}): shuffling or random "
                "augmentation; use shuffle=False without augmentation, or pass list(batches) to freeze one draw"
            )
    return frozen


def _described(batch: Any) -> str:
    shapes = [
        f"{str(t.dtype).removeprefix('torch.')}{tuple(t.shape)}" for t in tensors_of(batch)[:4]
    ]
    return f"a {type(batch).__name__} with {', '.join(shapes) or 'no tensor'}"


def _tolerance(dtype: torch.dtype) -> float:
    # rounding differs between batch shapes and between runs of an atomic-add kernel; randomness differs much more
    eps = torch.finfo(dtype).eps
    return (
        100 * eps if eps < 1e-3 else 4 * eps
    )  # a hundred roundings of bfloat16 would let anything pass
