"""The command line that the modules of single figures share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from examples.arguments import add_sizes, add_sweep_arguments, at_least
from examples.page import fill
from examples.results import Row
from lightning_cpna.sweeps import save_rows


def parse(
    module: str,
    description: str | None,
    arguments: list[str] | None,
    *,
    sizes: dict[str, str] | None = None,
    seeds: int | None = None,
    data: bool = False,
    problems: Callable[[Path | None], dict[str, bool]] | None = None,
) -> argparse.Namespace:
    """Read the command line.

    Args:
        module: The module's name.
        description: What it does.
        arguments: The words; None: those of the process.
        sizes: As in `add_sizes`, if there are sizes.
        seeds: How many seeds are the default, if that can be chosen.
        data: Whether there is a data folder.
        problems: From the data folder to whether each problem can be had, by name, if one can choose.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    if sizes is not None:
        add_sizes(parser, sizes)
    if seeds is not None:
        parser.add_argument("--seeds", type=at_least(1), default=seeds, help=f"how many seeds (default: {seeds})")
    add_sweep_arguments(parser, f"runs/{'_'.join(module.split('.')[1:])}", data=data)
    if problems is not None:
        parser.add_argument(
            "--problems",
            nargs="+",
            metavar="NAME",
            help=f"of {', '.join(problems(None))} (default: all that can be had)",
        )
    parser.add_argument("--page", type=Path, help="a file with the marks of the table")
    args = parser.parse_args(arguments)
    if problems is not None:
        is_here = problems(args.data)
        present = [name for name in is_here if is_here[name]]
        args.problems = args.problems or present
        if absent := [name for name in args.problems if name not in present]:
            why = "its file was not found" if absent[0] in is_here else f"allowed are {', '.join(present)}"
            parser.error(f"argument --problems: {absent[0]!r}: {why}")
    args.is_quick = sizes is not None and args.size == "quick"
    if args.page:
        if args.is_quick:
            parser.error("argument --page: not allowed with --quick, whose numbers are no results")
        try:
            fill(args.page.read_text(), module, "")
        except (OSError, ValueError) as error:
            parser.error(f"argument --page: {args.page}: {error}")
    return args


def finish(args: argparse.Namespace, module: str, rows: list[Row], figure: Figure, table: str) -> None:
    """Write ``NAME.csv`` and ``NAME.png``, and print the table; with ``--page`` put it into that file.

    Args:
        args: What `parse` returned.
        module: The module's name; NAME is its last part.
        rows: The results.
        figure: What shows them.
        table: What sums them up, in Markdown.
    """
    console, name = Console(), module.split(".")[-1]
    console.print(f"results:  {save_rows(rows, args.out / f'{name}.csv')}")
    figure.savefig(args.out / f"{name}.png", dpi=110)
    console.print(f"figure:   {args.out / f'{name}.png'}")
    print(table)
    if args.is_quick:
        console.print(
            "This was a quick look, of shortened training: what it shows need not be what the full size shows."
        )
    if args.page:
        args.page.write_text(fill(args.page.read_text(), module, table))
