"""``result.plot(axes)``: every type that has a picture, on given axes and on its own."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import hessian_tools as ht
from hessian_tools.plots.on_axes import DRAWN, draw
from hessian_tools.shown import Drawable
from hessian_tools.tracking import Track

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_results import SAMPLES

NAMES = [name for name, result in SAMPLES.items() if isinstance(result, Drawable)]


def test_every_drawable_type_has_a_picture():
    assert {kind.__name__ for kind in DRAWN} == set(NAMES)
    assert all(issubclass(kind, Drawable) for kind in DRAWN)


@pytest.mark.parametrize("name", NAMES)
def test_it_draws_on_the_axes_given_and_saves(name, tmp_path):
    axes = Figure().add_subplot()
    assert SAMPLES[name].plot(axes) is axes
    assert axes.has_data() or axes.images or axes.texts
    own = SAMPLES[name].plot()
    for kind in ("pdf", "svg"):
        own.figure.savefig(tmp_path / f"picture.{kind}")


def test_a_track_has_a_line_a_reading_without_their_errors():
    values = {"largest": [1.0, 2.0], "largest_residual": [0.1, 0.1], "scale": [0.5, math.nan]}
    track = Track(
        np.array([0, 5]), {k: np.array(v) for k, v in values.items()}, np.array([0.1, 0.1])
    )
    axes = track.plot()
    assert [line.get_label() for line in axes.lines] == ["largest", "scale"]
    assert axes.lines[1].get_xdata().tolist() == [0]  # what was not taken is no point
    assert axes.get_yscale() == "log"


def test_blocks_reach_from_their_smallest_to_their_largest_eigenvalue():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    problem = ht.Problem(model, ht.mse, [(torch.randn(8, 3), torch.randn(8, 2))])
    spectra = ht.blockwise_slq(problem, ht.partition(model, "tensor"), progress=False)
    axes = spectra.plot()
    ends = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2][:2]
    for (low, high), block in zip(ends, spectra.values(), strict=True):
        assert (low, high) == (block.smallest.value, block.largest.value)
    assert [text.get_text() for text in axes.get_yticklabels()] == list(spectra)


def test_what_has_no_picture_is_told():
    with pytest.raises(TypeError, match="a int has no picture; these have: Quadrature"):
        draw(3)
