"""What the published Adam-mini does with a model's names and shapes.

Source: arXiv 2406.16793 and the package adam-mini, version 1.1.1.

It lower-cases a parameter's name and looks for substrings; the first rule that applies counts:

1. one of ``adam`` ("bias"): Adam itself, every entry a block;
2. one of ``query_key``: the flattened tensor in runs of dim^2 / n_heads entries (one head of
   a square projection);
3. one of ``embedding``, ``output``, ``value``, ``mlp``, ``attention_output``: a block a slice
   of the first axis;
4. else one block.

Names alone decide, whatever the tensor is, so a step may crash: rule 2 on a tensor that does not
divide into such runs, rule 3 on tensors that are no matrices. Such a crash is a result: its tensor
is in no block, and a note says why.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from hessian_tools.blocks.block import Cut
from hessian_tools.blocks.kinds import Site
from hessian_tools.blocks.partition import Partition
from hessian_tools.blocks.survey import Survey
from hessian_tools.results import registered

DIM = 2048  # the published defaults
HEADS = 32


@registered
@dataclass(frozen=True)
class Keywords:
    """The substrings by rule, in the order in which the package asks; those of version 1.1.1."""

    adam: tuple[str, ...] = ("bias",)
    query_key: tuple[str, ...] = ("k_proj", "q_proj", "wq", "wk", "query", "key")
    embedding: tuple[str, ...] = ("embed", "embd", "wte")
    output: tuple[str, ...] = ("lm_head", "output", "final_layer")
    value: tuple[str, ...] = ("v_proj", "wv", "value")
    mlp: tuple[str, ...] = ("feed_forward", "linear", "mlp")
    attention_output: tuple[str, ...] = ("o_proj", "wo", "attn.proj")

    def rule(self, name: str) -> str:
        """The first field with a substring of ``name``; "" if none."""
        lowered = name.lower()
        for field, words in vars(self).items():
            if any(word in lowered for word in words):
                return str(field)
        return ""


# The optimizer's attribute that holds each list of substrings.
ATTRIBUTES = {
    "adam": "adam_block_names",
    "query_key": "wqk_names",
    "embedding": "embd_names",
    "output": "output_names",
    "value": "wv_names",
    "mlp": "mlp_names",
    "attention_output": "attn_proj_names",
}


def adam_mini_names(
    model: nn.Module,
    *,
    dim: int | None = None,
    n_heads: int | None = None,
    keywords: Keywords | None = None,
) -> Partition:
    """The blocks that share one second moment when the published Adam-mini trains ``model``.

    Args:
        dim, n_heads: its arguments of that name; by default those of ``model.config``
            (``hidden_size``, ``num_attention_heads``), as its README asks, else its own defaults
            2048 and 32. Its ``n_kv_heads`` changes nothing.
        keywords: its lists of substrings, if changed.

    Returns:
        a Partition; tensors that a step crashes on are in none of its blocks, and its notes name
        them with the reason.
    Raises:
        ValueError: for ``dim`` or ``n_heads`` below 1.
    """
    survey = Survey(model)
    cuts = list(published_cuts(survey, dim=dim, n_heads=n_heads, keywords=keywords))
    return Partition(tuple(cuts), "adam_mini_names", tuple(survey.notes))


def published_cuts(
    survey: Survey,
    *,
    dim: int | None = None,
    n_heads: int | None = None,
    keywords: Keywords | None = None,
) -> Iterable[Cut]:
    """The cuts of :func:`adam_mini_names` for a Survey, which gets the notes."""
    words = keywords or Keywords()
    width = _argument(survey, "dim", dim, "hidden_size", DIM)
    heads = _argument(survey, "n_heads", n_heads, "num_attention_heads", HEADS)
    has_heads = any(words.rule(site.name) == "query_key" for site in survey.sites)
    if width**2 % heads and has_heads:
        survey.notes.append(
            f"the first step crashes: dim^2 = {width}^2 does not divide by n_heads = {heads}"
        )
    run = width**2 // heads
    for site in survey.sites:
        cut, note = _cut(site, words.rule(site.name), run)
        if note:
            survey.notes.append(f"{site.name}: {note}")
        if cut is not None:
            yield cut


def _argument(
    survey: Survey,
    name: str,
    given: int | None,
    attribute: str,
    default: int,
) -> int:
    """``given``, or what the model's config says, or the package's default with a note."""
    if given is not None:
        if given < 1:
            raise ValueError(f"{name} is {given}; at least 1 is needed")
        return given
    configured = getattr(getattr(survey.model, "config", None), attribute, None)
    if isinstance(configured, int):
        return configured
    survey.notes.append(
        f"the model's config does not tell {name}, so Adam-mini's default {default} is taken"
    )
    return default


def _cut(site: Site, rule: str, run: int) -> tuple[Cut | None, str]:
    """(the cut, or None for a crash; a note or "")."""
    if rule == "adam":
        every_axis = tuple(range(len(site.shape)))
        return site.along(every_axis, "element"), ""
    if rule == "query_key":
        return _cut_into_runs(site, run)
    if not rule:
        return site.uncut(), ""
    return _cut_into_slices(site, rule)


def _cut_into_runs(site: Site, run: int) -> tuple[Cut | None, str]:
    size = math.prod(site.shape)
    if run < 1 or size % run:
        heads = f"heads of dim^2 / n_heads = {run}"
        return None, f"crashes, its {size} entries do not divide into {heads}"
    row = math.prod(site.shape[1:])
    note = "" if run % row == 0 else f"its blocks of {run} entries are no whole rows of {row}"
    return runs(site, run), note


def _cut_into_slices(site: Site, rule: str) -> tuple[Cut | None, str]:
    shape = site.shape
    crash = f"crashes, one of the {rule} substrings is in its name but"
    if len(shape) < 2:
        return None, f"{crash} it has {len(shape)} axes, not 2"
    is_matrix = len(shape) == 2
    broadcasts = is_matrix or shape[0] in (1, shape[1])
    if not broadcasts or math.prod(shape[2:]) > 1:
        return None, f"{crash} its shape is {shape}"
    # The rates, one a slice, are a matrix (slices, 1): broadcasting it against three axes pairs
    # them with the second.
    note = "" if is_matrix or shape[0] == 1 else "row i's rate is applied to column i, not row i"
    return site.along((0,), "slice"), note


def runs(site: Site, run: int) -> Cut:
    """The flattened tensor in runs of ``run`` entries.

    Splits axes rather than merging them where it can.
    """
    inner = 1  # entries at one place of the axes up to this one
    for axis in reversed(range(len(site.shape))):
        around = inner * site.shape[axis]
        if run % inner == 0 and around % run == 0 and inner <= run:
            split = (around // run, run // inner)
            view = (*site.shape[:axis], *split, *site.shape[axis + 1 :])
            return site.along(tuple(range(axis + 1)), "run", view)
        inner = around
    return site.along((0,), "run", (inner // run, run))
