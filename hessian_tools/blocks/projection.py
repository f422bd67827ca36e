"""How the features of a tensor divide into roles (query, key, value, output) and heads.

Letters: H heads, G groups of key/value heads, h head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise

from torch import nn

ROLES = ("q", "k", "v", "o")
# What the axes of the full view (groups, roles, units, features of a unit) enumerate, by what the
# features are cut by: "" is by role alone.
_ENUMERATED = {"": (1,), "head": (1, 0, 2), "row": (1, 0, 2, 3)}


@dataclass(frozen=True)
class Region:
    """A cut of one axis of features: ``view`` splits the axis, ``index`` picks from it."""

    view: tuple[int, ...]
    index: tuple[slice, ...]  # one a view axis
    axes: tuple[int, ...]  # of the view; they enumerate blocks
    labels: tuple[str, ...] = ("",)  # where there are several, the first of ``axes`` runs over them


@dataclass(frozen=True)
class _Span:
    """Roles that lie side by side, as a box in the view (groups, roles, units, unit)."""

    roles: slice
    units: slice
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Projection:
    """The feature axis of one tensor: G groups, in each every role's heads side by side."""

    roles: tuple[str, ...]  # of ROLES
    sizes: tuple[int, ...]  # features of each role, over all groups
    head_size: int = 0  # 0 unless every role is known to consist of whole heads
    groups: int = 1  # more only where head_size is known

    def regions(self, by: str, chosen: Sequence[str]) -> Iterator[Region]:
        """Cuts of the ``chosen`` roles.

        ``by``: "" by role alone; "head" by role and head, if ``head_size`` is known; "row" by role
        and feature. Neighbouring roles are cut together if all roles are of equal size.
        """
        unit = self.head_size if by == "head" or self.groups > 1 else 1
        counts = [size // (self.groups * unit) for size in self.sizes]  # units of a role in a group
        positions = [self.roles.index(role) for role in chosen]
        if len(set(counts)) == 1:
            view = (self.groups, len(counts), counts[0], unit)
            spans = self._equal_spans(positions, counts[0])
        else:
            view = (self.groups, 1, sum(counts), unit)
            spans = self._unequal_spans(positions, counts)
        # axes of one place would only make the same cut look like another
        kept = [size > 1 for size in view]
        axes = tuple(sum(kept[:axis]) for axis in _ENUMERATED[by] if kept[axis])
        for span in spans:
            index = (slice(0, view[0]), span.roles, span.units, slice(0, view[3]))
            labels = span.labels if len(self.roles) > 1 else ("",)
            yield Region(tuple(compress(view, kept)), tuple(compress(index, kept)), axes, labels)

    def heads(self) -> Region:
        """Every head of every role in the order in which they lie, if ``head_size`` is known.

        Named by role and head if there are several roles.
        """
        view = (sum(self.sizes) // self.head_size, self.head_size)
        in_group = [size // (self.groups * self.head_size) for size in self.sizes]
        labels = tuple(
            f"{role},head={group * count + head}"
            for group in range(self.groups)
            for role, count in zip(self.roles, in_group, strict=True)
            for head in range(count)
        )
        return Region(view, whole(view), (0,), labels if len(self.roles) > 1 else ("",))

    def _equal_spans(self, positions: Sequence[int], count: int) -> list[_Span]:
        """Runs of neighbouring roles, all of ``count`` units."""
        starts = [i for i, (last, first) in enumerate(pairwise(positions), 1) if first != last + 1]
        runs = [positions[a:b] for a, b in pairwise([0, *starts, len(positions)])]
        return [
            _Span(
                slice(run[0], run[-1] + 1),
                slice(0, count),
                tuple(self.roles[position] for position in run),
            )
            for run in runs
        ]

    def _unequal_spans(self, positions: Sequence[int], counts: Sequence[int]) -> list[_Span]:
        """Each role by itself."""
        stops = list(accumulate(counts))
        return [
            _Span(slice(0, 1), slice(stops[i] - counts[i], stops[i]), (self.roles[i],))
            for i in positions
        ]


def whole(view: tuple[int, ...]) -> tuple[slice, ...]:
    """The index that picks everything of ``view``."""
    return tuple(slice(0, size) for size in view)


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` is the (in, out) linear layer of HF GPT-2.

    It is known by its class's name, without an import of transformers.
    """
    return hasattr(module, "nf") and any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def linear_features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of an ``nn.Linear`` or a transposed ``Conv1D``; (0, 0) of anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_transposed(module):
        rows, columns = module.get_parameter("weight").shape
        return rows, columns
    return 0, 0
