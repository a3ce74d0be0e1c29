"""Results as files: rows in JSON, one a line."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from lightning_cpna.sweeps import save_rows

Row = dict[str, Any]


def save(rows: Iterable[Row], folder: Path, name: str) -> Path:
    """Write rows; return the file."""
    file = folder / f"{name}.json"
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return file


def save_figure(rows: Iterable[Row], figure: Figure, folder: Path, name: str) -> None:
    """Write a figure and the rows that it shows, ``NAME.png`` and ``NAME.csv``, and say where."""
    console = Console()
    console.print(f"results:  {save_rows(rows, folder / f'{name}.csv')}")
    figure.savefig(folder / f"{name}.png", dpi=110)
    console.print(f"figure:   {folder / f'{name}.png'}")


def load(folder: Path, name: str) -> list[Row]:
    """Read rows."""
    rows: list[Row] = json.loads((folder / f"{name}.json").read_text())
    return rows


def mean_and_spread(rows: Iterable[Row], by: tuple[str, ...], value: str) -> dict[tuple[Any, ...], tuple[float, float]]:
    """Group rows, and return the mean and standard deviation of a value over each group."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in by)].append(row[value])
    return {
        key: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for key, values in groups.items()
    }
