"""Results as files: rows in JSON, one a line."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def save(rows: Iterable[Row], folder: Path, name: str) -> Path:
    """Write rows; return the file."""
    file = folder / f"{name}.json"
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return file


def counted(n: int, noun: str) -> str:
    """Return how many there are of something, in words.

    Examples:
        >>> counted(1, "data set"), counted(3, "data set")
        ('1 data set', '3 data sets')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


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
