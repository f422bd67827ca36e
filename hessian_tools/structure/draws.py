"""Which blocks of a partition have their columns estimated: all of a tensor's, or some drawn with known probabilities.

Letters: B blocks, G groups (the tensors, or sets of tensors, that blocks lie in), r rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hessian_tools.blocks.block import Cut
from hessian_tools.spectra.probes import keyed_stream

_EVEN = 0.25  # share of draws that is made evenly


@dataclass(frozen=True)
class Draw:
    """A column to be estimated."""

    label: str
    block: int  # its number in the partition
    weight: float


class BlockGrid:
    """The blocks of a partition by number, tensor and layer."""

    def __init__(
        self, cuts: Sequence[Cut], layer: Callable[[str], str], num_blocks: int | None
    ) -> None:
        self.cuts, self.most = cuts, num_blocks
        sets = list(dict.fromkeys(cut.parameters for cut in cuts))
        self.groups = tuple(map(" + ".join, sets))
        self.layers = tuple(
            " + ".join(dict.fromkeys(map(layer, parameters))) for parameters in sets
        )
        self.cut_groups = np.array([sets.index(cut.parameters) for cut in cuts])
        counts = [cut.num_blocks for cut in cuts]
        self.starts = np.concatenate([[0], np.cumsum(counts)])  # numbers of the cuts' first blocks
        self.group_of = np.repeat(self.cut_groups, counts)
        self.num_blocks = np.bincount(self.group_of, minlength=len(sets))
        self.drawn = self.num_blocks > (num_blocks or np.inf)
        self.columns_of = np.where(self.drawn, num_blocks or 0, self.num_blocks)
        self.names = [name for cut in cuts for name in cut.names]

    @property
    def num_columns(self) -> int:
        return int(self.columns_of.sum())

    @property
    def num_entries(self) -> int:
        return sum(cut.num_blocks * cut.block_size for cut in self.cuts)

    def draws(self, seed: int, pilot: np.ndarray | None) -> list[Draw]:
        """The columns to be estimated, all blocks of a group or drawn ones; ``pilot`` (B,) guides the draws."""
        found: list[Draw] = []
        for group, count in enumerate(self.columns_of):
            blocks = np.flatnonzero(self.group_of == group)
            if not self.drawn[group]:
                found += [Draw(self.names[block], int(block), 1.0) for block in blocks]
                continue
            chances = np.full(len(blocks), 1 / len(blocks))
            if pilot is not None and (total := pilot[blocks].sum()) > 0:
                chances = _EVEN * chances + (1 - _EVEN) * pilot[blocks] / total
            stream = np.random.Generator(keyed_stream(seed, "draws", self.groups[group]))
            chosen = np.sort(stream.choice(len(blocks), count, p=chances / chances.sum()))
            for index, drawn in enumerate(chosen):
                again = index - int(np.searchsorted(chosen, drawn))
                label = self.names[blocks[drawn]] + (f"#{again + 1}" if again else "")
                found.append(Draw(label, int(blocks[drawn]), 1 / (count * chances[drawn])))
        return found

    def by_group(self, squares: np.ndarray) -> np.ndarray:
        """(r, B) -> (r, G)."""
        found = np.zeros((len(squares), len(self.groups)))
        by_cut = np.add.reduceat(squares, self.starts[:-1], axis=1)
        np.add.at(found.T, self.cut_groups, by_cut.T)
        return found
