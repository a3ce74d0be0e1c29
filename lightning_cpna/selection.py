"""Which stay? The largest scores, exactly as many as wanted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_cpna.cells import wide

MANY, SAMPLE, MARGIN = 2**15, 2**11, 70  # chosen: three standard deviations of a place in the sample are 68


def keep_top(scores: Tensor, n: int, member_axis: int | None = None) -> Tensor:
    """Mark the ``n`` largest scores; ties at the threshold go to the lowest index, so the count is exact.

    Args:
        scores: Float tensor of any shape; ``-inf`` marks what is never kept.
        n: How many to keep (of each member).
        member_axis: The axis of a stacked network's members; each keeps its own ``n``.

    Returns:
        Bool tensor of the shape of ``scores``, True at what stays.

    Raises:
        ValueError: If a score is NaN, or fewer than ``n`` scores are above ``-inf``.

    Examples:
        >>> keep_top(torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0]), 3)
        tensor([False,  True,  True,  True, False])
    """
    rows = scores.reshape(1, -1) if member_axis is None else scores.movedim(member_axis, 0)
    rows = rows.reshape(rows.shape[0], -1)  # (member, cell)
    rows = rows.detach()
    rows = rows.float() if rows.dtype == torch.bfloat16 else rows if rows.is_floating_point() else rows.double()
    if not 0 <= n <= rows.shape[1]:
        raise ValueError(f"n is {n}; allowed is 0 to {rows.shape[1]}, the number of scores")
    keep, _ = keep_top_rows(rows, n)
    if int(keep.sum()) < n * len(rows):
        raise ValueError(f"n is {n}; allowed is the number of scores above -inf or less")
    return keep.view(scores.shape) if member_axis is None else _unrow(keep, scores, member_axis)


def keep_top_rows(rows: Tensor, n: int) -> tuple[Tensor, float]:
    """Mark the ``n`` largest scores above ``-inf`` of every row of ``(member, cell)``, or all where a row has fewer.

    Returns:
        Bool tensor ``(member, cell)``, and the lowest score that stays.
    """
    if n == 0:
        _refuse_nan(rows)
        return torch.zeros_like(rows, dtype=torch.bool), torch.inf
    keep, threshold, n_kept, lowest = _at_least_the_nth(rows, n)
    if math.isnan(lowest):
        _refuse_nan(rows)
    if n_kept == n * len(rows) and lowest > -torch.inf:
        return keep, lowest
    alive, above, tied = rows > -torch.inf, rows > threshold, rows == threshold
    wanted = alive.sum(1, keepdim=True).clamp(max=n)
    keep = above | (tied & alive & (tied.cumsum(1) <= wanted - above.sum(1, keepdim=True)))
    return keep, float(rows.masked_fill(~keep, torch.inf).min())


def _refuse_nan(rows: Tensor) -> None:
    if n_nan := int(torch.isnan(rows).sum()):
        raise ValueError(
            f"scores: {n_nan} of {rows.numel()} are NaN; pruning would be arbitrary: look at the loss and the data"
        )


def _at_least_the_nth(rows: Tensor, n: int) -> tuple[Tensor, Tensor, int, float]:
    """Mark what is at least the ``n``-th largest of its row.

    Returns:
        The marks, that score ``(member, 1)``, the number of marks, and the lowest of those scores, NaN if any score is.
    """
    nth = nth_of(rows, rows.shape[1] - n)
    if not rows.is_cpu:
        keep = rows >= nth
        return keep, nth, int(keep.sum()), float(torch.where(rows.isnan().any(), torch.nan, nth.min()))
    scores, lowest_of = rows.numpy(), nth.numpy()  # NumPy's selection and comparison take a tenth of torch's time
    marks = scores >= lowest_of
    lowest = math.nan if math.isnan(scores.max()) else float(lowest_of.min())
    return torch.from_numpy(marks), nth, int(np.count_nonzero(marks)), lowest


def nth_of(rows: Tensor, place: int) -> Tensor:
    """Return what stands at a place of each sorted row, NaN last, in float32 or better: ``(row, 1)``.

    Examples:
        >>> nth_of(torch.tensor([[0.5, 0.1, 0.3], [0.2, 0.9, 0.4]]), 1)
        tensor([[0.3000],
                [0.4000]])
    """
    rows = wide(rows)
    if not rows.is_cpu:
        return torch.kthvalue(rows, place + 1, dim=1, keepdim=True).values
    values = rows.numpy()
    if rows.shape[1] < MANY:
        return torch.from_numpy(np.partition(values, place, axis=1)[:, place : place + 1])
    return torch.from_numpy(np.array([[_nth_of_many(row, place)] for row in values]))


def _nth_of_many(values: NDArray[np.floating[Any]], place: int) -> np.floating[Any]:
    """Let a sample tell between which two values it stands, and partition only what lies there.

    NumPy's AVX-512 partition takes up to five times as long as its AVX2 one on AMD Zen 4 (numpy/x86-simd-sort#6).
    """
    sample = np.sort(values[:: len(values) // SAMPLE | 1])  # an odd step goes through all columns of a weight
    middle = place * len(sample) // len(values)
    low, high = sample[max(0, middle - MARGIN)], sample[min(len(sample) - 1, middle + MARGIN)]
    below = values < low
    inside = values <= high
    inside &= ~below
    between = values[np.flatnonzero(inside)]
    place_between = place - int(np.count_nonzero(below))
    if 0 <= place_between < len(between):
        values, place = between, place_between
    nth: np.floating[Any] = np.partition(values, place)[place]
    return nth


def _unrow(rows: Tensor, like: Tensor, member_axis: int) -> Tensor:
    keep = torch.empty_like(like, dtype=torch.bool)
    moved = keep.movedim(member_axis, 0)
    moved.copy_(rows.view(moved.shape))
    return keep
