"""Figures: each function draws one result. The only folder that imports matplotlib."""

from hessian_tools.plots.style import COLUMN, TEXT_AS_TEXT, TEXT_WIDTH, printed

__all__ = ["COLUMN", "TEXT_AS_TEXT", "TEXT_WIDTH", "printed"]
