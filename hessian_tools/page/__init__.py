"""The report page: one HTML file of a folder's runs, to look at, to print and to pass on.

Reading order: words, views, scales, curves; a module a kind of result: block_spectra, heat_maps,
partitions, tracks, races, quadratics; found, which reads a folder, sections, writing. templates/
holds the page's HTML, CSS and JavaScript.
"""

from hessian_tools.page.writing import write_report

__all__ = ["write_report"]
