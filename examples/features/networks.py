"""The network that searches for features of tables train."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


class Classifier(pl.LightningModule):
    """One hidden ReLU layer, cross-entropy, Adam with coupled weight decay."""

    def __init__(self, n_features: int, n_classes: int, hidden: int = 64, lr: float = 1e-3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_features, hidden), nn.ReLU(), nn.Linear(hidden, n_classes))
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(batch, n_classes)``, of ``(batch, n_features)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr, weight_decay=1e-3, fused=True)
