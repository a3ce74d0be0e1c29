"""Tools that show why: what units do, and what the loss looks like around the weights."""

from lightning_cpna.landscape.alignment import (
    Alignment,
    alignment,
    angles_between,
    draw_vectors,
    filters_of,
    frame_potential,
    frame_potential_bounds,
    plot_alignment,
    similarity_graph,
)
from lightning_cpna.landscape.curvature import (
    Spectrum,
    hessian,
    hessian_spectrum,
    lanczos,
    n_outliers,
    plot_spectrum,
    top_eigenvalues,
)
from lightning_cpna.landscape.level_sets import LevelSetPath, plot_level_set, walk_level_set
from lightning_cpna.landscape.minima import Minima, find_minima, plot_minima
from lightning_cpna.landscape.paths import Curve, Path, barrier, fit_curve, follow, line, plot_paths
from lightning_cpna.landscape.surface import LossSurface
from lightning_cpna.landscape.units import LayerUnits, UnitReport, plot_units, unit_report

__all__ = [
    "Alignment",
    "Curve",
    "LayerUnits",
    "LevelSetPath",
    "LossSurface",
    "Minima",
    "Path",
    "Spectrum",
    "UnitReport",
    "alignment",
    "angles_between",
    "barrier",
    "draw_vectors",
    "filters_of",
    "find_minima",
    "fit_curve",
    "follow",
    "frame_potential",
    "frame_potential_bounds",
    "hessian",
    "hessian_spectrum",
    "lanczos",
    "line",
    "n_outliers",
    "plot_alignment",
    "plot_level_set",
    "plot_minima",
    "plot_paths",
    "plot_spectrum",
    "plot_units",
    "similarity_graph",
    "top_eigenvalues",
    "unit_report",
    "walk_level_set",
]
