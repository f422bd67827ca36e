"""Blocks whose spectra grow: more probes, more Lanczos steps from where a run stood, or all eigenvalues.

The Lanczos vectors that further steps need are kept within the memory budget, all blocks together. Where they do not
fit, the largest are dropped; a block whose vectors are gone and that needs more steps begins again, which its
``num_matvecs`` counts and ``notes`` tell.

Shapes: k probes, m steps, n size of a block.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.errors import NumericalError
from hessian_tools.spectra.batching import local_note, row_bytes
from hessian_tools.spectra.gauss import gauss_quadratures
from hessian_tools.spectra.lanczos import LanczosResult, LanczosState, lanczos, resume
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.quadrature import Quadrature
from hessian_tools.spectra.settings import Settings
from hessian_tools.spectra.slq import Watched, solved


class GrowingSpectra:
    """The blocks of a run: their quadratures so far, and the Lanczos vectors kept to go on from."""

    def __init__(
        self, hessian: CurvatureOperator, partition: Any, settings: Settings, finished: Mapping[str, Quadrature],
        on_block: Callable[[str, Quadrature], None] | None, bar: Any,
    ) -> None:  # fmt: skip
        self.hessian, self.settings, self.on_block, self.bar = hessian, settings, on_block, bar
        self.cuts = {block.name: block.as_cut() for block in partition}
        self.quadratures = {name: finished[name] for name in self.cuts if name in finished}
        self.states: dict[str, list[LanczosState]] = {}
        self.notes: list[str] = []

    def store(self, name: str, quadrature: Quadrature) -> None:
        self.quadratures[name] = quadrature
        if self.on_block is not None:
            self.on_block(name, quadrature)

    def grow(self, name: str, num_probes: int, num_steps: int) -> None:
        """Gives a block so many probes and steps in all, or (0, 0) its exact spectrum."""
        old, cut = self.quadratures.get(name), self.cuts[name]
        self.bar.set_postfix_str(name)
        if not num_probes:
            self.states.pop(name, None)
            ((_, found),) = solved(
                self.hessian, [cut], (), replace(self.settings, exact=True), self.bar
            )
            self.store(
                name,
                replace(found, num_matvecs=found.num_matvecs + (old.num_matvecs if old else 0)),
            )
            return
        operator, steps = (
            Watched(self.hessian.stacked(cut), self.bar),
            min(num_steps, cut.block_size),
        )
        mode = self._mode(name, cut.block_size, steps, old)
        if old is None:
            self.store(
                name, self._drawn(operator, name, cut.block_size, 0, num_probes, steps, mode)
            )
            return
        if steps > old.nodes.shape[1]:
            old = self._longer(operator, name, old, steps, mode)
        if num_probes > old.num_probes:
            drawn = self._drawn(operator, name, old.size, old.num_probes, num_probes, steps, mode)
            old = old.with_probes(drawn)
        self.store(name, old)

    def _mode(self, name: str, size: int, steps: int, old: Quadrature | None) -> str:
        """How the block is re-orthogonalised: as asked, or "local" where one basis exceeds the whole budget."""
        asked, before = self.settings.reorthogonalize, old.reorthogonalize if old else None
        if (
            asked != "full"
            or before == "local"
            or self._row(size, steps, asked) <= self.hessian.krylov_bytes
        ):
            return before or asked
        told = local_note(size, steps)
        warnings.warn(f"{name}: {told}", RuntimeWarning, stacklevel=4)
        return "local"

    def _row(self, size: int, steps: int, mode: str) -> int:
        """Bytes of a probe's run."""
        return row_bytes(size, steps, mode, self.hessian.dtype)

    def _drawn(
        self, operator: Any, name: str, size: int, first: int, last: int, steps: int, mode: str
    ) -> Quadrature:
        """The block's probes from ``first`` to before ``last``, as many at a time as the budget allows."""
        settings = self.settings
        start = draw_probes(
            settings.probes,
            settings.seed,
            name,
            last,
            size,
            dtype=operator.dtype,
            device=operator.device,
        )[first:]
        goes_on, runs = steps < min(settings.num_steps, size), []
        while len(start):
            rows = self._rows(self._row(size, steps, mode))
            run = lanczos(operator, start[:rows], steps, reorthogonalize=mode, keep_state=goes_on)
            if run.state is not None:
                self.states.setdefault(name, []).append(run.state)
            runs.append(replace(run, state=None))
            start = start[rows:]
        return self._quadrature(name, runs, size, mode)

    def _longer(
        self, operator: Any, name: str, old: Quadrature, steps: int, mode: str
    ) -> Quadrature:
        """The block's probes taken to ``steps``: from the vectors that are kept, or else from the beginning."""
        k, done = old.nodes.shape
        extra = self._row(old.size, steps - done, mode) * k
        while (
            mode == old.reorthogonalize
            and self._kept + extra > self.hessian.krylov_bytes
            and self._drop(but=name)
        ):
            pass
        states = self.states.pop(name, [])
        whole = sum(len(state.current) for state in states) == k and mode == old.reorthogonalize
        if (
            not whole
            or sum(state.nbytes for state in states) + self._kept + extra
            > self.hessian.krylov_bytes
        ):
            del states
            self.notes.append(
                f"{name}: {k * done} products were made again for more steps, as its Lanczos vectors were gone (they "
                "did not fit the memory budget, or the run was interrupted)"
            )
            found = self._drawn(operator, name, old.size, 0, k, steps, mode)
            return replace(found, num_matvecs=old.num_matvecs + k * steps)
        goes_on, runs = steps < min(self.settings.num_steps, old.size), []
        for index, state in enumerate(states):
            run = resume(operator, state, steps, keep_state=goes_on)
            if run.state is not None:
                states[index] = run.state
            runs.append(replace(run, state=None))
        if goes_on:
            self.states[name] = states
        return replace(
            self._quadrature(name, runs, old.size, mode),
            num_matvecs=old.num_matvecs + k * (steps - done),
        )

    def _quadrature(
        self, name: str, runs: Sequence[LanczosResult], size: int, mode: str
    ) -> Quadrature:
        settings = replace(self.settings, reorthogonalize=mode)
        (found,) = gauss_quadratures(runs, [name], size, settings)
        if isinstance(found, NumericalError):
            raise found
        return found

    def _rows(self, row: int) -> int:
        """How many probes of ``row`` bytes can run at a time; others' vectors go only when not even one could."""
        while self._kept + row > self.hessian.krylov_bytes and self._drop():
            pass
        return max(1, (self.hessian.krylov_bytes - self._kept) // row)

    def _drop(self, but: str = "") -> bool:
        """Forgets the largest block's Lanczos vectors; False when there are none."""
        sizes = {
            name: sum(s.nbytes for s in states)
            for name, states in self.states.items()
            if name != but
        }
        if sizes:
            del self.states[max(sizes, key=sizes.__getitem__)]
        return bool(sizes)

    @property
    def _kept(self) -> int:
        return sum(state.nbytes for states in self.states.values() for state in states)
