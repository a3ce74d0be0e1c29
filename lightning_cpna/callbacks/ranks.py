"""Decisions that every process takes alike."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_cpna._lightning import Trainer
from lightning_cpna.cells import pack, unpack

T = TypeVar("T")


def agree(trainer: Trainer, decision: Tensor) -> Tensor:
    """Let rank 0 decide: return its bool tensor on every rank."""
    if trainer.world_size == 1:
        return decision
    return unpack(broadcast(trainer, pack(decision)), decision.shape).to(decision.device)


def broadcast(trainer: Trainer, decision: T) -> T:
    """Let rank 0 decide: return its tensor, or tuple of tensors, on every rank."""
    if trainer.world_size == 1:
        return decision
    decided: T = tree_map(lambda mine, zeros: zeros.to(mine.device), decision, trainer.strategy.broadcast(decision))
    return decided
