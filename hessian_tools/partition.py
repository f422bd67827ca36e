"""Partitions of a model's parameters into named, disjoint blocks.

A *block* is a part of one tensor (or, for ``layer``, several tensors together). Blocks of one size that lie in the same
tensor form a *cut* and go through the engine together. Presets decide from module types, shapes and behaviour
(:mod:`hessian_tools.attention_layout`), never from parameter names.

Letters: B blocks of a cut, n entries of a block; ``...`` are leading batch axes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.attention_layout import (
    Attention,
    Region,
    find_attention,
    is_inside,
    is_transposed,
    transformer_layers,
    whole,
)

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Modules whose tensors of two or more dimensions have one row an output neuron; these and others that map features.
WITH_ROWS = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
MATRICES = (*WITH_ROWS, *TRANSPOSED)


@dataclass(frozen=True)
class Part:
    """A region of one tensor, cut into B equal pieces."""

    parameter: str  # name in model.named_parameters()
    shape: tuple[int, ...]  # of the tensor
    view: tuple[int, ...]  # the shape to view it as: axes of ``shape``, some split
    index: tuple[slice, ...]  # the region inside the view, one slice an axis, step 1
    axes: tuple[int, ...] = ()  # axes of the view that enumerate pieces, row-major; () is one piece
    window: tuple[int, int] | None = None  # the run of these pieces that is meant, if not all

    def __hash__(self) -> int:  # slices have no hash before Python 3.12
        return hash((self.parameter, self.view, self.axes, self.window, *((s.start, s.stop) for s in self.index)))

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(self.index[axis].stop - self.index[axis].start for axis in self.axes)

    @property
    def num_blocks(self) -> int:
        return self.window[1] - self.window[0] if self.window else math.prod(self._grid)

    @property
    def block_shape(self) -> tuple[int, ...]:
        return tuple(s.stop - s.start for axis, s in enumerate(self.index) if axis not in self.axes)

    @property
    def block_size(self) -> int:
        return math.prod(self.block_shape)

    def rows(self, tensor: Tensor) -> Tensor:
        """The pieces of ``tensor``, (..., *shape) -> (..., B, n); a view where torch allows it."""
        pieces, key, batch = self._pieces(tensor)
        return pieces[key].reshape(*batch, self.num_blocks, self.block_size)

    def place(self, rows: Tensor, out: Tensor) -> None:
        """Writes ``rows``, (..., B, n), to their places in ``out``, (..., *shape); the rest of ``out`` stays."""
        pieces, key, batch = self._pieces(out)
        grid = (self.num_blocks,) if self.window else self._grid
        pieces[key] = rows.reshape(*batch, *grid, *self.block_shape).to(out.dtype)

    def chunk(self, first: int, last: int) -> "Part":
        """Pieces ``first`` to ``last - 1`` alone."""
        if self.window:
            return replace(self, window=None).chunk(self.window[0] + first, self.window[0] + last)
        index, inner = list(self.index), self.num_blocks
        for axis, count in zip(self.axes, self._grid, strict=True):
            inner //= count
            low, high = first // inner, -(-last // inner)
            index[axis] = slice(self.index[axis].start + low, self.index[axis].start + high)
            first, last = first - low * inner, last - low * inner
            if high - low > 1:
                break
        part = replace(self, index=tuple(index))
        return part if last - first == part.num_blocks else replace(part, window=(first, last))

    def _pieces(self, tensor: Tensor) -> tuple[Tensor, tuple[Any, ...], tuple[int, ...]]:
        """(..., *grid, *block_shape) as a view, the index that picks the window from it, and the batch axes."""
        rank = tensor.ndim - len(self.shape)
        if rank < 0 or tuple(tensor.shape[rank:]) != self.shape:
            raise ValueError(f"tensor has shape {tuple(tensor.shape)}; {self.parameter} has shape {self.shape}")
        batch, every = tuple(tensor.shape[:rank]), (slice(None),) * rank
        region = tensor.view((*batch, *self.view))[(*every, *self.index)]
        pieces = region.movedim([rank + axis for axis in self.axes], list(range(rank, rank + len(self.axes))))
        if self.window is None:
            return pieces, (...,), batch
        chosen = torch.arange(*self.window, device=tensor.device)
        return pieces, (*every, *torch.unravel_index(chosen, self._grid)), batch


@dataclass(frozen=True)
class Cut:
    """B blocks of one size; block i is the concatenation of the i-th pieces of all parts.

    Names are made on demand: ``name[label,counter=number]``, with ``per_label`` blocks to each label in turn.
    """

    parts: tuple[Part, ...]  # all with the same num_blocks
    name: str
    labels: tuple[str, ...] = ("",)
    counter: str = ""
    per_label: int = 1
    first: int = 0  # this cut's first block in the enumeration of labels and numbers

    @property
    def num_blocks(self) -> int:
        return self.parts[0].num_blocks

    @property
    def block_size(self) -> int:
        return sum(part.block_size for part in self.parts)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.parameter for part in self.parts))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(self.block_name, range(self.num_blocks)))

    def block_name(self, position: int) -> str:
        label, number = divmod(self.first + position, self.per_label)
        inside = ",".join(filter(None, (self.labels[label], f"{self.counter}={number}" if self.counter else "")))
        return f"{self.name}[{inside}]" if inside else self.name

    def __getitem__(self, position: int) -> "Block":
        if not -self.num_blocks <= position < self.num_blocks:
            raise IndexError(f"position is {position}; {self.name} is cut into {self.num_blocks} blocks")
        return Block(self, position % self.num_blocks)

    def chunk(self, first: int, last: int) -> "Cut":
        """Blocks ``first`` to ``last - 1`` as a cut of their own, with their names."""
        if not 0 <= first < last <= self.num_blocks:
            raise ValueError(f"first, last are {first}, {last}; 0 <= first < last <= {self.num_blocks} is needed")
        return replace(self, parts=tuple(part.chunk(first, last) for part in self.parts), first=self.first + first)

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(B, n) from tensors by parameter name, each (*shape)."""
        return torch.cat([part.rows(tensors[part.parameter]) for part in self.parts], dim=-1)


@dataclass(frozen=True)
class Block:
    """One named block: the one at ``position`` of ``cut``."""

    cut: Cut
    position: int

    @property
    def name(self) -> str:
        return self.cut.block_name(self.position)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors it lies in."""
        return self.cut.parameters

    @property
    def parameter(self) -> str:
        """Name of its tensor. Raises ValueError for a block over several tensors."""
        if len(self.parameters) > 1:
            raise ValueError(f"block {self.name!r} lies in several tensors; take .parameters and .as_cut().rows")
        return self.parameters[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cut.parts[0].block_shape if len(self.cut.parts) == 1 else (self.numel,)

    @property
    def numel(self) -> int:
        return self.cut.block_size

    def select(self, tensor: Tensor) -> Tensor:
        """Its entries of a tensor shaped like the parameter, (..., *parameter shape) -> (..., *shape)."""
        rows = {part.parameter: part for part in self.as_cut().parts}[self.parameter].rows(tensor)
        return rows.reshape((*rows.shape[:-2], *self.shape))

    def as_cut(self) -> Cut:
        """The cut that holds this block alone."""
        return self.cut.chunk(self.position, self.position + 1)

    def __repr__(self) -> str:
        return f"Block({self.name!r}, shape={self.shape})"


class Partition:
    """Disjoint blocks in order: iterates over Blocks, indexed by name.

    Attributes: ``cuts``, ``preset`` ("" for own blocks), ``notes`` (what was left whole and why, one line each).
    """

    def __init__(self, cuts: Iterable[Cut], preset: str = "", notes: Iterable[str] = ()) -> None:
        self.cuts, self.preset, self.notes = tuple(cuts), preset, tuple(notes)
        self._num_blocks = sum(cut.num_blocks for cut in self.cuts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for cut in self.cuts for name in cut.names)

    def __len__(self) -> int:
        return self._num_blocks

    def __iter__(self) -> Iterator[Block]:
        return (cut[i] for cut in self.cuts for i in range(cut.num_blocks))

    def __contains__(self, item: object) -> bool:
        return self._find(item.name if isinstance(item, Block) else str(item)) is not None

    def __getitem__(self, name: str) -> Block:
        block = self._find(name)
        if block is None:
            raise KeyError(f"no block is named {name!r}{_close(name, _examples(self.cuts))}")
        return block

    def __repr__(self) -> str:
        return f"Partition({self.preset or 'own blocks'}: {len(self)} blocks in {len(self.cuts)} cuts)"

    def _find(self, name: str) -> Block | None:
        stems = {name, name.rpartition("[")[0]}
        near = (cut for cut in self.cuts if cut.name in stems)
        return next((cut[cut.names.index(name)] for cut in near if name in cut.names), None)


@dataclass(frozen=True)
class _Site:
    """A tensor and the module that owns it."""

    name: str
    shape: tuple[int, ...]
    module: nn.Module

    def cut(self, axis: int, region: Region, counter: str = "", covers: int = 1) -> Cut:
        """``region`` applied to ``covers`` axes from ``axis`` on."""
        before, after = self.shape[:axis], self.shape[axis + covers :]
        index = (*whole(before), *region.index, *whole(after))
        axes = tuple(axis + a for a in region.axes)
        part = Part(self.name, self.shape, (*before, *region.view, *after), index, axes)
        return Cut((part,), self.name, region.labels, counter, part.num_blocks // len(region.labels))

    def uncut(self) -> Cut:
        return self.cut(0, Region((), (), ()), covers=0)


class _Survey:
    """What presets may know of a model."""

    def __init__(self, model: nn.Module) -> None:
        # named_parameters gives a tied tensor once, under its first name.
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.numel()]
        self.model = model
        self.sites = [_Site(name, tuple(p.shape), model.get_submodule(name.rpartition(".")[0])) for name, p in named]
        self.notes: list[str] = []

    @cached_property
    def attention(self) -> Attention:
        attention = find_attention(self.model)
        self.notes += [
            f"{path or '(root)'}: its query/key/value layout is not recognised, so its tensors are not split"
            for path in attention.unknown
        ]
        return attention

    def cuts(self, site: _Site, by: str = "") -> list[Cut]:
        """Cuts of one tensor: query, key and value apart, then ``by`` "" (nothing else), "head" or "row"."""
        projection = self.attention.projections.get(site.name)
        axis = int(is_transposed(site.module)) if len(site.shape) > 1 else 0
        across = projection is not None and projection.roles == ("o",)  # cut along its inputs, the heads' results
        if projection is None or (across and by != "head"):
            return [self._rows(site, axis) if by == "row" and len(site.shape) > 1 else site.uncut()]
        if by == "head" and not projection.divides:
            self.notes.append(f"{site.name}: its {sum(projection.sizes)} features are not known to divide into heads")
            by = ""
        by = "" if by == "row" and len(site.shape) == 1 else by
        return [site.cut(1 - axis if across else axis, region, by) for region in projection.regions(by)]

    def _rows(self, site: _Site, axis: int) -> Cut:
        if isinstance(site.module, TRANSPOSED):
            groups, (inputs, outputs) = site.module.groups, site.shape[:2]
            view = (groups, inputs // groups, outputs)
            return site.cut(0, Region(view, whole(view), (0, 2)), "row", covers=2)
        if axis or isinstance(site.module, (*WITH_ROWS, *EMBEDDINGS)):
            size = site.shape[axis]
            return site.cut(axis, Region((size,), (slice(0, size),), (0,)), "row")
        self.notes.append(f"{site.name}: a {type(site.module).__name__} has no known output axis, so it is left whole")
        return site.uncut()


def _weights(survey: _Survey) -> Iterable[Cut]:
    return (cut for site in survey.sites if len(site.shape) > 1 for cut in survey.cuts(site))


def _layer(survey: _Survey) -> Iterable[Cut]:
    for path, sites in groupby(survey.sites, key=lambda site: site.name.rpartition(".")[0]):
        yield Cut(tuple(site.uncut().parts[0] for site in sites), path or "(root)")


def _official(survey: _Survey) -> Iterable[Cut]:
    layers = transformer_layers(survey.model, survey.attention)
    count = len(layers)
    if not layers:
        survey.notes.append("no stack of transformer layers found: every tensor of two or more dimensions is a block")
        return _weights(survey)

    def outside(path: str) -> bool:
        return not any(is_inside(path, layer) for layer in layers)

    tables = [site for site in survey.sites if isinstance(site.module, EMBEDDINGS) and outside(site.name)]
    # Of several embeddings (tokens, positions, segments) the tokens' has as many rows as the model has outputs.
    outputs = {m.out_features for path, m in survey.model.named_modules() if isinstance(m, nn.Linear) and outside(path)}
    tokens = [site for site in tables if site.shape[0] in outputs][:1] or tables[:1]
    numbers = (0, count // 4, 7 * count // 12, count - 1) if tokens else (0, count // 2, count - 1)
    used = {layers[number] for number in numbers}

    def chosen(site: _Site) -> bool:
        matrix = len(site.shape) > 1 and (isinstance(site.module, MATRICES) or is_transposed(site.module))
        return site in tokens or (matrix and (outside(site.name) or any(is_inside(site.name, layer) for layer in used)))

    return [cut for site in filter(chosen, survey.sites) for cut in (survey.cuts(site) if tokens else [site.uncut()])]


def _model(survey: _Survey) -> Iterable[Cut]:
    yield Cut(tuple(site.uncut().parts[0] for site in survey.sites), "(model)")


PRESETS: dict[str, Callable[[_Survey], Iterable[Cut]]] = {
    "tensor": lambda survey: [site.uncut() for site in survey.sites],
    "semantic": lambda survey: [cut for site in survey.sites for cut in survey.cuts(site)],
    "weights": _weights,
    "layer": _layer,
    "head": lambda survey: [cut for site in survey.sites for cut in survey.cuts(site, "head")],
    "neuron": lambda survey: [cut for site in survey.sites for cut in survey.cuts(site, "row")],
    "official": _official,
    "model": _model,
}


def partition(
    model: nn.Module,
    spec: str | Mapping[str, Any] | Iterable[str | Block] = "semantic",
    *,
    only: str | Sequence[str] | None = None,
) -> Partition:
    """Cuts the trainable parameters of ``model`` into named, disjoint blocks.

    Args:
        model: any ``nn.Module``. Parameters without gradient are left out; tied ones appear under their first name.
        spec: own blocks (see below), or a preset:
            ``tensor``: one block a tensor. ``semantic``: the same, with fused query/key/value tensors split.
            ``weights``: semantic, without tensors of fewer than two dimensions.
            ``layer``: all of a module's own tensors together, named by its path.
            ``head``: semantic, with query, key, value and the output projection's inputs split by head.
            ``neuron``: semantic, with matrices split by output: rows of linear layers (columns of transposed ones),
            output channels of convolutions, rows of embeddings.
            ``model``: everything as one block, the whole Hessian.
            ``official``: the matrices sampled for the published spectra (Zhang et al. 2024, arXiv 2402.16788).
        only: globs (``*``, ``?``) over block and parameter names; other blocks of the preset are left out.

    ``official`` is from the source for GPT-2 (token embedding; q, k, v, attention output and both MLP matrices of
    layers 0, 3, 7, 11 of 12) and for ViT (patch embedding and head; qkv uncut, attention output and both MLP matrices
    of layers 0, 6, 11 of 12). Ours: with a token embedding, layers 0, L/4, 7L/12, L-1 of L, else 0, L/2, L-1; every
    linear or convolution weight outside the layers counts as an embedding or head; query, key and value that are
    separate tensors (HF's ViT) stay separate; without transformer layers, as ``weights``.

    Own blocks are a list of parameter names (whole tensors), Blocks, and globs that choose semantic blocks; or a dict
    {block name: parameter name or (parameter name, tuple of slices)}.

    Returns:
        a Partition; its ``notes`` say what was left whole and why.
    Raises:
        ValueError: an unknown preset, a name or glob that matches nothing (with close matches), slices that do not fit,
            overlapping blocks (naming both), a model without trainable parameters.
        TypeError: any other kind of argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    survey = _Survey(model)
    if not survey.sites:
        raise ValueError("model has no parameter that requires grad; call requires_grad_() on those to be studied")
    if isinstance(spec, str):
        if spec not in PRESETS:
            raise ValueError(f"spec is {spec!r}; presets are {', '.join(PRESETS)}, and own names or globs go in a list")
        cuts, preset = list(PRESETS[spec](survey)), spec
    else:
        cuts, preset = _own(survey, spec), ""
    if only is not None:
        cuts = _chosen(cuts, [only] if isinstance(only, str) else list(only))
    return Partition(cuts, preset, survey.notes)


def _own(survey: _Survey, spec: Mapping[str, Any] | Iterable[str | Block]) -> list[Cut]:
    sites = {site.name: site for site in survey.sites}
    cuts: list[Cut] = []
    globs: list[str] = []
    if isinstance(spec, Mapping):
        cuts = [_sliced(sites, name, chosen) for name, chosen in spec.items()]
    elif not isinstance(spec, Iterable):
        raise TypeError(f"spec is a {type(spec).__name__}; pass a preset, a list of names, globs or Blocks, or a dict")
    else:
        for item in spec:
            if isinstance(item, Block):
                for part in item.as_cut().parts:
                    if part.parameter not in sites or sites[part.parameter].shape != part.shape:
                        raise ValueError(f"spec holds {item}, which is no block of this model's trainable parameters")
                cuts.append(item.as_cut())
            elif not isinstance(item, str):
                raise TypeError(f"spec holds a {type(item).__name__}; a list of names, globs or Blocks is needed")
            elif item in sites:
                cuts.append(sites[item].uncut())
            else:
                globs.append(item)
    if globs:
        cuts += _chosen([cut for site in survey.sites for cut in survey.cuts(site)], globs)
    if not cuts:
        raise ValueError("spec is empty; name at least one block")
    _check_disjoint(cuts)
    return cuts


def _sliced(sites: Mapping[str, _Site], name: str, chosen: Any) -> Cut:
    parameter, index = chosen if isinstance(chosen, tuple) and len(chosen) == 2 else (chosen, ())
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(parameter, str) or not all(isinstance(i, slice) for i in index):
        raise TypeError(f"spec[{name!r}] is {chosen!r}; give a parameter name or (parameter name, tuple of slices)")
    if parameter not in sites:
        raise ValueError(f"spec[{name!r}] names {parameter!r}, no trainable parameter{_close(parameter, sites)}")
    site = sites[parameter]
    bounds = [s.indices(size) for s, size in zip(index, site.shape, strict=False)]
    if len(index) > len(site.shape) or any(step != 1 or start >= stop for start, stop, step in bounds):
        raise ValueError(f"spec[{name!r}] is {index}; non-empty slices of step 1 into shape {site.shape} are needed")
    picked = tuple(slice(start, stop) for start, stop, _ in bounds)
    region = Region(site.shape, (*picked, *whole(site.shape[len(picked) :])), ())
    return replace(site.cut(0, region, covers=len(site.shape)), name=name)


def _chosen(cuts: Sequence[Cut], patterns: Sequence[str]) -> list[Cut]:
    """What of ``cuts`` one of ``patterns`` matches, by block or parameter name; every pattern must match something."""
    # Names have brackets, so brackets are no wildcards.
    globs = [pattern.replace("[", "[[]") for pattern in patterns]
    used: set[str] = set()

    def hit(name: str) -> bool:
        matching = {glob for glob in globs if fnmatchcase(name, glob)}
        used.update(matching)
        return bool(matching)

    chosen = []
    for cut in cuts:
        everything = {parameter for parameter in cut.parameters if hit(parameter)}
        hits = [hit(name) or bool(everything) for name in cut.names]
        first = 0
        for wanted, run in groupby(hits):
            last = first + len(list(run))
            if wanted:
                chosen.append(cut if last - first == cut.num_blocks else cut.chunk(first, last))
            first = last
    for pattern, glob in zip(patterns, globs, strict=True):
        if glob not in used:
            raise ValueError(f"{pattern!r} matches no block or trainable parameter{_close(pattern, _examples(cuts))}")
    return chosen


def _check_disjoint(cuts: Sequence[Cut]) -> None:
    blocks = [cut[i] for cut in cuts for i in range(cut.num_blocks)]
    parts: dict[str, list[tuple[int, Part]]] = {}
    for number, block in enumerate(blocks, start=1):
        for part in block.as_cut().parts:
            parts.setdefault(part.parameter, []).append((number, part))
    for pieces in parts.values():
        if len(pieces) == 1:
            continue
        owner = torch.zeros(pieces[0][1].shape, dtype=torch.int32)
        for number, part in pieces:
            earlier = int(part.rows(owner).max())
            if earlier:
                names = f"{blocks[earlier - 1].name!r} and {blocks[number - 1].name!r}"
                raise ValueError(f"spec has blocks {names}, which overlap; blocks must be disjoint")
            part.place(torch.full((1, part.block_size), number), owner)


def _examples(cuts: Sequence[Cut]) -> Iterator[str]:
    for cut in cuts:
        yield from cut.parameters
        yield from map(cut.block_name, range(min(cut.num_blocks, 32)))  # comparing thousands of names takes seconds


def _close(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f"; close: {', '.join(near)}" if near else ""
