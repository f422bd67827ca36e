"""What the tensors of a model are (embedding, query, norm ...), and where their outputs lie.

They are known by module types, shapes, sharing and behaviour, never by names. A fused
query/key/value tensor has several roles, each of which is a kind.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from hessian_tools.blocks.attention import Attention, find_attention, is_inside
from hessian_tools.blocks.block import Cut, Part
from hessian_tools.blocks.projection import Region, is_transposed, whole
from hessian_tools.blocks.trial_runs import output_axes, token_tables

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
    "output": "the matrix of the last layer: as many rows as there are tokens, or the last one "
    "outside the layers",
    "q": "a query projection",
    "k": "a key projection",
    "v": "a value projection",
    "o": "the projection of an attention's result",
    "gate": "what multiplies an attention's result, or adds to it, at its own position",
    "mlp": "any other matrix of a linear layer",
    "unread": "a matrix of an attention whose query, key and value nothing tells",
    "experts": "the matrices of all experts, (experts, ., .)",
    "recurrent": "a matrix of a recurrent layer",
    "conv": "the kernels of a convolution",
    "norm": "gain or shift of a module without matrices",
    "output bias": "the bias of the last layer",
    "bias": "the bias of a module with matrices",
    "other": "anything else",
}


@dataclass(frozen=True)
class Site:
    """A tensor and the module that owns it."""

    name: str
    shape: tuple[int, ...]
    module: nn.Module

    @property
    def is_vector(self) -> bool:
        """Whether it has fewer than two dimensions."""
        return len(self.shape) < 2

    @property
    def owner(self) -> str:
        """The path of its module."""
        return self.name.rpartition(".")[0]

    @property
    def is_transposed(self) -> bool:
        """Whether it is an (in, out) matrix where PyTorch's linear layers have (out, in)."""
        return not self.is_vector and is_transposed(self.module)

    def cut(self, axis: int, region: Region, counter: str = "") -> Cut:
        """``region`` of one axis."""
        before = self.shape[:axis]
        after = self.shape[axis + 1 :]
        index = (*whole(before), *region.index, *whole(after))
        axes = tuple(axis + a for a in region.axes)
        view = (*before, *region.view, *after)
        part = Part(self.name, self.shape, view, index, axes)
        per_label = part.num_blocks // len(region.labels)
        return Cut((part,), self.name, region.labels, counter, per_label)

    def along(
        self,
        axes: tuple[int, ...],
        counter: str,
        view: tuple[int, ...] | None = None,
    ) -> Cut:
        """The whole tensor, a block at each place of ``axes`` (of ``view``)."""
        view = view or self.shape
        part = Part(self.name, self.shape, view, whole(view), axes)
        return Cut((part,), self.name, counter=counter, per_label=part.num_blocks)

    def uncut(self) -> Cut:
        """The whole tensor as one block."""
        return together([self], self.name)


def together(sites: Iterable[Site], name: str) -> Cut:
    """One block of all of ``sites``."""
    parts = []
    for site in sites:
        parts.append(Part(site.name, site.shape, site.shape, whole(site.shape)))
    return Cut(tuple(parts), name)


class Anatomy:
    """The tensors of a model, and what each is.

    Attributes: ``all`` tensors; ``sites``, those that require grad; ``notes`` on what
    nothing tells.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.notes: list[str] = []
        self.all: list[Site] = []
        self.sites: list[Site] = []
        # named_parameters gives a tied tensor once, under its first name
        for name, p in model.named_parameters():
            if not p.numel():  # no block can lie in it
                continue
            module = model.get_submodule(name.rpartition(".")[0])
            site = Site(name, tuple(p.shape), module)
            self.all.append(site)
            if p.requires_grad:
                self.sites.append(site)
        self._output_axes: dict[tuple[object, ...], dict[str, int]] = {}

    @cached_property
    def attention(self) -> Attention:
        """The model's attention modules; looking for them runs some of its modules."""
        attention = find_attention(self.model)
        self.notes += attention.notes
        return attention

    @property
    def is_transformer(self) -> bool:
        """Whether there is attention, of known layout or not."""
        return bool(self.attention.projections or self.attention.unread)

    def layer_of(self, path: str) -> int | None:
        """The number of the transformer layer around the module or parameter at ``path``."""
        for number, layer in enumerate(self.attention.layers):
            if is_inside(path, layer):
                return number
        return None

    @cached_property
    def kinds(self) -> dict[str, str]:
        """{parameter name: its kind of KINDS}; a fused tensor's are joined by "/"."""
        kinds = {site.name: self._kind(site) for site in self.all}
        outputs = self._outputs(kinds)
        kinds |= {site.name: "output" for site in outputs}
        # The bias belongs to the last layer if its matrix does, so matrices come first.
        owners = {site.module for site in outputs}
        for site in self.all:
            if kinds[site.name] == "bias" and site.module in owners:
                kinds[site.name] = "output bias"
        return kinds

    def row_axes(self, site: Site) -> tuple[int, ...]:
        """The axes that enumerate outputs (experts before neurons); () if not known."""
        if site.is_vector:
            return ()
        if site.is_transposed:
            return (1,)
        if isinstance(site.module, (*WITH_ROWS, *EMBEDDINGS)):
            return (0,)
        leaf = site.name.rpartition(".")[2]
        axis = self._unknown_axes(site.module).get(leaf)
        if axis is None:
            return ()
        return (0, axis) if len(site.shape) == 3 else (axis,)

    def _outputs(self, kinds: dict[str, str]) -> list[Site]:
        """The matrices of the last layer; [] where a table is tied to it."""
        if "tied" in kinds.values():
            return []
        tokens = {site.shape[0] for site in self._of_kind("embedding", kinds)}
        matrices = []
        outputs = []
        for site in self._of_kind("mlp", kinds):
            if self.layer_of(site.name) is not None:
                continue
            matrices.append(site)
            rows = site.shape[self.row_axes(site)[-1]]
            if rows in tokens:
                outputs.append(site)
        if outputs and self.attention.layers:
            return outputs
        # Without known layers a row count may agree by accident, so one matrix is all there is.
        last = outputs or matrices or self._of_kind("conv", kinds)
        return last[-1:]

    def _of_kind(self, kind: str, kinds: dict[str, str]) -> list[Site]:
        return [site for site in self.all if kinds[site.name] == kind]

    def _kind(self, site: Site) -> str:
        projection = self.attention.projections.get(site.name)
        if projection is not None and not site.is_vector and any(projection.roles):
            return "/".join(projection.roles)
        # A tied table belongs to an nn.Embedding as well, so it is asked for first.
        if site.name in self._tied:
            return "tied"
        if isinstance(site.module, EMBEDDINGS):
            return "embedding" if site.name in self._tables else "position"
        if self._is_vector_of_its_module(site):
            return self._vector_kind(site)
        return self._matrix_kind(site)

    @staticmethod
    def _is_vector_of_its_module(site: Site) -> bool:
        """Also a matrix beside 3-D tensors: a vector an expert."""
        if len(site.shape) == 1:
            return True
        siblings = site.module.parameters(recurse=False)
        return len(site.shape) == 2 and any(p.ndim == 3 for p in siblings)

    def _vector_kind(self, site: Site) -> str:
        module = site.module
        is_known = isinstance(module, MATRICES) or is_transposed(module)
        if is_known or self._unknown_axes(module):
            return "bias"
        return "norm" if _is_leaf(module) else "other"

    def _matrix_kind(self, site: Site) -> str:
        module = site.module
        if isinstance(module, CONVOLUTIONS):
            return "conv"
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return "recurrent"
        if any(is_inside(site.name, path) for path in self.attention.unread):
            return "unread"
        if isinstance(module, nn.Linear | nn.Bilinear) or is_transposed(module):
            return "mlp"
        if self.row_axes(site):
            return "experts" if len(site.shape) == 3 else "mlp"
        return self._loose_kind(site)

    @staticmethod
    def _loose_kind(site: Site) -> str:
        """The kind of a tensor that is no matrix: one (1, T, d) may be added to tokens."""
        # The shape in which vision transformers hold what they add to, or put before, the tokens.
        may_be_added = len(site.shape) == 3 and site.shape[0] == 1
        if not may_be_added or _is_leaf(site.module):
            return "other"
        return "class token" if site.shape[1] == 1 else "position"

    @cached_property
    def _tables(self) -> list[str]:
        """Names of the tables looked up by token."""
        tables = {
            site.name: site.module
            for site in self.all
            if isinstance(site.module, EMBEDDINGS) and self.layer_of(site.name) is None
        }
        outputs = {
            module.out_features
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and self.layer_of(path) is None
        }
        layers = self.attention.layers
        first = self.model.get_submodule(layers[0]) if layers else None
        return token_tables(self.model, tables, outputs, first)

    @cached_property
    def _tied(self) -> set[str]:
        """Names of the tensors that a table shares with a linear layer."""
        # The same object: equal values may be chance or initialisation.
        modules = list(self.model.modules())
        in_tables = {id(m.weight) for m in modules if isinstance(m, EMBEDDINGS)}
        in_linears = {id(m.weight) for m in modules if isinstance(m, nn.Linear)}
        shared = in_tables & in_linears
        return {name for name, p in self.model.named_parameters() if id(p) in shared}

    def _unknown_axes(self, module: nn.Module) -> dict[str, int]:
        """Output axes of a module of unknown class, by the names of its tensors.

        Modules alike in class and shapes are run once.
        """
        if isinstance(module, (*MATRICES, *EMBEDDINGS)) or is_transposed(module):
            return {}
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
        key = (type(module), shapes)
        if key not in self._output_axes:
            self._output_axes[key] = output_axes(module)
        return self._output_axes[key]


def _is_leaf(module: nn.Module) -> bool:
    """Whether all its tensors are its own, none an inner module's."""
    directly = sum(1 for _ in module.parameters(recurse=False))
    return directly == sum(1 for _ in module.parameters())
