"""The five problems as Table 3 has them, and what is searched for each."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NamedTuple

from examples.uci.training import Epochs, Method

METHODS: dict[str, Method] = {
    "NN (best)": "NN",
    "NN (equivalent)": "NN",
    "CPNA": "CPNA",
    "CPA": "CPA",
    "score only": "score only",
    "nodes": "nodes",
}


class Paper(NamedTuple):
    """A cell of Guo et al., Table 3.

    Attributes:
        connections: From the input, and to the output layer.
        accuracy: Mean test accuracy in percent; each run's is the best of its epochs.
        spread: Its standard deviation.
    """

    connections: tuple[int, int]
    accuracy: float
    spread: float


class Problem(NamedTuple):
    """A row of Guo et al., Table 3, and how long and from which width the network is pruned here.

    Attributes:
        title: The data set's name.
        features: Inputs.
        classes: Outputs.
        paper: The table's cells.
        equivalent: Hidden units of NN (equivalent), and of the networks whose whole units are pruned.
        start: Hidden units of the networks that are pruned.
        batch_size: Their samples a step.
        epochs: Their phases; those of the two NN take as many epochs together.
        grid_epochs: How long a network of the grid is trained.
        splits: How many are reported.
    """

    title: str
    features: int
    classes: int
    paper: dict[str, Paper]
    equivalent: int
    start: int
    batch_size: int
    epochs: Epochs
    grid_epochs: int
    splits: int = 20


def _cells(best: tuple[Any, ...], equivalent: tuple[Any, ...], cpna: tuple[Any, ...]) -> dict[str, Paper]:
    return {"NN (best)": Paper(*best), "NN (equivalent)": Paper(*equivalent), "CPNA": Paper(*cpna)}


PROBLEMS = {
    "car": Problem(
        "Car Evaluation",
        21,
        4,
        _cells(((1344, 256), 100.0, 0.0), ((126, 24), 98.23, 0.06), ((120, 32), 100.0, 0.0)),
        equivalent=6,
        start=64,
        batch_size=16,
        epochs=Epochs(100, 120, 120, 100),
        grid_epochs=150,
    ),
    "segmentation": Problem(
        "Image Segmentation",
        19,
        7,
        _cells(((4864, 1792), 96.87, 0.72), ((266, 98), 96.27, 0.58), ((266, 98), 98.40, 0.32)),
        equivalent=14,
        start=512,
        batch_size=32,
        epochs=Epochs(50, 100, 200, 200),
        grid_epochs=180,
    ),
    "optdigits": Problem(
        "Optical Digits",
        64,
        10,
        _cells(((32768, 5120), 98.80, 0.29), ((1728, 270), 98.25, 0.19), ((1792, 160), 99.01, 0.20)),
        equivalent=27,
        start=512,
        batch_size=64,
        epochs=Epochs(30, 50, 50, 50),
        grid_epochs=60,
    ),
    "mfeat": Problem(
        "Multiple Features",
        216,
        10,
        _cells(((13824, 640), 97.85, 0.80), ((864, 40), 95.45, 0.98), ((583, 320), 98.15, 0.82)),
        equivalent=4,
        start=64,
        batch_size=16,
        epochs=Epochs(60, 60, 60, 100),
        grid_epochs=90,
    ),
    "isolet": Problem(
        "ISOLET",
        617,
        26,
        _cells(((39488, 1664), 96.73, 0.50), ((5553, 234), 94.31, 0.61), ((4683, 1118), 96.91, 0.54)),
        equivalent=9,
        start=128,
        batch_size=32,
        epochs=Epochs(15, 20, 25, 25),
        grid_epochs=30,
        splits=10,
    ),
}


def add_sets(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names the sets."""
    parser.add_argument(
        "sets", nargs="+", choices=[*PROBLEMS, "all"], metavar="set", help=f"{', '.join(PROBLEMS)} or all"
    )


def named(sets: Iterable[str]) -> list[str]:
    """Return the sets that the argument names, each once."""
    return list(PROBLEMS if "all" in sets else dict.fromkeys(sets))


def searched(method: str) -> str:
    """Return the method whose settings a method has: its own if the paper's table has it, else CPNA's."""
    return method if METHODS[method] == "NN" else "CPNA"


def dense(epochs: int, fine_tuning: int) -> Epochs:
    """Return the phases of a network of which nothing is pruned."""
    return Epochs(epochs - fine_tuning, 0, 0, fine_tuning)


def phases(problem: Problem, method: str) -> Epochs:
    """Return the phases of a method."""
    epochs = problem.epochs
    return dense(sum(epochs), epochs.fine_tuning) if METHODS[method] == "NN" else epochs


def shortened(epochs: Epochs, by: int) -> Epochs:
    """Return phases that are shorter, an epoch at least where there was one."""
    return Epochs(*(max(min(n, 1), n // by) for n in epochs))
