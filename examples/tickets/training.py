"""LeNet-300-100 on MNIST, and a fit that looks for tickets in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

from examples.data import Splits
from examples.saliency.training import Classifier, fit
from lightning_cpna import TicketRewind, sparsity_of

WIDTHS = (784, 300, 100, 10)
HIDDEN = ("net.0.weight", "net.2.weight")  # whose units can be removed
OUTPUT = "net.4.weight"
BATCH_SIZE = 100  # chosen, so that an epoch of MNIST is 500 steps; Frankle and Carbin have 60


class Recipe(NamedTuple):
    """How a network is optimised."""

    optimizer: Literal["Adam", "SGD"] = "Adam"
    lr: float = 1.2e-3  # Frankle and Carbin, Table 1: LeNet

    def __str__(self) -> str:
        return f"{self.optimizer}, lr {self.lr:g}"


class LeNet(Classifier):
    """784-300-100-10, ReLU, Gaussian Glorot initialisation (Frankle and Carbin, Fig. 2)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(WIDTHS, recipe.lr)
        self.recipe = recipe
        for part in self.net:
            if isinstance(part, nn.Linear):
                nn.init.xavier_normal_(part.weight)
                nn.init.zeros_(part.bias)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the recipe's optimizer."""
        if self.recipe.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return super().configure_optimizers()


def find(
    ticket: TicketRewind,
    data: Splits,
    seed: int,
    recipe: Recipe,
    board: Path | None,
    run: str,
    *,
    masks: Mapping[str, Any] | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> list[dict[str, Any]]:
    """Fit with a callback that looks for tickets; return a row for each round, with the test accuracy at its end.

    Args:
        ticket: The callback; it monitors "accuracy".
        data: What is trained on and tested on. Nothing is chosen on either.
        seed: The seed of initialisation and batches.
        recipe: The optimizer.
        board: The folder of TensorBoard runs, or None.
        run: This run's name there.
        masks: Masks that the network has from the start.
        callbacks: Others.
    """
    pl.seed_everything(seed, verbose=False)
    logger = TensorBoardLogger(board, run, f"seed_{seed}") if board else False
    module = LeNet(recipe)
    if masks is not None:
        sparsity_of(module).masks.load_state_dict(masks)
    fit(
        module,
        data._replace(validation=data.test),
        epochs=ticket.n_epochs,
        batch_size=BATCH_SIZE,
        seed=seed,
        callbacks=[ticket, *callbacks],
        logger=logger,
    )
    return [
        {
            "branch": "dense" if report.level == 0 else report.branch,
            "level": report.level,
            "density": report.density,
            "connections": report.connections,
            "steps": report.steps,
            "accuracy": report.value,
        }
        for report in ticket.reports
    ]
