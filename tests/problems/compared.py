"""Whether two results are the same."""

import dataclasses
import math

import numpy as np


def same_quadrature(a, b, tolerance=1e-12):
    parts = ("nodes", "weights", "residuals")
    return all(
        np.allclose(getattr(a, part), getattr(b, part), atol=tolerance, rtol=0) for part in parts
    )


def same(a, b):
    """Equality of type and of every bit, nan included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
