"""Which blocks, and how many probes, go through Lanczos together within the memory budget.

Where the Lanczos basis does not fit, fewer blocks, then fewer probes go together; where not even
one basis fits, the block runs with "local" re-orthogonalisation.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch

from hessian_tools.blocks.block import Cut
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.spectra.exact import dense_bytes
from hessian_tools.spectra.settings import Settings

_DENSE_BYTES = 1 << 28  # dense blocks held at a time
_WORK_VECTORS = 5  # of a row besides its basis: start, current, previous, product, residual


def batches(
    cut: Cut,
    done: Collection[str],
    settings: Settings,
    curvature: CurvatureOperator,
) -> Iterator[tuple[Cut, Settings]]:
    """The blocks of ``cut`` that are not in ``done``, in runs that fit the budget.

    Each comes with the settings it has to run with. Warns where these deviate in how they
    re-orthogonalise.
    """
    missing = [index for index, name in enumerate(cut.names) if name not in done]
    if not missing:
        return
    size = cut.block_size
    together, fitted = _fitted(size, settings, curvature)
    if fitted.reorthogonalize != settings.reorthogonalize:
        alike = f" and {len(missing) - 1} like it" if len(missing) > 1 else ""
        name = cut.block_name(missing[0])
        message = f"{name}{alike}: {local_note(size, settings.num_steps)}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    for run in _runs(missing, together):
        yield cut.chunk(run[0], run[-1] + 1), fitted


def row_bytes(size: int, num_steps: int, reorthogonalize: str, dtype: torch.dtype) -> int:
    """What one probe's run takes: its working vectors, and its basis where that is needed."""
    vectors = _WORK_VECTORS
    if reorthogonalize == "full":
        vectors += num_steps
    return size * dtype.itemsize * vectors


def local_note(size: int, num_steps: int) -> str:
    """Why a block runs with "local" re-orthogonalisation, and what to do about it."""
    return (
        f"the Lanczos basis ({num_steps} vectors of {size}) does not fit the memory budget, so it "
        "runs with reorthogonalize='local' (densities hold, counts of nodes do not); allow more "
        "memory or take fewer steps"
    )


def _fitted(size: int, settings: Settings, curvature: CurvatureOperator) -> tuple[int, Settings]:
    """How many blocks of ``size`` go together, and the settings with which they fit."""
    budget = curvature.krylov_bytes
    if settings.is_exact(size):
        return max(1, min(budget, _DENSE_BYTES) // dense_bytes(size)), settings
    steps = min(settings.num_steps, size)
    row = row_bytes(size, steps, settings.reorthogonalize, curvature.dtype)
    if settings.reorthogonalize == "full" and row > budget:
        settings = replace(settings, reorthogonalize="local")
        row = row_bytes(size, steps, "local", curvature.dtype)
    together = budget // (settings.num_probes * row)
    if together:
        return together, settings
    # not even one block with all its probes
    return 1, replace(settings, rows=max(1, budget // row))


def _runs(numbers: Sequence[int], longest: int) -> Iterator[list[int]]:
    """Consecutive ``numbers`` in runs of at most ``longest``."""
    run: list[int] = []
    for number in numbers:
        if run and (number > run[-1] + 1 or len(run) == longest):
            yield run
            run = []
        run.append(number)
    yield run
