"""What the published Adam-mini does with a model's names and shapes (arXiv 2406.16793; the adam-mini package 1.1.1).

It lower-cases a parameter's name and looks for substrings, the first rule that applies counts:

1. one of ``adam`` ("bias"): Adam itself, every entry a block;
2. one of ``query_key``: the flattened tensor in runs of dim^2 / n_heads entries (one head of a square projection);
3. one of ``embedding``, ``output``, ``value``, ``mlp``, ``attention_output``: a block a slice of the first axis;
4. else one block.

Names alone decide, whatever the tensor is, so a step may crash: rule 2 on a tensor that does not divide into such runs,
rule 3 on tensors that are no matrices. Such a crash is a finding: its tensor is in no block, and a note says why.
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

DIM, HEADS = 2048, 32  # the published defaults


@registered
@dataclass(frozen=True)
class Keywords:
    """The substrings by rule; the defaults are those of version 1.1.1, ``attribute`` is what it calls each."""

    adam: tuple[str, ...] = ("bias",)
    query_key: tuple[str, ...] = ("k_proj", "q_proj", "wq", "wk", "query", "key")
    embedding: tuple[str, ...] = ("embed", "embd", "wte")
    output: tuple[str, ...] = ("lm_head", "output", "final_layer")
    value: tuple[str, ...] = ("v_proj", "wv", "value")
    mlp: tuple[str, ...] = ("feed_forward", "linear", "mlp")
    attention_output: tuple[str, ...] = ("o_proj", "wo", "attn.proj")

    def rule(self, name: str) -> str:
        """The first field with a substring of ``name``, in the order in which the package asks; "" if none."""
        return next(
            (field for field, words in vars(self).items() if any(w in name.lower() for w in words)),
            "",
        )


ATTRIBUTES = {
    "adam": "adam_block_names", "query_key": "wqk_names", "embedding": "embd_names", "output": "output_names",
    "value": "wv_names", "mlp": "mlp_names", "attention_output": "attn_proj_names",
}  # fmt: skip


def adam_mini_names(
    model: nn.Module,
    *,
    dim: int | None = None,
    n_heads: int | None = None,
    keywords: Keywords | None = None,
) -> Partition:
    """The blocks that share one second moment when the published Adam-mini trains ``model``.

    Args:
        dim, n_heads: its arguments of that name; by default those of ``model.config`` (``hidden_size``,
            ``num_attention_heads``), as its README asks, else its own defaults 2048 and 32. Its ``n_kv_heads`` changes
            nothing.
        keywords: its lists of substrings, if changed.

    Returns:
        a Partition; tensors that a step crashes on are in none of its blocks, and its notes name them with the reason.
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
    """The same for a Survey, which gets the notes."""
    config = getattr(survey.model, "config", None)
    numbers = []
    for name, given, attribute, default in (
        ("dim", dim, "hidden_size", DIM),
        ("n_heads", n_heads, "num_attention_heads", HEADS),
    ):
        found = given if given is not None else getattr(config, attribute, None)
        if given is not None and given < 1:
            raise ValueError(f"{name} is {given}; at least 1 is needed")
        if not isinstance(found, int):
            survey.notes.append(
                f"the model's config does not tell {name}, so Adam-mini's default {default} is taken"
            )
            found = default
        numbers.append(found)
    words = keywords or Keywords()
    if numbers[0] ** 2 % numbers[1] and any(
        words.rule(site.name) == "query_key" for site in survey.sites
    ):
        survey.notes.append(
            f"the first step crashes: dim^2 = {numbers[0]}^2 does not divide by n_heads = {numbers[1]}"
        )
    run = numbers[0] ** 2 // numbers[1]
    for site in survey.sites:
        cut, note = _cut(site, words.rule(site.name), run)
        survey.notes += [note] if note else []
        if cut is not None:
            yield cut


def _cut(site: Site, rule: str, run: int) -> tuple[Cut | None, str]:
    """(the cut, or None for a crash; a note or "")."""
    size, shape = math.prod(site.shape), site.shape
    if rule == "adam":
        return site.along(tuple(range(len(shape))), "element"), ""
    if rule == "query_key":
        if run < 1 or size % run:
            return (
                None,
                f"{site.name}: crashes, its {size} entries do not divide into heads of dim^2 / n_heads = {run}",
            )
        return runs(site, run), _astray(site, run)
    if not rule:
        return site.uncut(), ""
    if len(shape) < 2:
        return (
            None,
            f"{site.name}: crashes, one of the {rule} substrings is in its name but it has {len(shape)} axes, not 2",
        )
    if math.prod(shape[2:]) > 1 or (len(shape) > 2 and shape[0] not in (1, shape[1])):
        return (
            None,
            f"{site.name}: crashes, one of the {rule} substrings is in its name but its shape is {shape}",
        )
    astray = (
        ""
        if len(shape) == 2 or shape[0] == 1
        else f"{site.name}: row i's rate is applied to column i, not row i"
    )
    return site.along((0,), "slice"), astray


def _astray(site: Site, run: int) -> str:
    row = math.prod(site.shape[1:])
    return (
        ""
        if run % row == 0
        else f"{site.name}: its blocks of {run} entries are no whole rows of {row}"
    )


def runs(site: Site, run: int) -> Cut:
    """The flattened tensor in runs of ``run`` entries; splits axes rather than merging them where it can."""
    inner = 1
    for axis in reversed(range(len(site.shape))):
        size = site.shape[axis]
        if run % inner == 0 and (inner * size) % run == 0 and inner <= run:
            view = (*site.shape[:axis], inner * size // run, run // inner, *site.shape[axis + 1 :])
            return site.along(tuple(range(axis + 1)), "run", view)
        inner *= size
    return site.along((0,), "run", (inner // run, run))
