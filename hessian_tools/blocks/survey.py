"""What the tensors of a model are: embedding, query, convolution, norm ..., and where their outputs lie.

Told by module types, shapes, sharing and behaviour (:mod:`hessian_tools.blocks.attention`), never by names. A fused
query/key/value tensor has several roles; every role is cut by the rule of its own kind.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from hessian_tools.blocks.attention import (
    Attention,
    Region,
    find_attention,
    is_inside,
    is_transposed,
    whole,
)
from hessian_tools.blocks.block import Cut, Part
from hessian_tools.blocks.token_tables import token_tables
from hessian_tools.blocks.weight_axes import output_axes

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
# Modules whose tensors of two or more dimensions have one row an output neuron.
WITH_ROWS = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
MATRICES = (*WITH_ROWS, *TRANSPOSED)  # those and others that map features

KINDS: dict[str, str] = {
    "embedding": "a table looked up by token",
    "tied": "such a table that is the output layer's matrix as well",
    "position": "any other table (positions, segments, distances), or a parameter (1, T, d)",
    "class token": "a parameter (1, 1, d)",
    "output": "the matrix of the last layer: as many rows as there are tokens, or the last one outside the layers",
    "q": "a query projection", "k": "a key projection", "v": "a value projection",
    "o": "the projection of an attention's result",
    "mlp": "any other matrix of a linear layer",
    "unread": "a matrix of an attention whose query, key and value nothing tells",
    "experts": "the matrices of all experts, (experts, ., .)",
    "recurrent": "a matrix of a recurrent layer",
    "conv": "the kernels of a convolution",
    "norm": "gain or shift of a module without matrices",
    "output bias": "the bias of the last layer",
    "bias": "the bias of a module with matrices",
    "other": "anything else",
}  # fmt: skip
# Ways to cut a tensor by its kind's rule.
WAYS: dict[str, str] = {
    "whole": "one block",
    "roles": "query, key and value of a fused tensor apart",
    "heads": "these by head (an output projection by the heads it reads); what has none by roles",
    "rows": "a block an output neuron, output channel or token, within its role and expert; vectors by roles",
    "elements": "every entry by itself",
    "skip": "left out",
}


@dataclass(frozen=True)
class Site:
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
        return Cut(
            (part,), self.name, region.labels, counter, part.num_blocks // len(region.labels)
        )

    def along(
        self, axes: tuple[int, ...], counter: str, view: tuple[int, ...] | None = None
    ) -> Cut:
        """The whole tensor, a block at each place of ``axes`` (of ``view``)."""
        view = view or self.shape
        part = Part(self.name, self.shape, view, whole(view), axes)
        return Cut((part,), self.name, counter=counter, per_label=part.num_blocks)

    def uncut(self) -> Cut:
        return together([self], self.name)


def together(sites: Iterable[Site], name: str) -> Cut:
    """One block of all of ``sites``."""
    return Cut(
        tuple(Part(site.name, site.shape, site.shape, whole(site.shape)) for site in sites), name
    )


class Survey:
    """What presets may know of a model."""

    def __init__(self, model: nn.Module) -> None:
        # named_parameters gives a tied tensor once, under its first name.
        named = [(name, p) for name, p in model.named_parameters() if p.numel()]
        self.model = model
        self.all = [
            Site(name, tuple(p.shape), model.get_submodule(name.rpartition(".")[0]))
            for name, p in named
        ]
        self.sites = [site for site, (_, p) in zip(self.all, named, strict=True) if p.requires_grad]
        self.notes: list[str] = []

    @cached_property
    def attention(self) -> Attention:
        attention = find_attention(self.model)
        self.notes += attention.notes
        return attention

    @property
    def is_transformer(self) -> bool:
        return bool(self.attention.projections or self.attention.unread)

    def layer_of(self, path: str) -> int | None:
        """The number of the transformer layer that the module or parameter at ``path`` lies in, if in any."""
        return next(
            (i for i, layer in enumerate(self.attention.layers) if is_inside(path, layer)), None
        )

    @cached_property
    def kinds(self) -> dict[str, str]:
        """{parameter name: its kind of KINDS}; a fused tensor's are joined by "/"."""
        kinds = {site.name: self._kind(site) for site in self.all}
        matrices = [
            site
            for site in self.all
            if kinds[site.name] == "mlp" and self.layer_of(site.name) is None
        ]
        tokens = {site.shape[0] for site in self.all if kinds[site.name] in ("embedding", "tied")}
        outputs = [site for site in matrices if site.shape[self._row_axes(site)[-1]] in tokens]
        if "tied" in kinds.values():
            outputs = []
        elif (
            not outputs or not self.attention.layers
        ):  # without known layers, a row count may agree by accident
            outputs = (
                outputs[-1:]
                or matrices[-1:]
                or [site for site in self.all if kinds[site.name] == "conv"][-1:]
            )
        kinds |= {site.name: "output" for site in outputs}
        owners = {site.module for site in outputs}
        return kinds | {
            s.name: "output bias"
            for s in self.all
            if kinds[s.name] == "bias" and s.module in owners
        }

    def _kind(self, site: Site) -> str:
        module, ndim = site.module, len(site.shape)
        projection = self.attention.projections.get(site.name)
        if projection is not None and ndim > 1:
            return "/".join(projection.roles)
        if site.name in self._tied:
            return "tied"
        if isinstance(module, EMBEDDINGS):
            return "embedding" if site.name in self._tables else "position"
        inside = sum(1 for _ in module.parameters(recurse=False))
        is_leaf = inside == sum(1 for _ in module.parameters())
        matrices = isinstance(module, MATRICES) or is_transposed(module) or bool(self._axes(module))
        if ndim == 1 or (ndim == 2 and any(p.ndim == 3 for p in module.parameters(recurse=False))):
            return "bias" if matrices else "norm" if is_leaf else "other"
        if isinstance(module, CONVOLUTIONS):
            return "conv"
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return "recurrent"
        if any(is_inside(site.name, path) for path in self.attention.unread):
            return "unread"
        if isinstance(module, nn.Linear | nn.Bilinear) or is_transposed(module):
            return "mlp"
        if self._row_axes(site):
            return "experts" if ndim == 3 else "mlp"
        if ndim == 3 and site.shape[0] == 1 and not is_leaf:
            return "class token" if site.shape[1] == 1 else "position"
        return "other"

    @cached_property
    def _tables(self) -> list[str]:
        """Names of the tables looked up by token."""
        tables = {
            s.name: s.module
            for s in self.all
            if isinstance(s.module, EMBEDDINGS) and self.layer_of(s.name) is None
        }
        linears = [
            (path, module)
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        outputs = {module.out_features for path, module in linears if self.layer_of(path) is None}
        first = (
            self.model.get_submodule(self.attention.layers[0]) if self.attention.layers else None
        )
        return token_tables(self.model, tables, outputs, first)

    @cached_property
    def _tied(self) -> set[str]:
        """Names of the tensors that a table shares with a linear layer."""
        owners = [
            {id(m.weight) for m in self.model.modules() if isinstance(m, kind)}
            for kind in (EMBEDDINGS, nn.Linear)
        ]
        return {name for name, p in self.model.named_parameters() if id(p) in owners[0] & owners[1]}

    def _axes(self, module: nn.Module) -> dict[str, int]:
        """Output axes of a module of unknown class; modules alike in class and shapes are asked once."""
        if isinstance(module, (*MATRICES, *EMBEDDINGS)) or is_transposed(module):
            return {}
        key = (type(module), tuple((name, tuple(p.shape)) for name, p in module.named_parameters()))
        if key not in self._asked:
            self._asked[key] = output_axes(module)
        return self._asked[key]

    @cached_property
    def _asked(self) -> dict[tuple[object, ...], dict[str, int]]:
        return {}

    def cuts(self, site: Site, rules: Mapping[str, str]) -> list[Cut]:
        """Cuts of one tensor: each of its kinds in the way (of WAYS) that ``rules`` has for it, or for "vector" (fewer
        than two dimensions), or for "else".
        """
        vector = len(site.shape) < 2
        kind = self.kinds[site.name] if rules.keys() - {"vector", "else"} else ""

        def way_of(kind: str) -> str:
            return rules.get(kind) or (rules.get("vector") if vector else None) or rules["else"]

        projection = (
            self.attention.projections.get(site.name) if rules != {"else": "whole"} else None
        )
        roles = projection.roles if projection else ("",)
        ways = {
            role: way_of(role if kind and not vector and projection else kind) for role in roles
        }
        ways = {role: "roles" if way == "rows" and vector else way for role, way in ways.items()}
        if set(ways.values()) <= {"skip", "whole", "elements"} and len(set(ways.values())) == 1:
            way = next(iter(ways.values()))
            return (
                []
                if way == "skip"
                else [self.elements(site) if way == "elements" else site.uncut()]
            )
        if projection is None or (roles == ("o",) and ways["o"] != "heads"):
            return [self.rows(site) if "rows" in ways.values() else site.uncut()]
        if "heads" in ways.values() and not projection.head_size:
            self.notes.append(
                f"{site.name}: its {sum(projection.sizes)} features are not known to divide into heads"
            )
            ways = {role: "roles" if way == "heads" else way for role, way in ways.items()}
        axis = int((not vector and is_transposed(site.module)) != (roles == ("o",)))
        found = []
        for way in dict.fromkeys(ways.values()):
            by = {"heads": "head", "rows": "row"}.get(way, "")
            chosen = [role for role in roles if ways[role] == way]
            found += [site.cut(axis, region, by) for region in projection.regions(by, chosen)]
        return found

    def rows(self, site: Site) -> Cut:
        """By output; whole, with a note, where that is not known."""
        cut = dict(self._feature_cuts(site)).get("rows")
        if cut is None:
            kind = type(site.module).__name__
            self.notes.append(
                f"{site.name}: a {kind} has no known output axis, so it is left whole"
            )
        return cut or site.uncut()

    def elements(self, site: Site) -> Cut:
        return site.along(tuple(range(len(site.shape))), "element")

    def _row_axes(self, site: Site) -> tuple[int, ...]:
        """The axes that enumerate outputs (experts before neurons); () if not known."""
        if len(site.shape) < 2:
            return ()
        if is_transposed(site.module):
            return (1,)
        if isinstance(site.module, (*WITH_ROWS, *EMBEDDINGS)):
            return (0,)
        axis = self._axes(site.module).get(site.name.rpartition(".")[2])
        return () if axis is None else (0, axis) if len(site.shape) == 3 else (axis,)

    def equal_cuts(self, site: Site) -> Iterator[tuple[str, Cut]]:
        """(what it follows, cut) of every way to cut the whole tensor into blocks of one size."""
        yield "whole", site.uncut()
        projection = self.attention.projections.get(site.name)
        if projection is not None:
            transposed = len(site.shape) > 1 and is_transposed(site.module)
            axis = int(transposed != (projection.roles == ("o",)))
            if len(set(projection.sizes)) == 1 < len(projection.sizes):
                yield "roles", site.cut(axis, next(projection.regions("", projection.roles)))
            if projection.head_size:
                yield (
                    "heads",
                    site.cut(axis, projection.heads(), "" if len(projection.roles) > 1 else "head"),
                )
        yield from self._feature_cuts(site)
        yield "elements", self.elements(site)

    def _feature_cuts(self, site: Site) -> Iterator[tuple[str, Cut]]:
        """By output ("rows") and by input ("columns"), or by each axis of a tensor whose axes are not known."""
        if len(site.shape) < 2:
            return
        if isinstance(site.module, TRANSPOSED):  # (in, out / groups, ...)
            view = (site.module.groups, site.shape[0] // site.module.groups, *site.shape[1:])
            yield "rows", site.along((0, 2), "row", view)
            yield "columns", site.along((0,), "column")
        elif isinstance(site.module, CONVOLUTIONS):  # (out, in / groups, ...)
            view = (site.module.groups, site.shape[0] // site.module.groups, *site.shape[1:])
            yield "rows", site.along((0,), "row")
            yield "columns", site.along((0, 2), "column", view)
        elif outputs := self._row_axes(site):
            inputs = tuple(axis for axis in range(len(site.shape)) if axis != outputs[-1])
            if len(outputs) > 1:
                yield "experts", site.along((0,), "expert")
            yield "rows", site.along(outputs, "row")
            yield "columns", site.along(inputs, "column")
        else:
            yield from (
                (f"axis {axis}", site.along((axis,), f"axis{axis}"))
                for axis in range(len(site.shape))
            )
