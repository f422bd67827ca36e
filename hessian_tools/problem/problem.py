"""Problem: a model, a loss and data, checked and made deterministic. Where a model enters.

The loss everywhere in this package is the pooled mean

    L(w) = sum_b n_b loss_b(w) / sum_b n_b,

loss_b being the mean over the n_b valid examples of batch b (for language models: tokens that are
not ignored), so nothing depends on how the data is cut into batches. Letters: n_b valid examples of
a batch, P trainable parameters.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hessian_tools.errors import NumericalError
from hessian_tools.problem.batches import (
    Batch,
    batch_length,
    cut_batch,
    described,
    frozen,
    is_plain,
    lengths_agree,
    tensors_of,
    to_device,
)
from hessian_tools.problem.evaluation import evaluating, stated_batch_stats
from hessian_tools.problem.losses import LossFunction, OutputLoss


class Problem:
    """A model, a loss and data whose curvature is asked for.

    Args:
        model: any ``nn.Module``; parameters with ``requires_grad`` are the variables, tied ones
            counted once. It is evaluated in the mode (training or not) that it has now, and comes
            back exactly as it was (mode, gradients, buffers, attention kernel).
        loss_fn: ``loss_fn(model, batch)`` -> scalar mean loss of the batch; ``ht.cross_entropy``,
            ``ht.mse`` and ``ht.huggingface`` are ready-made.
        batches: iterable of batches (tuples, dicts, BatchEncoding, dataclasses, objects with
            tensors as attributes; a DataLoader); they are kept, on the model's device.
        batch_stats: needed for a model with BatchNorm: True normalises by each batch's own
            statistics (as in training; a batch can then not be cut), False by the running ones. The
            running statistics never change.
        num_examples: ``num_examples(batch)`` -> the number of examples that the batch's mean is
            over. Default: what the ready-made losses count (tokens that are not ignored), else the
            length of the batch's first tensor. Needed for several batches that are objects whose
            tensors have different lengths, or in which no tensor is found.

    Attributes: ``parameters`` {name: tensor}, ``num_parameters`` P, ``batches``, ``counts`` (n_b of
    each batch), ``weights`` (n_b / sum n_b), ``loss`` (the pooled mean, a float), ``device``,
    ``dtype``, ``batch_stats`` and ``num_examples`` as given, ``differentiates_inside`` (whether the
    loss needs gradients enabled), and ``samples``, (n, batch) of one and of two examples, on which
    to learn about the loss (the first batch, where it cannot be cut).

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: no batches, no trainable parameter, complex or sparse parameters, a loss that is
            no scalar or does not depend on the parameters, a loss that fails, BatchNorm without
            ``batch_stats``, batches whose examples cannot be counted, two evaluations that differ,
            a loss that writes into the parameters.
        NumericalError: a loss that is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Iterable[Batch],
        *,
        batch_stats: bool | None = None,
        num_examples: Callable[[Batch], float] | None = None,
    ) -> None:
        _check_arguments(model, loss_fn, num_examples)
        _check_no_max_norm(model)
        self.model = model
        self.loss_fn = loss_fn
        self.num_examples = num_examples
        self.parameters = _trainable(model)
        self.num_parameters = sum(p.numel() for p in self.parameters.values())
        self.device = _common_device(self.parameters)
        dtypes = (p.dtype for p in self.parameters.values())
        self.dtype = functools.reduce(torch.promote_types, dtypes)
        self.batch_stats = stated_batch_stats(model, batch_stats)
        self._modes = {module: module.training for module in model.modules()}
        self.batches = [to_device(batch, self.device) for batch in frozen(batches)]
        self._check_countable()
        with self.evaluating():
            self.differentiates_inside = self._needs_gradients()
            self.counts = [self._checked_count(i) for i in range(len(self.batches))]
            losses = [self._checked_loss(i) for i in range(len(self.batches))]
            versions = {name: p._version for name, p in self.parameters.items()}
            again = [self.batch_value(batch) for batch in self.batches]
        self._check_unwritten(versions)
        self._check_deterministic(losses, again)
        self.samples = self._samples()
        self._check_differentiable()
        total = sum(self.counts)
        self.loss = sum(n * loss for n, loss in zip(self.counts, losses, strict=True)) / total
        self.weights = [n / total for n in self.counts]

    def batch_loss(self, batch: Batch) -> Tensor:
        """The mean loss of one batch, a scalar; call it inside :meth:`evaluating`."""
        return self.loss_fn(self.model, batch)

    def batch_outputs(self, batch: Batch) -> Tensor:
        """z of one batch, of which the loss is a function; call it inside :meth:`evaluating`.

        Raises:
            ValueError: as :attr:`in_two_steps`; z is not a real floating tensor.
        """
        outputs = self.in_two_steps.outputs(self.model, batch)
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"outputs(model, batch) returned a {kind}; one real floating tensor is needed: "
                "join several, flattened, with torch.cat"
            )
        return outputs

    def outputs_value(self, batch: Batch) -> Tensor:
        """The same, without a graph; call it inside :meth:`evaluating`."""
        with torch.set_grad_enabled(self.differentiates_inside):
            return self.batch_outputs(batch).detach()

    def loss_of_outputs(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean loss of one batch of given outputs, a scalar."""
        return self.in_two_steps.loss(outputs, batch)

    @property
    def in_two_steps(self) -> OutputLoss:
        """The loss function, which is known in two steps.

        Raises:
            ValueError: it is a function of model and batch alone.
        """
        if not isinstance(self.loss_fn, OutputLoss):
            raise ValueError(
                "the Gauss-Newton and Fisher matrices need the model's outputs and the loss of the "
                "outputs apart, and loss_fn is one function of model and batch; pass "
                "ht.Loss(outputs=..., loss=...), ht.cross_entropy, ht.mse or ht.huggingface"
            )
        return self.loss_fn

    def batch_value(self, batch: Batch) -> float:
        """The mean loss of one batch as a number, without a graph where that is possible.

        Call it inside :meth:`evaluating`.
        """
        return float(self._value(batch))

    def _value(self, batch: Batch) -> Tensor:
        with torch.set_grad_enabled(self.differentiates_inside):
            loss = self.batch_loss(batch)
        return loss.detach() if isinstance(loss, Tensor) else loss

    def count(self, batch: Batch) -> float:
        """n_b, the examples of a batch that count; 0 for a piece that holds ignored tokens only."""
        if self.num_examples is not None:
            return self.num_examples(batch)
        counted_by_loss = getattr(self.loss_fn, "num_examples", None)
        if counted_by_loss is not None:
            return counted_by_loss(self.model, batch)
        return batch_length(batch) or 1

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """The context in which the loss is evaluated and differentiated.

        See :mod:`hessian_tools.problem.evaluation`: BatchNorm as stated, kernels that have second
        derivatives. Everything is put back on leaving, also after an exception.
        """
        return evaluating(self.model, self.batch_stats, self._modes)

    def split(self, weight: float, batch: Batch, size: int) -> list[tuple[float, Batch]]:
        """Pieces (weight, batch) of at most ``size`` examples of a batch that has ``weight`` in L.

        The batch may itself be a piece. Pieces without examples that count are left out.

        Raises:
            ValueError: the pieces' weighted loss is not the batch's (batch statistics, a loss that
                is not the mean over the examples counted, tensors of different lengths): cutting
                would silently change the problem.
        """
        length = batch_length(batch)
        if length is None or length <= size:
            return [(weight, batch)]
        advice = "raise `memory` or pass smaller batches"
        if self.batch_stats:
            raise ValueError(
                f"a batch of {length} exceeds the memory budget and batch statistics forbid "
                f"cutting it: {advice}"
            )
        starts = range(0, length, size)
        pieces = [cut_batch(batch, first, min(first + size, length), length) for first in starts]
        with self.evaluating():
            whole = self.batch_value(batch)
            counted = [(n, piece) for piece in pieces if (n := self.count(piece))]
            total = sum(n for n, _ in counted)
            losses = [n * self._piece_loss(piece, length) for n, piece in counted]
            mean = sum(losses) / total
        if not self._close(mean, whole):
            raise ValueError(
                f"a batch of {length} must be cut to fit the memory budget, but its pieces' pooled "
                f"loss {mean:.7g} is not its loss {whole:.7g}: pass num_examples= (what the loss "
                f"is a mean over), or {advice}"
            )
        return [(weight * n / total, piece) for n, piece in counted]

    def _piece_loss(self, piece: Batch, length: int) -> float:
        try:
            return self.batch_value(piece)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"a batch of {length} must be cut to fit the memory budget, but loss_fn fails on a "
                f"piece of it ({reason}): raise `memory` or pass smaller batches"
            ) from error

    def _checked_count(self, index: int) -> float:
        with self._explaining(index):
            count = self.count(self.batches[index])
        is_number = isinstance(count, int | float) and not isinstance(count, bool)
        if not is_number or not 0 < count < math.inf:
            raise ValueError(
                f"batch {index} has {count!r} valid examples; a positive number is needed (a sum "
                "of weights where the loss is a weighted mean)"
            )
        return count

    def _checked_loss(self, index: int) -> float:
        with self._explaining(index):
            loss = self._value(self.batches[index])
        if not isinstance(loss, Tensor):
            raise ValueError(_no_scalar(f"a {type(loss).__name__}"))
        if loss.ndim != 0:
            raise ValueError(_no_scalar(f"shape {tuple(loss.shape)}"))
        if loss.is_complex():
            raise ValueError(_no_scalar(f"{loss.dtype}"))
        if not torch.isfinite(loss):
            raise NumericalError(
                f"the loss of batch {index} is {float(loss)}, before any derivative"
            )
        return float(loss)

    @contextlib.contextmanager
    def _explaining(self, index: int) -> Iterator[None]:
        """Errors of the user's loss name the batch; numerical and memory errors stay themselves."""
        try:
            yield
        except (ArithmeticError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"loss_fn(model, batch) failed on batch {index} "
                f"({described(self.batches[index])}): {type(error).__name__}: {error}"
            ) from error

    def _check_unwritten(self, versions: Mapping[str, int]) -> None:
        """Raises ValueError where every evaluation writes into parameters (versions then rise).

        A first one may prepare a model (RWKV rescales its layers).
        """
        written = [name for name, p in self.parameters.items() if p._version != versions[name]]
        if written:
            raise ValueError(
                f"evaluating the loss writes into {', '.join(written[:3])}, so that its "
                "derivatives are not those at the weights given; do that before, or on a copy that "
                "the forward pass makes"
            )

    def _check_deterministic(self, first: Sequence[float], second: Sequence[float]) -> None:
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            if not self._close(a, b):
                raise ValueError(
                    f"two evaluations of the loss on batch {index} differ ({a:.7g}, {b:.7g}): "
                    f"{_what_is_random(self.model)}; call model.eval() and take randomness out of "
                    "loss_fn (BatchNorm can still use batch_stats=True)"
                )

    def _samples(self) -> list[tuple[int, Batch]]:
        batch = self.batches[0]
        length = batch_length(batch)
        whole = [(length or 1, batch)]
        if length is None or length <= 2 or self.batch_stats:
            return whole
        try:
            samples = [(size, cut_batch(batch, 0, size, length)) for size in (1, 2)]
            usable = all(self._is_usable(sample) for _, sample in samples)
        except Exception:  # a model may need whole batches; then it gets one
            return whole
        return samples if usable else whole

    def _is_usable(self, sample: Batch) -> bool:
        """Whether loss and gradient are finite: the deviation of one example, say, is not."""
        with self.evaluating(), torch.enable_grad():
            loss = self.batch_loss(sample)
            if not loss.requires_grad or not torch.isfinite(loss):
                return False
            parameters = list(self.parameters.values())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)

    def _check_countable(self) -> None:
        """Refuses to guess how many examples a batch holds, where a wrong number would matter."""
        counted = self.num_examples or getattr(self.loss_fn, "num_examples", None)
        if counted is not None or len(self.batches) == 1:
            return
        for index, batch in enumerate(self.batches):
            if not tensors_of(batch):
                reason = "no tensor was found in it"
            elif not is_plain(batch) and not lengths_agree(batch):
                reason = "its tensors have different lengths"
            else:
                continue
            raise ValueError(
                f"how many examples batch {index} holds cannot be told ({described(batch)}: "
                f"{reason}); pass num_examples=, a function of the batch that gives the number "
                "of examples its mean loss is over"
            )

    def _needs_gradients(self) -> bool:
        """Whether the loss can only, or only rightly, be evaluated with gradients enabled.

        So it is where the loss differentiates inside (physics-informed networks, gradient
        penalties), or asks whether gradients are enabled.
        """
        batch = self.batches[0]
        length = batch_length(batch)
        if length is not None and length > 1 and not self.batch_stats:
            with contextlib.suppress(Exception):  # not every batch can be cut
                return self._differs_without_gradients(cut_batch(batch, 0, 1, length))
        with contextlib.suppress(Exception):  # told of later, with its reason
            return self._differs_without_gradients(batch)
        return False

    def _differs_without_gradients(self, batch: Batch) -> bool:
        with torch.enable_grad():
            expected = float(self.batch_loss(batch).detach())
        try:
            with torch.no_grad():
                found = float(self.batch_loss(batch))
        except RuntimeError:
            return True
        return not self._close(expected, found) and not math.isnan(expected)

    def _check_differentiable(self) -> None:
        with self.evaluating(), torch.enable_grad():
            if not any(self.batch_loss(sample).requires_grad for _, sample in self.samples):
                raise ValueError(
                    "the loss does not depend on any parameter that requires grad (it has no "
                    "gradient): loss_fn must call the given model, without torch.no_grad() or "
                    ".detach()"
                )

    def _close(self, a: float, b: float) -> bool:
        """Whether two values of one loss differ by rounding only."""
        # Rounding differs between batch shapes and between runs of an atomic-add kernel; randomness
        # differs much more. A hundred roundings of bfloat16 would let anything pass.
        eps = torch.finfo(self.dtype).eps
        tolerance = 100 * eps if eps < 1e-3 else 4 * eps
        return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)


def _check_arguments(model: object, loss_fn: object, num_examples: object) -> None:
    """Raises TypeError for an argument of the wrong kind."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is a {type(loss_fn).__name__}; pass loss_fn(model, batch) -> scalar loss"
        )
    if num_examples is not None and not callable(num_examples):
        raise TypeError(
            f"num_examples is a {type(num_examples).__name__}; pass a function of a batch that "
            "gives the number of examples its mean is over"
        )


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in parameters.items():
        if p.is_complex():
            raise ValueError(
                f"parameter {name} is complex ({p.dtype}), and curvature is about real variables: "
                "store torch.view_as_real(value) as the parameter, and call torch.view_as_complex "
                "on it in forward"
            )
        if p.layout != torch.strided:
            raise ValueError(
                f"parameter {name} is sparse ({p.layout}), and vectors of curvature are dense; "
                "store its values as a dense parameter"
            )
    if not parameters:
        raise ValueError(
            "model has no parameter that requires grad; "
            "call model.requires_grad_() or unfreeze some"
        )
    return parameters


def _check_no_max_norm(model: nn.Module) -> None:
    """Raises ValueError for embeddings that rescale their rows whenever they are read."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        if module.max_norm is not None and module.weight.requires_grad:
            raise ValueError(
                f"{name or 'model'} has max_norm={module.max_norm:g} and so writes into its own "
                "weights in every forward pass, which derivatives do not see; rescale the rows "
                "once and set max_norm = None"
            )


def _common_device(parameters: Mapping[str, Tensor]) -> torch.device:
    devices = {p.device for p in parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"model lies on {sorted(map(str, devices))}; "
            "move it to one device with model.to(device)"
        )
    return devices.pop()


def _no_scalar(returned: str) -> str:
    return (
        f"loss_fn returned {returned}, not a real scalar tensor; return the mean loss (loss.mean())"
    )


def _what_is_random(model: nn.Module) -> str:
    dropouts = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, _DropoutNd) and module.training and module.p > 0
    ]
    if not dropouts:
        return "something in it is random"
    return f"dropout is active in {', '.join(dropouts[:3])}"
