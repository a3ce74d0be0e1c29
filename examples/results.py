"""Results as files: rows in JSON, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def save(rows: Iterable[Row], folder: Path, name: str) -> Path:
    """Write rows; return the file."""
    file = folder / f"{name}.json"
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return file


def load(folder: Path, name: str) -> list[Row]:
    """Read rows."""
    rows: list[Row] = json.loads((folder / f"{name}.json").read_text())
    return rows
