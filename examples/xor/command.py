"""The command line that the modules of single figures share."""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from examples.arguments import add_sizes, add_sweep_arguments
from examples.readme import fill
from examples.results import Row
from lightning_cpna.sweeps import save_rows


def parse(name: str, description: str | None, sizes: dict[str, str], arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line.

    Args:
        name: The module's.
        description: What it does.
        sizes: As in `add_sizes`.
        arguments: The words; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m examples.xor.{name}", description=description)
    add_sizes(parser, sizes)
    add_sweep_arguments(parser, f"runs/xor_{name}", data=False)
    parser.add_argument("--readme", type=Path, help="a file with the marks of the table")
    return parser.parse_args(arguments)


def finish(args: argparse.Namespace, name: str, rows: list[Row], figure: Figure, table: str) -> None:
    """Write ``NAME.csv`` and ``NAME.png``, and print the table; with ``--readme`` put it into that file.

    Args:
        args: What `parse` returned.
        name: The module's.
        rows: The results.
        figure: What shows them.
        table: What sums them up, in Markdown.
    """
    console = Console()
    console.print(f"results:  {save_rows(rows, args.out / f'{name}.csv')}")
    figure.savefig(args.out / f"{name}.png", dpi=110)
    console.print(f"figure:   {args.out / f'{name}.png'}")
    print(table)
    if args.readme:
        args.readme.write_text(fill(args.readme.read_text(), f"examples.xor.{name}", table))
