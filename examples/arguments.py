"""Arguments of the examples' command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number, ``least`` or more.

    Example:
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


def add_sweep_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add what every sweep is told: the data folder, how many runs at a time, on what, and where everything is written.

    Args:
        parser: The parser.
        out: The default folder.
    """
    parser.add_argument("--data", type=Path, help="folder with the data (default: LIGHTNING_CPNA_DATA, or download)")
    parser.add_argument(
        "--jobs", type=at_least(1), default=-1, help="runs at a time (default: as many as there are cores)"
    )
    parser.add_argument(
        "--backend", choices=["loky", "ray"], default="loky", help="processes of this machine, or Ray (default: loky)"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help=f"where everything is written (default: {out})")
