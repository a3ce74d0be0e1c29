"""Tools that show why: what units do."""

from lightning_cpna.landscape.units import LayerUnits, UnitReport, plot_units, unit_report

__all__ = ["LayerUnits", "UnitReport", "plot_units", "unit_report"]
