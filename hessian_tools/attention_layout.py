"""Where query, key, value and heads lie in the tensors of an attention module.

A fused tensor's layout does not show in its shape: (3, H, h) and (H, 3, h) have equally many features.
``nn.MultiheadAttention`` states its layout; any other module is asked by running a copy on a few random tokens, with
leaves of autograd in place of its linear layers. A *query* feature acts on its own position only; *key* and *value*
features act on other positions too; a token that sees only itself depends on *value* alone (softmax over one entry is
constant); the query features behind one feature of the attention's result are one head. Names and values of parameters
play no part. What cannot be told so is left whole, with a note.

Letters: T tokens, d features of the attention's result, H heads, G key/value heads, h head size.
"""

import copy
import inspect
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6  # relative; derivatives below it are rounding (some models compute in float32 whatever comes in)
MOST_LINEARS = 8  # a module with more linear layers than that is no single attention
# Attributes that mark a module as attention; they only decide whether one that could not be told deserves a note.
ATTENTION_MARKS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "head_dim")


@dataclass(frozen=True)
class Region:
    """A cut of one axis of features: ``view`` splits the axis, ``index`` picks from it, ``axes`` enumerate blocks."""

    view: tuple[int, ...]
    index: tuple[slice, ...]  # one a view axis
    axes: tuple[int, ...]
    labels: tuple[str, ...] = ("",)  # where there are several, the first of ``axes`` runs over them


@dataclass(frozen=True)
class Projection:
    """The feature axis of one tensor."""

    roles: tuple[str, ...]  # of "q", "k", "v", "o"
    sizes: tuple[int, ...]  # features of each role
    head_size: int = 0  # 0 where it is unknown
    grouped: bool = False  # (G, H/G + 2, h), a group's queries, key and value side by side; else role after role

    @property
    def divides(self) -> bool:
        """Whether every role consists of whole heads."""
        return self.head_size > 0 and all(size % self.head_size == 0 for size in self.sizes)

    def regions(self, by: str) -> Iterator[Region]:
        """Cuts by role (``by=""``), role and head ("head", only if :attr:`divides`) or role and feature ("row")."""
        labels = self.roles if len(self.roles) > 1 else ("",)
        if self.grouped:
            yield from self._grouped(by)
            return
        unit = self.head_size if by == "head" else 1
        tail = (unit,) if unit > 1 else ()
        if len(set(self.sizes)) == 1:
            view = (*((len(labels),) if len(labels) > 1 else ()), self.sizes[0] // unit, *tail)
            axes = tuple(range(len(view) - len(tail)))
            yield Region(view, whole(view), axes if by else axes[:-1], labels)
            return
        start = 0
        for label, size in zip(labels, self.sizes, strict=True):
            index = (slice(start // unit, (start + size) // unit), *whole(tail))
            yield Region((sum(self.sizes) // unit, *tail), index, (0,) if by else (), (label,))
            start += size

    def _grouped(self, by: str) -> Iterator[Region]:
        queries = self.sizes[0] // self.sizes[1]
        view = (self.sizes[1] // self.head_size, queries + 2, self.head_size)
        if queries == 1:
            yield Region(view, whole(view), {"": (1,), "head": (1, 0), "row": (1, 0, 2)}[by], self.roles)
            return
        axes = {"": (), "head": (0, 1), "row": (0, 1, 2)}[by]
        for label, part in zip(self.roles, (slice(0, queries), slice(-2, -1), slice(-1, None)), strict=True):
            first, last, _ = part.indices(queries + 2)
            yield Region(view, (slice(0, view[0]), slice(first, last), slice(0, view[2])), axes, (label,))


def whole(view: tuple[int, ...]) -> tuple[slice, ...]:
    """The index that picks everything of ``view``."""
    return tuple(slice(0, size) for size in view)


@dataclass(frozen=True)
class Attention:
    """What was found in a model: ``projections`` by parameter name, and attention modules by path."""

    projections: dict[str, Projection]
    modules: tuple[str, ...]
    unknown: tuple[str, ...]  # modules that look like attention, but whose layout nothing tells


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` is the (in, out) linear layer of HF GPT-2, known by its class (no import of transformers)."""
    weight = getattr(module, "weight", None)
    named = any(base.__name__ == "Conv1D" for base in type(module).__mro__)
    return named and isinstance(weight, Tensor) and weight.ndim == 2 and getattr(module, "nf", None) == weight.shape[1]


def _features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of an ``nn.Linear`` or a transposed ``Conv1D``; (0, 0) of anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight if is_transposed(module) else None
    return (int(weight.shape[0]), int(weight.shape[1])) if isinstance(weight, Tensor) else (0, 0)


def join(path: str, name: str) -> str:
    """The full name of ``name`` inside the module at ``path`` ("" is the model itself)."""
    return f"{path}.{name}" if path else name


def is_inside(path: str, outer: str) -> bool:
    """Whether the module (or parameter) at ``path`` is the one at ``outer`` or lies in it."""
    return not outer or path == outer or path.startswith(f"{outer}.")


def find_attention(model: nn.Module) -> Attention:
    """Every attention module of ``model`` whose type or behaviour tells its layout."""
    projections: dict[str, Projection] = {}
    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            layout = _of_torch(module)
        else:
            linears = {name: inner for name, inner in module.named_modules() if name and _features(inner)[1]}
            told = all(join(path, f"{name}.weight") in projections for name in linears)
            layout = {} if told or not _may_be_attention(module, linears) else _by_behaviour(module, linears)
        if layout:
            found.append(path)
            # Outermost modules come first and know most: BERT's output projection lies beside its attention module.
            projections = {join(path, name): projection for name, projection in layout.items()} | projections
    marked = (path for path, module in model.named_modules() if any(name in vars(module) for name in ATTENTION_MARKS))
    unknown = (path for path in marked if not any(is_inside(path, other) or is_inside(other, path) for other in found))
    return Attention(projections, tuple(found), tuple(unknown))


def transformer_layers(model: nn.Module, attention: Attention) -> tuple[str, ...]:
    """Paths of the transformer layers: members of innermost lists in which every member holds attention."""
    stacks: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        members = [join(path, name) for name, _ in module.named_children()]
        holding = [m for m in members if any(is_inside(a, m) for a in attention.modules + attention.unknown)]
        if isinstance(module, nn.Sequential | nn.ModuleList) and members and holding == members:
            stacks[path] = members
    stacks = {path: members for path, members in stacks.items() if len(members) > 1} or stacks
    innermost = (path for path in stacks if not any(other != path and is_inside(other, path) for other in stacks))
    return tuple(member for path in innermost for member in stacks[path])


def _of_torch(module: nn.MultiheadAttention) -> dict[str, Projection]:
    width, size = module.embed_dim, module.head_dim
    fused = Projection(("q", "k", "v"), (width,) * 3, size)
    separate = {f"{role}_proj_weight": Projection((role,), (width,), size) for role in "qkv"}
    output = {"out_proj.weight": Projection(("o",), (width,), size)}
    return {"in_proj_weight": fused, "in_proj_bias": fused} | separate | output


def _may_be_attention(module: nn.Module, linears: dict[str, nn.Module]) -> bool:
    inside = sum(p.numel() for linear in linears.values() for p in linear.parameters())
    return 1 < len(linears) <= MOST_LINEARS and 2 * inside > sum(p.numel() for p in module.parameters())


class _Leaf(nn.Module):
    """Stands in for a linear layer: keeps its input and gives a random leaf, (1, T, out)."""

    def __init__(self, features: tuple[int, int], calls: list["_Leaf"], generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features = features
        self.calls, self.generator = calls, generator

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self)
        self.input = x
        # Small, so that the softmax is far from saturated even where scores are not scaled (T5).
        leaf = 0.3 * torch.randn(*x.shape[:-1], self.out_features, generator=self.generator, dtype=x.dtype)
        self.output = leaf.requires_grad_()
        return self.output


@dataclass(frozen=True)
class _Trial:
    leaves: dict[str, Tensor]  # (1, T, out) by name of the linear layer
    result: Tensor  # (1, T, d)
    output: str  # name of the linear layer that takes the result, or ""

    def reach(self, weights: Tensor) -> dict[str, Tensor]:
        """|d (last token's result @ weights) / d leaf|, (T, out) each."""
        leaves = list(self.leaves.values())
        scalar = self.result[0, -1] @ weights
        gradients = torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        return {name: gradient[0].abs() for name, gradient in zip(self.leaves, gradients, strict=True)}


def _by_behaviour(module: nn.Module, linears: dict[str, nn.Module]) -> dict[str, Projection]:
    """Layouts of ``linears`` (paths inside ``module``) from what their outputs act on; empty if it is no attention."""
    try:
        # The caller's autograd mode, default device, warning filter and random state neither matter nor change.
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                several, single = _run(module, linears, tokens=3), _run(module, linears, tokens=1)
            roles = _feature_roles(several, single)
            size = _head_size(several, roles)
    except Exception:  # a foreign forward may fail in any way on input that it does not expect
        return {}
    layout = {name: p for name in roles if (p := _from_roles(roles[name], size)) is not None}
    if not {"q", "k", "v"} <= {role for projection in layout.values() for role in projection.roles}:
        return {}
    layout = {f"{name}.{kind}": p for name, p in layout.items() for kind in ("weight", "bias")}
    output = Projection(("o",), (several.result.shape[-1],), size)
    return layout | ({f"{several.output}.weight": output} if several.output else {})


def _run(module: nn.Module, linears: dict[str, nn.Module], tokens: int) -> _Trial:
    generator = torch.Generator().manual_seed(0)
    calls: list[_Leaf] = []
    stand_ins = {name: _Leaf(_features(linear), calls, generator) for name, linear in linears.items()}
    twin = copy.deepcopy(module, {id(linears[name]): leaf for name, leaf in stand_ins.items()})
    twin = twin.to("cpu", torch.float64).eval().requires_grad_(False)
    for parameter in twin.parameters():  # a gain that starts at zero would hide what it multiplies
        parameter.uniform_(0.5, 1.5, generator=generator)
    width = _features(next(iter(linears.values())))[0]
    result = _forward(twin, torch.randn(1, tokens, width, generator=generator, dtype=torch.float64))
    # The output projection is the linear layer called last, if what it takes depends on the others.
    last = calls[-1] if calls[-1].input.requires_grad else None
    leaves = {name: leaf.output for name, leaf in stand_ins.items() if leaf in calls and leaf is not last}
    output = next((name for name, leaf in stand_ins.items() if leaf is last), "")
    return _Trial(leaves, last.input if last else result, output)


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    """First output of ``module.forward`` (past any compiled call) on tokens x, with neutral other arguments."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    ones, zeros = torch.ones(1, x.shape[1], 1, dtype=x.dtype), torch.zeros(1, 1, 1, dtype=x.dtype)
    # What the transformers library calls its arguments: no rotation (cos, sin), positions, and tokens to attend to.
    known = {"position_embeddings": (ones, 0 * ones), "position_ids": torch.arange(x.shape[1])[None]}
    usual = {p.name: known[p.name] for p in parameters if p.name in known}
    across = {p.name: x for p in parameters if p.name == "encoder_hidden_states"}
    attempts = [dict.fromkeys(required, value) | usual | extra for extra in ({}, across) for value in (None, x, zeros)]
    for arguments in attempts:
        try:
            result = module.forward(x, **arguments)
            break
        except Exception as error:
            failure = error
    else:
        raise failure
    while not isinstance(result, Tensor):
        result = result[0]
    return result


def _feature_roles(several: _Trial, single: _Trial) -> dict[str, list[str]]:
    """The role of every feature of every leaf: "q", "k", "v", or "" for anything else."""
    # Four random combinations of result features, so that no derivative vanishes by accident.
    weights = torch.randn(4, several.result.shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    among = [several.reach(w) for w in weights]
    alone = [single.reach(w) for w in weights]
    tolerance = TOLERANCE * max(float(reach.max()) for reach in among[0].values())
    roles = {}
    for name in several.leaves:
        strength = torch.stack([reach[name] for reach in among]).amax(0)
        by_itself = torch.stack([reach[name] for reach in alone]).amax(0)[-1] > tolerance
        codes = 4 * (strength[-1] > tolerance) + 2 * (strength[:-1].amax(0) > tolerance) + by_itself
        roles[name] = [{4: "q", 6: "k", 7: "v"}.get(code, "") for code in codes.tolist()]
    return roles


def _head_size(trial: _Trial, roles: dict[str, list[str]]) -> int:
    """Features of one head; 0 unless heads are equal runs of neighbouring features in query and result alike."""
    width = trial.result.shape[-1]
    is_query = torch.tensor([role == "q" for name in trial.leaves for role in roles[name]])

    def queries_behind(feature: int) -> list[int]:
        reach = torch.cat([r[-1] for r in trial.reach((torch.arange(width) == feature).double()).values()])
        return (reach[is_query] > TOLERANCE * reach.max()).nonzero().flatten().tolist()

    size = len(queries_behind(0))
    if not size or width % size or int(is_query.sum()) != width:
        return 0
    last = width - size
    checks = {0: 0, size - 1: 0, last: last, width - 1: last}  # feature: the first query of its head
    return size if all(queries_behind(f) == list(range(at, at + size)) for f, at in checks.items()) else 0


def _from_roles(roles: list[str], head_size: int) -> Projection | None:
    runs = [(role, len(list(group))) for role, group in itertools.groupby(roles)]
    names, sizes = tuple(role for role, _ in runs), tuple(size for _, size in runs)
    if "" in names:
        return None
    if len(set(names)) == len(names):
        return Projection(names, sizes, head_size)
    groups = len(runs) // 3
    periodic = runs == runs[:3] * groups and names[:3] == ("q", "k", "v")
    if periodic and sizes[1] == sizes[2] == head_size and sizes[0] % head_size == 0:
        return Projection(names[:3], tuple(size * groups for size in sizes[:3]), head_size, grouped=True)
    return None
