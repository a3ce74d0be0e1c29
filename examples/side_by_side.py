"""Several small networks in one fit: each has its own data, batches and rates; a step of the Trainer serves them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from examples.data import Split
from examples.quiet import quiet_trainer

LR_FALL = 30.0  # how much smaller the learning rate is in the end


class Member(NamedTuple):
    """One network of a fit.

    Attributes:
        net: The network.
        data: What it is trained on; all members have inputs of the same shape.
        seed: Of its batches.
        lr: Adam's learning rate.
        weight_decay: Adam's coupled weight decay.
    """

    net: nn.Module
    data: Split
    seed: int
    lr: float
    weight_decay: float


class Networks(pl.LightningModule):
    """The networks of a fit, with one Adam that has a parameter group for each.

    Args:
        members: The networks.
        loss: The mean loss of logits and targets, as of ``cross_entropy``.
        epochs: How long all are trained.
        fine_tuning: In how many of the last epochs the learning rate falls, geometrically to a thirtieth.
        decay: The factor of the weight decay in these epochs.
    """

    def __init__(
        self,
        members: Sequence[Member],
        loss: Callable[[Tensor, Tensor], Tensor],
        epochs: int,
        fine_tuning: int,
        decay: float = 1.0,
    ) -> None:
        super().__init__()
        self.nets = nn.ModuleList(member.net for member in members)
        self.members, self.loss = members, loss
        self.first, self.fine_tuning, self.decay = epochs - fine_tuning, fine_tuning, decay

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(member, batch, class)``, of ``(member, batch, feature)``."""
        return torch.stack([net(part) for net, part in zip(self.nets, x, strict=True)])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the sum of the members' mean losses."""
        logits, y = self(batch[0]), batch[1]
        return len(self.nets) * self.loss(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        groups = [
            {"params": list(member.net.parameters()), "lr": member.lr, "weight_decay": member.weight_decay}
            for member in self.members
        ]
        return torch.optim.Adam(groups, fused=True)

    def on_train_epoch_start(self) -> None:
        """Let the rates fall in the last epochs."""
        epoch = self.current_epoch - self.first
        if epoch < 0:
            return
        groups = self.optimizers().param_groups  # type: ignore[union-attr]
        for group, member in zip(groups, self.members, strict=True):
            group["lr"] = member.lr * LR_FALL ** -((epoch + 1) / self.fine_tuning)
            group["weight_decay"] = member.weight_decay * self.decay


class _Batches(Dataset[Any]):
    def __init__(self, parts: Sequence[Split]) -> None:
        self.parts = parts

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x = [part.x[own] for part, own in zip(self.parts, rows, strict=True)]
        y = [part.y[own] for part, own in zip(self.parts, rows, strict=True)]
        return torch.stack(x), torch.stack(y)


class _Shuffled:
    """Rows of every member, ``(member, batch)``, in its own order; what fills no batch is left out."""

    def __init__(self, members: Sequence[Member], batch_size: int) -> None:
        self.sizes = [len(member.data.y) for member in members]
        if min(self.sizes) < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}; allowed is {min(self.sizes)} or less, the smallest data's size"
            )
        self.batch_size = batch_size
        self.generators = [torch.Generator().manual_seed(member.seed) for member in members]

    def __len__(self) -> int:
        return min(self.sizes) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        used = len(self) * self.batch_size
        orders = [torch.randperm(n, generator=g)[:used] for n, g in zip(self.sizes, self.generators, strict=True)]
        yield from torch.split(torch.stack(orders), self.batch_size, dim=1)


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose initialisation depends on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def steps_an_epoch(members: Sequence[Member], batch_size: int) -> int:
    """Return how many steps an epoch has: batches are whole, and as many as the smallest member's data fill."""
    return len(_Shuffled(members, batch_size))


def fit(module: Networks, batch_size: int, callbacks: Sequence[Any] = ()) -> None:
    """Train networks side by side.

    Args:
        module: The networks.
        batch_size: Samples a step, of each.
        callbacks: Lightning callbacks.

    Raises:
        ValueError: If a member's data do not fill a batch.
    """
    trainer = quiet_trainer(
        max_epochs=module.first + module.fine_tuning,
        accelerator="cpu",
        callbacks=list(callbacks),
    )
    sampler: Any = _Shuffled(module.members, batch_size)
    data = _Batches([member.data for member in module.members])
    trainer.fit(module, DataLoader(data, sampler=sampler, batch_size=None))
