"""A user's own blocks: lists of names and globs, slices, globs to axes, functions and an optimizer's groups.

Every way ends in cuts that are checked to be disjoint. An *axis* says how one tensor is cut:

=================  ====================================================================================================
"whole"            one block (so is a tensor that has no such axis, with a note)
"role"             query, key and value of a fused tensor apart
"head"             these by head; an output projection by the heads that it reads
"row"              a block an output neuron, output channel or token, within its role and expert
"column"           a block an input
"expert"           a block an expert of a 3-D tensor
"element"          every entry by itself
int or ints        the tensor's own axes that enumerate the blocks, negative ones from the end
None               left out
=================  ====================================================================================================

Plurals will do.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hessian_tools.blocks.block import Block, Cut, Part
from hessian_tools.blocks.kinds import Site, together
from hessian_tools.blocks.ownership import check_disjoint, check_trained
from hessian_tools.blocks.partition import close_names, examples
from hessian_tools.blocks.projection import whole
from hessian_tools.blocks.survey import Survey

Axis = str | int | tuple[int, ...] | None
Spec = (
    Mapping[str, Any]
    | Iterable[str | Block]
    | Callable[[str, nn.Parameter, nn.Module], Axis | Cut]
    | Optimizer
)
SEMANTIC = {"else": "roles"}
AXES = ("whole", "role", "head", "row", "column", "expert", "element")


def own_cuts(survey: Survey, spec: Spec) -> list[Cut]:
    """The cuts of ``spec``, for what :func:`hessian_tools.blocks.presets.partition` says of it."""
    sites = {site.name: site for site in survey.sites}
    if isinstance(spec, Optimizer):
        cuts = _of_groups(survey, spec)
    elif isinstance(spec, Mapping):
        axes = {key: value for key, value in spec.items() if _is_axis(value, sites)}
        if axes and len(axes) < len(spec):
            mixed = next(key for key in spec if key not in axes)
            raise ValueError(
                f"spec has axes for globs ({next(iter(axes))!r}) and a named block ({mixed!r}); put them into two dicts"
            )
        cuts = (
            _by_globs(survey, axes)
            if axes
            else [_sliced(sites, name, value) for name, value in spec.items()]
        )
    elif isinstance(spec, Iterable):
        items = list(spec)
        globs = [item for item in items if isinstance(item, str) and item not in sites]
        cuts = [_named(sites, item) for item in items if item not in globs]
        cuts += chosen((cut for site in survey.sites for cut in survey.cuts(site, SEMANTIC)), globs)
    elif callable(spec):
        cuts = _by_function(survey, spec)
    else:
        raise TypeError(
            f"spec is a {type(spec).__name__}; pass a preset, a list of names, globs or Blocks, a dict, a function or "
            "an optimizer"
        )
    if not cuts:
        raise ValueError("spec is empty; name at least one block")
    check_disjoint(cuts)
    return cuts


def along(survey: Survey, site: Site, axis: Any) -> list[Cut]:
    """``site`` cut by one axis (of the table above); [] for None.

    Raises:
        ValueError: an unknown word, or an axis that the tensor does not have.
        TypeError: anything else.
    """
    if axis is None:
        return []
    if isinstance(axis, str):
        word = axis.removesuffix("s")
        if word not in AXES:
            raise ValueError(
                f"spec cuts {site.name} by {axis!r}; axes are {', '.join(AXES)}, numbers and None"
            )
        if word in ("column", "expert"):
            found = dict(survey.equal_cuts(site)).get(f"{word}s")
            if found is None:
                survey.notes.append(f"{site.name}: it has no {word}s, so it is left whole")
            return [found or site.uncut()]
        if word == "head" and site.name not in survey.attention.projections:
            survey.notes.append(f"{site.name}: it has no heads, so it is left whole")
        return survey.cuts(site, {"else": word if word == "whole" else f"{word}s"})
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not axes or not all(isinstance(a, int) and not isinstance(a, bool) for a in axes):
        raise TypeError(
            f"spec cuts {site.name} by {axis!r}; axes are {', '.join(AXES)}, numbers and None"
        )
    rank = len(site.shape)
    if not all(-rank <= a < rank for a in axes) or len({a % rank for a in axes}) < len(axes):
        raise ValueError(
            f"spec cuts {site.name} by axis {axis}; its shape {site.shape} has axes 0 to {rank - 1}"
        )
    axes = tuple(a % rank for a in axes)
    return [site.along(axes, "axis" + "x".join(map(str, axes)))]


def _is_axis(value: Any, sites: Mapping[str, Site]) -> bool:
    if isinstance(value, str):
        return value.removesuffix("s") in AXES and value not in sites
    return (
        value is None
        or isinstance(value, int)
        or (isinstance(value, tuple) and {*map(type, value)} == {int})
    )


def _by_globs(survey: Survey, axes: Mapping[str, Any]) -> list[Cut]:
    names = [site.name for site in survey.sites]
    for glob in axes:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(
                f"spec's {glob!r} matches no trainable parameter{close_names(glob, names)}"
            )
    cuts, missed = [], []
    for site in survey.sites:
        decisive = [axis for glob, axis in axes.items() if fnmatchcase(site.name, glob)][:1]
        missed += [] if decisive else [site.name]
        cuts += along(survey, site, decisive[0]) if decisive else []
    if missed:
        survey.notes.append(
            f"{len(missed)} tensors match no glob and are in no block: {_first(missed)}"
        )
    return cuts


def _first(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], *["..."] * (len(names) > 5)])


def _by_function(
    survey: Survey, choose: Callable[[str, nn.Parameter, nn.Module], Axis | Cut]
) -> list[Cut]:
    parameters, cuts = dict(survey.model.named_parameters()), []
    for site in survey.sites:
        answer = choose(site.name, parameters[site.name], site.module)
        if not isinstance(answer, Cut):
            cuts += along(survey, site, answer)
        elif any(part.parameter != site.name or part.shape != site.shape for part in answer.parts):
            raise ValueError(
                f"spec gives for {site.name!r} a cut of {', '.join(answer.parameters)}; cut the tensor asked for"
            )
        else:
            cuts.append(answer)
    return cuts


def _of_groups(survey: Survey, optimizer: Optimizer) -> list[Cut]:
    """A block a group: what shares one learning rate."""
    owned = {id(p): name for name, p in survey.model.named_parameters()}
    sites, cuts, seen = {site.name: site for site in survey.sites}, [], set[str]()
    for number, group in enumerate(optimizer.param_groups):
        if not all(id(p) in owned for p in group["params"]):
            raise ValueError(
                f"spec is an optimizer whose group {number} holds a tensor that is no parameter of the model"
            )
        members = [sites[owned[id(p)]] for p in group["params"] if owned[id(p)] in sites]
        seen |= {site.name for site in members}
        if members:
            cuts.append(together(members, str(group.get("name", f"group {number}"))))
    missed = [name for name in sites if name not in seen]
    if missed:
        survey.notes.append(
            f"{len(missed)} tensors are in no group and in no block: {_first(missed)}"
        )
    return cuts


def _named(sites: Mapping[str, Site], item: str | Block) -> Cut:
    if isinstance(item, str):
        return sites[item].uncut()
    if not isinstance(item, Block):
        raise TypeError(
            f"spec holds a {type(item).__name__}; a list of names, globs or Blocks is needed"
        )
    check_trained([item.cut], sites, "spec")
    return item.as_cut()


def _sliced(sites: Mapping[str, Site], name: str, chosen: Any) -> Cut:
    parameter, index = chosen if isinstance(chosen, tuple) and len(chosen) == 2 else (chosen, ())
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(parameter, str) or not all(isinstance(i, slice) for i in index):
        raise TypeError(
            f"spec[{name!r}] is {chosen!r}; give a parameter name or (parameter name, tuple of slices)"
        )
    if parameter not in sites:
        raise ValueError(
            f"spec[{name!r}] names {parameter!r}, no trainable parameter{close_names(parameter, sites)}"
        )
    site = sites[parameter]
    bounds = [s.indices(size) for s, size in zip(index, site.shape, strict=False)]
    if len(index) > len(site.shape) or any(
        step != 1 or start >= stop for start, stop, step in bounds
    ):
        raise ValueError(
            f"spec[{name!r}] is {index}; non-empty slices of step 1 into shape {site.shape} are needed"
        )
    picked = tuple(slice(start, stop) for start, stop, _ in bounds)
    return Cut(
        (Part(parameter, site.shape, site.shape, (*picked, *whole(site.shape[len(picked) :]))),),
        name,
    )


def chosen(cuts: Iterable[Cut], patterns: Sequence[str]) -> list[Cut]:
    """What of ``cuts`` one of ``patterns`` matches, by block or parameter name; every pattern must match something."""
    cuts = list(cuts)
    wanted: list[set[int]] = [set() for _ in cuts]  # positions in each cut
    for pattern in patterns:
        glob = partial(
            fnmatchcase, pat=pattern.replace("[", "[[]")
        )  # names have brackets, so they are no wildcards
        hits = [
            {i for i, name in enumerate(cut.names) if any(map(glob, (name, *cut.parameters)))}
            for cut in cuts
        ]
        if not any(hits):
            raise ValueError(
                f"{pattern!r} matches no block or trainable parameter{close_names(pattern, examples(cuts))}"
            )
        wanted = [before | new for before, new in zip(wanted, hits, strict=True)]
    picked = []
    for cut, positions in zip(cuts, wanted, strict=True):
        for is_wanted, run in groupby(range(cut.num_blocks), key=positions.__contains__):
            if is_wanted:
                first, *rest = run
                picked.append(cut.chunk(first, first + len(rest) + 1))
    return picked
