"""A (network, data) pair of the suite, its family, and which families are held out."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

import hessian_tools as ht
from hessian_tools.training import Stream

Build = Callable[[], nn.Module]  # draws its weights from torch's random numbers
Data = Callable[[], Stream]
BATCH_SIZE = 32  # examples: images, windows of text, graphs, pairs of views
BLOCKS = "weights"  # the partition whose blocks are compared
HELD_OUT = 1 / 3  # of the families


@dataclass(frozen=True)
class Traits:
    """What is known of a pair before anything is measured: the baselines read nothing else."""

    is_transformer: bool
    is_text: bool


@dataclass(frozen=True)
class Pair:
    """A network and its data.

    Attributes:
        name: FAMILY/WHAT, unique.
        build: the network, from the random numbers that it finds.
        data: the stream, in batches of :data:`BATCH_SIZE`.
    """

    name: str
    traits: Traits
    build: Build
    data: Data

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]

    def make_model(self, seed: int) -> nn.Module:
        """The network as it starts, from ``seed``; it has no dropout and is in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.build().eval()

    def stream(self, batch_size: int = BATCH_SIZE) -> Stream:
        """The batches; a smaller size cuts the same examples, in the same order, finer."""
        return self.data().with_batch_size(batch_size)

    def problem(
        self,
        num_batches: int,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> ht.Problem:
        """A network, as it starts by default, with the first batches of the stream."""
        stream = self.stream().with_seed(seed)
        batches = [stream.batch(step) for step in range(num_batches)]
        return ht.Problem(
            self.make_model(seed) if model is None else model,
            stream.loss_fn,
            batches,
            batch_stats=stream.batch_stats,
        )

    @functools.cached_property
    def num_parameters(self) -> int:
        """Trained ones, tied ones once."""
        model = self.make_model(0)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    @functools.cached_property
    def num_blocks(self) -> int:
        """Trained tensors of two or more dimensions: the blocks that readings compare."""
        return len(ht.partition(self.make_model(0), BLOCKS))


def family(name: str, traits: Traits, members: dict[str, tuple[Build, Data]]) -> list[Pair]:
    """The pairs of a family, by what tells them apart."""
    return [Pair(f"{name}/{what}", traits, *made) for what, made in members.items()]


def by_name(pairs: Iterable[Pair]) -> dict[str, Pair]:
    """Raises ValueError for a name given twice."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        if pair.name in found:
            raise ValueError(f"two pairs are named {pair.name!r}; give one another name")
        found[pair.name] = pair
    return found


def by_family(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """The pairs of each family."""
    ordered = sorted(pairs, key=lambda pair: pair.family)
    grouped = itertools.groupby(ordered, key=lambda pair: pair.family)
    return {name: list(members) for name, members in grouped}


def held_out(families: Iterable[str]) -> frozenset[str]:
    """The third of ``families`` that is not looked at until the end.

    They are those whose names have the smallest SHA-256, which nobody chose.
    """
    ordered = sorted(families, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return frozenset(ordered[: round(HELD_OUT * len(ordered))])
