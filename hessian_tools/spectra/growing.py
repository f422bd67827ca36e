"""Blocks whose spectra grow: by probes, by Lanczos steps from where a run stood, or to be exact.

The Lanczos vectors that further steps need are kept within the memory budget, all blocks together.
Where they do not fit, those of the largest block are dropped; a block whose vectors are gone and
that needs more steps begins again, which its ``num_matvecs`` counts and ``notes`` report.

Shapes: k probes, m steps, n size of a block.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from hessian_tools.blocks.block import Block
from hessian_tools.curvature.operators import CurvatureOperator
from hessian_tools.curvature.symmetric import SymmetricOperator
from hessian_tools.errors import NumericalError
from hessian_tools.spectra.batching import local_note, row_bytes
from hessian_tools.spectra.gauss import gauss_quadratures
from hessian_tools.spectra.lanczos import LanczosResult, LanczosState, lanczos, resume
from hessian_tools.spectra.probes import draw_probes
from hessian_tools.spectra.quadrature import BlockSpectra, Quadrature
from hessian_tools.spectra.settings import Settings
from hessian_tools.spectra.slq import Watched, notes_on, solved


@dataclass(frozen=True)
class Growth:
    """What a block shall have in all: ``probes`` of ``steps`` each, or its exact spectrum."""

    probes: int = 0
    steps: int = 0
    exact: bool = False


class GrowingSpectra:
    """The blocks of a run: their quadratures so far, and the Lanczos vectors to go on from.

    Args:
        blocks: the blocks of the run; those in ``finished`` begin with what they have there.
        settings: the most probes and steps of a block, and how the runs are made.
        on_block: called with name and Quadrature each time a block has grown.
        bar: counts products.

    Attributes: ``quadratures`` by name; ``kept``, the Lanczos vectors; ``notes`` on products that
    had to be made again.
    """

    def __init__(
        self,
        curvature: CurvatureOperator,
        blocks: Iterable[Block],
        settings: Settings,
        finished: Mapping[str, Quadrature],
        on_block: Callable[[str, Quadrature], None] | None,
        bar: tqdm,
    ) -> None:
        self.curvature = curvature
        self.settings = settings
        self.on_block = on_block
        self.bar = bar
        self.cuts = {block.name: block.as_cut() for block in blocks}
        self.quadratures = {name: finished[name] for name in self.cuts if name in finished}
        self.notes: list[str] = []
        self.kept = KeptVectors(curvature)

    @property
    def blocks(self) -> dict[str, Quadrature]:
        """What all blocks have, in the partition's order."""
        return {name: self.quadratures[name] for name in self.cuts}

    def spectra(self) -> BlockSpectra:
        """The result, once each block has something."""
        settings = self.settings
        notes = [n for name, block in self.blocks.items() for n in notes_on(name, block, settings)]
        return BlockSpectra(
            quadratures=self.blocks,
            num_probes=max(block.num_probes for block in self.blocks.values()),
            num_steps=settings.num_steps,
            seed=settings.seed,
            probes=settings.probes,
            reorthogonalize=settings.reorthogonalize,
            route=self.curvature.route,
            notes=(*notes, *self.notes),
            curvature=self.curvature.title,
        )

    def store(self, name: str, quadrature: Quadrature) -> None:
        """Takes ``quadrature`` for what the block ``name`` has."""
        self.quadratures[name] = quadrature
        if self.on_block is not None:
            self.on_block(name, quadrature)

    def grow(self, name: str, growth: Growth) -> None:
        """Gives a block the probes and steps of ``growth``; it keeps those that it has.

        Raises:
            NumericalError: for a product with NaN or inf.
        """
        self.bar.set_postfix_str(name)
        if growth.exact:
            self.store(name, self._exact(name))
            return
        old = self.quadratures.get(name)
        run = self._run(name, growth.steps, old)
        if old is None:
            self.store(name, self._drawn(run, 0, growth.probes))
            return
        new = old
        if run.steps > old.nodes.shape[1]:
            new = self._lengthened(run, old)
        if growth.probes > old.num_probes:
            new = new.with_probes(self._drawn(run, old.num_probes, growth.probes))
        self.store(name, new)

    def _exact(self, name: str) -> Quadrature:
        """All eigenvalues; the products that were spent on probes before count as well."""
        self.kept.take(name)
        exactly = replace(self.settings, exact=True)
        ((_, exact),) = solved(self.curvature, [self.cuts[name]], (), exactly, self.bar)
        if name not in self.quadratures:
            return exact
        before = self.quadratures[name].num_matvecs
        return replace(exact, num_matvecs=exact.num_matvecs + before)

    def _run(self, name: str, steps: int, old: Quadrature | None) -> "_Run":
        cut = self.cuts[name]
        steps = min(steps, cut.block_size)
        operator = Watched(self.curvature.stacked(cut), self.bar)
        mode = old.reorthogonalize if old else self.settings.reorthogonalize
        run = _Run(name, operator, steps, mode)
        asked = self.settings.reorthogonalize
        needed = row_bytes(operator.size, steps, asked, operator.dtype)
        if asked != "full" or mode == "local" or needed <= self.curvature.krylov_bytes:
            return run
        # not even the basis of one probe fits the whole budget
        message = f"{name}: {local_note(operator.size, steps)}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return replace(run, mode="local")

    def _drawn(self, run: "_Run", first: int, last: int) -> Quadrature:
        """Probes ``first`` to before ``last``, as many at a time as the budget allows."""
        operator = run.operator
        # probe i is the same however many are drawn
        start = draw_probes(
            self.settings.probes,
            self.settings.seed,
            run.name,
            last,
            operator.size,
            dtype=operator.dtype,
            device=operator.device,
        )[first:]
        results = []
        while len(start):
            rows = self.kept.rows_that_fit(run.bytes_of(run.steps))
            result = lanczos(
                operator,
                start[:rows],
                run.steps,
                reorthogonalize=run.mode,
                keep_state=self._goes_on(run),
            )
            if result.state is not None:
                self.kept.add(run.name, result.state)
            # a state is held by ``kept`` alone, so that dropping it frees its memory
            results.append(replace(result, state=None))
            start = start[rows:]
        return self._quadrature(run, results)

    def _lengthened(self, run: "_Run", old: Quadrature) -> Quadrature:
        """The probes of ``old`` taken to more steps, from their kept vectors if possible."""
        k, done = old.nodes.shape
        further = k * run.bytes_of(run.steps - done)
        same_mode = run.mode == old.reorthogonalize
        if same_mode:
            self.kept.make_room(further, but=run.name)
        states = self.kept.take(run.name)
        held = sum(state.nbytes for state in states)
        num_held = sum(len(state.current) for state in states)
        if not same_mode or num_held != k or not self.kept.fits(held + further):
            states.clear()  # before the new vectors need the memory
            return self._begun_again(run, old)
        results = []
        for index, state in enumerate(states):
            result = resume(run.operator, state, run.steps, keep_state=self._goes_on(run))
            if result.state is not None:
                states[index] = result.state  # the shorter one is freed before the next resumes
            results.append(replace(result, state=None))
        if self._goes_on(run):
            for state in states:
                self.kept.add(run.name, state)
        spent = old.num_matvecs + k * (run.steps - done)
        return replace(self._quadrature(run, results), num_matvecs=spent)

    def _begun_again(self, run: "_Run", old: Quadrature) -> Quadrature:
        k, done = old.nodes.shape
        self.notes.append(
            f"{run.name}: {k * done} products were made again for more steps, as its Lanczos "
            "vectors were gone (they did not fit the memory budget, or the run was interrupted)"
        )
        spent = old.num_matvecs + k * run.steps
        return replace(self._drawn(run, 0, k), num_matvecs=spent)

    def _goes_on(self, run: "_Run") -> bool:
        """Whether the block may get still more steps later."""
        return run.steps < min(self.settings.num_steps, run.operator.size)

    def _quadrature(self, run: "_Run", results: Sequence[LanczosResult]) -> Quadrature:
        settings = replace(self.settings, reorthogonalize=run.mode)
        (outcome,) = gauss_quadratures(results, [run.name], run.operator.size, settings)
        if isinstance(outcome, NumericalError):
            raise outcome
        return outcome


@dataclass(frozen=True, eq=False)
class _Run:
    """How the next Lanczos steps of a block are made."""

    name: str
    operator: SymmetricOperator  # of the block alone, (n, n)
    steps: int  # of every probe when done, at most n
    mode: str  # of re-orthogonalisation: as asked, or "local" where one basis exceeds the budget

    def bytes_of(self, steps: int) -> int:
        """What ``steps`` steps of one probe hold."""
        return row_bytes(self.operator.size, steps, self.mode, self.operator.dtype)


class KeptVectors:
    """Lanczos vectors of unfinished runs by block, within the operator's budget."""

    def __init__(self, curvature: CurvatureOperator) -> None:
        self.curvature = curvature
        self.states: dict[str, list[LanczosState]] = {}

    @property
    def nbytes(self) -> int:
        """Of all vectors kept."""
        return sum(state.nbytes for states in self.states.values() for state in states)

    def add(self, name: str, state: LanczosState) -> None:
        """Keeps the vectors of some probes of a block."""
        self.states.setdefault(name, []).append(state)

    def take(self, name: str) -> list[LanczosState]:
        """The states of a block, which are then no longer kept here."""
        return self.states.pop(name, [])

    def fits(self, further: int) -> bool:
        """Whether this many bytes fit beside what is kept."""
        return self.nbytes + further <= self.curvature.krylov_bytes

    def make_room(self, further: int, but: str = "") -> None:
        """Drops the largest blocks, except ``but``, until ``further`` bytes fit or none is left."""
        while not self.fits(further):
            sizes = {
                name: sum(state.nbytes for state in states)
                for name, states in self.states.items()
                if name != but
            }
            if not sizes:
                return
            del self.states[max(sizes, key=sizes.__getitem__)]

    def rows_that_fit(self, row: int) -> int:
        """How many probes of ``row`` bytes can run at a time, at least one.

        Kept vectors are dropped only when not even one probe would fit beside them.
        """
        self.make_room(row)
        return max(1, (self.curvature.krylov_bytes - self.nbytes) // row)
