"""Pictures: what is written on them, that nothing overlaps or is cut off, and that marked outliers
are eigenvalues."""

import inspect
import itertools

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import hessian_tools as ht
from hessian_tools.curvature.symmetric import DiagonalOperator
from hessian_tools.plots import spectra as plotting
from hessian_tools.spectra.density import Axis

GPT2 = [
    f"transformer.h.{layer}.{name}"
    for layer in range(4)
    for name in ("attn.c_attn.weight[q]", "attn.c_attn.weight[k]", "attn.c_attn.weight[v]", "attn.c_proj.weight",
                 "mlp.c_fc.weight", "mlp.c_proj.weight")
] + ["transformer.wte.weight", "transformer.wpe.weight"]  # fmt: skip
BERT = [f"bert.encoder.layer.{i}.attention.output.dense.weight" for i in range(7)] + [
    "cls.predictions.bias"
]


def spectra(names, scales=None, size=400, exact="auto"):
    """Blocks whose scales spread over 5 decades, some of them zero."""
    quadratures = {}
    for i, name in enumerate(names):
        scale = 10.0 ** ((i * 7) % 6 - 4) if scales is None else scales[i]
        values = scale * np.random.default_rng(i).standard_normal(size) ** 3
        operator = DiagonalOperator(torch.from_numpy(values))
        quadratures[name] = ht.slq(operator, num_probes=2, num_steps=12, name=name, exact=exact)
    return ht.BlockSpectra(quadratures, 2, 12, 0, "rademacher", "full", "a route")


def assert_readable(figure):
    """No text that is drawn leaves the page, no two texts touch (two pixels of grace)."""
    texts, draw = [], Text.draw
    canvas = FigureCanvasAgg(figure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Text, "draw", lambda self, renderer, *a: texts.append(self) or draw(self, renderer, *a)
        )
        canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in set(texts) if text.get_text()]
    assert len(boxes) > 5
    width, height = canvas.get_width_height()
    for text, box in boxes:
        assert min(box.x0, box.y0) >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, (
            f"{text!r} is cut off"
        )
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        apart = a.x1 - 2 < b.x0 or b.x1 - 2 < a.x0 or a.y1 - 2 < b.y0 or b.y1 - 2 < a.y0
        assert apart, f"{one!r} and {two!r} overlap"


@pytest.mark.parametrize(
    "names",
    [["a.weight"], ["a.weight", "b.weight"], BERT, GPT2, [f"blocks.{i}.weight" for i in range(60)]],
)
def test_block_spectra_are_readable(names):
    figure = plotting.block_spectra(
        spectra(names), title="net (1,234 parameters, its data)" + " and words" * 9
    )
    assert_readable(figure)
    panels = [panel for panel in figure.axes if panel.get_visible()]
    shown = min(len(names), plotting.MAX_PANELS)
    assert len(panels) == shown
    assert ("48 of 60 shown" in figure.get_suptitle().replace("\n", " ")) == (len(names) == 60)
    assert figure.get_suptitle().startswith("net (1,234 parameters")
    assert figure.get_supxlabel().startswith("eigenvalue (logarithmic beyond ±")
    assert figure.get_supylabel() == "share of eigenvalues per decade\n(kernel of 0.2 decades)"
    if shown == len(names):
        assert [panel.get_title() for panel in panels] == plotting.shortened(names)


def test_a_panel_tells_and_marks_its_extreme_eigenvalues():
    found = spectra(["a.weight", "b.weight"], scales=[1e-3, 10.0], exact=True)
    figure = plotting.block_spectra(found)
    axis = ht.spectral_density(found, grid="symlog").axis
    for panel, q in zip(figure.axes, found.values(), strict=True):
        ends = np.array([q.nodes.min(), q.nodes.max()])
        assert panel.texts[0].get_text() == "{:.3g}  to  {:.3g}".format(*ends)
        assert np.allclose(panel.lines[1].get_xdata(), axis.position(ends))
    low, high = figure.axes[0].get_xlim()
    assert figure.axes[1].get_xlim() == (low, high)  # one axis for all
    assert list(figure.axes[1].get_xticks()) == list(figure.axes[0].get_xticks())
    values = figure.axes[0].lines[0].get_ydata()
    assert np.trapezoid(values, figure.axes[0].lines[0].get_xdata()) == pytest.approx(
        1, abs=0.02
    )  # a share


@pytest.mark.parametrize("scales", [(0.0, 0.0), (1.0, 0.0), (1e-30, 1e-32), (1e20, 1e-20)])
@pytest.mark.parametrize("exact", [True, False])
def test_zero_and_extreme_blocks_are_drawn(scales, exact, tmp_path):
    found = spectra(["a.weight", "b.weight"], scales, size=30, exact=exact)
    assert_readable(plotting.block_spectra(found))
    for name in found:
        alone = ht.BlockSpectra({name: found[name]}, 2, 12, 0, "rademacher", "full", "a route")
        assert plotting.draw(tmp_path, alone, None, "net") == [tmp_path / "spectrum.png"]


def test_draw_writes_whole_pngs(tmp_path):
    found = spectra(BERT)
    js = ht.js_heterogeneity(found)
    paths = plotting.draw(tmp_path, found, js, "net")
    assert paths == [tmp_path / "block_spectra.png", tmp_path / "js_matrix.png"]
    assert plotting.draw(tmp_path, found, None, "net") == paths[:1]
    assert all(image.imread(path).shape[1] > 800 for path in paths)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("names", [["a", "b"], GPT2])
def test_heat_map(names, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plotting, "written", lambda figure, path: figures.append(figure) or path)
    found = spectra(names)
    js = ht.js_heterogeneity(found, readings=["wasserstein", "unnormalised"])
    plotting.draw(tmp_path, found, js, "net")
    figure = figures[1]
    assert_readable(figure)
    for panel, reading in zip(figure.axes[:2], ("wasserstein", "unnormalised"), strict=True):
        assert np.array_equal(panel.images[0].get_array(), js.readings[reading].matrix)
        assert f"mean over pairs {js.told(reading)}, " in panel.get_title()
        assert [label.get_text() for label in panel.get_xticklabels()] == plotting.shortened(names)
    assert [bar.get_ylabel() for bar in figure.axes[2:]] == ["decades", "nats / dx"]


def planted(bulk, outside, seed=0):
    rng = np.random.default_rng(seed)
    return DiagonalOperator(
        torch.from_numpy(np.concatenate([0.1 * rng.standard_normal(bulk), outside]))
    )


def test_outliers_are_the_planted_eigenvalues():
    outside = [-9.0, -4.0, 3.0, 5.0, 20.0]
    found = ht.slq(planted(3000, outside), num_probes=3, num_steps=40, exact=False)
    assert plotting.outliers(found, 10) == pytest.approx(outside, rel=1e-6)
    assert plotting.outliers(found, 2) == pytest.approx([-9.0, 20.0], rel=1e-6)
    exact = ht.slq(planted(300, outside), num_probes=3, num_steps=40, exact=True)
    assert plotting.outliers(exact, 10) == pytest.approx([-9.0, 20.0])  # here the rms is 1.3


@pytest.mark.parametrize("mode", ["local", "none"])
def test_copies_of_an_outlier_count_once(mode):
    operator = planted(3000, [10.0])
    found = ht.slq(operator, num_probes=2, num_steps=120, reorthogonalize=mode, exact=False)
    assert (np.abs(found.nodes[0] - 10) < 1e-6).sum() > 1  # orthogonality is lost: there are copies
    assert plotting.outliers(found, 10) == pytest.approx([10.0], rel=1e-6)


def test_no_outliers_in_a_bulk_nor_what_has_not_converged():
    semicircle = DiagonalOperator(torch.from_numpy(np.sin(np.linspace(-1.5, 1.5, 2000))))
    assert (
        len(plotting.outliers(ht.slq(semicircle, num_probes=2, num_steps=40, exact=False), 10)) == 0
    )
    steps = ht.slq(
        planted(3000, [5.0, 5.5]), num_probes=2, num_steps=3, exact=False
    )  # too few to tell them apart
    assert len(plotting.outliers(steps, 10)) == 0
    cluster = planted(3000, [7.0] * 90)  # 3 % of all eigenvalues are no outlier
    assert len(plotting.outliers(ht.slq(cluster, num_probes=2, num_steps=30, exact=False), 10)) == 0


def test_spectrum_marks_outliers_and_names_axes():
    axes = Figure((8, 4.4), layout="constrained").subplots()
    found = ht.slq(planted(3000, [-9.0, 20.0]), num_probes=3, num_steps=40, exact=False)
    plotting.spectrum(axes, found)
    assert axes.lines[1].get_xdata() == pytest.approx([-9.0, 20.0], rel=1e-6)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "2 outliers, converged to 1 %"
    ]
    assert (
        axes.get_xlabel() == "eigenvalue of the mean loss's Hessian" and axes.get_yscale() == "log"
    )
    assert axes.get_ylabel().startswith("density per unit of eigenvalue\n(Gaussian kernel of ")
    assert axes.get_title() == "n = 3,002, -9  to  20"
    assert_readable(axes.figure)


@pytest.mark.parametrize(
    "low, high, largest, labels",
    [
        (-7.0, 7.0, 10.0, ["$-10^{1}$", "$-10^{-2}$", "0", "$10^{-2}$", "$10^{1}$"]),
        (-8.0, 3.0, 10.0, None),
        (-1.0, 7.0, 10.0, ["0", "$10^{-3}$", "$10^{-1}$", "$10^{1}$"]),
        (-1.0, 1.0, 1e6, None),
    ],
)
def test_symlog_ticks_lie_at_powers_of_ten(low, high, largest, labels):
    axes, axis = Figure().subplots(), Axis("symlog", 1e-6 * largest)
    plotting.symlog_ticks(axes, axis, low, high)
    ticks = sorted(
        zip(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()], strict=True)
    )
    found = [text for _, text in ticks]
    assert found == (labels or found) and "0" in found
    for position, text in ticks:
        value = float(text.strip("$").replace("10^{", "1e").replace("}", ""))
        assert axis.eigenvalue(position) == pytest.approx(value) and low <= position <= high
    assert min(np.diff([position for position, _ in ticks]), default=9) >= 0.7 * (high - low) / 5
    minor = axis.eigenvalue(axes.get_xticks(minor=True))
    assert np.allclose(np.log10(np.abs(minor)), np.rint(np.log10(np.abs(minor))))


@pytest.mark.parametrize(
    "names, short",
    [
        (["a.b.weight", "a.c.weight"], ["b", "c"]),
        (["a.b.weight", "a.b.weight.weight"], ["weight", "weight.weight"]),
        (["x.weight", "x"], ["x.weight", "x"]),
        (["a.b", "a.b.c"], ["b", "b.c"]),
        (["ab.x", "ac.x"], ["ab.x", "ac.x"]),
        (["net.fc.weight"], ["net.fc"]),
        (["t.h.0.c_attn.weight[q]", "t.h.0.c_attn.weight[k]"], ["c_attn[q]", "c_attn[k]"]),
    ],
)
def test_shortened_names_stay_different(names, short):
    assert plotting.shortened(names) == short
    assert len(set(plotting.shortened(names))) == len(names)


def test_drawing_opens_no_window_and_leaves_no_global_state():
    assert "pyplot" not in inspect.getsource(
        plotting
    ) and "matplotlib.use" not in inspect.getsource(plotting)


# ------------------------------------------------------------------- ends that are bounds, formats


def of(eigenvalues, probes, steps):
    operator = ht.curvature.DiagonalOperator(torch.as_tensor(eigenvalues))
    return ht.slq(operator, num_probes=probes, num_steps=steps, seed=0)


def planted_bulk(n, low, high):
    """Smooth between ``low`` and ``high``."""
    middle, half = (low + high) / 2, (high - low) / 2
    return middle + half * np.sin(np.pi * (np.arange(n) / (n - 1) - 0.5))


def test_a_ritz_value_that_has_not_converged_is_a_bound():
    few = of(planted_bulk(1500, 0.5, 2.0), probes=1, steps=3)
    assert plotting.extremes(few, 3).startswith("≤ ")
    assert "≥ " in plotting.extremes(few, 3)
    outlier = of(np.append(planted_bulk(1500, 0.5, 2.0), 100.0), probes=2, steps=20)
    assert plotting.extremes(outlier, 3).endswith("to  100")


def test_normalized_panels_are_divided_by_the_tenth_largest_ritz_value():
    found = spectra(["a.weight", "b.weight", "c.weight"], scales=[1e-3, 10.0, 0.0], exact=True)
    figure = plotting.block_spectra(found, normalized=True)
    assert_readable(figure)
    labels = []
    for name, panel in zip(found, figure.axes, strict=True):
        tenth = np.sort(found[name].nodes[0])[-10] or 1.0
        ends = np.array([found[name].nodes.min(), found[name].nodes.max()]) / tenth
        assert panel.texts[0].get_text() == "{:.3g}  to  {:.3g}".format(*ends)
        labels.append(f"{name[0]} ÷ {tenth:.2g}")
    assert [panel.get_title() for panel in figure.axes] == labels
    assert "tenth largest Ritz value" in figure.get_supxlabel()


def test_a_normalized_spectrum_says_by_what_it_is_divided():
    eigenvalues = np.linspace(1.0, 400.0, 400)
    figure = Figure((6, 4))
    plotting.spectrum(figure.subplots(), of(eigenvalues, 2, 400), normalized=True)
    (axes,) = figure.axes
    assert axes.get_xlabel().endswith("/ its tenth largest Ritz value, 3.9e+02")
    low, high = axes.get_xlim()
    assert low < 0 and 1 < high < 1.2


@pytest.mark.parametrize("kind", ["pdf", "svg", "png"])
def test_formats(kind, tmp_path):
    figure = Figure((2, 2))
    figure.subplots().plot([1, 2])
    path = plotting.written(figure, tmp_path / f"a.{kind}")
    starts = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}
    assert path.read_bytes().startswith(starts[kind])
