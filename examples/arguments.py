"""Arguments of the examples' command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable


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
