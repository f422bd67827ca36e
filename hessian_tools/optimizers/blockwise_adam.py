"""Adam whose second moment is one number a block of a partition: a family in one optimizer.

    p <- p (1 - lr wd)
    m <- b1 m + (1 - b1) g
    v_b <- b2 v_b + (1 - b2) mean over block b of g^2
    p <- p - lr (m / (1 - b1^t)) / (sqrt(v_b) / sqrt(1 - b2^t) + eps)

With every entry a block this is AdamW (Loshchilov & Hutter 2019); with Algorithm 3 of Adam-mini it
is Adam-mini (Zhang et al., arXiv 2406.16793); with one block a tensor it is Adalayer (Zhao et al.,
arXiv 2407.07972); :mod:`hessian_tools.optimizers.adam_family` has them by name. A group may also

- not ``adapt``: p <- p - lr m / (1 - b1^t), SGD with an averaged gradient;
- be ``frozen_after`` T steps: until then v is the plain mean of the blocks' mean squares so far,
  from then on it stays, uncorrected;
- be ``held_until`` T steps, before which p stays. The corrections count these steps as well.

Letters: B blocks of a tensor, t steps.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.blocks.param_groups import ParamGroup, param_groups
from hessian_tools.blocks.partition import Partition
from hessian_tools.optimizers.stepping import Dense

Closure = Callable[[], Tensor | float]
_ALIKE = ("lr", "betas", "eps", "weight_decay", "adapt", "frozen_after", "held_until")
_NO_BLOCK = "(no block)"  # the group of what is in none


class BlockwiseAdam(Dense):
    """Adam over a partition.

    State of each tensor: ``step``, ``exp_avg``, and ``exp_avg_sq``, (B,), a number a block in the
    order of its group's ``cuts``; of the tensor's own shape where every entry is a block.

    Args:
        params: a model with its ``partition``, or groups as :func:`hessian_tools.param_groups`
            makes them; a group's own ``lr``, ``betas``, ``eps``, ``weight_decay``, ``adapt``,
            ``frozen_after`` and ``held_until`` override what is given here. Entries in no block
            keep a number each.
        partition: blocks of the model, with ``params`` a model.
        lr: a number.
        betas: (b1, b2), each in [0, 1).
        eps: added outside of the root, as in Adam.
        weight_decay: decoupled, wd.
        adapt: whether to divide by the second moment at all.
        frozen_after: T; None: never.
        held_until: T.

    Raises:
        ValueError: a number out of range; a model without partition; a group without ``cuts``, or
            with a part of the tensors that make up its block (as ZeroRedundancyOptimizer shares
            them out among processes); a partition whose blocks join parts of several tensors, or
            leave out a part of a tensor that they cut; a tensor that FSDP has sharded where its
            blocks are cut.
        RuntimeError: sparse or complex gradients.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[ParamGroup],
        partition: Partition | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adapt: bool = True,
        frozen_after: int | None = None,
        held_until: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adapt": adapt,
            "frozen_after": frozen_after,
            "held_until": held_until,
        }
        super().__init__(_groups(params, partition), defaults)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As torch's, of a group that says its blocks; see the errors of the class."""
        _check_says_blocks(param_group)
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        try:
            _check(added)
            _check_is_whole(added)
            for p in added["params"]:
                _check_cuts(p, added)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch's own has overloads
        self,
        closure: Closure | None = None,
    ) -> Tensor | float | None:
        """One step; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [w for group in self.param_groups for w in self._work(group)]
        # tensors of alike groups go through together, which saves launches on a device
        for _, alike in groupby(sorted(work, key=_order), key=_order):
            _update(list(alike))
        return loss

    @torch.no_grad()
    def denominators(self) -> dict[Tensor, Tensor]:
        """By parameter, what its steps are divided by, for every entry: P of the preconditioner.

        Raises:
            ValueError: before the first step.
        """
        found = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    raise ValueError(
                        "the optimizer has made no step, so its second moments are not there; "
                        "take a step first"
                    )
                work = _Work(p, p, self.state[p], group)
                spread = torch.empty_like(p, memory_format=torch.contiguous_format)
                for region, values in work.divided(spread):
                    region.copy_(values.expand_as(region))
                found[p] = spread
        return found

    def _work(self, group: ParamGroup) -> "list[_Work]":
        """The tensors of a group that have gradients, with their state."""
        found = []
        for p in group["params"]:
            if p.grad is None:
                continue
            self.check_gradient(p)
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
                if group["adapt"]:
                    state["exp_avg_sq"] = _no_moments(p, group)
            found.append(_Work(p, p.grad, state, group))
        return found


# --------------------------------------------------------------------------------------- one step


@dataclass(eq=False)
class _Work:
    """One tensor of a step."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    group: ParamGroup

    @property
    def steps(self) -> int:
        return int(self.state["step"])

    @property
    def has_all(self) -> bool:
        """Whether every entry has a second moment of its own."""
        return _is_elementwise(self.parameter, self.group)

    def mean_squares(self) -> Tensor:
        """(B,) of the gradient's cuts."""
        wide = self.state["exp_avg_sq"].dtype
        found = []
        for cut in self.group["cuts"]:
            region = _region(self.gradient.contiguous(), cut)
            axes = [axis for axis in range(region.ndim) if axis not in cut["axes"]]
            if axes:
                norms = torch.linalg.vector_norm(region, dim=axes, dtype=wide)
                mean = norms.square() / math.prod(region.shape[axis] for axis in axes)
            else:
                mean = region.to(wide).square()
            found.append(mean.permute(_in_order(cut["axes"])).flatten())
        return torch.cat(found)

    def denominator(self) -> Tensor:
        """sqrt(v) over its correction, plus eps; (B,) or the tensor's shape."""
        if not self.group["adapt"]:
            return self.parameter.new_ones(1)
        root = self.state["exp_avg_sq"].sqrt()
        if self.group["frozen_after"] is None:
            root.div_(math.sqrt(1 - self.group["betas"][1] ** self.steps))
        return root.add_(self.group["eps"]).to(self.parameter.dtype)

    def divided(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the regions of ``tensor``, each with denominators that it can be divided by."""
        if self.has_all or not self.group["adapt"]:
            return iter([(tensor, self.denominator())])
        return by_blocks(tensor, self.denominator(), self.group)


def _update(work: list[_Work]) -> None:
    """A step of tensors whose groups are alike."""
    group = work[0].group
    beta1, _ = group["betas"]
    means = _states(work, "exp_avg")
    torch._foreach_add_(_states(work, "step"), 1)
    torch._foreach_lerp_(means, [w.gradient for w in work], 1 - beta1)
    single, blocks = _apart(work)
    if group["adapt"]:
        _follow(single, blocks)
    if work[0].steps <= group["held_until"]:
        return
    parameters = [w.parameter for w in work]
    lr = float(group["lr"])
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
    rate = lr / (1 - beta1 ** work[0].steps)
    if not group["adapt"]:
        torch._foreach_add_(parameters, means, alpha=-rate)
        return
    _move_entries(single, rate)
    for w in blocks:
        _move_blocks(w, rate)


def _apart(work: list[_Work]) -> tuple[list[_Work], list[_Work]]:
    """Tensors of which every entry is a block, and the others."""
    return [w for w in work if w.has_all], [w for w in work if not w.has_all]


def _states(work: list[_Work], key: str) -> list[Tensor]:
    return [w.state[key] for w in work]


def _move_entries(work: list[_Work], rate: float) -> None:
    """Tensors of which every entry is a block, all at once."""
    if not work:
        return
    denominators = [w.denominator() for w in work]
    moved = [w.parameter for w in work]
    torch._foreach_addcdiv_(moved, _states(work, "exp_avg"), denominators, value=-rate)


def _move_blocks(work: _Work, rate: float) -> None:
    """A tensor of larger blocks: each cut's region by its own denominators."""
    means = [region for region, _ in work.divided(work.state["exp_avg"])]
    for (region, values), mean in zip(work.divided(work.parameter), means, strict=True):
        region.addcdiv_(mean, values, value=-rate)


def _follow(single: list[_Work], blocks: list[_Work]) -> None:
    """The second moments, after this step's gradients."""
    first = [*single, *blocks][0]
    after = first.group["frozen_after"]
    if after is not None and first.steps > after:
        return
    # an average of all steps so far is a step of 1 / t towards the new one
    towards = 1 - first.group["betas"][1] if after is None else 1 / first.steps
    if single:
        moments = _states(single, "exp_avg_sq")
        gradients = [w.gradient.to(w.state["exp_avg_sq"].dtype) for w in single]
        torch._foreach_mul_(moments, 1 - towards)
        torch._foreach_addcmul_(moments, gradients, gradients, value=towards)
    if blocks:
        torch._foreach_lerp_(_states(blocks, "exp_avg_sq"), _mean_squares(blocks), towards)


def _mean_squares(work: list[_Work]) -> list[Tensor]:
    """(B,) of each tensor; a block of several whole tensors has one number for all of them."""
    whole = [w for w in work if not w.group["cuts"]]
    wide = [w.gradient.to(w.state["exp_avg_sq"].dtype) for w in whole]
    norms = torch._foreach_norm(wide) if whole else []
    squares: dict[int, list[Tensor]] = defaultdict(list)
    counts: Counter[int] = Counter()
    for w, norm in zip(whole, norms, strict=True):
        squares[id(w.group)].append(norm.square())
        counts[id(w.group)] += w.gradient.numel()
    found = []
    for w in work:
        if w.group["cuts"]:
            found.append(w.mean_squares())
            continue
        block = id(w.group)
        mean = torch.stack(squares[block]).sum() / counts[block]
        found.append(mean.reshape(1).to(w.state["exp_avg_sq"].dtype))
    return found


def _no_moments(p: Tensor, group: ParamGroup) -> Tensor:
    """Zeros, as many as there are blocks; float32 at least."""
    wide = torch.promote_types(p.dtype, torch.float32)
    if _is_elementwise(p, group):
        return torch.zeros_like(p, dtype=wide, memory_format=torch.contiguous_format)
    return p.new_zeros(sum(map(_count, group["cuts"])) or 1, dtype=wide)


# ----------------------------------------------------------------------------------------- blocks


def _is_elementwise(p: Tensor, group: ParamGroup) -> bool:
    """Whether every entry of ``p`` is a block."""
    if group.get("block") == _NO_BLOCK:
        return True
    return bool(group["cuts"]) and sum(map(_count, group["cuts"])) == p.numel()


def by_blocks(
    tensor: Tensor,
    values: Tensor,
    group: ParamGroup,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the regions that a group cuts ``tensor`` into, each with its blocks' ``values``.

    The values (B,) come in the order of the cuts, and go in shapes that broadcast to the regions.
    """
    cuts = group["cuts"]
    if not cuts:
        yield tensor, values
        return
    for cut, some in zip(cuts, values.split([_count(cut) for cut in cuts]), strict=True):
        region = _region(tensor, cut)
        yield region, _beside(some, region.shape, cut["axes"])


def _count(cut: Mapping[str, Any]) -> int:  # numbers and tuples of them
    return int(cut["num_blocks"])


def _region(tensor: Tensor, cut: Mapping[str, Any]) -> Tensor:
    """The part of a tensor that a cut is about, a view with the cut's axes."""
    index = [slice(start, stop) for start, stop in cut["index"]]
    if cut.get("window") is not None:
        (axis,) = cut["axes"]
        first, last = cut["window"]
        start = index[axis].start
        index[axis] = slice(start + first, start + last)
    return tensor.view(tuple(cut["view"]))[tuple(index)]


def _in_order(axes: Sequence[int]) -> list[int]:
    """How the axes that are left, in their own order, come into the order of ``axes``."""
    ordered = sorted(axes)
    return [ordered.index(axis) for axis in axes]


def _beside(values: Tensor, shape: torch.Size, axes: Sequence[int]) -> Tensor:
    """(B,) values in the order of ``axes``, as a tensor that broadcasts to ``shape``."""
    grid = values.reshape([shape[axis] for axis in axes])
    ordered = sorted(range(len(axes)), key=lambda place: axes[place])
    sizes = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    return grid.permute(ordered).reshape(sizes)


def _groups(
    params: nn.Module | Iterable[ParamGroup],
    partition: Partition | None,
) -> list[ParamGroup]:
    if isinstance(params, nn.Module) and partition is not None:
        return param_groups(params, partition)
    if isinstance(params, nn.Module):
        raise ValueError(
            "a model comes with the partition of its parameters: BlockwiseAdam(model, "
            "ht.partition(model, 'adam_mini')), for one"
        )
    if partition is not None:
        raise ValueError(
            "partition is that of a model; pass BlockwiseAdam(model, partition), or the groups of "
            "ht.param_groups(model, partition) alone"
        )
    return list(params)


def _order(work: _Work) -> tuple[str, str, str, int]:
    """What tells apart tensors that cannot go through together."""
    settings = repr([work.group[key] for key in _ALIKE])
    return settings, str(work.parameter.device), str(work.parameter.dtype), work.steps


def _check(group: ParamGroup) -> None:
    """Raises ValueError for a number out of range."""
    lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
    if not (float(lr) >= 0 and eps >= 0 and decay >= 0):
        raise ValueError(
            f"lr is {lr}, eps {eps} and weight_decay {decay}; none of them may be negative"
        )
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas is {group['betas']}; both must lie in [0, 1)")
    after = group["frozen_after"]
    if after is not None and (int(after) != after or after < 1):
        raise ValueError(f"frozen_after is {after!r}; a number of steps from 1, or None, is needed")


def _check_says_blocks(group: ParamGroup) -> None:
    """Raises ValueError for a group as torch's optimizers take it, without blocks."""
    if "cuts" not in group:
        raise ValueError(
            "a group of parameters does not say what its blocks are; pass BlockwiseAdam(model, "
            "partition), or groups of ht.param_groups(model, partition). A group of your own is "
            "one block of all its tensors with 'cuts': [], and Adam's with 'block': '(no block)' "
            "as well"
        )


def _check_is_whole(group: ParamGroup) -> None:
    """Raises ValueError where other processes have some of the tensors that make up the block."""
    names = group.get("names", [])
    held = len(group["params"])
    is_one_block = not group["cuts"] and group.get("block") != _NO_BLOCK
    if is_one_block and len(names) > 1 and held < len(names):
        raise ValueError(
            f"the block {group.get('block')!r} has {len(names)} tensors, and this process {held} "
            "of them, so it cannot average over the block; share out tensors among processes "
            "(ZeroRedundancyOptimizer) only where no block joins several, as in 'adam_mini'"
        )


def _check_cuts(p: Tensor, group: ParamGroup) -> None:
    """Raises ValueError for cuts that the tensor cannot be updated by."""
    cuts = group["cuts"]
    if cuts and not p.is_contiguous():
        raise ValueError(
            f"the parameter of {group.get('block')} is not contiguous, so its blocks are no views "
            "of it; make it so: parameter.data = parameter.data.contiguous()"
        )
    if any(cut.get("window") is not None and len(cut["axes"]) > 1 for cut in cuts):
        raise ValueError(
            f"{group.get('block')} is a run of blocks along several axes; pass the whole cut"
        )
    if cuts and hasattr(p, "to_local"):
        _check_shards(p, group)
    covered = sum(_region(p.detach(), cut).numel() for cut in cuts)
    if cuts and covered != p.numel():
        raise ValueError(
            f"the cuts of {group.get('block')} hold {covered:,} of {p.numel():,} entries; an "
            "optimizer has to move all of them"
        )


def _check_shards(p: Tensor, group: ParamGroup) -> None:
    """Raises ValueError for a DTensor whose cuts are copies: torch gathers it to cut its shards."""
    try:
        regions = [_region(p.detach(), cut) for cut in group["cuts"]]
    except RuntimeError:  # shards of uneven length
        regions = []
    # to_local and placements are a DTensor's
    here = _shards(p)
    if not regions or any(_shards(region) != here for region in regions):
        raise ValueError(
            f"the parameter of {group.get('block')} is sharded across processes where its blocks "
            "are cut, so they are no views of it; take a partition that leaves it whole, or "
            "DistributedDataParallel in place of FSDP"
        )


def _shards(tensor: Any) -> tuple[int, list[bool]]:  # a DTensor, which not every torch has
    """The memory here, and along which axes of the device mesh a DTensor is sharded."""
    memory = tensor.to_local().untyped_storage().data_ptr()
    return memory, [placement.is_shard() for placement in tensor.placements]
