"""How the features of a tensor divide into roles (query, key, value, output) and heads.

Letters: H heads, G groups of key/value heads, h head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress

from torch import nn

ROLES = ("q", "k", "v", "o")
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
    head_size: int = 0  # 0 unless every role is known to consist of whole heads
    groups: int = 1  # more only where head_size is known

    @property
    def is_fused(self) -> bool:
        """Whether one tensor holds several roles."""
        return len(self.roles) > 1

    def regions(self, by: str, chosen: Sequence[str]) -> Iterator[Region]:
        """Cuts of the ``chosen`` roles.

        ``by``: "" by role alone; "head" by role and head, if ``head_size`` is known; "row" by role
        and feature. Neighbouring roles are cut together if all roles are of equal size.
        """
        # In several groups a role's features are no single run: heads are what groups consist of.
        unit = self.head_size if by == "head" or self.groups > 1 else 1
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

    def heads(self) -> Region:
        """Every head of every role in the order in which they lie, if ``head_size`` is known.

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
