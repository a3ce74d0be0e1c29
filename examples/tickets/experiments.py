"""What is asked of the tickets: how small they can be, who is right about them, and whether they transfer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from examples.data import Split, Splits, mnist
from examples.results import Row
from examples.tickets.training import HIDDEN, OUTPUT, Recipe, find
from lightning_cpna import TicketRewind, sparsity_of

EPOCHS = 5  # chosen: about as many examples as Frankle and Carbin's networks see until their validation loss is least
STEP = 100  # chosen: 4 % of a round; Frankle et al. 2020 go back to 0.1 to 7 % of training
# Chosen: what each level keeps of the hidden layers and of the output layer, so that twelve levels end at 1.4 %; Frankle and
# Carbin keep 0.8 and 0.9: the output layer loses at half the rate, so that every class keeps connections.
KEPT, KEPT_OF_OUTPUTS = 0.7, 0.85
LEVELS = 12
EVERY = 3  # chosen: experiments that train every density by itself take every third level
RECIPES = (Recipe(), Recipe("SGD", 0.1))


def weights(levels: float) -> dict[str, int | float]:
    """Return what remains of each layer's weights after so many levels."""
    return {**dict.fromkeys(HIDDEN, KEPT**levels), OUTPUT: KEPT_OF_OUTPUTS**levels}


def iterative(
    seed: int, folder: Path | None, board: Path | None, epochs: int = EPOCHS, levels: int = LEVELS
) -> list[Row]:
    """Prune a little after every round (Frankle and Carbin, Fig. 3): tickets from init beside both controls."""
    ticket = TicketRewind(
        weights(levels), epochs=epochs, levels=levels, controls=["reinit", "shuffle"], monitor="accuracy"
    )
    return find(ticket, mnist(seed, folder), seed, Recipe(), board, "iterative")


def rewinding(
    seed: int, folder: Path | None, board: Path | None, epochs: int = EPOCHS, levels: int = LEVELS
) -> list[Row]:
    """The same, but going back to a step early in training (Frankle et al. 2020)."""
    ticket = TicketRewind(weights(levels), epochs=epochs, levels=levels, rewind_to=STEP, monitor="accuracy")
    return find(ticket, mnist(seed, folder), seed, Recipe(), board, f"rewind to step {STEP}")


def keeping(
    seed: int, folder: Path | None, board: Path | None, epochs: int = EPOCHS, levels: int = LEVELS
) -> list[Row]:
    """The same, but with the weights as they are: training begins again only for the optimizer (Renda et al. 2020)."""
    ticket = TicketRewind(weights(levels), epochs=epochs, levels=levels, rewind_to="keep", monitor="accuracy")
    return find(ticket, mnist(seed, folder), seed, Recipe(), board, "keep weights")


def one_shot(
    seed: int, folder: Path | None, board: Path | None, epochs: int = EPOCHS, levels: int = LEVELS
) -> list[Row]:
    """Prune once, to some densities of the iterative experiment."""
    rows = []
    for level in range(EVERY, levels + 1, EVERY):
        ticket = TicketRewind(weights(level), epochs=epochs, controls=["reinit", "shuffle"], monitor="accuracy")
        rows += find(ticket, mnist(seed, folder), seed, Recipe(), board, f"one-shot to {KEPT**level:.3f}")
    return rows


def objection(seed: int, folder: Path | None, board: Path | None, epochs: int = EPOCHS, levels: int = 4) -> list[Row]:
    """Ask whether fresh weights do as well (Liu et al. 2019): small and large rates, single weights and whole units."""
    rows = []
    data = mnist(seed, folder)
    for recipe in RECIPES:
        for what, targets in (
            ("weights", weights(2.5 * levels)),
            ("units", dict.fromkeys(HIDDEN, 0.7**levels)),
        ):
            ticket = TicketRewind(
                targets,
                epochs=epochs,
                levels=levels,
                controls=["reinit"],
                granularity="unit" if what == "units" else "connection",
                monitor="accuracy",
            )
            found = find(ticket, data, seed, recipe, board, f"{what}, {recipe}")
            rows += [{"recipe": str(recipe), "what": what, **row} for row in found]
    return rows


class Found(pl.Callback):
    """Notes the masks of each level."""

    def __init__(self) -> None:
        self.masks: dict[int, dict[str, Any]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note them."""
        self.masks[int(trainer.callback_metrics["ticket/level"])] = sparsity_of(pl_module).masks.state_dict()


def transfer(
    seed: int, folder: Path | None, board: Path | None, epochs: int = EPOCHS, levels: int = LEVELS
) -> list[Row]:
    """Find tickets on the digits 0 to 4 and train them on 5 to 9, beside their controls (Morcos et al. 2019)."""
    data, found = mnist(seed, folder), Found()
    first, second = _digits(data, range(5)), _digits(data, range(5, 10))
    ticket = TicketRewind(weights(levels), epochs=epochs, levels=levels, monitor="accuracy")
    find(ticket, first, seed, Recipe(), board, "found on 0 to 4", callbacks=[found])
    rows = []
    for level in range(0, levels + 1, EVERY):
        ticket = TicketRewind(epochs=epochs, controls=["reinit", "shuffle"] if level else [], monitor="accuracy")
        run = f"5 to 9, {KEPT**level:.3f}"
        there = find(ticket, second, seed, Recipe(), board, run, masks=found.masks[level])
        rows += [{**row, "level": level} for row in there if row["level"] == min(level, 1)]
    return rows


def _digits(data: Splits, which: range) -> Splits:
    """Return the examples of some digits, whose classes count from 0."""

    def part(split: Split) -> Split:
        rows = (split.y >= which.start) & (split.y < which.stop)
        return Split(split.x[rows], split.y[rows] - which.start)

    return Splits(*map(part, data))


EXPERIMENTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "iterative": iterative,
    "rewinding": rewinding,
    "keeping": keeping,
    "one-shot": one_shot,
    "objection": objection,
    "transfer": transfer,
}


def run(*, experiment: str, seed: int, epochs: int, folder: Path | None = None, board: Path | None = None) -> list[Row]:
    """Run one experiment; return a row for each round.

    Args:
        experiment: A key of ``EXPERIMENTS``.
        seed: Of everything in it.
        epochs: Of each round.
        folder: The data folder.
        board: The folder of TensorBoard runs.
    """
    return EXPERIMENTS[experiment](seed, folder, board, epochs)
