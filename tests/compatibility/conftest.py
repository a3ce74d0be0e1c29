"""Where ``RECORD_MATRIX`` names a file, what became of every cell is written into it: the table of the site.

A cell that was not run, or cannot be tried on this machine, which has no GPU, say, stays what it was there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

CELLS: list[list[str]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    properties: dict[str, Any] = dict(report.user_properties)
    if "cell" not in properties or report.when != "call":
        return
    reason = properties.get("refused", "")
    outcome = "refused" if reason else {"passed": "works"}.get(report.outcome, report.outcome)
    if report.skipped:
        reason = report.longrepr[2].removeprefix("Skipped: ")  # type: ignore[index]
    CELLS.append([*properties["cell"], outcome, reason])


def pytest_sessionfinish() -> None:
    if "RECORD_MATRIX" in os.environ:
        path = Path(os.environ["RECORD_MATRIX"])
        before = {tuple(row[:3]): row for row in json.loads(path.read_text())} if path.exists() else {}
        tried = {tuple(row[:3]): row for row in CELLS if row[3] != "skipped" or tuple(row[:3]) not in before}
        rows = (before | tried).values()
        path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
