"""The order of batches, and going back to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from lightning_cpna._lightning import Trainer
from lightning_cpna.rng import rng_state, set_rng_state


@dataclass
class BatchOrder:
    """What the order of batches depends on: random generators, and samplers that count epochs.

    Attributes:
        states: The states of each process's generators when the fit began.
    """

    states: list[dict[str, Any]] = field(default_factory=list)

    def note(self, trainer: Trainer) -> None:
        """Note the generators' states, if that is still to be done.

        Raises:
            ValueError: If they were noted by another number of processes.
        """
        if not self.states:
            mine = rng_state(trainer.strategy.root_device)
            self.states = [trainer.strategy.broadcast(mine, src=rank) for rank in range(trainer.world_size)]
        elif len(self.states) != trainer.world_size:
            raise ValueError(
                f"the fit began on {len(self.states)} processes and goes on on {trainer.world_size}, so that their random "
                "generators cannot go back; allowed is the same number, or Rewind(sampler=False)"
            )

    def rewind_(self, trainer: Trainer) -> None:
        """Put the generators back; those of a loader's own begin again with their seeds."""
        set_rng_state(self.states[trainer.global_rank], trainer.strategy.root_device)
        for owner in (*tree_leaves(trainer.train_dataloader), *_samplers(trainer)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(generator.initial_seed())

    def set_epoch(self, trainer: Trainer, epoch: int) -> None:
        """Tell samplers that count epochs which one this is."""
        for sampler in _samplers(trainer):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)


def _samplers(trainer: Trainer) -> list[Any]:
    """Find the samplers of the training loaders."""
    loaders = tree_leaves(trainer.train_dataloader)
    return [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")]
