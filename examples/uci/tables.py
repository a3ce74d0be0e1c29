"""Table 3 beside the paper's, and the paired differences: `python -m examples.uci.tables table3.csv --page RESULTS.md`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path

from examples.page import fill
from examples.results import Row
from examples.uci.recipes import METHODS, PROBLEMS
from lightning_cpna.sweeps import load_rows

MEASURES = ("best", "final", "chosen")
OTHERS = ("NN (equivalent)", "NN (best)", "CPA", "score only", "nodes")


def _of(rows: Iterable[Row], name: str, method: str, measure: str) -> dict[int, float]:
    """Return a measure by seed: the epoch is chosen by the honest protocol, everything else is of the paper's."""
    protocol = "honest" if measure == "chosen" else "paper"
    wanted = {"set": name, "method": method, "protocol": protocol}
    return {row["seed"]: row[measure] for row in rows if all(row[key] == value for key, value in wanted.items())}


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.mean(found):.2f} ± {statistics.stdev(found) if len(found) > 1 else 0.0:.2f}" if found else ""


def _counts(rows: list[Row], name: str, method: str, kind: str) -> str:
    found = [row for row in rows if (row["set"], row["method"]) == (name, method)]
    parts = [sorted({row[f"{kind}_{layer}"] for row in found}) for layer in ("input", "hidden")]
    return " + ".join(f"{part[0]}" if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def table3(rows: list[Row]) -> str:
    """Return the table in Markdown: accuracies in percent, mean and standard deviation over the splits."""
    lines = [
        ["data", "method", "connections", "effective", "paper", "best epoch", "last epoch", "epoch by validation"],
        ["---", "---", *["---:"] * 6],
    ]
    for name, problem in PROBLEMS.items():
        for method in METHODS:
            if not any((row["set"], row["method"]) == (name, method) for row in rows):
                continue
            paper = problem.paper.get(method)
            lines.append(
                [
                    problem.title,
                    method,
                    _counts(rows, name, method, "live"),
                    _counts(rows, name, method, "effective"),
                    f"{paper.accuracy:.2f} ± {paper.spread:.2f}" if paper else "",
                    *(_mean(_of(rows, name, method, measure).values()) for measure in MEASURES),
                ]
            )
    return _markdown(lines)


def differences(rows: list[Row]) -> str:
    """Return how much higher CPNA is than every other method, on the same splits: mean and its standard error."""
    lines = [
        ["data", "CPNA minus", "splits", "best epoch", "last epoch", "epoch by validation"],
        ["---", "---", *["---:"] * 4],
    ]
    for name, problem in PROBLEMS.items():
        for other in OTHERS:
            cells, n = [], 0
            for measure in MEASURES:
                ours, theirs = (_of(rows, name, method, measure) for method in ("CPNA", other))
                found = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
                n = max(n, len(found))
                cells.append(
                    f"{statistics.mean(found):+.2f} ± {statistics.stdev(found) / len(found) ** 0.5:.2f}"
                    if len(found) > 1
                    else ""
                )
            if n > 1:
                lines.append([problem.title, other, str(n), *cells])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; with ``--page`` put them into that file."""
    parser = argparse.ArgumentParser(prog="python -m examples.uci.tables", description=__doc__)
    parser.add_argument("results", type=Path, help="table3.csv")
    parser.add_argument("--page", type=Path, help="a file with the marks of the tables")
    args = parser.parse_args(arguments)
    rows = load_rows(args.results)
    text = f"{table3(rows)}\n\n{differences(rows)}"
    print(text)
    if args.page:
        args.page.write_text(fill(args.page.read_text(), "examples.uci", text))


if __name__ == "__main__":
    main()
