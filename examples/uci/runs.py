"""The two kinds of run that the sweeps repeat: folds of a training part, and retraining on several splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.data import Splits
from examples.results import Row
from examples.uci.data import folds, splits, uci
from examples.uci.recipes import METHODS
from examples.uci.training import Epochs, Job, Plan, train

VALIDATION = 0.1  # of the training part, where the epoch is chosen on it
SEARCHED_SPLIT = 0  # whose training part is searched; none that is reported


def check_data(sets: Iterable[str], folder: Path | None) -> None:
    """Exit with an error where a set is not there, before anything is trained.

    Args:
        sets: Keys of `PROBLEMS`.
        folder: The data folder; None is the one that ``LIGHTNING_CPNA_DATA`` names, or a download.
    """
    for name in sets:
        try:
            uci(name, folder)
        except (OSError, ValueError) as error:
            hint = "" if isinstance(error, FileNotFoundError) else "; --data names a folder that has it"
            raise SystemExit(f"error: {name}: {error}{hint}") from None


def _train(
    parts: Sequence[Splits],
    seeds: Sequence[int],
    choices: Sequence[dict[str, Any]],
    *,
    method: str,
    hidden: int,
    batch_size: int,
    epochs: Sequence[int],
    score: str,
) -> list[Row]:
    jobs = [Job(part, seed, **choice) for part, seed, choice in zip(parts, seeds, choices, strict=True)]
    return train(jobs, Plan(METHODS[method], hidden, batch_size, Epochs(*epochs), score))


def cross_validate(
    *, set: str, choices: list[dict[str, Any]], run: int = 0, folder: Path | None = None, **plan: Any
) -> list[Row]:
    """Train every choice on every fold of the training part of one split, all side by side.

    Args:
        set: A key of `PROBLEMS`.
        choices: What tells the networks apart: entries of `Job`.
        run: Which draw of the folds, and which initialisations.
        folder: The data folder.
        plan: What they have in common: ``method``, ``hidden``, ``batch_size``, ``epochs`` and ``score``.

    Returns:
        A row for each choice and fold, with the accuracy on the fold, ``validation``.
    """
    parts = folds(uci(set, folder), SEARCHED_SPLIT, run)
    pairs = [(choice, fold) for choice in choices for fold in range(len(parts))]
    rows = _train(
        [parts[fold] for _, fold in pairs],
        [1000 * run + fold for _, fold in pairs],
        [choice for choice, _ in pairs],
        **plan,
    )
    return [{"fold": fold, **choice, **row} for (choice, fold), row in zip(pairs, rows, strict=True)]


def retrain(
    *, set: str, protocol: str, seeds: list[int], choice: dict[str, Any], folder: Path | None = None, **plan: Any
) -> list[Row]:
    """Train a chosen setting on several splits side by side.

    Args:
        set: A key of `PROBLEMS`.
        protocol: "paper": trained on the whole training part. "honest": a tenth of it chooses the epoch.
        seeds: Of the splits, and of the networks' initialisations and batches.
        choice: The chosen entries of `Job`.
        folder: The data folder.
        plan: What they have in common, as in `cross_validate`.

    Returns:
        A row for each seed, with the accuracies on its test part.
    """
    pooled = uci(set, folder)
    parts = [splits(pooled, seed, VALIDATION if protocol == "honest" else 0.0) for seed in seeds]
    rows = _train(parts, seeds, [choice] * len(seeds), **plan)
    return [{"seed": seed, **row} for seed, row in zip(seeds, rows, strict=True)]
