"""The k-dimensional XOR problem in p dimensions: its data, and the network that learns it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics.classification import BinaryAUROC


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one batch size, learning rate and weight decay.

    Attributes:
        epochs: Passes over the data.
        batch_size: Samples a step; None is the whole data set.
        lr: Adam's learning rate.
        weight_decay: Adam's (coupled) weight decay.
        lr_end: Where the learning rate falls to, geometrically, by the end of the phase; None keeps it.
    """

    epochs: int
    batch_size: int | None = 256
    lr: float = 1e-2
    weight_decay: float = 1e-3
    lr_end: float | None = None

    def steps(self, n: int) -> int:
        """Return the number of optimizer steps on ``n`` samples."""
        return self.epochs * math.ceil(n / (self.batch_size or n))


class XORData(Dataset[tuple[Tensor, Tensor]]):
    """``y = 1`` where the product of the first k of p coordinates, uniform in [-1, 1], is positive.

    An item is a whole batch: the index is a tensor of rows, or a slice, so that no sample is collated in Python.
    """

    def __init__(self, k: int, p: int, n: int, generator: torch.Generator) -> None:
        self.x = torch.rand(n, p, generator=generator) * 2 - 1  # (n, p)
        self.y = (self.x[:, :k].prod(dim=1) > 0).float()  # (n,)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Return a batch, ``(rows, p)`` and ``(rows,)``."""
        return self.x[rows], self.y[rows]


class PhaseBatches(Sampler[Any]):
    """The batches of all phases, one after the other: for the trainer a single long epoch."""

    def __init__(self, n: int, phases: list[Phase], generator: torch.Generator) -> None:
        self.n, self.phases, self.generator = n, phases, generator

    def __len__(self) -> int:
        return sum(phase.steps(self.n) for phase in self.phases)

    def __iter__(self) -> Iterator[Any]:
        for phase in self.phases:
            for _ in range(phase.epochs):
                if phase.batch_size is None:
                    yield slice(None)
                else:
                    yield from torch.split(torch.randperm(self.n, generator=self.generator), phase.batch_size)


class XORDataModule(pl.LightningDataModule):
    """Training and test set of one seed, and the training batches of a recipe."""

    def __init__(self, k: int, p: int, n: int, seed: int, phases: list[Phase]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.train, self.test = XORData(k, p, n, generator), XORData(k, p, n, generator)
        self.batches = PhaseBatches(n, phases, generator)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the recipe's batches of the training set."""
        return DataLoader(self.train, sampler=self.batches, batch_size=None)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return the test set and the training set, a batch each: they are watched, never chosen on."""
        return [DataLoader(data, sampler=[slice(None)], batch_size=None) for data in (self.test, self.train)]


class XORNet(pl.LightningModule):
    """One hidden ReLU layer, one output, cross-entropy, Adam with coupled weight decay."""

    def __init__(self, p: int, hidden: int, phases: list[Phase], n: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(p, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.auc_test, self.auc_train = BinaryAUROC(), BinaryAUROC()
        self.phases, self.n = phases, n

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(batch,)``, of ``(batch, p)``."""
        logits: Tensor = self.net(x).squeeze(-1)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int) -> None:
        """Log the AUC and the cross-entropy of the test set or the training set."""
        x, y = batch
        logits = self(x)
        split = ("test", "train")[dataloader_idx]
        auc = (self.auc_test, self.auc_train)[dataloader_idx]
        auc(logits, y.int())
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y)
        options: dict[str, Any] = {"add_dataloader_idx": False, "batch_size": len(y)}
        self.log(f"auc/{split}", auc, prog_bar=True, **options)
        self.log(f"loss/{split}", loss, **options)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one Adam for all phases."""
        return torch.optim.Adam(self.parameters(), lr=self.phases[0].lr, weight_decay=self.phases[0].weight_decay)


class Phases(pl.Callback):
    """Sets the optimizer's learning rate and weight decay as the phases say, again in every epoch; its moments go on."""

    def __init__(self, phases: list[Phase], n: int) -> None:
        self.phases, self.n = phases, n

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the rates of this step."""
        step = trainer.global_step % sum(phase.steps(self.n) for phase in self.phases)
        for phase in self.phases:
            if step < (steps := phase.steps(self.n)):
                break
            step -= steps
        lr = phase.lr * ((phase.lr_end or phase.lr) / phase.lr) ** (step / steps)
        for group in trainer.optimizers[0].param_groups:
            group.update(lr=lr, weight_decay=phase.weight_decay)
