"""The partition checker on planted Hessians, whose structure is known by name and axis, and on
small networks."""

import math
from pathlib import Path

import pytest
import torch
from problems import network, transformers
from problems.planted import planted
from torch import nn

import hessian_tools as ht
from hessian_tools.blocks.block import Cut, Part
from hessian_tools.structure import judgement as partition_verdict
from hessian_tools.structure.check import _suggested
from hessian_tools.structure.judgement import CONTRADICTED, VERDICTS, Answer, Statement
from hessian_tools.structure.report import CutEvidence

ROWS, COLUMNS = 16, 12


def transposed_layer(outputs, inputs):
    layer = transformers().pytorch_utils.Conv1D(outputs, inputs)
    layer.bias = None
    return layer


def check(problem, claim, **settings):
    (found,) = ht.check_partition(
        problem, {"*": claim}, exact=settings.pop("exact", False), **settings
    ).tensors
    return found


TRUTHS = {
    # planted -> verdict on each claim
    "rows": {
        "rows": "follows",
        "columns": "wrong axis",
        "whole": "too coarse",
        "elements": "too fine",
    },
    "columns": {
        "rows": "wrong axis",
        "columns": "follows",
        "whole": "too coarse",
        "elements": "too fine",
    },
    "dense": {
        "rows": "too fine",
        "columns": "too fine",
        "whole": "follows",
        "elements": "too fine",
    },
    "elements": {
        "rows": "too coarse",
        "columns": "too coarse",
        "whole": "too coarse",
        "elements": "follows",
    },
}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "estimated"])
@pytest.mark.parametrize("noise", [0.0, 0.4])
@pytest.mark.parametrize("kind", TRUTHS)
def test_planted_structure_is_found_by_name_and_axis(kind, noise, exact):
    problem = planted((ROWS, COLUMNS), kind, noise=noise)
    for claim, verdict in TRUTHS[kind].items():
        found = check(problem, claim, exact=exact)
        assert (found.claim, found.verdict, found.likely) == (claim, verdict, verdict), found.reason
        assert found.suggested == ("whole" if kind == "dense" else kind) and found.exact == exact


def test_a_transposed_layer_is_found_by_what_its_axes_are():
    """Blocks are columns of the stored tensor, which are the output neurons of a Conv1D: a naive
    cut is wrong."""
    problem = planted((ROWS, COLUMNS), "columns", layer=transposed_layer(COLUMNS, ROWS))
    assert check(problem, "rows").verdict == "follows"
    naive = check(problem, 0)
    assert (naive.claim, naive.verdict, naive.suggested) == ("columns", "wrong axis", "rows")


def test_groups_that_no_neighbours_form_are_found_when_claimed():
    """Even rows belong together, and odd ones: only the claim that says so follows."""
    problem = planted((ROWS, COLUMNS), "alternate rows", noise=0.2)
    assert (
        check(problem, "rows").verdict == "too fine"
        and check(problem, "whole").verdict == "follows"
    )
    shape = (ROWS // 2, 2, COLUMNS)

    def halves(axis):
        part = Part(
            "layer.weight", (ROWS, COLUMNS), shape, tuple(slice(0, size) for size in shape), (axis,)
        )
        return ht.Partition((Cut((part,), "layer.weight", counter="half", per_label=2),))

    alternate = ht.check_partition(problem, halves(1), exact=False)
    (found,) = alternate.tensors
    assert (found.claim, found.verdict, found.suggested) == ("claimed", "follows", "claimed")
    assert alternate.suggestion.cuts == halves(1).cuts
    runs = Part(
        "layer.weight",
        (ROWS, COLUMNS),
        (2, ROWS // 2, COLUMNS),
        (slice(0, 2), slice(0, 8), slice(0, 12)),
        (0,),
    )
    runs = ht.Partition((Cut((runs,), "layer.weight", counter="half", per_label=2),))
    assert ht.check_partition(problem, runs, exact=False).tensors[0].verdict == "too fine"


def test_wrong_claims_are_told_wrong_at_every_seed_and_right_ones_never():
    """Entries inside three times as large as outside: contrast 9, more than the 4 of the level; 10
    matrices each."""
    counts: dict[str, int] = {}
    for seed in range(10):
        problem = planted((ROWS, COLUMNS), "rows", noise=1.3, seed=seed)
        for claim, verdict in TRUTHS["rows"].items():
            found = check(problem, claim, seed=seed).verdict
            assert found in (verdict, "undecided")
            counts[claim] = counts.get(claim, 0) + (found == verdict)
    assert counts["columns"] >= 8 and counts["whole"] >= 8 and counts["elements"] >= 8


def test_scales_of_rows_are_no_structure():
    """A dense Hessian whose rows differ by a factor of 30 holds more mass inside rows, but not for
    any structure."""
    problem = planted((ROWS, COLUMNS), "dense", scales=torch.logspace(0, -1.5, ROWS))
    found = check(problem, "whole", exact=True)
    assert found["rows"].share > 0.2 and found.verdict == "follows"
    assert check(problem, "rows").verdict in ("too fine", "undecided")


def test_evidence_tells_every_cut_with_its_error():
    problem = planted((ROWS, COLUMNS), "rows", noise=0.4)
    exact, found = check(problem, "rows", exact=True), check(problem, "rows")
    assert [e.cut for e in found.evidence] == ["whole", "elements", "rows", "columns"]
    for truth, estimate in zip(exact.evidence, found.evidence, strict=True):
        assert estimate.share == pytest.approx(truth.share, abs=4 * estimate.share_error + 1e-12)
        assert truth.share_error == 0 and (estimate.cut == "whole" or estimate.share_error > 0)
    assert found.claimed is found["rows"] and found.claimed.num_blocks == ROWS
    with pytest.raises(KeyError, match="has no cut 'heads'; its cuts are whole, elements"):
        found["heads"]


def test_a_vanishing_hessian_and_rounding_noise_are_undecided():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    problem = ht.Problem(
        model, lambda m, b: m[0](b).sum() ** 2, [torch.randn(4, 3, dtype=torch.float64)]
    )
    report = ht.check_partition(problem, "tensor", exact=False)
    dead = report["1.weight"]
    assert (
        dead.verdict == dead.likely == "undecided"
        and "exactly zero" in dead.reason
        and dead.norm == 0
    )
    noise = ht.check_partition(network("gpt", torch.float32), "tensor")[
        "blocks.0.attention.key.bias"
    ]
    assert noise.verdict == "undecided" and "rounding" in noise.reason  # softmax does not see it


def test_roles_of_a_fused_tensor_are_judged_apart_unless_blocks_cross_them():
    problem = network("hf-gpt2")
    apart = ht.check_partition(problem, "adam_mini", exact=True)
    fused = "transformer.h.0.attn.c_attn.weight"
    assert [name for name in apart.verdict if name.startswith(fused)] == [
        f"{fused}[{role}]" for role in "qkv"
    ]
    assert [apart[f"{fused}[{role}]"].claim for role in "qkv"] == ["heads", "heads", "rows"]
    assert (
        apart[f"{fused}[q]"].verdict == "follows"
    )  # heads do not see each other's queries but behind the softmax
    together = ht.check_partition(problem, {f"{fused}": "whole"}, exact=True)
    assert list(together.verdict) == [fused] and together[fused].verdict == "too coarse"
    assert {"roles", "heads", "rows"} <= {e.cut for e in together[fused].evidence}


def test_the_suggestion_covers_what_was_judged_and_makes_a_partition():
    problem = network("hf-gpt2")
    report = ht.check_partition(problem, "adam_mini", exact=True)
    entries = sum(cut.numel for cut in report.suggestion.cuts)
    assert entries == problem.num_parameters == report.savings.num_parameters
    assert report.savings.num_blocks == len(report.suggestion)
    assert len(set(report.suggestion.names)) == len(report.suggestion)
    again = ht.check_partition(problem, report.suggestion, exact=True)
    assert [t.claim for t in again.tensors] == [t.suggested for t in report.tensors]
    for tensor in report.tensors:
        assert (
            again[tensor.name].verdict in ("follows", "undecided")
            or tensor[tensor.suggested].verdict != "follows"
        )


def test_a_trained_gpt2_contradicts_the_naive_cut_of_its_transposed_layer():
    """Conv1D stores c_fc as (inputs, outputs): its first axis is no neuron's. 60 steps of Adam on
    the plays' bytes."""
    from hessian_tools.problem import data

    hf = transformers()
    config = hf.GPT2Config(
        vocab_size=256,
        n_positions=32,
        n_embd=24,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    model = hf.GPT2LMHeadModel._from_config(config, attn_implementation="sdpa")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    tokens = data.text_tokens("byte", None)
    for x, y in data.language_batches(tokens, context=32, num_examples=480, batch_size=8, seed=1):
        optimizer.zero_grad()
        ht.cross_entropy(model, (x, y)).backward()
        optimizer.step()
    batches = data.language_batches(tokens, context=32, num_examples=8, batch_size=8, seed=2)
    problem = ht.Problem(model.eval(), ht.cross_entropy, batches)
    layer = "transformer.h.0.mlp.c_fc.weight"
    naive = ht.check_partition(problem, {layer: 0})[layer]
    assert (naive.claim, naive.verdict, naive.suggested) == ("columns", "wrong axis", "rows"), (
        naive.reason
    )
    assert ht.check_partition(problem, {layer: "row"})[layer].verdict == "follows"


def test_finished_tensors_are_not_computed_again():
    problem = network("mlp")
    seen = {}
    report = ht.check_partition(problem, "neuron", on_tensor=seen.__setitem__)
    assert list(seen) == [t.name for t in report.tensors]
    again = ht.check_partition(
        problem, "neuron", finished=seen, on_tensor=lambda *found: pytest.fail("computed")
    )
    assert repr(again.tensors) == repr(report.tensors)


def test_a_report_survives_saving(tmp_path):
    report = ht.check_partition(network("hf-gpt2"), "adam_mini")
    ht.save(report, tmp_path / "report")
    assert repr(ht.load(tmp_path / "report")) == repr(report)


def test_blocks_over_several_tensors_are_judged_in_each_with_a_note():
    report = ht.check_partition(network("mlp"), "model", exact=True)
    assert {t.claim for t in report.tensors} == {"whole"} and len(report.tensors) == 4
    assert "several tensors" in report.notes[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_probes": 2}, "num_probes is 2; it must be an integer of at least 3"),
        ({"num_blocks": 1.5}, "num_blocks is 1.5"),
        ({"alpha": 0}, "alpha is 0; it must lie between 0 and 1"),
        ({"contrast": 1}, "contrast is 1; it must exceed 1"),
        ({"partition": "nonsense"}, "presets are"),
    ],
)
def test_bad_arguments_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        ht.check_partition(network("mlp"), **settings)


def test_a_partition_of_another_model_and_too_large_a_dense_matrix_are_refused():
    with pytest.raises(ValueError, match="in no trainable parameter of this model"):
        ht.check_partition(network("mlp"), ht.partition(network("gpt").model, "tensor"))
    wide = nn.Linear(80, 80, bias=False)
    problem = ht.Problem(wide, ht.mse, [(torch.randn(2, 80), torch.randn(2, 80))])
    with pytest.raises(ValueError, match="6,400 entries; at most 4,096"):
        ht.check_partition(problem, "tensor", exact=True)


def test_an_undecided_claim_is_kept_and_a_contradicted_one_replaced():
    cuts = {
        "whole": ("too coarse", "too coarse", math.nan),
        "rows": ("undecided", "too fine", 0.1),
        "columns": ("undecided", "follows", 0.2),
    }
    evidence = [
        CutEvidence(name, 2, 0, 0, 0, excess, 0, 0, *said) for name, (*said, excess) in cuts.items()
    ]
    assert _suggested(evidence, "rows") == "rows" and _suggested(evidence, "whole") == "columns"
    sure = [*evidence, CutEvidence("heads", 2, 0, 0, 0, 0.3, 0, 0, "follows", "follows")]
    assert {_suggested(sure, claim) for claim in ("rows", "whole", "heads")} == {"heads"}


def test_the_error_rates_told_are_those_measured():
    records = ht.load(Path(__file__).parents[2] / "results" / "partition_error_rates" / "result")

    def counted(truths, verdicts=VERDICTS):
        asked = [r for r in records if r["truth"] in truths and r["estimated"] in verdicts]
        return sum(r["count"] for r in asked)

    right, wrong = counted({"right"}), counted({"wrong"})
    contradicted, accepted = counted({"right"}, CONTRADICTED), counted({"wrong"}, {"follows"})
    undecided = counted({"right", "wrong"}, {"undecided"})
    assert (contradicted, right) == partition_verdict.CONTRADICTED_THOUGH_RIGHT
    assert (accepted, wrong) == partition_verdict.ACCEPTED_THOUGH_WRONG
    assert (undecided, right + wrong) == partition_verdict.UNDECIDED_SHARE
    assert contradicted < 0.01 * right and accepted < 0.01 * wrong
    assert undecided < 0.15 * (right + wrong)
    assert len({r["kind"] for r in records}) == 18
    assert f"{right:,} right claims" in ht.check_partition(network("mlp"), "tensor").reliability


def quadratic(mean_squares):
    """A weight of ROWS x COLUMNS whose Hessian has entries of given mean squares."""
    upper = torch.randn(ROWS * COLUMNS, ROWS * COLUMNS, dtype=torch.float64).triu()
    matrix = mean_squares.double().sqrt() * (upper + upper.triu(1).T)

    def loss(model, batch):
        w = model.weight.flatten()
        return w @ matrix @ w / 2

    layer = nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float64)
    return ht.Problem(layer, loss, [torch.zeros(1)])


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "estimated"])
@pytest.mark.parametrize("kind", ["chain", "permuted groups", "columns in pairs"])
def test_blocks_coupled_to_a_few_others_as_to_themselves_are_too_fine(kind, exact):
    """What is outside is small on average, so that the contrast alone sees separate blocks."""
    row = torch.arange(ROWS).repeat_interleave(COLUMNS)
    column = torch.arange(COLUMNS).repeat(ROWS)
    group = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[row] // 4
    inside, claim = {
        "chain": ((row[:, None] - row).abs() <= 1, "rows"),
        "permuted groups": (group[:, None] == group, "rows"),
        "columns in pairs": ((column // 2)[:, None] == column // 2, "columns"),
    }[kind]
    found = check(quadratic(1 + 29 * inside), claim, exact=exact)
    assert found.claimed.contrast > 4
    assert found.verdict == "too fine" and "closest" in found.reason


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "estimated"])
def test_one_coupled_pair_is_no_objection(exact):
    row = torch.arange(ROWS).repeat_interleave(COLUMNS)
    pair = (row[:, None] < 2) & (row < 2)
    inside = (row[:, None] == row) | pair
    found = check(quadratic(1 + 39 * inside), "rows", exact=exact)
    assert found.verdict == "follows", found.reason


def test_alpha_is_divided_by_the_number_of_tests():
    """Of whole, elements, rows and columns, five pairs are one cut within another, rows and columns
    are tested against each other twice, and the blocks of each for being coupled twice."""
    found = check(planted((ROWS, COLUMNS), "rows", noise=0.4), "rows", alpha=0.07)
    assert len(found.tests) > 3
    assert [test.level for test in found.tests] == pytest.approx([0.07 / 11] * len(found.tests))


def test_answers_are_a_three_valued_logic():
    yes, no, unclear = Answer.YES, Answer.NO, Answer.UNCLEAR
    assert [~answer for answer in (yes, no, unclear)] == [no, yes, unclear]
    assert yes & yes is yes and yes & unclear is unclear and unclear & no is no
    assert no | no is no and no | unclear is unclear and unclear | yes is yes


def test_answers_of_tests():
    answers = [Statement("x", p, 1 - p, 0.01).answer for p in (0.001, 0.2, 0.999)]
    assert answers == ["yes", "unclear", "no"] and not math.isnan(
        Statement("x", 0.5, 0.5, 0.01).p_true
    )
