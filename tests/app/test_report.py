"""Tables and numbers as text, against what a person would write."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import hessian_tools as ht
from hessian_tools import tables
from hessian_tools.app import report
from hessian_tools.curvature.symmetric import DiagonalOperator


def spectra(blocks, notes=()):
    """Exact spectra of diagonal blocks with the given eigenvalues."""
    quadratures = {
        name: ht.slq(
            DiagonalOperator(torch.tensor(values, dtype=torch.float64)),
            num_probes=2,
            num_steps=3,
            exact=True,
        )
        for name, values in blocks.items()
    }
    return ht.BlockSpectra(quadratures, 2, 3, 0, "rademacher", "full", "the route", notes)


SMALL = spectra({"a.weight": [-1.0, 2.0, 3.0], "longer.bias": [0.0, 0.0]}, ("a note",))


def test_table():
    text = report.table(("name", "x"), [("a", "1.5"), ("long name", "2")])
    assert text.splitlines() == [
        "name         x",
        "---------  ---",
        "a          1.5",
        "long name    2",
    ]
    assert report.table(("a", "b"), [("xxx", "yy")], left=2).splitlines()[0] == "a    b"


def test_spectra_table():
    assert report.spectra_table(SMALL).splitlines() == [
        "block        size  rms eigenvalue  smallest  largest  trace ± 95 %  HVPs  status",
        "-----------  ----  --------------  --------  -------  ------------  ----  ------",
        "a.weight        3            2.16        -1        3         4 ± 0     3   exact",
        "longer.bias     2               0         0        0         0 ± 0     2   exact",
    ]


@pytest.mark.parametrize(
    "value, error, text",
    [
        (12.345, 0.42, "12.3 ± 0.4"),
        (-104.2, 31.0, "-100 ± 30"),
        (0.5524, 0.00078, "0.5524 ± 0.0008"),
        (0.00284, 5.7e-05, "0.00284 ± 0.00006"),
        (9.94, 0.96, "10 ± 1"),
        (-0.0027, 0.01, "0.00 ± 0.01"),
        (123456.0, 4321.0, "123000 ± 4000"),
        (1.0, 0.0, "1 ± 0"),
        (1.25, float("nan"), "1.25 ± nan"),
        (float("nan"), 0.1, "nan ± 0.1"),
        (1e9, 2e7, "1e+09 ± 2e+07"),
        (3e-9, 2e-10, "3e-09 ± 2e-10"),
        (float("inf"), float("inf"), "inf ± inf"),
    ],
)
def test_plus_minus(value, error, text):
    assert report.plus_minus(value, error) == text


@pytest.mark.parametrize(
    "value, low, high, text",
    [
        (1.349, 1.3423, 1.3558, "1.3490 (1.3423 to 1.3558)"),
        (12.345, 11.2, 13.3, "12.3 (11.2 to 13.3)"),
        (-0.01, -0.2, 0.11, "0.000 (0.000 to 0.110)"),
        (123.0, 80.0, 170.0, "123 (80 to 170)"),
        (2.5, 2.5, 2.5, "2.5 (exact)"),
        (1e9, 9e8, 1.2e9, "1e+09 (9e+08 to 1.2e+09)"),
    ],
)
def test_interval(value, low, high, text):
    assert tables.interval(value, low, high) == text


def test_readings_table_has_a_column_a_model():
    asked = {"readings": ["curvature", "log", "wasserstein", "bounded", "unnormalised"]}
    js = ht.js_heterogeneity(spectra({"a": [1.0, 1.0], "b": [1000.0, 1000.0]}), **asked)
    other = ht.js_heterogeneity(spectra({"a": [1.0, 1.0], "b": [1.0, 1.0]}), **asked)
    lines = report.readings_table({"first": js, "second": other}).splitlines()
    assert lines[0].split() == ["reading", "(95", "%", "interval)", "first", "second"]
    start = lines[1].index("  ")
    rows = {line[:start].strip(): line[start:].split() for line in lines[2:]}
    assert [name.split(" [")[0] for name in rows] == [
        "spread of block scales",
        "curvature",
        "JS log",
        "Wasserstein",
        "JS bounded (literature)",
        "JS0 (literature, unnormalised)",
        "verdict",
    ]
    assert rows["JS bounded (literature) [nats]"][:3] == ["0.693", "(floor", "0)"]  # ln 2: disjoint
    assert rows["Wasserstein [decades]"] == ["3", "(exact)", "0", "(exact)"]  # a factor of 1000
    assert rows["curvature [decades]"] == ["3", "(exact)", "0", "(exact)"]
    assert rows["spread of block scales [decades]"] == ["1.5", "(exact)", "0", "(exact)"]
    assert " ".join(rows["verdict"]) == f"{js.verdict.decision} {other.verdict.decision}"
    assert other.verdict.decision == "no heterogeneity found"
    assert rows["JS0 (literature, unnormalised) [nats / dx]"][0] == f"{js.js0:.3g}"


def test_what_is_not_resolved_has_no_number():
    eigenvalues = torch.linspace(-1, 1, 4000, dtype=torch.float64) ** 3
    blocks = {
        name: ht.slq(DiagonalOperator(scale * eigenvalues), num_probes=2, num_steps=2, exact=False)
        for name, scale in (("a", 1.0), ("b", 1.7))
    }
    js = ht.js_heterogeneity(blocks)
    assert js.told("curvature") == "not resolved at 2 x 2"
    assert "(exact)" not in js.told("scale") and "not resolved" not in js.told("scale")
    found = report.summary(ht.BlockSpectra(blocks, 2, 2, 0, "rademacher", "full", "a route"), js)
    assert found["readings"]["curvature"]["resolved"] is False
    assert found["readings"]["curvature"]["low"] is None
    assert js.verdict.decision == "undecided" and "curvature" in js.verdict.reason


def test_exact_spectra_are_offered_where_they_are_within_reach():
    assert report.exact_offer(SMALL) == ""
    operator = DiagonalOperator(torch.linspace(1, 2, 60, dtype=torch.float64))
    near = ht.slq(operator, num_probes=2, num_steps=5, exact=False)
    found = ht.BlockSpectra({"a": near, **SMALL}, 2, 5, 0, "rademacher", "full", "a route")
    assert report.exact_offer(found).endswith("for 60 products: --exact 60")


def test_verdict_text_is_wrapped_and_complete():
    js = dataclasses.replace(ht.js_heterogeneity(SMALL), notes=("one note", "two"))
    lines = report.verdict_text("net", js, "the race").splitlines()
    assert max(map(len, lines)) <= 100 and lines[-2:] == ["note: one note", "note: two"]
    assert " ".join(lines[:-2]) == f"net: {js.verdict}"


def test_what_is_undecided_is_decided_by_a_race():
    js = ht.js_heterogeneity(SMALL)
    open_question = dataclasses.replace(js.verdict, decision="undecided")
    lines = report.verdict_text("net", dataclasses.replace(js, verdict=open_question), "the race")
    assert lines.endswith("\nto decide: the race")
    closed = dataclasses.replace(js.verdict, decision="nothing to compare")
    assert "race" not in report.verdict_text(
        "", dataclasses.replace(js, verdict=closed), "the race"
    )


def test_summary_is_json_with_the_tables_numbers():
    js = ht.js_heterogeneity(SMALL, readings=["unnormalised"])
    found = json.loads(json.dumps(report.summary(SMALL, js), allow_nan=False))
    first = found["blocks"][0]
    assert first["name"] == "a.weight" and (first["smallest"], first["largest"]) == (-1, 3)
    assert first["trace"] == pytest.approx(4) and first["rms"] == pytest.approx(np.sqrt(14 / 3))
    assert found["matvecs"] == 5 and found["route"] == "the route"
    assert found["notes"] == ["a note", *js.notes] and js.notes
    assert found["readings"]["scale"]["mean"] == "nan"  # one of two blocks is zero
    assert found["readings"]["unnormalised"]["mean"] == js.js0
    assert found["verdict"] == {"decision": js.verdict.decision, "words": str(js.verdict)}
    assert set(report.summary(SMALL, None)) == {"blocks", "matvecs", "route", "matrix", "notes"}
