"""The data: XOR problems, whose features are known, madelon, and the ASU and UCI sets."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.model_selection import train_test_split

from examples.asu.training import RECIPES, data
from examples.data import ASU, Split, is_here
from examples.features.asu import twins
from examples.uci.data import FILES, splits, uci
from examples.xor.problem import XORData

N = 3000
VALIDATION = 0.25


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


def _xor(k: int, p: int, seed: int, folder: Path | None) -> Data:
    generator = torch.Generator().manual_seed(seed)
    train, test = (Split(part.x, part.y.long()) for part in (XORData(k, p, N, generator) for _ in range(2)))
    return Data(train, test, frozenset(range(k)))


def _asu(name: str, seed: int, folder: Path | None) -> Data:
    train, test = data(name, seed, folder, RECIPES[name].inputs)
    known = frozenset(twins(torch.cat([train.x, test.x]))) if name == "madelon" else None
    return Data(train, test, known)


def _uci(name: str, seed: int, folder: Path | None) -> Data:
    parts = splits(uci(name, folder), seed)
    return Data(parts.train, parts.test)


def load(problem: str, seed: int, folder: Path | None) -> Data:
    """Return the data of a problem.

    Args:
        problem: An entry of `present`.
        seed: Of the draw, or of the split.
        folder: The folder with the data.
    """
    if problem in XOR:
        return _xor(*XOR[problem], seed, folder)
    return (_asu if problem in ASU else _uci)(problem, seed, folder)


def held_out(whole: Split, seed: int) -> tuple[Split, Split]:
    """Hold a quarter of the training part out, stratified, to choose hyper-parameters on."""
    rows, held = train_test_split(
        torch.arange(len(whole.y)).numpy(), test_size=VALIDATION, random_state=seed, stratify=whole.y.numpy()
    )
    return Split(whole.x[rows], whole.y[rows]), Split(whole.x[held], whole.y[held])


XOR = {"3-D XOR p=60": (3, 60), "4-D XOR p=40": (4, 40), "5-D XOR p=20": (5, 20)}


def present(folder: Path | None) -> list[str]:
    """List the problems whose data can be had."""
    return [*XOR, *(name for name in ASU if is_here(name, folder)), *FILES]
