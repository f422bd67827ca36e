"""A user's blocks: lists of names and globs, slices, functions, an optimizer's groups.

Every way ends in cuts that are checked to be disjoint. An *axis* says how one tensor is cut:

=============  ====================================================================================
"whole"        one block (so is a tensor that has no such axis, with a note)
"role"         query, key and value of a fused tensor apart
"head"         these by head; an output projection by the heads that it reads
"row"          a block an output neuron, output channel or token, within its role and expert
"column"       a block an input
"expert"       a block an expert of a 3-D tensor
"element"      every entry by itself
ht.heads(8)    8 heads along an axis, as the user states it; an error where that does not fit
int or ints    the tensor's own axes that enumerate the blocks, negative ones from the end
None           left out
=============  ====================================================================================

Plurals will do.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby
from typing import TypeGuard

from torch import nn
from torch.optim import Optimizer

from hessian_tools.blocks.block import Block, Cut, Part
from hessian_tools.blocks.kinds import Site, together
from hessian_tools.blocks.ownership import check_disjoint, check_trained
from hessian_tools.blocks.partition import close_names, examples
from hessian_tools.blocks.projection import Heads, whole
from hessian_tools.blocks.survey import Survey

Axis = str | int | tuple[int, ...] | Heads | None  # of the table above
Choice = Callable[[str, nn.Parameter, nn.Module], Axis | Cut]
# A dict holds axes, or parameter names with or without slices: what it is shows on looking.
Spec = Mapping[str, object] | Iterable[str | Block] | Choice | Optimizer
SEMANTIC = {"else": "roles"}
AXES = ("whole", "role", "head", "row", "column", "expert", "element")


def specified_cuts(survey: Survey, spec: Spec) -> list[Cut]:
    """The cuts of ``spec``, for what :func:`hessian_tools.blocks.presets.partition` says of it."""
    if isinstance(spec, Optimizer):
        cuts = _of_groups(survey, spec)
    elif isinstance(spec, Mapping):
        cuts = _of_dict(survey, spec)
    elif isinstance(spec, Iterable):
        cuts = _of_list(survey, list(spec))
    elif callable(spec):
        cuts = _of_function(survey, spec)
    else:
        raise TypeError(
            f"spec is a {type(spec).__name__}; pass a preset, a list of names, globs or Blocks, a "
            "dict, a function or an optimizer"
        )
    if not cuts:
        raise ValueError("spec is empty; name at least one block")
    check_disjoint(cuts)
    return cuts


def along(survey: Survey, site: Site, axis: Axis) -> list[Cut]:
    """``site`` cut by one axis (of the table above); [] for None.

    Raises:
        ValueError: an unknown word, or an axis or stated heads that the tensor does not have.
        TypeError: anything else.
    """
    if axis is None:
        return []
    if isinstance(axis, Heads):
        return survey.stated(site, axis)
    if isinstance(axis, str):
        return _along_word(survey, site, axis)
    return _along_numbers(site, axis)


def _along_numbers(site: Site, axis: int | tuple[int, ...]) -> list[Cut]:
    axes = axis if isinstance(axis, tuple) else (axis,)
    # type(), not isinstance: True and False are integers to Python, but no axes.
    if {type(number) for number in axes} != {int}:
        raise TypeError(
            f"spec cuts {site.name} by {axis!r}; axes are {', '.join(AXES)}, numbers and None"
        )
    rank = len(site.shape)
    exist = all(-rank <= number < rank for number in axes)
    if exist:
        axes = tuple(number % rank for number in axes)
    if not exist or len(set(axes)) < len(axes):
        raise ValueError(
            f"spec cuts {site.name} by axis {axis}; its shape {site.shape} has axes 0 to {rank - 1}"
        )
    counter = "axis" + "x".join(str(number) for number in axes)
    return [site.along(axes, counter)]


def _along_word(survey: Survey, site: Site, axis: str) -> list[Cut]:
    word = axis.removesuffix("s")
    if word not in AXES:
        raise ValueError(
            f"spec cuts {site.name} by {axis!r}; axes are {', '.join(AXES)}, numbers and None"
        )
    if word == "whole":
        return survey.cuts(site, {"else": "whole"})
    # No preset cuts by these two, so rules do not know them.
    if word in ("column", "expert"):
        cut = dict(survey.equal_cuts(site)).get(f"{word}s")
        if cut is None:
            survey.notes.append(f"{site.name}: it has no {word}s, so it is left whole")
        return [cut or site.uncut()]
    if word == "head" and site.name not in survey.attention.projections:
        survey.notes.append(f"{site.name}: it has no heads, so it is left whole")
    return survey.cuts(site, {"else": f"{word}s"})


def _of_dict(survey: Survey, spec: Mapping[str, object]) -> list[Cut]:
    """Either {glob: axis} or {block name: parameter or slices of it}."""
    sites = _by_name(survey)
    axes: dict[str, Axis] = {}
    named: list[str] = []
    for key, value in spec.items():
        if _is_axis(value, sites):
            axes[key] = value
        else:
            named.append(key)
    if axes and named:
        raise ValueError(
            f"spec has axes for globs ({next(iter(axes))!r}) and a named block ({named[0]!r}); put "
            "them into two dicts"
        )
    if axes:
        return _of_globs(survey, axes)
    return [_sliced(sites, name, spec[name]) for name in named]


def _is_axis(value: object, sites: Mapping[str, Site]) -> TypeGuard[Axis]:
    # A tensor may be called "row": then its name is meant.
    if isinstance(value, str):
        return value.removesuffix("s") in AXES and value not in sites
    if isinstance(value, tuple):
        return {*map(type, value)} == {int}
    return value is None or isinstance(value, int | Heads)


def _of_globs(survey: Survey, axes: Mapping[str, Axis]) -> list[Cut]:
    _check_globs(survey, axes)
    cuts: list[Cut] = []
    missed = []
    for site in survey.sites:
        decisive = next((glob for glob in axes if fnmatchcase(site.name, glob)), None)
        if decisive is None:
            missed.append(site.name)
        else:
            cuts += along(survey, site, axes[decisive])
    if missed:
        survey.notes.append(
            f"{len(missed)} tensors match no glob and are in no block: {_first(missed)}"
        )
    return cuts


def _check_globs(survey: Survey, axes: Mapping[str, Axis]) -> None:
    """Raises ValueError for a glob that matches nothing and for heads that another one overrules.

    The first glob that matches decides, but heads that are stated are never passed over silently.
    """
    names = [site.name for site in survey.sites]
    decisive: dict[str, str] = {}
    for glob, axis in axes.items():
        matched = [name for name in names if fnmatchcase(name, glob)]
        if not matched:
            raise ValueError(
                f"spec's {glob!r} matches no trainable parameter{close_names(glob, names)}"
            )
        for name in matched:
            first = decisive.setdefault(name, glob)
            if isinstance(axis, Heads) and axes[first] != axis:
                raise ValueError(
                    f"spec states {axis} for {name!r} by {glob!r}, and {axes[first]} by {first!r} "
                    "before it; globs for different heads must not overlap, and stated heads go "
                    "before what is general"
                )


def with_heads(survey: Survey, cuts: Sequence[Cut], stated: Mapping[str, Heads]) -> list[Cut]:
    """``cuts`` of a preset, with the tensors that a glob of ``stated`` matches cut by its heads.

    Raises:
        ValueError: a glob that matches nothing, heads that do not fit, two statements on one
            tensor, or a tensor that shares its blocks with others (as by "layer").
        TypeError: anything but heads.
    """
    for glob, heads in stated.items():
        if not isinstance(heads, Heads):
            raise TypeError(f"heads[{glob!r}] is {heads!r}; hessian_tools.heads(8) is needed")
    _check_globs(survey, stated)
    own: dict[str, list[Cut]] = {}
    for site in survey.sites:
        decisive = next((glob for glob in stated if fnmatchcase(site.name, glob)), None)
        if decisive is not None:
            own[site.name] = survey.stated(site, stated[decisive])
    return _replaced(cuts, own)


def _replaced(cuts: Sequence[Cut], own: Mapping[str, list[Cut]]) -> list[Cut]:
    """``cuts`` with those of some tensors replaced by their ``own``.

    They come at the place of the tensor's first cut, and at the end where there is none.
    """
    left = dict(own)
    result: list[Cut] = []
    for cut in cuts:
        mine = [name for name in cut.parameters if name in own]
        if not mine:
            result.append(cut)
        elif len(cut.parameters) > 1:
            raise ValueError(
                f"heads are stated for {mine[0]!r}, which the preset has in one block with others, "
                f"{cut.name!r}; choose a preset of one tensor a block, such as 'tensor'"
            )
        else:
            result += left.pop(mine[0], [])
    for new in left.values():
        result += new
    return result


def _of_function(survey: Survey, choose: Choice) -> list[Cut]:
    parameters = dict(survey.model.named_parameters())
    cuts: list[Cut] = []
    for site in survey.sites:
        answer = choose(site.name, parameters[site.name], site.module)
        if not isinstance(answer, Cut):
            cuts += along(survey, site, answer)
            continue
        # A cut of another tensor might overlap what the function gives for that one.
        if {(part.parameter, part.shape) for part in answer.parts} != {(site.name, site.shape)}:
            raise ValueError(
                f"spec gives for {site.name!r} a cut of {', '.join(answer.parameters)}; cut the "
                "tensor asked for"
            )
        cuts.append(answer)
    return cuts


def _of_groups(survey: Survey, optimizer: Optimizer) -> list[Cut]:
    """A block a group: what shares one learning rate."""
    # By identity: tensors cannot be compared, and an optimizer does not know their names.
    names = {id(p): name for name, p in survey.model.named_parameters()}
    sites = _by_name(survey)
    cuts: list[Cut] = []
    seen: set[str] = set()
    for number, group in enumerate(optimizer.param_groups):
        if not all(id(p) in names for p in group["params"]):
            raise ValueError(
                f"spec is an optimizer whose group {number} holds a tensor that is no parameter of "
                "the model"
            )
        members = [names[id(p)] for p in group["params"]]
        trained = [sites[name] for name in members if name in sites]
        seen |= set(members)
        if trained:
            label = str(group.get("name", f"group {number}"))
            cuts.append(together(trained, label))
    missed = [name for name in sites if name not in seen]
    if missed:
        survey.notes.append(
            f"{len(missed)} tensors are in no group and in no block: {_first(missed)}"
        )
    return cuts


def _of_list(survey: Survey, items: Sequence[str | Block]) -> list[Cut]:
    """Whole tensors by name and Blocks; what is no name is a glob over semantic blocks."""
    sites = _by_name(survey)
    globs = [item for item in items if isinstance(item, str) and item not in sites]
    cuts = [_named(sites, item) for item in items if item not in globs]
    semantic = (cut for site in survey.sites for cut in survey.cuts(site, SEMANTIC))
    return cuts + chosen(semantic, globs)


def _named(sites: Mapping[str, Site], item: str | Block) -> Cut:
    if isinstance(item, str):
        return sites[item].uncut()
    if not isinstance(item, Block):
        raise TypeError(
            f"spec holds a {type(item).__name__}; a list of names, globs or Blocks is needed"
        )
    check_trained([item.cut], sites, "spec")
    return item.as_cut()


def _sliced(sites: Mapping[str, Site], name: str, value: object) -> Cut:
    parameter, index = _parameter_and_slices(name, value)
    if parameter not in sites:
        raise ValueError(
            f"spec[{name!r}] names {parameter!r}, no trainable parameter"
            f"{close_names(parameter, sites)}"
        )
    shape = sites[parameter].shape
    bounds = [s.indices(size) for s, size in zip(index, shape, strict=False)]
    are_runs = all(step == 1 and start < stop for start, stop, step in bounds)
    if len(index) > len(shape) or not are_runs:
        raise ValueError(
            f"spec[{name!r}] is {index}; non-empty slices of step 1 into shape {shape} are needed"
        )
    picked = tuple(slice(start, stop) for start, stop, _ in bounds)
    rest = whole(shape[len(picked) :])
    part = Part(parameter, shape, shape, (*picked, *rest))
    return Cut((part,), name)


def _parameter_and_slices(name: str, value: object) -> tuple[str, tuple[slice, ...]]:
    parameter: object = value
    index: object = ()
    if isinstance(value, tuple) and len(value) == 2:
        parameter, index = value
    slices = index if isinstance(index, tuple) else (index,)
    if not isinstance(parameter, str) or not all(isinstance(i, slice) for i in slices):
        raise TypeError(
            f"spec[{name!r}] is {value!r}; give a parameter name or (parameter name, tuple of "
            "slices)"
        )
    return parameter, slices


def chosen(cuts: Iterable[Cut], patterns: Sequence[str]) -> list[Cut]:
    """What of ``cuts`` one of ``patterns`` matches, by block or parameter name.

    Raises ValueError for a pattern that matches nothing.
    """
    cuts = list(cuts)
    matched: list[set[int]] = [set() for _ in cuts]  # positions in each cut
    for pattern in patterns:
        # Names of blocks have brackets, so these are no wildcards.
        glob = partial(fnmatchcase, pat=pattern.replace("[", "[[]"))
        hits = [_matching(cut, glob) for cut in cuts]
        if not any(hits):
            raise ValueError(
                f"{pattern!r} matches no block or trainable parameter"
                f"{close_names(pattern, examples(cuts))}"
            )
        for positions, new in zip(matched, hits, strict=True):
            positions |= new
    return [
        chunk
        for cut, positions in zip(cuts, matched, strict=True)
        for chunk in _runs(cut, positions)
    ]


def _matching(cut: Cut, glob: Callable[[str], bool]) -> set[int]:
    if any(map(glob, cut.parameters)):
        return set(range(cut.num_blocks))
    return {i for i, name in enumerate(cut.names) if glob(name)}


def _runs(cut: Cut, positions: set[int]) -> Iterator[Cut]:
    """Runs of neighbouring blocks among ``positions``, each a cut whose blocks go together."""
    for is_wanted, run in groupby(range(cut.num_blocks), key=positions.__contains__):
        if is_wanted:
            first, *rest = run
            yield cut.chunk(first, first + len(rest) + 1)


def _by_name(survey: Survey) -> dict[str, Site]:
    return {site.name: site for site in survey.sites}


def _first(names: Sequence[str]) -> str:
    dots = ["..."] if len(names) > 5 else []
    return ", ".join([*names[:5], *dots])
