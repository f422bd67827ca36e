"""What a Problem's model holds, seen to be still the same: parameters, buffers, and the data.

Whatever is kept between products (recorded graphs, constants of a tangent program) belongs to the
weights it was made with. autograd counts the operations that write into a tensor, but not those
through ``.data``, and neither swapped memory (``vector_to_parameters``) nor swapped tensors
(``load_state_dict(assign=True)``, pruning) nor ``requires_grad``. So tensors are told by what they
are: the object, where its memory lies, how often it was written, and, for those of the model, a
checksum of the values. The data is the Problem's own, so that nobody writes into it by ``.data``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hessian_tools.problem.batches import tensors_of
from hessian_tools.problem.problem import Problem

Identity = tuple[int, int]  # a tensor's id, and where its memory lies


@dataclass(frozen=True)
class Snapshot:
    """What a Problem's model and data hold at one time."""

    # kept, so that no other takes the id of one
    tensors: tuple[Tensor, ...] = field(compare=False)
    identities: tuple[Identity, ...]
    versions: tuple[int, ...]  # how often each was written, as far as autograd knows
    checksums: tuple[int, ...]  # of the values of the model's tensors


class Watch:
    """Notices when the model or the data of a Problem are not what they were at the last look."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._last: Snapshot | None = None

    def change(self) -> str:
        """ "" where all is as at the last look; else "values", or "tensors" where others came in.

        Costs a pass over the model's values, and on a device makes the host wait.

        Raises:
            ValueError: the trainable parameters are not those of the Problem any more.
        """
        follow(self._problem)
        last, now = self._last, _snapshot(self._problem)
        self._last = now
        if last is None or now == last:
            return ""
        same_tensors = [id(t) for t in now.tensors] == [id(t) for t in last.tensors]
        return "values" if same_tensors else "tensors"

    def look_away(self) -> None:
        """What the package itself has written since the last look, and put back, is no change."""
        if self._last is not None:
            self._last = replace(self._last, versions=_versions(self._last.tensors))


def follow(problem: Problem) -> None:
    """Makes ``problem.parameters`` those that the model has now, should they have been swapped.

    Raises:
        ValueError: the trainable parameters are not those of the Problem any more: other names,
            shapes, dtype or device, or some were frozen or freed.
    """
    present = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}
    pairs = zip(present.items(), problem.parameters.items(), strict=False)
    alike = len(present) == len(problem.parameters) and all(
        name == known_name and p is known for (name, p), (known_name, known) in pairs
    )
    if not alike:
        _check_same_names(problem, present)
        problem.parameters.update(present)
    _check_same_kind(problem)


def _check_same_names(problem: Problem, present: dict[str, nn.Parameter]) -> None:
    everything = dict(problem.model.named_parameters())
    for name in problem.parameters:
        if name not in everything:
            raise _no_longer(f"{name} is no parameter of the model any more")
        if name not in present:
            raise _no_longer(f"{name} does not require grad any more")
    for name in present:
        if name not in problem.parameters:
            raise _no_longer(f"{name} did not require grad, or was no parameter, at that time")


def _check_same_kind(problem: Problem) -> None:
    parameters = problem.parameters
    size = sum(p.numel() for p in parameters.values())
    if size != problem.num_parameters:
        raise _no_longer(f"they had {problem.num_parameters:,} entries and have {size:,}")
    for name, p in parameters.items():
        if p.device != problem.device:
            raise _no_longer(f"{name} lies on {p.device}, and lay on {problem.device}")
        if torch.promote_types(p.dtype, problem.dtype) != problem.dtype:
            raise _no_longer(f"{name} is in {p.dtype}, and the Problem's dtype is {problem.dtype}")


def _no_longer(reason: str) -> ValueError:
    return ValueError(
        "the model's trainable parameters are not those that the Problem was made with "
        f"({reason}); make a new Problem, and a new partition, of the model as it is now"
    )


def _snapshot(problem: Problem) -> Snapshot:
    held = tuple(_held(problem.model))
    data = tuple(tensors_of(problem.batches))
    tensors = held + data
    return Snapshot(
        tensors=tensors,
        identities=tuple((id(t), _place(t)) for t in tensors),
        versions=_versions(tensors),
        checksums=_checksums(held, problem.device),
    )


def _held(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for t in tensors)


def _place(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; 0 for one that has no single memory (sparse)."""
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


@torch.no_grad()
def _checksums(tensors: Iterable[Tensor], device: torch.device) -> tuple[int, ...]:
    sums = [total.to(device) for t in tensors for total in _sums(t)]
    # as whole numbers, so that NaN is like itself; one transfer from a device
    return tuple(torch.stack(sums).tolist()) if sums else ()


def _sums(tensor: Tensor) -> Iterator[Tensor]:
    """Two numbers: the first sees every change of one entry, the second most rearrangements."""
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return
    values = tensor.detach().contiguous().flatten()
    octets = values.view(torch.uint8)
    if octets.storage_offset() % 8:
        octets = octets.clone()  # words must begin at a multiple of eight
    whole = len(octets) // 8 * 8
    words = octets[:whole].view(torch.int64).sum()
    yield words + octets[whole:].sum()
    if values.is_floating_point():
        yield torch.dot(values[:-1], values[1:]).double().view(torch.int64)
