"""Where query, key, value and heads lie in the tensors of an attention module.

A fused tensor's layout does not show in its shape: (3, H, h) and (H, 3, h) have equally many features.
``nn.MultiheadAttention`` states its layout; any other module is asked by running a copy on a few random tokens, with
leaves of autograd in place of its linear layers. A *query* feature acts on its own position only; *key* and *value*
features act on other positions too; where all tokens are alike the result depends on *value* alone (a mean of equal
values is that value, whatever the weights); the query features behind one feature of the attention's result are one
head. Names and values of parameters play no part. What cannot be told so is left whole, with a note.

Letters: T tokens, d features of the attention's result, H heads, G key/value heads, h head size.
"""

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, compress, groupby, islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-6  # relative; derivatives below it are rounding (some models compute in float32 whatever comes in)
TOKENS = ((3,), (2, 2))  # tokens to try: a sequence, an image
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
    """The feature axis of one tensor: G groups one after the other, in each every role's heads side by side."""

    roles: tuple[str, ...]  # of "q", "k", "v", "o"
    sizes: tuple[int, ...]  # features of each role, over all groups
    head_size: int = 0  # 0 unless every role is known to consist of whole heads
    groups: int = 1  # more only where head_size is known

    def regions(self, by: str, chosen: Sequence[str]) -> Iterator[Region]:
        """Cuts of the ``chosen`` roles by role (``by=""``), by role and head ("head", if ``head_size`` is known) or by
        role and feature ("row").

        Neighbouring roles are cut together if all roles are of equal size.
        """
        unit = self.head_size if by == "head" or self.groups > 1 else 1
        counts = [
            size // (self.groups * unit) for size in self.sizes
        ]  # units of each role in a group
        positions = [self.roles.index(role) for role in chosen]
        if len(set(counts)) == 1:
            view = (self.groups, len(counts), counts[0], unit)
            together = [first == last + 1 for last, first in pairwise(positions)]
            ends = [0, *(i for i, joined in enumerate(together, 1) if not joined), len(positions)]
            runs = [positions[first:last] for first, last in pairwise(ends)]
            spans = [
                (slice(run[0], run[-1] + 1), slice(0, counts[0]), [self.roles[i] for i in run])
                for run in runs
            ]
        else:
            view, stops = (self.groups, 1, sum(counts), unit), list(accumulate(counts))
            spans = [
                (slice(0, 1), slice(stops[i] - counts[i], stops[i]), [self.roles[i]])
                for i in positions
            ]
        kept = [size > 1 for size in view]
        axes = {"": (1,), "head": (1, 0, 2), "row": (1, 0, 2, 3)}[by]
        axes = tuple(sum(kept[:axis]) for axis in axes if kept[axis])
        for roles, units, names in spans:
            index = (slice(0, view[0]), roles, units, slice(0, view[3]))
            labels = tuple(names) if len(self.roles) > 1 else ("",)
            yield Region(tuple(compress(view, kept)), tuple(compress(index, kept)), axes, labels)

    def heads(self) -> Region:
        """Every head of every role in the order in which they lie, named by role and head if there are several roles.

        For those whose ``head_size`` is known.
        """
        view = (sum(self.sizes) // self.head_size, self.head_size)
        counts = [
            size // (self.groups * self.head_size) for size in self.sizes
        ]  # heads of each role in a group
        labels = tuple(
            f"{role},head={group * count + head}"
            for group in range(self.groups)
            for role, count in zip(self.roles, counts, strict=True)
            for head in range(count)
        )
        return Region(view, whole(view), (0,), labels if len(self.roles) > 1 else ("",))


def whole(view: tuple[int, ...]) -> tuple[slice, ...]:
    """The index that picks everything of ``view``."""
    return tuple(slice(0, size) for size in view)


@dataclass(frozen=True)
class Attention:
    """What was found in a model."""

    projections: dict[str, Projection]  # by parameter name
    layers: tuple[str, ...]  # paths of the transformer layers
    unread: tuple[
        str, ...
    ]  # paths of modules that look like attention, but whose layout nothing tells
    notes: tuple[str, ...]  # on these


def is_transposed(module: nn.Module) -> bool:
    """Whether ``module`` is the (in, out) linear layer of HF GPT-2, known by its class (no import of transformers)."""
    return hasattr(module, "nf") and any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def _features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of an ``nn.Linear`` or a transposed ``Conv1D``; (0, 0) of anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (*module.get_parameter("weight").shape,) if is_transposed(module) else (0, 0)


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
            linears = {
                name: inner
                for name, inner in module.named_modules()
                if name and _features(inner)[1]
            }
            told = all(join(path, f"{name}.weight") in projections for name in linears)
            layout = (
                {}
                if told or not _may_be_attention(module, linears)
                else _by_behaviour(module, linears)
            )
        if layout:
            found.append(path)
            # Outermost modules come first and know most: BERT's output projection lies beside its attention module.
            projections = {
                join(path, name): projection for name, projection in layout.items()
            } | projections
    marked = (
        path
        for path, module in model.named_modules()
        if any(name in vars(module) for name in ATTENTION_MARKS)
    )
    unknown = [
        path
        for path in marked
        if not any(is_inside(path, other) or is_inside(other, path) for other in found)
    ]
    problem = "its query/key/value layout is not recognised, so its tensors are not split"
    notes = tuple(f"{path or '(root)'}: {problem}" for path in unknown)
    return Attention(
        projections, _transformer_layers(model, found + unknown), tuple(unknown), notes
    )


def _transformer_layers(model: nn.Module, attention: list[str]) -> tuple[str, ...]:
    """Members of the innermost lists of modules in which every member holds one of the ``attention`` modules."""
    stacks: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        members = [join(path, name) for name, _ in module.named_children()]
        holding = [
            member for member in members if any(is_inside(inner, member) for inner in attention)
        ]
        if isinstance(module, nn.Sequential | nn.ModuleList) and members and holding == members:
            stacks[path] = members
    stacks = {path: members for path, members in stacks.items() if len(members) > 1} or stacks
    innermost = (
        path
        for path in stacks
        if not any(other != path and is_inside(other, path) for other in stacks)
    )
    return tuple(member for path in innermost for member in stacks[path])


def _of_torch(module: nn.MultiheadAttention) -> dict[str, Projection]:
    width, size = module.embed_dim, module.head_dim
    fused = Projection(("q", "k", "v"), (width,) * 3, size)
    separate = {f"{role}_proj_weight": Projection((role,), (width,), size) for role in "qkv"}
    output = {"out_proj.weight": Projection(("o",), (width,), size)}
    return {"in_proj_weight": fused, "in_proj_bias": fused} | separate | output


def _may_be_attention(module: nn.Module, linears: dict[str, nn.Module]) -> bool:
    inside = sum(p.numel() for linear in linears.values() for p in linear.parameters())
    return 1 < len(linears) <= MOST_LINEARS and 2 * inside > sum(
        p.numel() for p in module.parameters()
    )


class _Leaf(nn.Module):
    """Stands in for a linear layer: keeps its input and gives a random leaf (1, ..., out), constant if ``alike``."""

    def __init__(
        self,
        features: tuple[int, int],
        calls: list["_Leaf"],
        generator: torch.Generator,
        alike: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = features
        self.calls, self.generator, self.alike = calls, generator, alike
        # What a forward that takes the tensors themselves finds; only their identity counts.
        self.weight, self.bias = (
            torch.zeros(()).expand(self.out_features, self.in_features),
            torch.zeros(features[1]),
        )

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self)
        self.input = x
        # Small, so that the softmax is far from saturated even where scores are not scaled (T5).
        shape = (
            (*(1 for _ in x.shape[:-1]), self.out_features)
            if self.alike
            else (*x.shape[:-1], self.out_features)
        )
        leaf = 0.3 * torch.randn(shape, generator=self.generator, dtype=x.dtype)
        self.output = leaf.expand(*x.shape[:-1], -1).clone().requires_grad_()
        return self.output.clone()  # which the module may overwrite


class _Functional(TorchFunctionMode):
    """Sends ``F.linear`` on the weight of a stand-in to the stand-in: torchvision's Swin never calls its layers."""

    def __init__(self, leaves: Iterable[_Leaf]) -> None:
        super().__init__()
        self.leaves = {id(leaf.weight): leaf for leaf in leaves}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and len(args) > 1 and id(args[1]) in self.leaves:
            return self.leaves[id(args[1])](args[0])
        return func(*args, **(kwargs or {}))


class _Trial:
    """A run of a copy of ``module`` on random tokens: the leaves, and the result that depends on them."""

    def __init__(
        self, module: nn.Module, linears: dict[str, nn.Module], shape: tuple[int, ...], alike: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        calls: list[_Leaf] = []
        stand_ins = {
            name: _Leaf(_features(linear), calls, generator, alike)
            for name, linear in linears.items()
        }
        twin = copy.deepcopy(module, {id(linears[name]): leaf for name, leaf in stand_ins.items()})
        twin = twin.to("cpu", torch.float64).eval().requires_grad_(False)
        for (
            parameter
        ) in twin.parameters():  # a gain that starts at zero would hide what it multiplies
            parameter.uniform_(0.5, 1.5, generator=generator)
        width = _features(next(iter(linears.values())))[0]
        x = torch.randn(1, *shape, width, generator=generator, dtype=torch.float64)
        with _Functional(stand_ins.values()):
            result = _forward(twin, x)
        # The output projection is the linear layer called last, if what it takes depends on the others.
        last = calls[-1] if calls[-1].input.requires_grad else None
        self.output = next(
            (name for name, leaf in stand_ins.items() if leaf is last), ""
        )  # its name, if there is one
        self.result = (last.input if last else result).flatten(1, -2)  # (1, T, d)
        leaves = {
            name: leaf.output
            for name, leaf in stand_ins.items()
            if leaf in calls and leaf is not last
        }
        # Others see no tokens (Swin V2 computes its position bias by linear layers).
        self.leaves = {
            name: y for name, y in leaves.items() if y.shape[:-1].numel() == self.result.shape[1]
        }

    def reach(self, weights: Tensor) -> Tensor:
        """|d (last token's result @ weights) / d leaf|, (T, F) with the F features of all leaves side by side."""
        leaves = list(self.leaves.values())
        scalar = self.result[0, -1] @ weights
        gradients = torch.autograd.grad(
            scalar, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([gradient.flatten(1, -2) for gradient in gradients], dim=-1)[0].abs()


def _by_behaviour(module: nn.Module, linears: dict[str, nn.Module]) -> dict[str, Projection]:
    """Layouts of ``linears`` (paths inside ``module``) from what their outputs act on; empty if it is no attention."""
    for shape in TOKENS:
        try:
            # The caller's autograd mode, default device, warning filter and random state neither matter nor change.
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.device("cpu"),
                torch.random.fork_rng([]),
            ):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    several, alike = (
                        _Trial(module, linears, shape, alike) for alike in (False, True)
                    )
                roles = _feature_roles(several, alike)
                size = _head_size(several, roles)
            break
        except Exception:  # a foreign forward may fail in any way on input that it does not expect
            continue
    else:
        return {}
    features = iter(roles)
    by_name = {
        name: list(islice(features, leaf.shape[-1])) for name, leaf in several.leaves.items()
    }
    layout = {name: p for name, inside in by_name.items() if (p := _from_roles(inside, size))}
    if not {"q", "k", "v"} <= {role for projection in layout.values() for role in projection.roles}:
        return {}
    layout = {f"{name}.{kind}": p for name, p in layout.items() for kind in ("weight", "bias")}
    output = Projection(("o",), (several.result.shape[-1],), size)
    return layout | ({f"{several.output}.weight": output} if several.output else {})


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    """First output of ``module.forward`` (past any compiled call) on tokens x, with neutral other arguments."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    ones, zeros = torch.ones(1, x.shape[1], 1, dtype=x.dtype), torch.zeros(1, 1, 1, dtype=x.dtype)
    # What the transformers library calls its arguments: no rotation (cos, sin), positions, and tokens to attend to.
    known = {
        "position_embeddings": (ones, 0 * ones),
        "position_ids": torch.arange(x.shape[1])[None],
    }
    usual = {p.name: known[p.name] for p in parameters if p.name in known}
    for extra in ({}, {p.name: x for p in parameters if p.name == "encoder_hidden_states"}):
        for value in (None, x, zeros):
            with suppress(Exception):  # the next arguments may fit
                result = module.forward(x, **dict.fromkeys(required, value) | usual | extra)
                while not isinstance(result, Tensor):
                    result = result[0]
                return result
    raise ValueError(f"{type(module).__name__} takes no such arguments")


def _feature_roles(several: _Trial, alike: _Trial) -> list[str]:
    """The role of every feature of every leaf: "q", "k", "v", or "" for anything else."""
    # Four random combinations of result features, so that no derivative vanishes by accident.
    weights = torch.randn(
        4, several.result.shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    among = torch.stack([several.reach(w) for w in weights]).amax(0)
    alone = torch.stack([alike.reach(w) for w in weights]).amax(0)
    tolerance = TOLERANCE * among.max()
    codes = (
        4 * (among[-1] > tolerance) + 2 * (among[:-1].amax(0) > tolerance) + (alone[-1] > tolerance)
    )
    return [{4: "q", 6: "k", 7: "v"}.get(code, "") for code in codes.tolist()]


def _head_size(trial: _Trial, roles: list[str]) -> int:
    """Features of one head; 0 unless heads are equal runs of neighbouring features in query and result alike."""
    width = trial.result.shape[-1]
    is_query = torch.tensor([role == "q" for role in roles])

    def queries_behind(feature: int) -> list[int]:
        reach = trial.reach((torch.arange(width) == feature).double())[-1]
        return (reach[is_query] > TOLERANCE * reach.max()).nonzero().flatten().tolist()

    size = len(queries_behind(0))
    if not size or width % size or int(is_query.sum()) != width:
        return 0
    corners = (
        0,
        size - 1,
        width - size,
        width - 1,
    )  # first and last feature of the first and the last head
    return (
        size
        if all(queries_behind(f) == list(range(f - f % size, f - f % size + size)) for f in corners)
        else 0
    )


def _from_roles(roles: list[str], head_size: int) -> Projection | None:
    runs = [(role, len(list(run))) for role, run in groupby(roles)]
    names, sizes = zip(*runs, strict=True)
    count = len(set(names))
    groups = len(runs) // count
    divides = head_size > 0 and all(size % head_size == 0 for size in sizes)
    grouped = divides and names[:3] == ("q", "k", "v") and sizes[1] == sizes[2] == head_size
    if "" in names or runs != runs[:count] * groups or (groups > 1 and not grouped):
        return None
    return Projection(
        names[:count], tuple(n * groups for n in sizes[:count]), head_size if divides else 0, groups
    )
