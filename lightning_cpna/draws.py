"""Drawing connections that are not there yet."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cpna.cells import distinct, n_up_to, together


class Free(NamedTuple):
    """Cells that are not occupied.

    Attributes:
        cells: Ascending, int64 ``(n,)``.
        n_before: How many occupied cells are before each, int64 ``(n,)``.
    """

    cells: Tensor
    n_before: Tensor


def draw_cells(occupied: Tensor, n_cells: int, n: int, generator: torch.Generator | None = None) -> Free:
    """Draw cells that are not occupied, uniformly, each at most once.

    Args:
        occupied: Ascending cells, int64 ``(m,)``.
        n_cells: How many cells there are, from 0 on.
        n: How many to draw.
        generator: A CPU generator; None is torch's global one.

    Returns:
        The cells, on the device of ``occupied``.

    Raises:
        ValueError: If fewer than ``n`` are free.

    Examples:
        >>> draw_cells(torch.tensor([0, 2, 3]), n_cells=5, n=2).cells
        tensor([1, 4])
    """
    n_free = n_cells - len(occupied)
    if not 0 <= n <= n_free:
        raise ValueError(f"n is {n}; allowed is 0 to {n_free}, the number of free cells")
    if n_free <= 4 * n:
        ranks = torch.randperm(n_free, generator=generator)[:n].sort().values
    else:  # drawing one after another, and again what was drawn before, is uniform
        ranks = distinct(torch.randint(n_free, (n,), generator=generator))
        while len(ranks) < n:
            more = torch.randint(n_free, (n - len(ranks),), generator=generator)
            ranks = together(ranks, distinct(more))
    return free_cells(occupied, ranks.to(occupied.device))


def free_cells(occupied: Tensor, ranks: Tensor) -> Free:
    """Return the cells that are the ``ranks``-th of those that are not occupied.

    Args:
        occupied: Ascending cells, int64 ``(m,)``.
        ranks: From 0, ascending, int64 ``(n,)``.

    Examples:
        >>> free_cells(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 2])).cells
        tensor([1, 4, 5])
    """
    n_free_before = torch.arange(len(occupied), device=occupied.device).neg_().add_(occupied)
    n_before = n_up_to(n_free_before, ranks)
    return Free(n_before + ranks, n_before)
