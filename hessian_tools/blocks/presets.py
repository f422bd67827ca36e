"""Partitions of a model's parameters: presets as data, and a user's own.

A preset is an entry of PRESETS: what it does in words, its source, and a way to cut (of
``survey.WAYS``) for every kind of tensor (of ``kinds.KINDS``; "vector" is any of fewer than two
dimensions, "else" the rest). Kinds follow from module types, shapes and behaviour, never from
parameter names; only ``adam_mini_names`` reads names, because that is what it is about.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import nn

from hessian_tools.blocks.adam_mini import published_cuts
from hessian_tools.blocks.block import Cut
from hessian_tools.blocks.kinds import MATRICES, Site, together
from hessian_tools.blocks.partition import Partition, close_names
from hessian_tools.blocks.projection import Heads
from hessian_tools.blocks.specification import (
    SEMANTIC,
    Spec,
    chosen,
    specified_cuts,
    with_heads,
)
from hessian_tools.blocks.survey import Survey


@dataclass(frozen=True)
class Preset:
    """One entry of PRESETS."""

    says: str  # what it does
    source: str  # who published it
    rules: Mapping[str, str] = field(default_factory=dict)  # kind -> way
    otherwise: Mapping[str, str] | None = None  # the rules for models without attention, if others
    cuts: Callable[[Survey], Iterable[Cut]] | None = None  # in place of rules

    def __call__(self, survey: Survey) -> list[Cut]:
        """The cuts of a model."""
        if self.cuts is not None:
            return list(self.cuts(survey))
        rules = self.rules
        if self.otherwise is not None and not survey.is_transformer:
            survey.notes.append(
                "no attention found: the model is no Transformer, so other rules hold (see the "
                "preset)"
            )
            rules = self.otherwise
        return [cut for site in survey.sites for cut in survey.cuts(site, rules)]


def _layer(survey: Survey) -> Iterable[Cut]:
    for path, sites in groupby(survey.sites, key=lambda site: site.owner):
        yield together(sites, path or "(root)")


def _official(survey: Survey) -> Iterable[Cut]:
    count = len(survey.attention.layers)
    if not count:
        survey.notes.append(
            "no stack of transformer layers found: every tensor of two or more dimensions is a "
            "block"
        )
        return PRESETS["weights"](survey)
    tables = [site for site in survey.sites if survey.kinds[site.name] in ("embedding", "tied")]
    cuts: list[Cut] = []
    if tables:  # a language model: GPT-2's layers 0, 3, 7 and 11 of 12
        layers = {None, 0, count // 4, 7 * count // 12, count - 1}
        for site in survey.sites:
            if site is tables[0] or _is_matrix_in(survey, site, layers):
                cuts += survey.cuts(site, SEMANTIC)
        return cuts
    layers = {None, 0, count // 2, count - 1}  # ViT's 0, 6 and 11 of 12
    return [site.uncut() for site in survey.sites if _is_matrix_in(survey, site, layers)]


def _is_matrix_in(survey: Survey, site: Site, layers: set[int | None]) -> bool:
    """Whether it is a layer's matrix, in one of ``layers``; None stands for outside of them."""
    if site.is_vector or survey.layer_of(site.name) not in layers:
        return False
    return site.is_transposed or isinstance(site.module, MATRICES)


def _model(survey: Survey) -> Iterable[Cut]:
    return [together(survey.sites, "(model)")]


OURS = "ours"
ZHANG = "Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More, arXiv 2406.16793"
ZHAO = (
    "Zhao et al., Deconstructing What Makes a Good Optimizer for Language Models, arXiv 2407.07972"
)
TABLES = {"embedding": "rows", "tied": "rows", "output": "rows"}

PRESETS: dict[str, Preset] = {
    "tensor": Preset("one block a tensor", "PyTorch's own", {"else": "whole"}),
    "semantic": Preset(
        "one block a tensor, with fused query/key/value tensors split",
        OURS,
        SEMANTIC,
    ),
    "weights": Preset(
        "semantic, without tensors of fewer than two dimensions",
        OURS,
        {"vector": "skip", "else": "roles"},
    ),
    "layer": Preset(
        "all of a module's own tensors together, named by its path",
        OURS,
        cuts=_layer,
    ),
    "head": Preset(
        "semantic, with query, key, value and the output projection's inputs split by head",
        OURS,
        {"else": "heads"},
    ),
    "neuron": Preset(
        "semantic, with matrices split by output: rows of linear layers (columns of transposed "
        "ones), output channels of convolutions, rows of embeddings, each expert's rows",
        OURS,
        {"else": "rows"},
    ),
    "token": Preset(
        "semantic, with token embedding and output layer split by token",
        OURS,
        {**TABLES, "else": "roles"},
    ),
    "element": Preset(
        "every entry by itself: Adam's own",
        "Kingma & Ba, arXiv 1412.6980",
        {"else": "elements"},
    ),
    "adam_mini": Preset(
        "embedding and output by token, query and key by head, value, attention output, MLP and "
        "experts by output neuron, else one block a tensor (fused biases by role); without "
        "attention one block a tensor",
        f"{ZHANG}, Algorithm 3; experts and biases by its principle, one block a dense sub-block",
        {
            **TABLES,
            "q": "heads",
            "k": "heads",
            "v": "rows",
            "o": "rows",
            "gate": "rows",
            "mlp": "rows",
            "experts": "rows",
            "bias": "roles",
            "else": "whole",
        },
        otherwise={"else": "whole"},
    ),
    "adam_mini_names": Preset(
        "what the published Adam-mini 1.1.1 does with these names and shapes; tensors it crashes "
        "on are in no block",
        f"{ZHANG}; the adam-mini package, version 1.1.1",
        cuts=published_cuts,
    ),
    "adalayer": Preset(
        "one block a tensor: one scalar second moment each", ZHAO, {"else": "whole"}
    ),
    "adalayer_star": Preset(
        "adalayer with query, key and value apart, and one scalar a logit in the last layer",
        f"{ZHAO} (Adalayer*)",
        {"tied": "rows", "output": "rows", "output bias": "elements", "else": "roles"},
    ),
    "official": Preset(
        "the matrices sampled for the published spectra",
        "Zhang et al. 2024, arXiv 2402.16788",
        cuts=_official,
    ),
    "model": Preset("everything as one block, the whole Hessian", OURS, cuts=_model),
}


def partition(
    model: nn.Module,
    spec: str | Spec = "semantic",
    *,
    only: str | Sequence[str] | None = None,
    heads: Mapping[str, Heads] | None = None,
) -> Partition:
    """Cuts the trainable parameters of ``model`` into named, disjoint blocks.

    Args:
        model: any ``nn.Module``. Parameters without gradient are left out; tied ones appear under
            their first name.
        spec: the name of an entry of PRESETS (each says what it does), or blocks of the user's own,
            see below.
        only: globs (``*``, ``?``) over block and parameter names; other blocks of the preset are
            left out.
        heads: {glob over parameter names: :func:`hessian_tools.heads`}, which overrides a preset
            for the tensors that match. In a dict of axes such statements stand as values.

    ``official`` is from the source for GPT-2 (token embedding; q, k, v, attention output and both
    MLP matrices of layers 0, 3, 7, 11 of 12) and for ViT (patch embedding and head; qkv uncut,
    attention output and both MLP matrices of layers 0, 6, 11 of 12). Ours: with a token embedding,
    layers 0, L/4, 7L/12, L-1 of L, else 0, L/2, L-1; every linear or convolution weight outside the
    layers counts as an embedding or head; query, key and value that are separate tensors (HF's ViT)
    stay separate; without transformer layers, as ``weights``.

    ``adam_mini`` leaves tables of positions and segments, convolutions (patch embeddings), class
    tokens, norms and what else Algorithm 3 does not name whole, and takes every linear layer that
    is no query or key as MLP.

    A user's own blocks, with axes as in :mod:`hessian_tools.blocks.specification` ("whole", "head",
    "row", "column", numbers, ``ht.heads(8)`` ...):
        a list of parameter names (whole tensors), Blocks, and globs that choose semantic blocks;
        a dict {block name: parameter name or (parameter name, tuple of slices)};
        a dict {glob over parameter names: axis}: the first glob that matches a tensor decides
            (special ones first);
        a function (name, parameter, module) -> axis or a Cut of that tensor;
        a ``torch.optim.Optimizer``: one block a param group, since a group shares one learning
            rate.
    Tensors that these do not mention are in no block.

    Returns:
        a Partition; its ``notes`` say what was left whole and why.
    Raises:
        ValueError: an unknown preset or axis, a name or glob that matches nothing (with close
            matches), slices or stated heads that do not fit, two statements on one tensor's heads,
            overlapping blocks (naming both), a model without trainable parameters.
        TypeError: any other kind of argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass a torch.nn.Module")
    survey = Survey(model)
    if not survey.sites:
        raise ValueError(
            "model has no parameter that requires grad; call requires_grad_() on those to be "
            "studied"
        )
    if isinstance(spec, str):
        preset = spec
        cuts = _preset_cuts(survey, spec)
        if heads:
            cuts = with_heads(survey, cuts, heads)
            preset = ""  # no longer what that preset does
    elif heads:
        raise ValueError(
            "heads are stated beside a spec of your own; they go with a preset's name, and into a "
            "dict of axes as its values"
        )
    else:
        preset = ""
        cuts = specified_cuts(survey, spec)
    if only is not None:
        cuts = chosen(cuts, [only] if isinstance(only, str) else only)
    return Partition(tuple(cuts), preset, tuple(survey.notes))


def _preset_cuts(survey: Survey, name: str) -> list[Cut]:
    if name not in PRESETS:
        raise ValueError(
            f"spec is {name!r}; presets are {', '.join(PRESETS)}, and own names or globs go in a "
            "list"
        )
    return PRESETS[name](survey)


def alternatives(model: nn.Module | Survey, parameter: str) -> dict[str, Cut]:
    """Every cut of one tensor that makes sense, by what it follows; each covers the whole tensor.

    ``whole``; ``rows``: output neurons, output channels or tokens (columns of transposed layers);
    ``columns``: inputs; ``heads`` (of an output projection: runs of its inputs); ``roles``: query,
    key and value of a fused tensor, if they are of one size; ``experts``; ``elements``. A tensor
    whose axes are not known has ``axis 0``, ``axis 1`` ... instead of rows and columns. Cuts into
    one block are left out, except ``whole``, and so are those that repeat another.

    ``model`` may be a Survey of it, which saves looking again for every tensor.

    Raises:
        ValueError: ``parameter`` names no trainable parameter (with close matches).
    """
    survey = model if isinstance(model, Survey) else Survey(model)
    sites = {site.name: site for site in survey.sites}
    if parameter not in sites:
        raise ValueError(
            f"parameter is {parameter!r}, no trainable parameter{close_names(parameter, sites)}"
        )
    cuts: dict[str, Cut] = {}
    seen = []
    for name, cut in survey.equal_cuts(sites[parameter]):
        pieces = _pieces(cut)
        if cuts and (cut.num_blocks == 1 or pieces in seen):
            continue
        cuts[name] = cut
        seen.append(pieces)
    return cuts


def _pieces(cut: Cut) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What tells one cut of a whole tensor from another, whatever its blocks are called."""
    part = cut.parts[0]
    kept = [axis for axis, size in enumerate(part.view) if size > 1]
    sizes = tuple(part.view[axis] for axis in kept)
    enumerating = tuple(i for i, axis in enumerate(kept) if axis in part.axes)
    return sizes, enumerating
