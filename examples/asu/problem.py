"""What the paper says: the networks, their sizes and accuracies (Liu, Mocanu, Pechenizkiy 2019, Tables 2 and 3)."""

from __future__ import annotations

from typing import NamedTuple

from lightning_cpna import EpochFraction

EPSILON = 10.0  # derived from the SET column of Table 3
METHODS = ("SET", "NPSET", "1st NPSET", "2nd NPSET", "Direct SET", "Direct FC", "Dense")
NEURONS = EpochFraction(alpha=0.04, first=10, last=50)  # derived from the NPSET column of Table 3


class Problem(NamedTuple):
    """A data set's network, and the paper's numbers.

    Attributes:
        widths: Inputs, hidden units, hidden units, classes.
        set_connections: Table 3, SET.
        npset_neurons: Table 3, NPSET: inputs and hidden units.
        npset_connections: Table 3, NPSET.
        accuracy: Table 2, in percent, by method; None where the data set is not in this repository's table.
    """

    widths: tuple[int, int, int, int]
    set_connections: int
    npset_neurons: int
    npset_connections: int
    accuracy: dict[str, float] | None = None


def _accuracy(set_: float, npset: float, direct_set: float, direct_fc: float) -> dict[str, float]:
    return {"SET": set_, "NPSET": npset, "Direct SET": direct_set, "Direct FC": direct_fc}


PROBLEMS: dict[str, Problem] = {
    "Leukemia": Problem((7070, 7000, 7000, 2), 294235, 9710, 40039, _accuracy(87.5, 87.5, 87.5, 75.0)),
    "PCMAC": Problem((3289, 3000, 3000, 2), 128432, 4435, 18622, _accuracy(87.4, 88.4, 87.8, 85.2)),
    "Lung-discrete": Problem((325, 300, 300, 7), 13446, 457, 2447, _accuracy(88.0, 88.0, 88.0, 80.0)),
    "gisette": Problem((5000, 5000, 5000, 2), 209556, 6892, 29884),
    "lung": Problem((3312, 3000, 3000, 5), 135689, 4458, 19776),
    "CLL-SUB-111": Problem((11340, 11000, 11000, 3), 474738, 15488, 65421),
    "Carcinom": Problem((9182, 9000, 9000, 11), 420592, 12580, 67726),
    "orlraws10P": Problem((10304, 10000, 10000, 10), 465977, 14072, 72871, _accuracy(88.2, 88.2, 88.2, 79.4)),
    "TOX-171": Problem((5748, 5000, 5000, 4), 225416, 7640, 31815, _accuracy(91.2, 91.2, 91.2, 82.5)),
    "Prostate-GE": Problem((5966, 5000, 5000, 2), 219191, 7858, 30690, _accuracy(88.2, 88.2, 88.2, 79.4)),
    "arcene": Problem((10000, 10000, 10000, 2), 419469, 13768, 57136, _accuracy(77.6, 77.6, 79.1, 77.6)),
    "madelon": Problem((500, 1000, 1000, 2), 36563, 896, 5096, _accuracy(71.2, 71.3, 71.1, 56.4)),
    "Yale": Problem((1024, 1000, 1000, 15), 47222, 1420, 8576, _accuracy(70.9, 74.5, 69.1, 63.6)),
    "GLIOMA": Problem((4434, 4000, 4000, 4), 178678, 5956, 25228, _accuracy(76.5, 76.5, 76.5, 64.7)),
    "RELATHE": Problem((4322, 4000, 4000, 2), 170804, 5844, 24280, _accuracy(89.7, 90.6, 87.6, 90.8)),
}


def pruned_widths(widths: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return the widths at which NPSET ends.

    Examples:
        >>> pruned_widths((7070, 7000, 7000, 2))
        (7070, 1320, 1320, 2)
    """
    n_in, first, second, n_out = widths
    return n_in, NEURONS.n_remaining(NEURONS.last, first), NEURONS.n_remaining(NEURONS.last, second), n_out
