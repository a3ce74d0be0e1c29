"""What belongs to one fit of a callback."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_cpna._lightning import LightningModule, Trainer
from lightning_cpna.activations import Watch
from lightning_cpna.callbacks.board import ConnectivityPictures
from lightning_cpna.callbacks.capture import Capture
from lightning_cpna.callbacks.log import Log
from lightning_cpna.shrink import Shrinking
from lightning_cpna.sparsity import Budget, Sparsity


@dataclass
class Fit:
    """What belongs to one fit: never copied, never saved.

    Attributes:
        trainer: The trainer.
        module: What it trains.
        sparsity: The module's masks, shared by all callbacks.
        budgets: The budgets of this callback.
        leads: Whether this is the first of our callbacks, which does what is done once.
        log: Takes this callback's numbers to whoever wants them.
        pictures: Of the connectivity, which the first of our callbacks draws.
        optimizers: The trainer's optimizers.
        handles: The hooks on them.
        capture: Records a batch.
        planned: Whether it is decided what will be done when.
        is_told: Whether the loggers know that.
        averaged_version: The version of the masks when averages of the weights were masked last.
        watch: What the units did, for callbacks that ask.
        watching: Open while a batch is watched.
        batch: The batch that is watched, and its index.
        shrinking: Cuts what is dead out of the tensors, if a callback asked for it.
        live_at_cut: How many connections lived when something was cut last, 0 before.
        last_live: How many lived after the last batch.
        changed_at: The step after which that was new.
    """

    trainer: Trainer
    module: LightningModule
    sparsity: Sparsity
    budgets: list[Budget]
    leads: bool
    log: Log
    pictures: ConnectivityPictures
    optimizers: list[Optimizer] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)
    capture: Capture | None = None
    planned: bool = False
    is_told: bool = False
    averaged_version: int = -1
    watch: Watch | None = None
    watching: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    batch: tuple[Any, int] | None = None
    shrinking: Shrinking | None = None
    live_at_cut: int = 0
    last_live: int = 0
    changed_at: int = 0

    @property
    def names(self) -> list[str]:
        """The parameters of this callback's budgets."""
        return [name for budget in self.budgets for name in budget.names]

    def restore(self) -> None:
        """Give tensors that were made smaller their full shapes."""
        if self.shrinking is not None:
            self.shrinking.restore_()
            self.shrinking = None

    def release(self) -> None:
        """Let go of optimizers and modules."""
        self.restore()
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.watching.close()
        if self.capture is not None:
            self.capture.close()
            self.capture = None
