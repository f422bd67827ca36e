"""Scales, ticks, paths and heat maps: places in a drawing against the numbers they stand for."""

import base64
import io
import math
import re

import numpy as np
import pytest
from PIL import Image
from problems.page_folders import EIGENVALUES, exact_spectra, small_problem

import hessian_tools as ht
from hessian_tools.page.block_spectra import blocks_view, spectrum_view
from hessian_tools.page.curves import Curve, PanelOf, drawing, line_path, thinned
from hessian_tools.page.heat_maps import coupling_map, dense_map, reading_maps
from hessian_tools.page.scales import Scale, eigenvalue_ticks, fitted, linear_values
from hessian_tools.page.words import plus_minus, power_of_ten, sentence, shown
from hessian_tools.spectra.density import Axis, spectral_density, symlog_axis


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (12345, "12,345"),
        (-3, "−3"),
        (1.2345, "1.23"),
        (-0.00012345, "−0.000123"),
        (1.2345e-5, "1.23e−5"),
        (999.6, "1,000"),
        (12345.6, "12,300"),
        (-123456.0, "−1.23e5"),
        (1e300, "1e300"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_numbers_in_words(value, text):
    assert shown(value) == text


def test_other_words():
    assert [power_of_ten(k) for k in (-12, -1, 0, 1, 3)] == ["10⁻¹²", "10⁻¹", "1", "10", "10³"]
    assert power_of_ten(-3, True) == "−10⁻³" and power_of_ten(0, True) == "−1"
    assert plus_minus(-104.2, 31.0) == "−100 ± 30" and plus_minus(1.5, 0.0) == "1.5"
    assert plus_minus(1.5, math.nan) == "1.5"
    assert sentence("adam leads") == sentence("adam leads.") == "Adam leads."


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 17.0), (1e-9, 2e-9), (998.0, 1003.0)])
def test_ticks_of_a_linear_axis_are_few_round_and_inside(low, high):
    values = linear_values(low, high, 6)
    steps = np.diff(values)
    assert 2 <= len(values) <= 8 and np.allclose(steps, steps[0])
    assert low - 1e-9 * high <= values[0] and values[-1] <= high * (1 + 1e-9)
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0] * 1.0001)), 6) in (1, 2, 5)


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (1e-3, 2.0), (1e-14, 1e3), (0.5, 0.9)])
def test_ticks_of_a_log_axis_say_where_they_are(low, high):
    scale = Scale(low, high, 100.0, 0.0, is_log=True)
    ticks = scale.ticks(6)
    assert 2 <= len(ticks) <= 14
    for place, label in ticks:
        value = low * (high / low) ** ((100.0 - place) / 100.0)
        digits = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
        power = re.fullmatch(r"10([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)", label)
        told = 10.0 ** int(power[1].translate(digits)) if power else float(label.replace(",", ""))
        assert value == pytest.approx(told, rel=0.03)


def test_a_scale_holds_all_that_is_finite():
    scale = fitted([1.0, 3.0, math.nan, math.inf], 200.0, 0.0)
    assert not scale.is_log and scale.low < 1.0 and scale.high > 3.0
    assert fitted([1e-3, 5.0], 0, 1).is_log and not fitted([-1.0, 500.0], 0, 1).is_log
    assert fitted([], 0, 1).at(0.5) == 0.5
    alone = fitted([7.0], 0.0, 1.0)
    assert alone.low < 7.0 < alone.high


def test_ticks_of_the_eigenvalue_axis_lie_at_their_eigenvalues():
    axis = Axis("symlog", 1e-6)
    places = Scale(-7.0, 8.0, 0.0, 600.0)
    ticks = {label: place for place, label in eigenvalue_ticks(axis, places)}
    assert ticks["0"] == places.at(0.0)
    for label, value in (("10⁻²", 1e-2), ("−10⁻²", -1e-2)):
        assert ticks[label] == pytest.approx(float(places.at(axis.position(value))), abs=0.06)


# ---------------------------------------------------------------------------------------- curves


def points(path):
    return np.array(re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path), dtype=float)


def test_a_path_breaks_where_nothing_is_known():
    y = np.array([1.0, math.nan, 2.0, 3.0])
    assert line_path(np.arange(4.0), y) == "M0 1M2 2L3 3"


def test_a_curve_is_drawn_at_its_numbers():
    x, y = np.array([0.0, 5.0, 10.0]), np.array([1.0, 100.0, 10.0])
    curve = Curve("a", x, y, low=y / 2, high=y * 2, drawn_as="dots")
    drawn = drawing([PanelOf("title", [curve]), PanelOf("b", [Curve("b", x, -y)])], "step", "words")
    (first,), (second,) = (panel.curves for panel in drawn.panels)
    places = points(first.path)
    assert places[:, 0].tolist() == [drawn.left, (drawn.left + drawn.right) / 2, drawn.right]
    heights = places[:, 1]  # of a logarithmic axis: 10 is in the middle of 1 and 100
    assert heights[2] == pytest.approx((heights[0] + heights[1]) / 2, abs=0.1)
    assert drawn.panels[0].top <= heights.min() and heights.max() <= drawn.panels[0].bottom
    assert points(second.path)[1, 1] > points(second.path)[0, 1]  # lower numbers lie lower
    assert drawn.panels[1].top > drawn.panels[0].bottom
    assert first.numbers["at"] == x.tolist() and first.numbers["values"] == y.tolist()
    assert first.band.endswith("Z") and first.marks.count("h0") == 3
    assert [key.label for key in drawn.legend] == ["a"]  # the other is named by its panel


def test_a_wide_band_does_not_flatten_its_curve():
    y = np.array([1.0, 2.0, 1.5])
    wide = np.array([2.0, 80.0, 2.0])
    curve = Curve("a", np.arange(3.0), y, low=y - 0.1, high=wide)
    drawn = drawing([PanelOf("title", [curve])], "step", "words")
    heights = points(drawn.panels[0].curves[0].path)[:, 1]
    assert np.ptp(heights) > 0.3 * (drawn.panels[0].bottom - drawn.panels[0].top)


def test_thinned_points_keep_both_ends():
    assert thinned(5) == [0, 1, 2, 3, 4]
    for is_log in (False, True):
        kept = thinned(10_000, 100, is_log)
        assert kept[0] == 0 and kept[-1] == 9_999 and len(kept) <= 100


# --------------------------------------------------------------------------------------- spectra


def test_a_blocks_curve_is_its_density():
    """The path, taken back to numbers, against the density itself."""
    spectra = exact_spectra()
    view = blocks_view(spectra, None, 100)
    axis = symlog_axis(spectra.values())
    fine = spectral_density(spectra, grid="symlog", num_points=6_000)
    along = Scale(float(fine.grid[0]), float(fine.grid[-1]), view.left, view.right)
    lowest = 10.0**-1  # of the largest block, 4 rows: below 0.5 / 4
    for curve, values in zip(view.curves, fine.values, strict=True):
        places = points(curve.path)
        # between points a curve is straight, up to what a kernel bends over their distance
        inside = (places[:, 1] < view.bottom - 1) & (places[:, 1] > view.top + 1)
        assert inside.sum() >= 3
        heights = np.interp(places[inside, 0], along.at(fine.grid), values)
        scale = Scale(lowest, 2.5, view.bottom, view.top, is_log=True)
        assert places[inside, 1] == pytest.approx(scale.at(heights), abs=1.0)
        low, high = axis.position(
            [spectra[curve.name].smallest.value, max(EIGENVALUES[curve.name])]
        )
        assert curve.ends == pytest.approx(along.at([low, high]), abs=0.1)


def test_the_pair_shown_first_is_the_most_different():
    spectra = exact_spectra()
    js = ht.js_heterogeneity(spectra)
    view = blocks_view(spectra, js, 100)
    names = [spectra.names[place] for place in view.pair]
    matrix = js.readings["curvature"].matrix
    assert matrix[tuple(js.names.index(name) for name in names)] == np.nanmax(matrix)
    assert spectra[names[0]].rms.value > spectra[names[1]].rms.value
    assert blocks_view(spectra, None, 100).pair == (5, 0)  # head and the first query


def test_more_blocks_than_there_is_room_for():
    view = blocks_view(exact_spectra(), ht.js_heterogeneity(exact_spectra()), 4)
    assert len(view.curves) == len(view.table.rows) == 4
    assert "4 of 6 blocks are shown" in " ".join(view.notes)
    assert max(view.pair) < 4


def test_one_spectrum_has_its_facts():
    spectra = exact_spectra({"(model)": [-1.0] * 40 + [0.0] * 200 + [50.0]})
    view = spectrum_view("(model)", spectra["(model)"], spectra)
    facts = dict(view.facts)
    assert facts["largest eigenvalue"] == "50" and facts["outliers, known to 1 %"] == "50"
    (panel,) = view.drawing.panels
    outlier = panel.curves[1]
    assert outlier.numbers["at"] == [50.0] and outlier.drawn_as == "crosses"


# ------------------------------------------------------------------------------------- heat maps


def matrix_of(heat_map):
    """Back from the numbers on the page."""
    shares = np.frombuffer(base64.b64decode(heat_map.numbers), "<u2").astype(float)
    count = len(heat_map.names)
    assert len(shares) == count * (count + 1) / 2
    shares[shares == 65535] = math.nan
    matrix = np.zeros((count, count))
    matrix[np.triu_indices(count)] = shares / 65534
    matrix = np.maximum(matrix, matrix.T)
    if heat_map.is_log:
        return heat_map.low * (heat_map.high / heat_map.low) ** matrix
    return heat_map.low + matrix * (heat_map.high - heat_map.low)


def pixels_of(heat_map):
    content = base64.b64decode(heat_map.image.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).astype(int)


def test_a_map_holds_the_readings_numbers():
    spectra = exact_spectra({**EIGENVALUES, "dead.weight": [0.0, 0.0]})
    js = ht.js_heterogeneity(spectra, readings=["curvature", "log"])
    for heat_map, reading in zip(reading_maps(js, 100), js.readings.values(), strict=True):
        found = matrix_of(heat_map)
        assert np.allclose(found, reading.matrix, atol=2e-5 * heat_map.high, equal_nan=True)
        pixels = pixels_of(heat_map)
        known = np.isfinite(reading.matrix)
        assert (pixels[..., 3] == np.where(known, 255, 0)).all()
        brightness = pixels[..., :3].sum(-1)[known]
        assert brightness[np.argmax(reading.matrix[known])] == brightness.max()
    best = heat_map.pairs.rows[0].cells
    assert best[2].value == pytest.approx(np.nanmax(reading.matrix))


def test_a_large_map_is_thinned_and_says_so():
    js = ht.js_heterogeneity(exact_spectra())
    (heat_map,) = reading_maps(js, 3)
    assert heat_map.names == tuple(js.names[place] for place in (0, 2, 5))
    assert "3 of 6 blocks are drawn" in heat_map.told
    assert np.allclose(matrix_of(heat_map)[0, 2], js.readings["curvature"].matrix[0, 5], rtol=1e-4)


def test_couplings_are_drawn_by_their_logarithms():
    problem = small_problem()
    found = ht.coupling(problem, ht.partition(problem.model, "tensor"), num_probes=2, seed=0)
    heat_map = coupling_map(found, 100)
    shown_ones = np.clip(found.tensor_coupling, heat_map.low, None)
    assert heat_map.is_log and np.allclose(matrix_of(heat_map), shown_ones, rtol=1e-3)


def test_a_dense_matrix_keeps_its_largest_entries():
    matrix = np.full((1000, 1000), 1e-9)
    matrix[123, 876] = matrix[876, 123] = -2.0
    block = ht.structure.DenseBlock(
        ("a", "b"), np.array([0, 500, 1000]), matrix, 0.0, 1000, "float64"
    )
    heat_map = dense_map(block)
    pixels = pixels_of(heat_map)
    assert pixels.shape == (400, 400, 4) and heat_map.borders == (0.5,)
    brightest = np.argwhere(pixels[..., :3].sum(-1) == pixels[..., :3].sum(-1).max())
    assert brightest.tolist() == [[49, 350], [350, 49]]
    assert heat_map.high == 2.0
