"""The networks of these experiments, and how they are trained."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from examples.data import Split, Splits, loader
from examples.quiet import quiet_trainer


class Classifier(pl.LightningModule):
    """A fully connected ReLU network, cross-entropy, Adam."""

    def __init__(self, widths: Sequence[int], lr: float = 1e-3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(batch, class)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return cross_entropy(self, batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the validation accuracy in percent."""
        self.log("accuracy", accuracy(self, Split(*batch)), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    @property
    def hidden(self) -> list[str]:
        """The weights of the hidden layers."""
        return [name for name, _ in self.named_parameters() if name.endswith("weight")][:-1]


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean loss of a batch."""
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@torch.no_grad()
def accuracy(module: nn.Module, split: Split) -> float:
    """Return the accuracy on a split, in percent."""
    return 100 * float((module(split.x).argmax(1) == split.y).float().mean())


def fit(
    module: Classifier,
    data: Splits,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    callbacks: Sequence[Any] = (),
    logger: Any = False,
) -> pl.Trainer:
    """Train a module."""
    torch.set_num_threads(1)
    trainer = quiet_trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=logger,
    )
    trainer.fit(module, loader(data.train, batch_size, seed), loader(data.validation))
    return trainer


def trained(widths: Sequence[int], data: Splits, *, epochs: int, batch_size: int, seed: int) -> Classifier:
    """Initialise a network by the seed and train it."""
    pl.seed_everything(seed, verbose=False)
    module = Classifier(widths)
    fit(module, data, epochs=epochs, batch_size=batch_size, seed=seed)
    return module
