"""The data: XOR problems, whose features are known, madelon, and the ASU and UCI sets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.model_selection import train_test_split

from examples.asu.training import RECIPES
from examples.data import ASU, Split, asu, is_here, standardized, word_counts
from examples.features.asu import twins
from examples.uci.data import FILES, scaled, uci, unscaled_splits
from examples.xor.problem import XORData

N = 3000
SEARCHED = 5999  # the seed of what settings are chosen on
VALIDATION = 0.25
MANY_ROWS = ("PCMAC", "gisette", "madelon", "RELATHE")  # of the ASU sets; the others have 50 to 203


class Data(NamedTuple):
    """A data set, drawn by a seed.

    Attributes:
        train: What is trained on.
        test: What is reported.
        relevant: The features that matter, if that is known.
    """

    train: Split
    test: Split
    relevant: frozenset[int] | None = None

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return int(torch.cat([self.train.y, self.test.y]).max()) + 1


def _xor(k: int, p: int, seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)
    train, test = (Split(part.x, part.y.long()) for part in (XORData(k, p, N, generator) for _ in range(2)))
    return Data(train, test, frozenset(range(k)))


def _parts(name: str, folder: Path | None) -> tuple[Split, Split]:
    """Return what settings may be chosen on, and what they may not, unscaled."""
    if name in ASU:
        return asu(name, SEARCHED, folder)
    parts = unscaled_splits(uci(name, folder), SEARCHED)
    return parts.train, parts.test


def _scaled(name: str, train: Split, test: Split) -> tuple[Split, Split]:
    if name not in ASU:
        train, test = scaled(train, test)
        return train, test
    return (standardized if RECIPES[name].inputs == "standardized" else word_counts)(train, test)


def tested_half(known: Split, unseen: Split, seed: int) -> tuple[Split, Split]:
    """Draw half of what no setting was chosen on for the test; the other half joins what is trained on."""
    order = torch.randperm(len(unseen.y), generator=torch.Generator().manual_seed(seed))
    test, rest = order[: len(order) // 2], order[len(order) // 2 :]
    train = Split(torch.cat([known.x, unseen.x[rest]]), torch.cat([known.y, unseen.y[rest]]))
    return train, Split(unseen.x[test], unseen.y[test])


def load(problem: str, seed: int, folder: Path | None) -> Data:
    """Return the data of a problem.

    Of an XOR problem every seed draws another data set. A real one is split once, in what settings are chosen on and what
    they are not: these are the training and the test part of the seed `SEARCHED`; for any other, half of the latter, drawn
    by the seed, is the test part, and all else is trained on.

    Args:
        problem: An entry of `present`.
        seed: Of the draw.
        folder: The folder with the data.
    """
    if problem in XOR:
        return _xor(*XOR[problem], seed)
    known, unseen = _parts(problem, folder)
    train, test = _scaled(problem, *((known, unseen) if seed == SEARCHED else tested_half(known, unseen, seed)))
    relevant = frozenset(twins(torch.cat([train.x, test.x]))) if problem == "madelon" else None
    return Data(train, test, relevant)


def held_out(whole: Split, seed: int) -> tuple[Split, Split]:
    """Hold a quarter of the training part out, stratified, to choose hyper-parameters on."""
    rows, held = train_test_split(
        torch.arange(len(whole.y)).numpy(), test_size=VALIDATION, random_state=seed, stratify=whole.y.numpy()
    )
    return Split(whole.x[rows], whole.y[rows]), Split(whole.x[held], whole.y[held])


def share_of_steps(problem: str) -> float:
    """Return what part of the steps among their settings networks make: few where there are fewer than 250 rows."""
    if problem in XOR:
        return 1
    return 1 / 8 if problem in ASU and problem not in MANY_ROWS else 1 / 2  # of the UCI sets all have many


XOR = {"3-D XOR p=60": (3, 60), "4-D XOR p=40": (4, 40), "5-D XOR p=20": (5, 20)}


def present(folder: Path | None) -> dict[str, bool]:
    """Tell of every problem whether its data can be had."""
    return dict.fromkeys(XOR, True) | {name: is_here(name, folder) for name in ASU} | dict.fromkeys(FILES, True)
