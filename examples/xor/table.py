"""The table of the XOR experiment beside the paper's, from ``results.json``: `python -m examples.xor.table FILE...`."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from examples.page import fill
from examples.xor.figures import TITLES
from examples.xor.recipes import METHODS

# Guo et al., Table 1: test AUC in percent by k and method; FSA + CPNA is not theirs.
PAPER = {
    3: {"nn": 82.53, "cpna_hidden": 96.58, "cpna_all": 99.58},
    4: {"nn": 72.17, "cpna_hidden": 95.31, "cpna_all": 98.31},
    5: {"nn": 66.24, "cpna_hidden": 80.03, "cpna_all": 96.83},
}
PAPER_SIZES = {3: 60, 4: 40, 5: 20}
HEADER = ["problem", "method", "test AUC %", "best", "> 95", "paper", "connections", "tries", "s/run"]


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Summarise runs: a row for each problem and method, in the paper's order."""
    groups: dict[tuple[int, int, int, str, int], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["k"], result["p"], result["hidden"], result["method"], result["n"]), []).append(
            result
        )
    found = []
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1], METHODS.index(item[0][3])))
    for (k, p, hidden, method, n), runs in ordered:
        aucs = [run["test_auc"] for run in runs]
        spread = statistics.stdev(aucs) if len(aucs) > 1 else 0.0
        paper = PAPER[k].get(method) if (p, n) == (PAPER_SIZES[k], 3000) else None
        counts = sorted({" + ".join(f"{n:,}" for n in run["connections"].values()) for run in runs})
        found.append(
            [
                f"{k}-D p={p} H={hidden}" + (f" n={n}" if n != 3000 else ""),
                TITLES[method],
                f"{statistics.mean(aucs):.2f} ± {spread:.2f}",
                f"{max(aucs):.2f}",
                f"{sum(auc > 95 for auc in aucs)} of {len(aucs)}",
                "" if paper is None else f"{paper:.2f}",
                " / ".join(counts),
                "" if (tries := statistics.mean(run["tries"] for run in runs)) == 1 else f"{tries:.1f}",
                f"{statistics.mean(run['seconds'] for run in runs):.0f}",
            ]
        )
    return found


def rich_tables(results: list[dict[str, Any]]) -> list[Table]:
    """Return a table for each problem, narrow enough for a terminal of 80 columns; columns with nothing are left out."""
    tables = []
    for problem, group in itertools.groupby(rows(results), key=lambda row: row[0]):
        lines = list(group)
        table = Table(title=problem, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
        used = _used(lines)[1:]
        for column in used:
            table.add_column(HEADER[column], justify="right" if column > 1 else "left", no_wrap=True)
        for line in lines:
            table.add_row(*(line[column] for column in used))
        tables.append(table)
    return tables


def markdown(results: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    found = rows(results)
    lines = [HEADER, ["---", "---", *["---:"] * (len(HEADER) - 2)], *found]
    return "\n".join("| " + " | ".join(line[column] for column in _used(found)) + " |" for line in lines)


def _used(lines: list[list[str]]) -> list[int]:
    """Find the columns that say something."""
    return [column for column in range(len(HEADER)) if any(line[column] for line in lines)]


def load(files: list[Path]) -> list[dict[str, Any]]:
    """Read runs from several ``results.json``."""
    return [run for file in files for run in json.loads(file.read_text())]


def main() -> None:
    """Print the table; with ``--page`` put it into that file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="results.json of examples.xor")
    parser.add_argument("--page", type=Path, help="a file with the marks of the table")
    args = parser.parse_args()
    results = load(args.files)
    Console().print(*rich_tables(results))
    if args.page:
        args.page.write_text(fill(args.page.read_text(), "examples.xor", markdown(results)))


if __name__ == "__main__":
    main()
