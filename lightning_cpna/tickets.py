"""Lottery tickets: the rounds in which they are found, and random masks for comparison.

A winning ticket is a sparse network whose weights, put back to what they were early in training, train as well as the dense
network does (Frankle and Carbin 2019). Whether it is the weights or the mask that matters, the controls show: the same mask
with fresh weights, and a random mask of the same counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim import Optimizer

from lightning_cpna.mask import ListMask
from lightning_cpna.masks import Masks
from lightning_cpna.scores import Score
from lightning_cpna.snapshot import Snapshot, restore_masks_
from lightning_cpna.sparsity import Budget, Sparsity

Control = Literal["reinit", "shuffle"]


@dataclass(frozen=True)
class Round:
    """A part of a fit that finds tickets.

    Attributes:
        level: How often the masks tightened before it.
        branch: ``"init"``, ``"step 500"`` or ``"keep"`` for the tickets, or the name of a control.
    """

    level: int
    branch: str


@dataclass(frozen=True)
class RoundReport(Round):
    """What is known of a round that ended.

    Attributes:
        counts: How many connections lived, by parameter.
        sizes: How many there are, live or not.
        steps: How many optimizer steps it had.
        value: The metric that was monitored, at its end.
    """

    counts: dict[str, int]
    sizes: dict[str, int]
    steps: int
    value: float | None

    @property
    def connections(self) -> int:
        """How many connections lived in all."""
        return sum(self.counts.values())

    @property
    def density(self) -> float:
        """Which fraction lived."""
        return self.connections / sum(self.sizes.values())


@torch.no_grad()
def shuffle_masks_(
    sparsity: Sparsity,
    snapshot: Snapshot,
    *,
    optimizers: Iterable[Optimizer] = (),
    generator: torch.Generator | None = None,
) -> None:
    """Exchange the masks for random ones that leave every layer as many connections (and units, and features), in place.

    What lives newly is zero until ``rewind_`` puts the weights back: call it after this.

    In a dense layer any connection may live then, in a ``SparseLinear`` those of the snapshot. Layers whose budgets
    (``sparsity.budgets``) count units or features lose random whole ones; where these have different numbers of connections,
    as in a ``SparseLinear``, fewer connections may be left.

    Args:
        sparsity: The module and its masks.
        snapshot: What it was before anything was pruned.
        optimizers: Its optimizers.
        generator: A CPU generator.

    Examples:
        >>> from lightning_cpna import rewind_, take_snapshot
        >>> net = torch.nn.Linear(10, 4)
        >>> sparsity = Sparsity(net)
        >>> snapshot = take_snapshot(sparsity)
        >>> sparsity.remove_("weight", net.weight.abs() < 0.2)
        >>> n = sparsity.masks["weight"].n_live
        >>> shuffle_masks_(sparsity, snapshot, generator=torch.Generator().manual_seed(0))
        >>> rewind_(sparsity, snapshot)
        >>> int(net.weight.count_nonzero()) == n
        True
    """
    optimizers, generator = list(optimizers), generator or torch.Generator()
    counts = {name: mask.n_live for name, mask in sparsity.masks.items()}
    groups = {
        Budget(name, (name,), budget.granularity, 0): None
        for budget in sorted(sparsity.budgets, key=lambda budget: budget.granularity)
        if budget.granularity != "connection"
        for name in budget.names
    }
    remaining = [sparsity.n_remaining(budget) for budget in groups]
    restore_masks_(sparsity, snapshot, optimizers)
    dense = {name: mask for name, mask in sparsity.masks.items() if not isinstance(mask, ListMask)}
    whole = Masks()
    for name in dense:
        whole.add(name, sparsity.tensors[name])
    sparsity.masks.replace(whole)
    for budget, n in zip(groups, remaining, strict=True):
        sparsity.prune_(budget, n, Score("random"), optimizers=optimizers, generator=generator)
    for name, n in counts.items():
        sparsity.add_mask(name)
        left = min(n, sparsity.masks[name].n_live)
        budget = Budget(name, (name,), "connection", left)
        sparsity.prune_(budget, left, Score("random"), optimizers=optimizers, generator=generator)
