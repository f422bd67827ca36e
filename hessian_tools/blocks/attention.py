"""The attention modules of a model, and where query, key, value and heads lie in their tensors.

A fused tensor's layout does not show in its shape: (3, H, h) and (H, 3, h) have equally many
features. ``nn.MultiheadAttention`` states its layout; any other module is asked by running it
(:mod:`hessian_tools.blocks.behaviour`). Names and values of parameters play no part. What nothing
tells is left whole, with a note.
"""

from dataclasses import dataclass

from torch import nn

from hessian_tools.blocks.behaviour import layout_by_behaviour
from hessian_tools.blocks.projection import Projection, linear_features

MOST_LINEARS = 8  # a module with more linear layers than that is no single attention
# Attributes that mark a module as attention; they only decide whether one whose layout nothing
# tells deserves a note.
ATTENTION_MARKS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "head_dim")


@dataclass(frozen=True)
class Attention:
    """The attention modules of a model."""

    projections: dict[str, Projection]  # by parameter name
    layers: tuple[str, ...]  # paths of the transformer layers
    unread: tuple[str, ...]  # paths of modules that look like attention, but of unknown layout
    notes: tuple[str, ...]  # on these


def join(path: str, name: str) -> str:
    """The full name of ``name`` inside the module at ``path`` ("" is the model itself)."""
    return f"{path}.{name}" if path else name


def is_inside(path: str, outer: str) -> bool:
    """Whether the module (or parameter) at ``path`` is the one at ``outer`` or lies in it."""
    return not outer or path == outer or path.startswith(f"{outer}.")


def find_attention(model: nn.Module) -> Attention:
    """Every attention module of ``model`` whose type or behaviour tells its layout."""
    projections: dict[str, Projection] = {}
    read: list[str] = []
    for path, module in model.named_modules():
        layout = _layout(path, module, projections)
        if layout:
            read.append(path)
            # Outermost modules come first and know most: BERT's output projection lies beside its
            # attention module. So what is known already is kept.
            inner = {join(path, name): projection for name, projection in layout.items()}
            projections = inner | projections
    unread = _marked_but_unread(model, read)
    problem = "its query/key/value layout is not recognised, so its tensors are not split"
    notes = tuple(f"{path or '(root)'}: {problem}" for path in unread)
    layers = _transformer_layers(model, read + unread)
    return Attention(projections, layers, tuple(unread), notes)


def _layout(
    path: str,
    module: nn.Module,
    known: dict[str, Projection],
) -> dict[str, Projection]:
    """The projections of one module by their names inside it; empty if it is no attention."""
    if isinstance(module, nn.MultiheadAttention):
        return _of_torch(module)
    linears = {}
    for name, inner in module.named_modules():
        _, outputs = linear_features(inner)
        if name and outputs:
            linears[name] = inner
    is_known = all(join(path, f"{name}.weight") in known for name in linears)
    if is_known or not _may_be_attention(module, linears):
        return {}
    return layout_by_behaviour(module, linears)


def _marked_but_unread(model: nn.Module, read: list[str]) -> list[str]:
    """Paths of modules that look like attention and neither hold nor lie in one of ``read``."""
    unread = []
    for path, module in model.named_modules():
        holds_matrices = any(p.ndim > 1 for p in module.parameters())
        is_marked = holds_matrices and any(name in vars(module) for name in ATTENTION_MARKS)
        is_read = any(is_inside(path, other) or is_inside(other, path) for other in read)
        if is_marked and not is_read:
            unread.append(path)
    return unread


def _transformer_layers(model: nn.Module, attention: list[str]) -> tuple[str, ...]:
    """Members of the innermost lists of modules whose every member holds one of ``attention``."""
    stacks = _stacks(model, attention)
    # A list of one layer counts only in a model that has none of several: it may be any wrapper.
    several = {path: members for path, members in stacks.items() if len(members) > 1}
    stacks = several or stacks
    layers: list[str] = []
    for path, members in stacks.items():
        holds_another = any(other != path and is_inside(other, path) for other in stacks)
        if not holds_another:
            layers += members
    return tuple(layers)


def _stacks(model: nn.Module, attention: list[str]) -> dict[str, list[str]]:
    """{path of a list of modules: its members' paths}, where each holds one of ``attention``."""
    stacks: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        members = [join(path, name) for name, _ in module.named_children()]
        if members and all(_holds_any(member, attention) for member in members):
            stacks[path] = members
    return stacks


def _holds_any(path: str, inner: list[str]) -> bool:
    return any(is_inside(other, path) for other in inner)


def _of_torch(module: nn.MultiheadAttention) -> dict[str, Projection]:
    """The layout that PyTorch documents, whether or not key and value have widths of their own."""
    width = module.embed_dim
    size = module.head_dim
    fused = Projection(("q", "k", "v"), (width,) * 3, (size,) * 3)
    layout = {"in_proj_weight": fused, "in_proj_bias": fused}
    for role in ("q", "k", "v"):
        layout[f"{role}_proj_weight"] = Projection((role,), (width,), (size,))
    layout["out_proj.weight"] = Projection(("o",), (width,), (size,))
    return layout


def _may_be_attention(module: nn.Module, linears: dict[str, nn.Module]) -> bool:
    """Whether it is worth running: a few linear layers hold most of its parameters."""
    if not 1 < len(linears) <= MOST_LINEARS:
        return False
    inside = sum(_size(linear) for linear in linears.values())
    return 2 * inside > _size(module)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
