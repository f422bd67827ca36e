"""How the features of a tensor divide into roles (query, key, value, output) and heads.

Where nothing tells, the user does: :func:`heads`.

Letters: H heads, G groups of key/value heads, h head size.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress

from torch import nn

# Gates act on the attention's result at their own position; "" has heads, but none of these roles.
ROLES = ("q", "k", "v", "o", "gate", "")
# Which axes of the view (groups, roles, units, features of a unit) enumerate blocks, by what the
# features are cut by; "" is by role alone. Roles come first, as in the names of blocks.
_ENUMERATED = {
    "": (1,),
    "head": (1, 0, 2),
    "row": (1, 0, 2, 3),
}


@dataclass(frozen=True)
class Region:
    """A cut of one axis of features: ``view`` splits the axis, ``index`` picks from it."""

    view: tuple[int, ...]
    index: tuple[slice, ...]  # one a view axis
    axes: tuple[int, ...]  # of the view; they enumerate blocks
    labels: tuple[str, ...] = ("",)  # where there are several, the first of ``axes`` runs over them


@dataclass(frozen=True)
class _Span:
    """Roles that lie side by side, as a box in the view (groups, roles, units, features)."""

    roles: slice
    units: slice
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Projection:
    """The feature axis of one tensor: G groups in a row, each with the heads of every role."""

    roles: tuple[str, ...]  # of ROLES
    sizes: tuple[int, ...]  # features of each role, over all groups
    # Features of a head of each role; () unless every role is known to consist of whole heads.
    head_sizes: tuple[int, ...] = ()
    groups: int = 1  # more only where head sizes are known
    axis: int | None = None  # of the tensor; None: where its module has outputs (inputs of "o")

    @property
    def is_fused(self) -> bool:
        """Whether one tensor holds several roles."""
        return len(self.roles) > 1

    @property
    def head_size(self) -> int:
        """h, if that is known and the same for all roles; else 0."""
        sizes = set(self.head_sizes)
        return sizes.pop() if len(sizes) == 1 else 0

    @property
    def is_box(self) -> bool:
        """Whether the heads of each role are a box in some view of the axis, as cuts need it."""
        if self.head_size:
            return True
        period = sum(self.sizes) // self.groups
        for first, last, size in self._heads_in_a_group():
            is_single = last - first == size
            if not is_single and (first % size or period % size):
                return False
        return True

    def regions(self, by: str, chosen: Sequence[str]) -> Iterator[Region]:
        """Cuts of the ``chosen`` roles.

        ``by``: "" by role alone; "head" by role and head, if their sizes are known; "row" by role
        and feature. Neighbouring roles are cut together if all roles are of equal size.
        """
        if by == "head" and not self.head_size:
            yield from self._unequal_heads(chosen)
            return
        unit = self._unit(by)
        counts = self._per_group(unit)
        positions = [self.roles.index(role) for role in chosen]
        if len(set(counts)) == 1:
            view = (self.groups, len(counts), counts[0], unit)
            spans = self._equal_spans(positions, counts[0])
        else:
            view = (self.groups, 1, sum(counts), unit)
            spans = self._unequal_spans(positions, counts)
        # Axes of one place would only make the same cut look like another.
        kept = [size > 1 for size in view]
        axes = tuple(sum(kept[:axis]) for axis in _ENUMERATED[by] if kept[axis])
        for span in spans:
            index = (slice(0, self.groups), span.roles, span.units, slice(0, unit))
            yield Region(
                view=tuple(compress(view, kept)),
                index=tuple(compress(index, kept)),
                axes=axes,
                labels=span.labels if self.is_fused else ("",),
            )

    def _unit(self, by: str) -> int:
        """How many features lie together, whatever they are cut by."""
        # In several groups a role's features are no single run: heads are what groups consist of.
        is_by_head = by == "head" or self.groups > 1
        return self.head_size if is_by_head and self.head_size else 1

    def heads(self) -> Region:
        """Every head of every role in the order in which they lie, if there is a ``head_size``.

        Named by role and head if there are several roles.
        """
        view = (sum(self.sizes) // self.head_size, self.head_size)
        labels = self._head_labels() if self.is_fused else ("",)
        return Region(view, whole(view), (0,), labels)

    def _head_labels(self) -> tuple[str, ...]:
        counts = self._per_group(self.head_size)
        labels = []
        for group in range(self.groups):
            for role, count in zip(self.roles, counts, strict=True):
                first = group * count
                labels += [f"{role},head={first + head}" for head in range(count)]
        return tuple(labels)

    def _heads_in_a_group(self) -> Iterator[tuple[int, int, int]]:
        """(first feature, last feature + 1, head size) of each role in the first group."""
        stops = list(accumulate(self._per_group(1)))
        yield from zip([0, *stops], stops, self.head_sizes, strict=False)

    def _unequal_heads(self, chosen: Sequence[str]) -> Iterator[Region]:
        """The heads of each of the ``chosen`` roles, whose heads are of different sizes."""
        period = sum(self.sizes) // self.groups
        groups = slice(0, self.groups)
        for role, inside in zip(self.roles, self._heads_in_a_group(), strict=True):
            if role not in chosen:
                continue
            first, last, size = inside
            if last - first == size:  # one head a group, which may begin anywhere
                index = (groups, slice(first, last))
                yield Region((self.groups, period), index, (0,), (role,))
                continue
            units = slice(first // size, last // size)
            view = (self.groups, period // size, size)
            yield Region(view, (groups, units, slice(0, size)), (0, 1), (role,))

    def _per_group(self, unit: int) -> list[int]:
        """How many units of so many features each role has in a group."""
        return [size // (self.groups * unit) for size in self.sizes]

    def _equal_spans(self, positions: Sequence[int], count: int) -> list[_Span]:
        """Runs of neighbouring roles, all of ``count`` units."""
        runs: list[list[int]] = []
        for position in positions:
            if runs and position == runs[-1][-1] + 1:
                runs[-1].append(position)
            else:
                runs.append([position])
        spans = []
        for run in runs:
            roles = slice(run[0], run[-1] + 1)
            spans.append(_Span(roles, slice(0, count), self.roles[roles]))
        return spans

    def _unequal_spans(self, positions: Sequence[int], counts: Sequence[int]) -> list[_Span]:
        """Each role by itself: its units lie between others' on one axis."""
        stops = list(accumulate(counts))
        spans = []
        for position in positions:
            stop = stops[position]
            units = slice(stop - counts[position], stop)
            spans.append(_Span(slice(0, 1), units, (self.roles[position],)))
        return spans


def whole(view: tuple[int, ...]) -> tuple[slice, ...]:
    """The index that picks everything of ``view``."""
    return tuple(slice(0, size) for size in view)


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` is the (in, out) linear layer of HF GPT-2.

    It is known by its class's name, without an import of transformers.
    """
    bases = {base.__name__ for base in type(module).__mro__}
    return "Conv1D" in bases and hasattr(module, "nf")


def linear_features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of an ``nn.Linear`` or a transposed ``Conv1D``; (0, 0) of anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_transposed(module):
        rows, columns = module.get_parameter("weight").shape
        return rows, columns
    return 0, 0


@dataclass(frozen=True)
class Heads:
    """How a user states the heads of a tensor: see :func:`heads`, which checks it."""

    count: int
    axis: int = 0
    fused: str = ""
    kv_count: int = 0  # 0: as many as of query
    groups: int = 1
    sizes: tuple[int, ...] = ()

    def projection(self, name: str, shape: tuple[int, ...]) -> Projection:
        """The statement as it holds for one tensor.

        Raises:
            ValueError: the tensor has no such axis, or the heads do not fill it.
        """
        rank = len(shape)
        if not -rank <= self.axis < rank:
            raise ValueError(
                f"{self} is stated for {name} of shape {shape}, which has no axis {self.axis}; "
                f"{_axes_of(rank)}"
            )
        axis = self.axis % rank
        counts = self._counts()
        sizes = self.sizes or self._equal_sizes(name, shape, axis)
        features = [count * size for count, size in zip(counts, sizes, strict=True)]
        if sum(features) != shape[axis]:
            parts = " + ".join(f"{n} x {h}" for n, h in zip(counts, sizes, strict=True))
            raise ValueError(
                f"{self} is stated for {name} of shape {shape}, whose axis {axis} has "
                f"{shape[axis]} places; its heads fill {parts} = {sum(features)}"
            )
        roles = tuple(self.fused) or ("",)
        projection = Projection(roles, tuple(features), tuple(sizes), self.groups, axis)
        if not projection.is_box:
            raise ValueError(
                f"{self} is stated for {name}: heads of different sizes, several of a role beside "
                "each other, must begin at multiples of their size; name such blocks by slices"
            )
        return projection

    def _counts(self) -> tuple[int, ...]:
        """Heads of each role."""
        of_keys = self.kv_count or self.count
        return tuple(self.count if role == "q" else of_keys for role in self.fused or "q")

    def _equal_sizes(self, name: str, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        counts = self._counts()
        size, rest = divmod(shape[axis], sum(counts))
        if rest or not size:
            total = " + ".join(str(count) for count in counts)
            heads_of_all = total if len(counts) == 1 else f"{total} = {sum(counts)}"
            raise ValueError(
                f"{self} is stated for {name} of shape {shape}, whose axis {axis} has "
                f"{shape[axis]} places, which {heads_of_all} heads do not divide"
            )
        return (size,) * len(counts)

    def __str__(self) -> str:
        given = [str(self.count)]
        if self.axis:
            given.append(f"axis={self.axis}")
        if self.fused:
            given.append(f"fused={self.fused}")
        if self.kv_count:
            given.append(f"kv_count={self.kv_count}")
        if self.groups != 1:
            given.append(f"groups={self.groups}")
        if self.sizes:
            given.append("sizes=" + "+".join(str(size) for size in self.sizes))
        return f"heads({', '.join(given)})"


def heads(
    count: int,
    axis: int = 0,
    *,
    fused: str = "",
    kv_count: int = 0,
    groups: int = 1,
    sizes: Sequence[int] = (),
) -> Heads:
    """States that ``count`` heads lie along one axis of a tensor, for the specs of `partition`.

    ``{"*.q_proj.weight": heads(8)}`` gives blocks ``...q_proj.weight[head=0]`` to ``[head=7]``,
    each a run of equally many rows. A tensor that cannot be cut so is an error, never left whole.

    Args:
        count: heads (of the query in a fused tensor).
        axis: of the tensor as it is stored, negative from the end. Linear layers have outputs on
            axis 0; an output projection is cut along its inputs, axis 1; HF GPT-2's Conv1D the
            other way round.
        fused: the roles that share the axis, in their order: "qkv", "kv", "qvk" (CodeGen) ... Their
            heads are blocks of their own, named ``[q,head=0]``.
        kv_count: heads of key and of value, if fewer than ``count`` (grouped queries).
        groups: how often the order of roles repeats. 1: all of q, then all of k (timm, GPT-2);
            ``count``: q, k and v of each head together (GPT-NeoX); ``kv_count``: the queries of
            each key together (Falcon); 4 in CodeGen.
        sizes: features of a head of each role, where they differ (DeepSeek's kv_b_proj:
            ``heads(16, fused="kv", groups=16, sizes=(128, 64))``).

    Raises:
        ValueError: numbers below 1 or that do not divide by ``groups``, an unknown role; and, from
            `partition`, a tensor that has no such axis or whose axis the heads do not divide.
    """
    _check_whole("count", count, 1)
    _check_whole("kv_count", kv_count, 0)
    _check_whole("groups", groups, 1)
    if type(axis) is not int:
        raise ValueError(
            f"heads: axis is {axis!r}; the number of one of the tensor's axes is needed"
        )
    is_known = isinstance(fused, str) and set(fused) <= set("qkv")
    if not is_known or len(set(fused)) < len(fused):
        raise ValueError(
            f"heads: fused is {fused!r}; the letters q, k and v in their order are needed, each at "
            "most once"
        )
    if not fused and (kv_count or groups != 1):
        raise ValueError("heads: kv_count and groups are of fused tensors; state fused='qkv'")
    stated = Heads(count, axis, fused, kv_count, groups, tuple(sizes))
    _check_parts(stated)
    return stated


def _check_whole(name: str, number: int, least: int) -> None:
    if type(number) is not int or number < least:
        raise ValueError(
            f"heads: {name} is {number!r}; a whole number of at least {least} is needed"
        )


def _check_parts(stated: Heads) -> None:
    """Raises ValueError unless groups divide the heads and there is a size for each role."""
    for count in stated._counts():
        if count % stated.groups:
            raise ValueError(f"{stated}: {count} heads do not divide into {stated.groups} groups")
    if not stated.sizes:
        return
    for size in stated.sizes:
        _check_whole("sizes", size, 1)
    if len(stated.sizes) != len(stated.fused or "q"):
        raise ValueError(
            f"{stated}: one size for each of the roles {stated.fused or 'q'!r} is needed"
        )


def parse_heads(text: str) -> Heads:
    """The statement in words of the command line: "heads(12, fused=qkv)", with or without "heads".

    Raises:
        ValueError: any other text, or what :func:`heads` refuses.
    """
    found = re.fullmatch(r"heads\((.*)\)", text.strip())
    count, *options = (found[1] if found else text).split(",")
    given: dict[str, int] = {}
    fused = ""
    sizes: tuple[int, ...] = ()
    for option in options:
        key, _, value = (piece.strip() for piece in option.partition("="))
        if key == "fused":
            fused = value
        elif key == "sizes":
            sizes = tuple(_number(size, text) for size in value.split("+"))
        elif key in ("axis", "kv_count", "groups"):
            given[key] = _number(value, text)
        else:
            raise _unreadable(text)
    return heads(_number(count.strip(), text), fused=fused, sizes=sizes, **given)


def _number(word: str, text: str) -> int:
    if not re.fullmatch(r"-?\d+", word):
        raise _unreadable(text)
    return int(word)


def _unreadable(text: str) -> ValueError:
    return ValueError(
        f"{text!r} states no heads; write 'heads(8)', if need be with axis=1, fused=qkv, "
        "kv_count=2, groups=8 or sizes=128+64 after a comma"
    )


def _axes_of(rank: int) -> str:
    if not rank:
        return "it has none"
    return f"it has axis 0 to {rank - 1}" if rank > 1 else "it has axis 0 alone"
