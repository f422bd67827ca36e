"""Partitions of a model's parameters into named, disjoint blocks.

A *block* is a part of one tensor (or, for ``layer``, several tensors together). Blocks of one size that lie in the same
tensor form a *cut* and go through the engine together. Presets decide from module types, shapes and behaviour
(:mod:`hessian_tools.attention_layout`), never from parameter names.

Letters: B blocks of a cut, n entries of a block; ``...`` are leading batch axes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools.attention_layout import Attention, Region, find_attention, is_inside, is_transposed, whole

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Modules whose tensors of two or more dimensions have one row an output neuron.
WITH_ROWS = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
MATRICES = (*WITH_ROWS, *TRANSPOSED)  # those and others that map features


@dataclass(frozen=True)
class Part:
    """A region of one tensor, cut into B equal pieces."""

    parameter: str  # name in model.named_parameters()
    shape: tuple[int, ...]  # of the tensor
    view: tuple[int, ...]  # the shape to view it as: axes of ``shape``, some split
    index: tuple[slice, ...] = field(hash=False)  # the region inside the view, one slice an axis, step 1
    axes: tuple[int, ...] = ()  # axes of the view that enumerate pieces, row-major; () is one piece
    window: tuple[int, int] | None = None  # the run of these pieces that is meant, if not all

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
        pieces, picked = self._pieces(tensor)
        return pieces[picked].reshape(*tensor.shape[: tensor.ndim - len(self.shape)], self.num_blocks, self.block_size)

    def place(self, rows: Tensor, out: Tensor) -> None:
        """Writes ``rows``, (..., B, n), to their places in ``out``, (..., *shape); the rest of ``out`` stays."""
        pieces, picked = self._pieces(out)
        grid = (self.num_blocks,) if self.window else self._grid
        pieces[picked] = rows.reshape(*rows.shape[:-2], *grid, *self.block_shape).to(out.dtype)

    def chunk(self, first: int, last: int) -> "Part":
        """Pieces ``first`` to ``last - 1`` alone."""
        if last - first == self.num_blocks:
            return self
        start = self.window[0] if self.window else 0
        return replace(self, window=(start + first, start + last))

    def _pieces(self, tensor: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """(..., *grid, *block_shape) as a view, and the index that picks the window from it."""
        rank = tensor.ndim - len(self.shape)
        if rank < 0 or tuple(tensor.shape[rank:]) != self.shape:
            raise ValueError(f"tensor has shape {tuple(tensor.shape)}; {self.parameter} has shape {self.shape}")
        every = (slice(None),) * rank
        region = tensor.view((*tensor.shape[:rank], *self.view))[(*every, *self.index)]
        pieces = region.movedim([rank + axis for axis in self.axes], list(range(rank, rank + len(self.axes))))
        if self.window is None:
            return pieces, (...,)
        if len(self.axes) == 1:
            return pieces, (*every, slice(*self.window))
        numbers = torch.arange(*self.window, device=tensor.device)
        return pieces, (*every, *torch.unravel_index(numbers, self._grid))


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

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for cut in self.cuts for name in cut.names)

    @cached_property
    def _by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self}

    def __len__(self) -> int:
        return sum(cut.num_blocks for cut in self.cuts)

    def __iter__(self) -> Iterator[Block]:
        return (cut[i] for cut in self.cuts for i in range(cut.num_blocks))

    def __contains__(self, item: object) -> bool:
        return (item.name if isinstance(item, Block) else item) in self._by_name

    def __getitem__(self, name: str) -> Block:
        if name not in self._by_name:
            raise KeyError(f"no block is named {name!r}{_close(name, _examples(self.cuts))}")
        return self._by_name[name]

    def __repr__(self) -> str:
        return f"Partition({self.preset or 'own blocks'}: {len(self)} blocks in {len(self.cuts)} cuts)"


@dataclass(frozen=True)
class _Site:
    """A tensor and the module that owns it."""

    name: str
    shape: tuple[int, ...]
    module: nn.Module

    def cut(self, axis: int, region: Region, counter: str = "") -> Cut:
        """``region`` of one axis."""
        before, after = self.shape[:axis], self.shape[axis + 1 :]
        index = (*whole(before), *region.index, *whole(after))
        axes = tuple(axis + a for a in region.axes)
        part = Part(self.name, self.shape, (*before, *region.view, *after), index, axes)
        return Cut((part,), self.name, region.labels, counter, part.num_blocks // len(region.labels))

    def uncut(self) -> Cut:
        return _together([self], self.name)


def _together(sites: Iterable[_Site], name: str) -> Cut:
    """One block of all of ``sites``."""
    return Cut(tuple(Part(site.name, site.shape, site.shape, whole(site.shape)) for site in sites), name)


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
        self.notes += attention.notes
        return attention

    def cuts(self, site: _Site, by: str = "") -> list[Cut]:
        """Cuts of one tensor: query, key and value apart, then ``by`` "" (nothing else), "head" or "row"."""
        projection = self.attention.projections.get(site.name)
        matrix = len(site.shape) > 1
        axis = int(matrix and is_transposed(site.module))
        by = "" if by == "row" and not matrix else by
        across = projection is not None and projection.roles == ("o",)  # cut along its inputs, the heads' results
        if projection is None or (across and by != "head"):
            return [self._rows(site, axis) if by == "row" else site.uncut()]
        if by == "head" and not projection.head_size:
            self.notes.append(f"{site.name}: its {sum(projection.sizes)} features are not known to divide into heads")
            by = ""
        return [site.cut(1 - axis if across else axis, region, by) for region in projection.regions(by)]

    def _rows(self, site: _Site, axis: int) -> Cut:
        if isinstance(site.module, TRANSPOSED):  # (in, out / groups, ...)
            view: tuple[int, ...] = (site.module.groups, site.shape[0] // site.module.groups)
            return site.cut(0, Region(view, whole(view), (0, 2)), "row")  # 2: the tensor's own axis of outputs
        if axis or isinstance(site.module, (*WITH_ROWS, *EMBEDDINGS)):
            view = (site.shape[axis],)
            return site.cut(axis, Region(view, whole(view), (0,)), "row")
        self.notes.append(f"{site.name}: a {type(site.module).__name__} has no known output axis, so it is left whole")
        return site.uncut()


def _weights(survey: _Survey) -> Iterable[Cut]:
    return (cut for site in survey.sites if len(site.shape) > 1 for cut in survey.cuts(site))


def _layer(survey: _Survey) -> Iterable[Cut]:
    for path, sites in groupby(survey.sites, key=lambda site: site.name.rpartition(".")[0]):
        yield _together(sites, path or "(root)")


def _official(survey: _Survey) -> Iterable[Cut]:
    layers = survey.attention.layers
    count = len(layers)
    if not layers:
        survey.notes.append("no stack of transformer layers found: every tensor of two or more dimensions is a block")
        return _weights(survey)

    def layer_of(path: str) -> int | None:
        return next((number for number, layer in enumerate(layers) if is_inside(path, layer)), None)

    tables = [site for site in survey.sites if isinstance(site.module, EMBEDDINGS) and layer_of(site.name) is None]
    # Of several embeddings (tokens, positions, segments) the tokens' has as many rows as the model has outputs.
    linears = [(path, module) for path, module in survey.model.named_modules() if isinstance(module, nn.Linear)]
    outputs = {module.out_features for path, module in linears if layer_of(path) is None}
    tokens = [site for site in tables if site.shape[0] in outputs][:1] or tables[:1]
    used = {None, 0, count // 4, 7 * count // 12, count - 1} if tokens else {None, 0, count // 2, count - 1}

    def chosen(site: _Site) -> bool:
        matrix = len(site.shape) > 1 and (isinstance(site.module, MATRICES) or is_transposed(site.module))
        return site in tokens or (matrix and layer_of(site.name) in used)

    return [cut for site in filter(chosen, survey.sites) for cut in (survey.cuts(site) if tokens else [site.uncut()])]


Spec = Mapping[str, Any] | Iterable[str | Block]  # own blocks

PRESETS: dict[str, Callable[[_Survey], Iterable[Cut]]] = {
    "tensor": lambda survey: [site.uncut() for site in survey.sites],
    "semantic": lambda survey: [cut for site in survey.sites for cut in survey.cuts(site)],
    "weights": _weights,
    "layer": _layer,
    "head": lambda survey: [cut for site in survey.sites for cut in survey.cuts(site, "head")],
    "neuron": lambda survey: [cut for site in survey.sites for cut in survey.cuts(site, "row")],
    "official": _official,
    "model": lambda survey: [_together(survey.sites, "(model)")],
}


def partition(model: nn.Module, spec: str | Spec = "semantic", *, only: str | Sequence[str] | None = None) -> Partition:
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
        cuts = _chosen(cuts, [only] if isinstance(only, str) else only)
    return Partition(cuts, preset, survey.notes)


def _own(survey: _Survey, spec: Spec) -> list[Cut]:
    sites = {site.name: site for site in survey.sites}
    if isinstance(spec, Mapping):
        cuts = [_sliced(sites, name, chosen) for name, chosen in spec.items()]
    elif isinstance(spec, Iterable):
        items = list(spec)
        globs = [item for item in items if isinstance(item, str) and item not in sites]
        cuts = [_named(sites, item) for item in items if item not in globs]
        cuts += _chosen(PRESETS["semantic"](survey), globs)
    else:
        raise TypeError(f"spec is a {type(spec).__name__}; pass a preset, a list of names, globs or Blocks, or a dict")
    if not cuts:
        raise ValueError("spec is empty; name at least one block")
    _check_disjoint(cuts)
    return cuts


def _named(sites: Mapping[str, _Site], item: str | Block) -> Cut:
    if isinstance(item, str):
        return sites[item].uncut()
    if not isinstance(item, Block):
        raise TypeError(f"spec holds a {type(item).__name__}; a list of names, globs or Blocks is needed")
    if any(part.parameter not in sites or sites[part.parameter].shape != part.shape for part in item.cut.parts):
        raise ValueError(f"spec holds {item}, which is no block of this model's trainable parameters")
    return item.as_cut()


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
    return Cut((Part(parameter, site.shape, site.shape, (*picked, *whole(site.shape[len(picked) :]))),), name)


def _chosen(cuts: Iterable[Cut], patterns: Sequence[str]) -> list[Cut]:
    """What of ``cuts`` one of ``patterns`` matches, by block or parameter name; every pattern must match something."""
    cuts = list(cuts)
    wanted: list[set[int]] = [set() for _ in cuts]  # positions in each cut
    for pattern in patterns:
        glob = partial(fnmatchcase, pat=pattern.replace("[", "[[]"))  # names have brackets, so they are no wildcards
        hits = [{i for i, name in enumerate(cut.names) if any(map(glob, (name, *cut.parameters)))} for cut in cuts]
        if not any(hits):
            raise ValueError(f"{pattern!r} matches no block or trainable parameter{_close(pattern, _examples(cuts))}")
        wanted = [before | new for before, new in zip(wanted, hits, strict=True)]
    chosen = []
    for cut, positions in zip(cuts, wanted, strict=True):
        for is_wanted, run in groupby(range(cut.num_blocks), key=positions.__contains__):
            if is_wanted:
                first, *rest = run
                chosen.append(cut.chunk(first, first + len(rest) + 1))
    return chosen


def _check_disjoint(cuts: Sequence[Cut]) -> None:
    names = [""]  # by number of the block; 0 is none
    owners: dict[str, Tensor] = {}  # the number of the block that has an entry
    for cut in cuts:
        numbers = torch.arange(len(names), len(names) + cut.num_blocks)[:, None]
        names += cut.names
        for part in cut.parts:
            owner = owners.setdefault(part.parameter, torch.zeros(part.shape, dtype=torch.int32))
            earlier, position = part.rows(owner).amax(dim=1).max(dim=0)
            if earlier:
                both = f"{names[int(earlier)]!r} and {cut.block_name(int(position))!r}"
                raise ValueError(f"spec has blocks {both}, which overlap; blocks must be disjoint")
            part.place(numbers.expand(-1, part.block_size), owner)


def _examples(cuts: Iterable[Cut]) -> Iterator[str]:
    # Comparing thousands of names takes seconds.
    return (name for cut in cuts for name in (*cut.parameters, *cut.chunk(0, min(cut.num_blocks, 32)).names))


def _close(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f"; close: {', '.join(near)}" if near else ""
