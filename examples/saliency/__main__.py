"""Saliencies of weights and units (Evci 2018), and where importance lies: `python -m examples.saliency`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import joblib
from rich.console import Console
from rich.progress import track

from examples.arguments import at_least
from examples.results import Row, save
from examples.saliency.experiments import EXPERIMENTS
from examples.saliency.figures import FIGURES


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.saliency", description=__doc__)
    parser.add_argument(
        "--experiments",
        nargs="+",
        choices=EXPERIMENTS,
        default=["curves", "removable"],
        help="what to run (default: curves removable)",
    )
    parser.add_argument("--seeds", type=at_least(1), default=2, help="how many seeds (default: 2)")
    parser.add_argument("--data", type=Path, help="folder with mnist/*.gz (default: LIGHTNING_CPNA_DATA, or download)")
    parser.add_argument(
        "--jobs", type=at_least(1), default=os.cpu_count(), help="parallel processes (default: the cores)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/saliency"), help="where everything is written")
    return parser.parse_args(arguments)


def rounded(row: Row) -> Row:
    """Round what a figure does not show."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main(arguments: list[str] | None = None) -> None:
    """Run experiments over seeds, and write their results and figures."""
    args = parse(arguments)
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.experiments:
        calls = [joblib.delayed(EXPERIMENTS[name])(seed, args.data) for seed in range(args.seeds)]
        runs = joblib.Parallel(n_jobs=args.jobs, return_as="generator")(calls)
        rows: list[Row] = [row for run in track(runs, name, total=len(calls), console=console) for row in run]
        console.print(f"results:  {save(map(rounded, rows), args.out, name)}")
        for figure in FIGURES[name](rows, args.out):
            console.print(f"figure:   {figure}")


if __name__ == "__main__":
    main()
