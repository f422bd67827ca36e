"""Figures: each function draws one result. The only folder that imports matplotlib."""
