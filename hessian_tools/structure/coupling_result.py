"""The result of :func:`hessian_tools.structure.coupling.coupling`: what follows from its columns.

Letters: B blocks, k probes, D columns (draws of blocks), S different blocks among them, G groups
(the tensors, or sets of tensors, that blocks lie in).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hessian_tools.results import registered
from hessian_tools.shown import Drawable
from hessian_tools.spectra.quadrature import Estimate

PLACES = ("block", "tensor", "layer", "across")

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@registered
@dataclass(frozen=True, eq=False)
class Coupling(Drawable):
    """Squared norms |H_ij|_F^2 between the blocks of a partition, and the matrix's mass by place.

    The matrix, a Hessian unless ``curvature`` says otherwise, is that over the partition's entries:
    what the partition leaves out counts nowhere.
    Errors are standard errors. Over a tensor whose blocks are all taken they are across the k
    probes of a column (nan for k = 1); over one whose blocks are drawn, across its draws (nan for a
    single draw), which includes what its probes do. Both take the numbers for normal: two errors
    cover what Student's t with k - 1 (or draws - 1) degrees of freedom says, 82 % for 3 and 91 %
    for 8, less where a few draws carry the total. Exact results have errors of 0.
    """

    names: tuple[str, ...]  # (S,) blocks whose columns are known
    groups: tuple[str, ...]  # (G,) tensors ("a + b" for blocks over several)
    layers: tuple[str, ...]  # (G,) the layer of each
    group_of: Integers  # (S,) the group of each block
    num_blocks: Integers  # (G,) blocks of each group in the partition
    columns: Integers  # (D,) the block of each column
    weights: Floats  # (D,) 1 / (draws p_j); 1 where all blocks of a group are taken
    drawn: NDArray[np.bool_]  # (G,) whether a group's blocks were drawn
    squares: Floats = field(repr=False)  # (k, D, S) |H_ij z_j|^2, i last; |H_ij|_F^2 when exact
    by_group: Floats = field(repr=False)  # (k, D, G) the same summed over all blocks i of a group
    exact: bool  # from the dense matrix, in float64
    num_matvecs: int  # products spent
    seed: int
    probes: str  # "rademacher" | "gaussian" | "none" (exact)
    route: str  # how products were computed
    curvature: str = "Hessian"  # which matrix, in words

    @property
    def num_probes(self) -> int:
        """k; 1 when exact."""
        return len(self.squares)

    @cached_property
    def mass(self) -> Floats:
        """(S, S) unbiased estimates of |H_ij|_F^2, the mean of those from columns i and j."""
        return (self._means + self._means.T) / 2

    @cached_property
    def mass_error(self) -> Floats:
        """(S, S) standard errors of ``mass`` across probes."""
        return _symmetric_error(self._probe_variance(lambda squares, block: squares))

    @cached_property
    def normalised(self) -> Floats:
        """(S, S) |H_ij|_F / sqrt(|H_ii|_F |H_jj|_F), 1 on the diagonal.

        It is nan where a diagonal block vanishes.
        """
        return _normalised(self.mass)

    @cached_property
    def normalised_error(self) -> Floats:
        """(S, S) standard errors of ``normalised`` by the delta method; 0 on the diagonal."""
        mass = self.mass
        diagonal = np.diag(mass)

        # The part of d log normalised that column ``block`` gives.
        def relative(squares: Floats, block: int) -> Floats:
            at_block = squares[:, block, None]
            return _ratio(squares, mass[:, block]) / 4 - _ratio(at_block, diagonal[block]) / 4

        error = 2 * self.normalised * _symmetric_error(self._probe_variance(relative))
        if self.exact:
            np.fill_diagonal(error, 0.0)
        else:
            np.fill_diagonal(error, np.where(np.isnan(np.diag(error)), np.nan, 0.0))
        return error

    @cached_property
    def shares(self) -> dict[str, Estimate]:
        """Shares of |H|_F^2 by the places of ``PLACES``; they add up to 1.

        Mass lies inside a "block", else in a "tensor", else in a "layer", or "across" layers. All
        are nan where the Hessian vanishes.
        """
        places = self._places
        whole = places.sum(0)
        total = float((self.weights * places.mean(1).sum(0)).sum())
        every = range(len(self.groups))
        return {
            place: self._share(part, whole, total, self.weights, every)
            for place, part in zip(PLACES, places, strict=True)
        }

    @cached_property
    def tensor_shares(self) -> dict[str, Estimate]:
        """By group, the share of the mass between its own entries that lies inside blocks.

        It is nan where that mass vanishes.
        """
        inside, beside = self._places[:2]
        within = inside + beside
        shares = {}
        for number, name in enumerate(self.groups):
            weights = self.weights * (self._group_of_column == number)
            total = float((weights * within.mean(0)).sum())
            shares[name] = self._share(inside, within, total, weights, [number])
        return shares

    @cached_property
    def tensor_mass(self) -> Floats:
        """(G, G) unbiased estimates of |H|_F^2 between groups, symmetrised."""
        means = self.by_group.mean(0)
        rows = [
            self.weights * (self._group_of_column == group) @ means
            for group in range(len(self.groups))
        ]
        mass = np.stack(rows)
        return (mass + mass.T) / 2

    @cached_property
    def tensor_mass_error(self) -> Floats:
        """(G, G) standard errors of ``tensor_mass``."""
        every = range(len(self.groups))
        variance = [
            [self._total_variance(self.by_group[:, :, other], [group]) for other in every]
            for group in every
        ]
        return _symmetric_error(np.array(variance))

    @property
    def tensor_coupling(self) -> Floats:
        """(G, G) the normalised coupling of groups."""
        return _normalised(self.tensor_mass)

    @property
    def _group_of_column(self) -> Integers:
        """(D,) the group of each column's block."""
        return self.group_of[self.columns]

    @cached_property
    def _means(self) -> Floats:
        """(S, S), column j the mean over all probes of block j."""
        sums = np.zeros((len(self.names), len(self.names)))
        np.add.at(sums, self.columns, self.squares.mean(0))
        return sums.T / np.bincount(self.columns, minlength=len(self.names))

    def _probe_variance(self, function: Callable[[Floats, int], Floats]) -> Floats:
        """(S, S), column j the variance of the mean over block j's probes.

        It is that of ``function`` of the squares (k, S) and of j.
        """
        variance = np.zeros((len(self.names), len(self.names)))
        if self.exact:
            return variance
        for block in range(len(self.names)):
            squares = self.squares[:, self.columns == block].reshape(-1, len(self.names))
            values = function(squares, block)
            variance[:, block] = _variance(values) / len(values)
        return variance

    @cached_property
    def _places(self) -> Floats:
        """(4, k, D) mass of each column by PLACES."""
        every = np.arange(len(self.columns))
        group = self._group_of_column
        layers = np.array(self.layers)
        is_same_layer = layers[group][:, None] == layers  # (D, G)
        is_other_group = np.arange(len(self.groups)) != group[:, None]
        inside = self.squares[:, every, self.columns]
        tensor = self.by_group[:, every, group]
        elsewhere = self.by_group * is_other_group
        layer = (elsewhere * is_same_layer).sum(-1)
        across = (elsewhere * ~is_same_layer).sum(-1)
        return np.stack([inside, tensor - inside, layer, across])

    def _share(
        self,
        part: Floats,
        whole: Floats,
        total: float,
        weights: Floats,
        groups: Iterable[int],
    ) -> Estimate:
        """The weighted total of ``part`` (k, D) over that of ``whole``, which is ``total``."""
        if not total:
            return Estimate(float("nan"), float("nan"))
        share = float((weights * part.mean(0)).sum()) / total
        # The variance of a ratio, linearised at ``share``. Divided first: squares of masses may
        # leave float64's range.
        variance = self._total_variance((part - share * whole) / total, groups)
        return Estimate(share, float(np.sqrt(variance)))

    def _total_variance(self, values: Floats, groups: Iterable[int]) -> float:
        """Variance of the weighted total of ``values`` (k, D) over ``groups``."""
        if self.exact:
            return 0.0
        total = 0.0
        for group in groups:  # which are independent
            of_group = self._group_of_column == group
            columns = values[:, of_group]
            if self.drawn[group]:
                # The total is a sum of independent draws that all estimate the same.
                draws = columns.mean(0) * self.weights[of_group]
                total += float(_variance(draws) * len(draws))
            else:
                total += float((_variance(columns) / len(columns)).sum())
        return total


def _variance(values: Floats) -> Floats:
    """Along the first axis, unbiased; nan for a single row."""
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    return np.asarray(values.var(0, ddof=1))


def _symmetric_error(variance: Floats) -> Floats:
    """Errors of (A + A') / 2 from variances of A, whose columns are independent."""
    error = np.sqrt(variance + variance.T) / 2
    np.fill_diagonal(error, np.sqrt(np.diag(variance)))
    return error


def _normalised(mass: Floats) -> Floats:
    scale = np.diag(mass) ** 0.25
    return _ratio(np.sqrt(mass), np.outer(scale, scale), undefined=np.nan)


def _ratio(a: Floats, b: Floats | np.float64, undefined: float = 0.0) -> Floats:
    """a / b, ``undefined`` where b is 0."""
    out = np.full(np.broadcast_shapes(np.shape(a), np.shape(b)), undefined)
    return np.divide(a, b, out=out, where=np.asarray(b) != 0)
