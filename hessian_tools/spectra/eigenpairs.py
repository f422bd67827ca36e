"""The outermost eigenpairs of an operator: residuals that were computed, no copy overlooked.

Thick-restart Lanczos with full re-orthogonalisation (:mod:`hessian_tools.spectra.krylov`) finds
them from products alone; how large its basis may grow is a question of memory. Two things
are done that the method does not do by itself:

- Residuals r = |A x - t x| come from products with the final vectors. An eigenvalue of A lies
  within r of t (Parlett 1998, theorem 4.5.1).
- Repeated eigenvalues come as often as they are there. Once the wanted pairs have converged, a run
  from a new random vector orthogonal to them looks for eigenvalues beyond the last one
  (:func:`hessian_tools.spectra.krylov.overlooked`). What it finds is added, and another run
  follows, until one finds nothing.

Letters: n size of the operator, k wanted pairs (of each end for "both"), w all wanted pairs.
"""

import math
import warnings
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hessian_tools.curvature.engine.memory import format_bytes
from hessian_tools.curvature.progress import product_bar
from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.curvature.target import (
    Shape,
    by_name,
    names_and_shapes,
    single_operator,
    vector_bytes,
)
from hessian_tools.errors import nonfinite_product
from hessian_tools.problem.problem import Problem
from hessian_tools.results import registered
from hessian_tools.shown import Drawable, Record, Tabular
from hessian_tools.spectra.krylov import (
    Floats,
    Krylov,
    Products,
    Ritz,
    overlooked,
    random_rows,
)
from hessian_tools.spectra.row_arithmetic import dot_table, dots, straighten, subtract, turn_rows

WHICH = ("largest", "smallest", "magnitude", "both")
_FLOOR = 50  # roundings of |A|: no residual is asked to be smaller
_DENSE = 64  # up to this size the dense matrix is cheaper
_ROOM = 6  # rows that a run needs besides the vectors it keeps

Indices = NDArray[np.intp]


@registered
@dataclass(frozen=True, eq=False)
class Eigenpairs(Tabular, Drawable):
    """w eigenvalues with their vectors: w = k, or 2 k for "both".

    "largest": descending; "smallest": ascending; "magnitude": by descending magnitude; "both": the
    k largest, descending, and then the k smallest, ascending.

    An eigenvalue of the operator lies within ``residuals[i]`` of ``values[i]`` (Parlett 1998,
    theorem 4.5.1); how far the vector is from an eigenvector is that over the gap to the next
    eigenvalue.
    """

    values: Floats  # (w,) Rayleigh quotients x'Ax
    residuals: Floats  # (w,) |A x - t x|, from products with the vectors returned
    vectors: NDArray[np.floating]  # (w, n) of length 1, in the operator's dtype
    converged: NDArray[np.bool_]  # (w,) residual <= tolerance * scale
    which: str  # "largest" | "smallest" | "magnitude" | "both"
    tolerance: float  # of residuals, relative to scale; not below what the dtype allows
    scale: float  # the largest |Ritz value| seen
    num_matvecs: int  # all products, one for each row
    check_matvecs: int  # of these, the ones that looked for further eigenvalues
    # "passed": none beyond the last was left out; "unfinished": max_matvecs came first;
    # "none": not asked for; "dense": all eigenvalues were computed
    check: str
    names: tuple[str, ...] = ()  # of the tensors that make up a vector, where they are known
    shapes: tuple[Shape, ...] = ()  # of these tensors

    def records(self) -> list[Record]:
        """A row an eigenvalue."""
        triples = zip(self.values, self.residuals, self.converged, strict=True)
        return [
            {"eigenvalue": float(value), "residual": float(residual), "converged": bool(converged)}
            for value, residual, converged in triples
        ]

    def named(self, index: int) -> dict[str, Tensor]:
        """Vector ``index`` as tensors on the CPU, by the names of the parameters.

        Of a whole curvature operator they have the parameters' shapes. Of one of its blocks they
        are the pieces of the tensors that the block is made of.

        Raises:
            ValueError: for an operator that belongs to no parameters.
            IndexError: for a vector that is not there.
        """
        return by_name(self.vectors[index], self.names, self.shapes)


def top_eigenpairs(
    operator: Problem | SymmetricOperator,
    k: int,
    which: str = "largest",
    *,
    tolerance: float = 1e-6,
    max_matvecs: int | None = None,
    seed: int = 0,
    block_size: int | None = None,
    check: bool = True,
    memory: str | int = "auto",
    progress: bool = True,
) -> Eigenpairs:
    """The k outermost eigenvalues of a symmetric operator of size n, and their vectors.

    Args:
        operator: any symmetric operator, one block (``curvature.block(block)``), or a Problem (its
            Hessian).
        k: pairs; for "both" pairs of each end.
        which: "largest" and "smallest" in the sense of the number line, "magnitude" for the
            largest |eigenvalue|, "both" for both ends.
        tolerance: a pair has converged when its residual is at most this times the largest |Ritz
            value|. Not below 50 roundings of the operator's dtype (6e-6 for float32).
        max_matvecs: products that may be spent in all, each row of a batch counts; None allows
            1000, or 100 for each pair if that is more.
        seed: the only source of randomness.
        block_size: start vectors, whose products come in batches of so many rows; None is 1, which
            takes the fewest products. A batch pays where its products cost little more than one,
            and finds repeated eigenvalues up to its size at once.
        check: whether to look for eigenvalues that were missed, such as further copies of a
            repeated one.
        memory: bytes for vectors, such as "2GiB"; "auto" takes what the operator's own budget
            leaves. A small basis is restarted more often and needs more products.
        progress: a bar on stderr, products done, when that is a terminal.

    Where n is at most 64, or 2 w + 20, the dense matrix is formed by n products and all its
    eigenvalues are computed, in float64.

    Raises:
        TypeError: for anything but an operator or a Problem.
        ValueError: for an argument out of range, or memory too small for the vectors.
        NumericalError: for a product with NaN or inf, naming the first such product by its number.
    Warns:
        RuntimeWarning: when ``max_matvecs`` came first. All pairs are returned as far as they are.
    """
    target = single_operator(operator)
    ends = _Ends(which, k)
    ends.check(target.size)
    _check_tolerance(tolerance)
    block = 1
    if block_size is not None:
        block = _whole_number("block_size", block_size, 1, target.size)
    limit = _limit(max_matvecs, ends.count, block)
    eps = torch.finfo(target.dtype).eps
    tolerance = max(float(tolerance), _FLOOR * eps)
    if target.size <= max(_DENSE, 2 * ends.count + 20):
        return _by_dense_matrix(target, ends, tolerance)
    capacity = _capacity(target, ends.count, block, vector_bytes(target, memory))
    target.expect(min(limit, capacity))
    with target.steady(), torch.no_grad(), product_bar(limit, shown=progress) as bar:
        search = _Search(target, ends, tolerance, limit, seed, bar)
        pairs = search.run(capacity, block, check)
    _warn(pairs, limit)
    return pairs


@dataclass(frozen=True)
class _Ends:
    """Which eigenvalues are wanted, and how many."""

    which: str
    k: int

    @property
    def count(self) -> int:
        """w."""
        return 2 * self.k if self.which == "both" else self.k

    def check(self, size: int) -> None:
        """Raises ValueError for what an operator of ``size`` cannot give."""
        if self.which not in WHICH:
            allowed = ", ".join(map(repr, WHICH))
            raise ValueError(f"which is {self.which!r}; allowed are {allowed}")
        most = size // 2 if self.which == "both" else size
        of_each = " of each end" if self.which == "both" else ""
        if isinstance(self.k, bool) or not isinstance(self.k, Integral) or not 1 <= self.k <= most:
            raise ValueError(
                f"k is {self.k!r}; an operator of size {size} has 1 to {most} pairs{of_each}: "
                "pass a whole number in that range"
            )

    def order(self, values: Floats) -> Indices:
        """Indices of ``values`` from the most wanted to the least.

        For "both" they alternate: the largest, the smallest, the second largest and so on.
        """
        if self.which == "largest":
            return np.argsort(-values, kind="stable")
        if self.which == "smallest":
            return np.argsort(values, kind="stable")
        if self.which == "magnitude":
            return np.argsort(-np.abs(values), kind="stable")
        from_below = np.argsort(values, kind="stable")
        both = np.stack([from_below[::-1], from_below], axis=1).ravel()
        # every index occurs twice by now, and counts where it comes first
        _, first = np.unique(both, return_index=True)
        return both[np.sort(first)]

    def arranged(self, values: Floats) -> Indices:
        """Indices of the w wanted of ``values``, in the order in which they are returned."""
        wanted = self.order(values)[: self.count]
        if self.which == "both":
            return np.concatenate([wanted[::2], wanted[1::2]])
        return wanted

    def limits(self, values: Floats) -> tuple[float, float]:
        """(low, high): an eigenvalue outside would be wanted besides the w best of ``values``."""
        wanted = values[self.arranged(values)]
        if self.which == "largest":
            return -math.inf, float(wanted[-1])
        if self.which == "smallest":
            return float(wanted[-1]), math.inf
        if self.which == "magnitude":
            least = float(np.abs(wanted).min())
            return -least, least
        return float(wanted[-1]), float(wanted[self.k - 1])


class _Search:
    """One call of :func:`top_eigenpairs`: what its stages have in common."""

    def __init__(
        self,
        operator: SymmetricOperator,
        ends: _Ends,
        tolerance: float,
        limit: int,
        seed: int,
        bar: tqdm,
    ) -> None:
        self.operator = operator
        self.ends = ends
        self.tolerance = tolerance
        self.seed = seed
        self.products = Products(operator, bar)
        self.limit = limit

    def run(self, capacity: int, block: int, check: bool) -> Eigenpairs:
        """Search, check, and residuals of what was found."""
        start = random_rows(self.operator, self.seed, "eigenpairs", block)
        rows = start.new_empty(capacity, self.operator.size)
        # the residuals at the end take a product for each pair, and the last step up to a block
        self.limit -= self.ends.count + block - 1
        space = Krylov(self.products, rows, start, (self.seed, "eigenpairs"))
        ritz, is_done = self._converge(space)
        order = self.ends.order(ritz.values)
        wanted = self._with_converged(ritz, order)
        space.restart(ritz, wanted)
        spent = self.products.count
        values, verdict = ritz.values[wanted], "none"
        if check and space.is_whole:
            verdict = "passed"
        elif check:
            verdict = "unfinished"
            if is_done:
                values, verdict = self._checked(rows, values)
        check_matvecs = self.products.count - spent
        self._gather(rows, values)
        return self._result(rows, check_matvecs, verdict)

    @property
    def target(self) -> float:
        """The residual that the search aims at, over the unit of the products.

        It is half of the tolerance, since the estimates of the search leave rounding out.
        """
        return 0.5 * self.tolerance * self.products.scale

    def is_spent(self) -> bool:
        """Whether the products that are left are those for the residuals."""
        return self.products.count >= self.limit

    def _converge(self, space: Krylov) -> tuple[Ritz, bool]:
        """Steps and restarts until the w wanted pairs have converged, or products run out."""
        count = self.ends.count
        every = max(1, len(space.rows) // 32)
        looked = 0
        while True:
            space.step()
            must_look = space.is_full or space.is_whole or self.is_spent()
            if not must_look and self.products.count - looked < every:
                continue
            looked = self.products.count
            ritz = space.ritz()
            wanted = self.ends.order(ritz.values)[:count]
            is_small = ritz.residuals[wanted] <= self.target
            if space.is_whole or (len(wanted) == count and is_small.all()):
                return ritz, True
            if self.is_spent():
                return ritz, False
            if space.is_full:
                space.restart(ritz, self._kept(space, ritz))

    def _kept(self, space: Krylov, ritz: Ritz) -> Indices:
        """The Ritz vectors to go on with: the wanted, and half of the room for others."""
        count = self.ends.count
        most = len(space.rows) - space.locked - 2 * space.pending
        kept = min(count + (most - count) // 2, most - 1, len(ritz.values) - 1)
        return self.ends.order(ritz.values)[: max(kept, 1)]

    def _with_converged(self, ritz: Ritz, order: Indices) -> Indices:
        """The wanted pairs, and those after them that have converged as well.

        The check has these out of its way. None that has not converged may be among them: it can
        hold a part of the very vector that is looked for.
        """
        count = self.ends.count
        further = order[count:]
        converged = further[ritz.residuals[further] <= self.target]
        return np.concatenate([order[:count], converged])

    def _checked(self, rows: Tensor, values: Floats) -> tuple[Floats, str]:
        """Values of the first rows with those that were missed, and how the check ended."""
        round_number = 0
        while not self.is_spent():
            values = self._with_room(rows, values)
            name = f"eigenpairs check {round_number}"
            round_number += 1
            start = random_rows(self.operator, self.seed, name, 1)
            space = Krylov(self.products, rows, start, (self.seed, name), locked=len(values))
            low, high = self.ends.limits(values)
            found, is_settled = overlooked(
                space,
                low - self.target,
                high + self.target,
                tolerance=self.target,
                is_spent=self.is_spent,
            )
            values = np.concatenate([values, found])
            if is_settled and not len(found):
                return values, "passed"
        return values, "unfinished"

    def _with_room(self, rows: Tensor, values: Floats) -> Floats:
        """``values`` without those that are not wanted where their rows are needed."""
        if len(values) + 2 * _ROOM <= len(rows) or len(values) == self.ends.count:
            return values
        return self._gather(rows, values)

    def _gather(self, rows: Tensor, values: Floats) -> Floats:
        """Makes the wanted rows the first ones, of ``values``; gives theirs."""
        best = self.ends.arranged(values)
        picked = np.eye(len(values))[:, best]
        turn_rows(rows[: len(values)], picked)
        return values[best]

    def _result(self, rows: Tensor, check_matvecs: int, verdict: str) -> Eigenpairs:
        """From the first w ``rows``; the next w are written over."""
        values, residuals = self._refined(rows)
        scale = max(self.products.scale, float(np.abs(values).max()))
        unit = self.products.unit
        order = self.ends.arranged(values)
        names, shapes = names_and_shapes(self.operator)
        vectors = rows[: self.ends.count].cpu().numpy()
        return Eigenpairs(
            values=unit * values[order],
            residuals=unit * residuals[order],
            vectors=vectors[order],
            converged=residuals[order] <= self.tolerance * scale,
            which=self.ends.which,
            tolerance=self.tolerance,
            scale=unit * scale,
            num_matvecs=self.products.count,
            check_matvecs=check_matvecs,
            check=verdict,
            names=names,
            shapes=shapes,
        )

    def _refined(self, rows: Tensor) -> tuple[Floats, Floats]:
        """Makes the first w of ``rows`` the Ritz vectors of their span: values and true residuals.

        The products with them are taken here. Vectors that were found one after the other were not
        yet diagonalised together.
        """
        count = self.ends.count
        vectors, products = rows[:count], rows[count : 2 * count]
        straighten(vectors)
        for first in range(0, count, _ROOM):
            some = slice(first, first + _ROOM)
            products[some] = self.products(vectors[some])
        projected = dot_table(vectors, products).cpu().numpy()
        _, turn = np.linalg.eigh((projected + projected.T) / 2)
        turn_rows(vectors, turn)
        turn_rows(products, turn)
        values = dots(vectors, products) / dots(vectors, vectors)
        subtract(products, values, vectors)
        residuals = dots(products, products).sqrt()
        return values.cpu().numpy(), residuals.cpu().numpy()


def _by_dense_matrix(operator: SymmetricOperator, ends: _Ends, tolerance: float) -> Eigenpairs:
    """All eigenvalues of the dense matrix; the wanted ones."""
    matrix = operator.to_dense().detach().double().cpu().numpy()
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise nonfinite_product("", f"in product {finite.argmin() + 1}")
    values, columns = np.linalg.eigh((matrix + matrix.T) / 2)
    order = ends.arranged(values)
    vectors = columns.T[order]
    residuals = np.linalg.norm(vectors @ matrix - values[order, None] * vectors, axis=1)
    scale = float(np.abs(values).max())
    names, shapes = names_and_shapes(operator)
    dtype = np.float64 if operator.dtype == torch.float64 else np.float32
    return Eigenpairs(
        values=values[order],
        residuals=residuals,
        vectors=np.ascontiguousarray(vectors, dtype=dtype),
        converged=residuals <= tolerance * scale,
        which=ends.which,
        tolerance=tolerance,
        scale=scale,
        num_matvecs=operator.size,
        check_matvecs=0,
        check="dense",
        names=names,
        shapes=shapes,
    )


def _capacity(operator: SymmetricOperator, count: int, block: int, budget: int) -> int:
    """Rows of the basis: as many as help, or as fit ``budget`` bytes.

    Raises:
        ValueError: where not even the least basis fits.
    """
    row = operator.size * operator.dtype.itemsize
    # besides the basis: products, what is left of them, a row in passing, and the vectors returned
    besides = 2 * block + 2 + count
    fitting = budget // row - besides
    least = max(count + max(_ROOM, 2 * block + 2), 2 * count)
    if fitting < least:
        needed = format_bytes((least + besides) * row)
        raise ValueError(
            f"k needs {needed} for vectors of size {operator.size}, but memory is "
            f"{format_bytes(budget)}; pass a smaller k or block_size, or more memory"
        )
    useful = max(4 * count, 2 * count + 60) + 2 * block
    return min(fitting, useful)


def _limit(max_matvecs: int | None, count: int, block: int) -> int:
    # w vectors at least, which take w products, and their residuals
    least = 2 * count + block
    if max_matvecs is None:
        return max(1000, 100 * count, least)
    return _whole_number("max_matvecs", max_matvecs, least)


def _whole_number(name: str, value: int, least: int, most: float = math.inf) -> int:
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_whole or not least <= value <= most:
        upto = "" if math.isinf(most) else f" and at most {most}"
        raise ValueError(f"{name} is {value!r}; pass a whole number, at least {least}{upto}")
    return int(value)


def _check_tolerance(tolerance: float) -> None:
    is_number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    if not is_number or not 0 <= tolerance < 1:
        raise ValueError(
            f"tolerance is {tolerance!r}; pass a number from 0 to below 1, the residual relative "
            "to the largest |eigenvalue|, such as 1e-6"
        )


def _warn(pairs: Eigenpairs, limit: int) -> None:
    """One RuntimeWarning where something is left open."""
    missed = int((~pairs.converged).sum())
    remedy = "pass a larger max_matvecs, more memory, or a larger tolerance"
    if missed:
        worst = pairs.residuals.max() / (pairs.scale or 1.0)
        warnings.warn(
            f"{missed} of {len(pairs.values)} eigenpairs have not converged after "
            f"{pairs.num_matvecs} products (max_matvecs {limit}): relative residuals are up to "
            f"{worst:.2g}, the tolerance is {pairs.tolerance:.2g}; {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )
    elif pairs.check == "unfinished":
        warnings.warn(
            f"all {len(pairs.values)} eigenpairs have converged, but {pairs.check_matvecs} "
            f"products did not settle whether a repeated eigenvalue was missed (max_matvecs "
            f"{limit}); {remedy}",
            RuntimeWarning,
            stacklevel=3,
        )
