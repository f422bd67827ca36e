"""Which blocks of a partition have their columns estimated: all of a tensor's, or some drawn with
known probabilities.

Letters: B blocks, G groups (the tensors, or sets of tensors, that blocks lie in), r rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hessian_tools.blocks.block import Cut
from hessian_tools.spectra.probes import keyed_stream

_EVEN = 0.25  # share of draws that is made evenly


@dataclass(frozen=True)
class Draw:
    """A column to be estimated."""

    label: str  # the block's name, with "#2" and so on where it is drawn again
    block: int  # its number in the partition
    weight: float


class BlockGrid:
    """The blocks of a partition by number, tensor and layer.

    Args:
        cuts: disjoint cuts, G groups of tensors among them.
        layer: the layer of a parameter by its name.
        num_blocks: the most columns of a group; None for all of its blocks.
    """

    def __init__(
        self,
        cuts: Sequence[Cut],
        layer: Callable[[str], str],
        num_blocks: int | None,
    ) -> None:
        self.cuts = cuts
        self.most = num_blocks
        sets = list(dict.fromkeys(cut.parameters for cut in cuts))
        layers = [dict.fromkeys(map(layer, parameters)) for parameters in sets]
        self.groups = tuple(map(" + ".join, sets))
        self.layers = tuple(map(" + ".join, layers))
        self.cut_groups = np.array([sets.index(cut.parameters) for cut in cuts])
        counts = [cut.num_blocks for cut in cuts]
        self.starts = np.concatenate([[0], np.cumsum(counts)])  # numbers of the cuts' first blocks
        self.group_of = np.repeat(self.cut_groups, counts)  # (B,)
        self.num_blocks = np.bincount(self.group_of, minlength=len(sets))  # (G,)
        self.drawn = self.num_blocks > (num_blocks or np.inf)  # (G,)
        self.columns_of = np.where(self.drawn, num_blocks or 0, self.num_blocks)  # (G,)
        self.names = [name for cut in cuts for name in cut.names]

    @property
    def num_columns(self) -> int:
        return int(self.columns_of.sum())

    @property
    def num_entries(self) -> int:
        return sum(cut.numel for cut in self.cuts)

    def draws(self, seed: int, pilot: NDArray[np.float64] | None) -> list[Draw]:
        """The columns to be estimated, all blocks of a group or drawn ones.

        ``pilot`` (B,), the mass of each block's columns as far as known, guides the draws.
        """
        draws: list[Draw] = []
        for group in range(len(self.groups)):
            if self.drawn[group]:
                draws += self._drawn(group, seed, pilot)
            else:
                blocks = np.flatnonzero(self.group_of == group)
                draws += [Draw(self.names[block], int(block), 1.0) for block in blocks]
        return draws

    def _drawn(
        self,
        group: int,
        seed: int,
        pilot: NDArray[np.float64] | None,
    ) -> Iterator[Draw]:
        blocks = np.flatnonzero(self.group_of == group)
        count = self.columns_of[group]
        chances = np.full(len(blocks), 1 / len(blocks))
        total = 0.0 if pilot is None else pilot[blocks].sum()
        if pilot is not None and total > 0:
            chances = _EVEN * chances + (1 - _EVEN) * pilot[blocks] / total
        stream = np.random.Generator(keyed_stream(seed, "draws", self.groups[group]))
        chosen = np.sort(stream.choice(len(blocks), count, p=chances / chances.sum()))
        for index, drawn in enumerate(chosen):
            times_before = index - int(np.searchsorted(chosen, drawn))
            again = f"#{times_before + 1}" if times_before else ""
            weight = 1 / (count * chances[drawn])
            yield Draw(f"{self.names[blocks[drawn]]}{again}", int(blocks[drawn]), weight)

    def by_group(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """(r, B) -> (r, G), sums over the blocks of each group."""
        sums = np.zeros((len(squares), len(self.groups)))
        by_cut = np.add.reduceat(squares, self.starts[:-1], axis=1)
        np.add.at(sums.T, self.cut_groups, by_cut.T)
        return sums
