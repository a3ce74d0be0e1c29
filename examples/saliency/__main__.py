"""Saliencies of weights and units (Evci 2018), and where importance lies: `python -m examples.saliency`."""

from __future__ import annotations

import argparse
from functools import partial

from rich.console import Console

from examples.arguments import add_sweep_arguments, at_least, run_sweep
from examples.results import Row, save
from examples.saliency.experiments import EXPERIMENTS
from examples.saliency.figures import FIGURES
from lightning_cpna.sweeps import grid


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
    add_sweep_arguments(parser, "runs/saliency")
    return parser.parse_args(arguments)


def rounded(row: Row) -> Row:
    """Round what a figure does not show."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def main(arguments: list[str] | None = None) -> None:
    """Run experiments over seeds, and write their results and figures."""
    args = parse(arguments)
    console = Console()
    for name in args.experiments:
        rows = run_sweep(
            args,
            partial(EXPERIMENTS[name], folder=args.data),
            grid(seed=range(args.seeds)),
            title=name,
        )
        console.print(f"results:  {save(map(rounded, rows), args.out, name)}")
        for figure in FIGURES[name](rows, args.out):
            console.print(f"figure:   {figure}")


if __name__ == "__main__":
    main()
