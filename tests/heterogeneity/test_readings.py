"""A reading is one class: a new one shows up in tables, pictures, JSON, files and tolerances."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from problems.compared import same
from problems.planted import FakeHessian, blocks, cut_of, random_symmetric

import hessian_tools as ht
from hessian_tools import tables
from hessian_tools.app import cli, report
from hessian_tools.blocks.partition import Partition
from hessian_tools.heterogeneity.measure import PairMeasure, Replacement, Workspace
from hessian_tools.heterogeneity.readings import READINGS, pair_readings
from hessian_tools.plots import spectra as plotting


def top(block):
    return np.log10(block.nodes.max(axis=1)).mean()


@dataclass(frozen=True)
class TopDistance(PairMeasure):
    """Distance of the blocks' largest nodes in decades, mean over probes."""

    name: str = "top"
    label: str = "Top distance"
    title: str = "Distance of the largest eigenvalues"
    unit: str = "decades"
    description: str = "distance of the largest eigenvalues"
    scale_free: bool = True
    drawn: bool = True

    def values(self, workspace: Workspace):
        tops = np.array([top(block) for block in workspace.blocks])
        return np.abs(tops[:, None] - tops)

    def row(self, replacement: Replacement):
        blocks = np.array([top(block) for block in replacement.workspace.blocks])
        return np.abs(top(replacement.block) - blocks[replacement.others])


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(READINGS, "top", TopDistance())


@pytest.fixture
def spectra(added):
    return ht.BlockSpectra(blocks(), 3, 9, 0, "rademacher", "full", "a route")


def test_every_entry_bears_its_own_name():
    assert {name: measure.name for name, measure in READINGS.items()} == {n: n for n in READINGS}
    assert pair_readings() == ("curvature", "log", "wasserstein", "bounded", "unnormalised")


def test_a_new_reading_is_computed_with_its_error(spectra):
    js = ht.js_heterogeneity(spectra, readings=["top"])
    tops = np.array([top(block) for block in spectra.values()])
    pairs = [abs(a - b) for i, a in enumerate(tops) for b in tops[:i]]
    reading = js.readings["top"]
    assert reading.mean == pytest.approx(np.mean(pairs)) and reading.standard_error > 0
    assert (reading.unit, reading.description) == ("decades", TopDistance.description)


def test_a_new_reading_is_in_table_and_json(spectra):
    js = ht.js_heterogeneity(spectra, readings=["top"])
    reading = js.readings["top"]
    lines = report.readings_table({"net": js}).splitlines()
    (row,) = (line for line in lines if line.startswith("Top distance [decades]"))
    assert row.endswith(tables.interval(reading.mean, reading.low, reading.high))
    summary = json.loads(json.dumps(report.summary(spectra, js)))
    assert summary["readings"]["top"]["mean"] == reading.mean


def test_a_new_reading_is_drawn(spectra, monkeypatch, tmp_path):
    js = ht.js_heterogeneity(spectra, readings=pair_readings())
    axes = Figure().subplots()
    plotting.js_matrix(axes, js, "top")
    assert axes.get_title().startswith("Distance of the largest eigenvalues\nmean over pairs ")
    figures = []
    monkeypatch.setattr(plotting, "written", lambda figure, path: figures.append(figure) or path)
    plotting.draw(tmp_path, spectra, js, "net")
    titles = [panel.get_title().split("\n")[0] for panel in figures[-1].axes[:4]]
    drawn = ("curvature", "wasserstein", "unnormalised", "top")
    assert titles == [READINGS[name].title for name in drawn]


def test_a_new_reading_is_saved_and_loaded(spectra, tmp_path):
    js = ht.js_heterogeneity(spectra, readings=["top"])
    ht.save(js, tmp_path / "js")
    loaded = ht.load(tmp_path / "js")
    assert same(loaded, js) and loaded.readings["top"].mean == js.readings["top"].mean


def test_a_new_reading_can_be_asked_to_meet_a_tolerance(added, capsys):
    matrices = {
        name: random_symmetric(10.0**i * np.linspace(0.5, 1, 40), i) for i, name in enumerate("ab")
    }
    partition = Partition(tuple(cut_of([name], 40) for name in matrices))
    found = ht.adaptive_js0(
        FakeHessian(matrices), partition, reading="top", tolerance=0.1, progress=False
    )
    assert found.met and found.estimates["top"] == pytest.approx(1.0, abs=0.1)
    assert found.heterogeneity.readings["top"].mean == pytest.approx(1.0, abs=0.1)
    with pytest.raises(SystemExit):
        cli.main(["js0", "--help"])
    assert "unnormalised,top}" in capsys.readouterr().out


def test_results_saved_before_the_registry_load():
    """Readings of an earlier version, without intervals; its numbers are those that it printed."""
    path = Path(__file__).parents[1] / "fixtures" / "js0_0.1.0"
    js = ht.load(path)["heterogeneity"]
    assert set(js.readings) == {"bounded", "unnormalised", "log", "wasserstein"}
    size = len(js.names)
    for name, reading in js.every_reading.items():
        values = js.scale_spread.log10_rms if name == "scale" else reading.matrix
        assert values.shape == ((size,) if name == "scale" else (size, size))
        assert np.isnan(reading.low) and np.isfinite(reading.mean)
        mean = np.std(values) if name == "scale" else values[np.triu_indices(size, 1)].mean()
        assert mean == pytest.approx(reading.mean, rel=1e-12)
