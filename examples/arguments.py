"""Arguments of the examples' command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from examples.results import Row
from lightning_cpna.sweeps import RunFunction, Setting, sweep


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number, ``least`` or more.

    Examples:
        >>> at_least(1)("3")
        3
    """

    def read(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; allowed is {least} or more")
        return value

    read.__name__ = "int"  # argparse names it where the text is no number
    return read


def existing_folder(text: str) -> Path:
    """Be the type of an argument that is a folder which is there.

    Examples:
        >>> existing_folder(".")
        PosixPath('.')
    """
    if not (folder := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return folder


def add_sizes(parser: argparse.ArgumentParser, sizes: dict[str, str]) -> None:
    """Add ``--quick`` and ``--full``; ``size`` is "quick", "full", or "reduced" if neither is given.

    Args:
        parser: The parser.
        sizes: What each of the three is.
    """
    group = parser.add_mutually_exclusive_group()
    for size in ("quick", "full"):
        group.add_argument(
            f"--{size}",
            dest="size",
            action="store_const",
            const=size,
            help=f"{sizes[size]} (default: {sizes['reduced']})",
        )
    parser.set_defaults(size="reduced")


def add_sweep_arguments(parser: argparse.ArgumentParser, out: str, *, data: bool = True) -> None:
    """Add what every sweep is told: the data folder, how many runs at a time, on what, and where everything is written.

    Args:
        parser: The parser.
        out: The default folder.
        data: Whether there is a data folder.
    """
    if data:
        parser.add_argument(
            "--data", type=existing_folder, help="folder with the data (default: LIGHTNING_CPNA_DATA, or download)"
        )
    parser.add_argument(
        "--jobs", type=at_least(1), default=-1, help="runs at a time (default: as many as there are cores)"
    )
    parser.add_argument(
        "--backend", choices=["loky", "ray"], default="loky", help="processes of this machine, or Ray (default: loky)"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help=f"where everything is written (default: {out})")


def run_sweep(args: argparse.Namespace, function: RunFunction, settings: Iterable[Setting], title: str) -> list[Row]:
    """Run a sweep as the command line says; finished runs are kept in ``runs`` of the folder that it names.

    Args:
        args: What `add_sweep_arguments` added.
        function: As in `sweep`.
        settings: As in `sweep`.
        title: As in `sweep`.
    """
    return sweep(
        function,
        settings,
        args.out / "runs",
        n_jobs=args.jobs,
        backend=args.backend,
        title=title,
        console=Console(),
    )
