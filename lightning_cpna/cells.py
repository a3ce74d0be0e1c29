"""Bool tensors and the cells where they are True: counting, listing, filling and packing them.

On the CPU nearly all of it goes through NumPy, 1.5 to 15 times faster than torch.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)
RARE = 0.05  # measured: where more are True, and more are False, a processor guesses a branch a cell too badly
FEW = 4  # measured: where a list is so many times as long as what is looked up in it, a search is faster than a merge


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor of floats in float32 or better.

    Examples:
        >>> wide(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor if tensor.dtype in WIDE else tensor.float()


def count_true(where: Tensor) -> int:
    """Count where a bool tensor is True.

    Examples:
        >>> count_true(torch.tensor([True, False, True]))
        2
    """
    return int(np.count_nonzero(where.numpy()) if where.is_cpu else where.sum())


def within(values: Tensor, low: float, high: float) -> Tensor:
    """Mark the values, in float32 or better and without gradients, that are from ``low`` to ``high``, as a bool tensor.

    Examples:
        >>> within(torch.tensor([0.1, 0.5, 0.9]), 0.5, 2)
        tensor([False,  True,  True])
    """
    if not values.is_cpu:
        return (values >= low) & (values <= high)
    array = values.numpy()
    return torch.from_numpy((array >= low) & (array <= high))


def cells_of(where: Tensor) -> Tensor:
    """Return where a bool tensor is True, as cells of the flattened tensor, int64 ``(n,)``.

    Examples:
        >>> cells_of(torch.tensor([[False, True], [True, False]]))
        tensor([1, 2])
    """
    flat = where.flatten()
    return torch.from_numpy(np.flatnonzero(flat.numpy())) if flat.is_cpu else flat.nonzero().flatten()


def others(n: int, cells: Tensor) -> Tensor:
    """Return those of ``n`` cells that are not in a list, ascending, int64.

    Examples:
        >>> others(5, torch.tensor([3, 0]))
        tensor([1, 2, 4])
    """
    free = torch.ones(n, dtype=torch.bool, device=cells.device)
    if free.is_cpu:
        free.numpy()[cells.numpy()] = False
    else:
        free[cells] = False
    return cells_of(free)


def pick(values: Tensor, where: Tensor) -> Tensor:
    """Return the values ``(n,)`` where a bool tensor ``(n,)`` is True, as ``values[where]``.

    Examples:
        >>> pick(torch.tensor([5, 6, 7]), torch.tensor([True, False, True]))
        tensor([5, 7])
    """
    if values.is_cpu and values.dtype != torch.bfloat16:
        n = count_true(where)
        if min(n, len(where) - n) < RARE * len(where):
            return torch.from_numpy(values.numpy()[where.numpy()])
    return values.index_select(0, cells_of(where))


def distinct(cells: Tensor, kind: Literal["quicksort", "stable"] = "quicksort") -> Tensor:
    """Return cells, int64 ``(n,)``, ascending and each once; ``kind`` is NumPy's way to sort on the CPU.

    Examples:
        >>> distinct(torch.tensor([7, 2, 7]))
        tensor([2, 7])
    """
    ascending = torch.from_numpy(np.sort(cells.numpy(), kind=kind)) if cells.is_cpu else cells.sort().values
    once: Tensor = torch.unique_consecutive(ascending)
    return once


def together(first: Tensor, second: Tensor) -> Tensor:
    """Return the cells that are in one of two ascending lists, int64, ascending and each once.

    Examples:
        >>> together(torch.tensor([2, 7]), torch.tensor([3, 7]))
        tensor([2, 3, 7])
    """
    return distinct(torch.cat([first, second]), "stable")  # which sees that there are two ascending runs


def n_up_to(ascending: Tensor, values: Tensor) -> Tensor:
    """Count, for each of ascending values, those of an ascending list that are not above it, int64.

    Examples:
        >>> n_up_to(torch.tensor([2, 4, 4]), torch.tensor([1, 4, 9]))
        tensor([0, 3, 3])
    """
    if not ascending.is_cpu:
        return torch.searchsorted(ascending, values, right=True)
    if FEW * len(values) <= len(ascending):
        return torch.from_numpy(np.searchsorted(ascending.numpy(), values.numpy(), side="right"))
    merged = np.concatenate([ascending.numpy(), values.numpy()])
    merged *= 2
    merged[len(ascending) :] += 1  # so a value is odd, and stands behind what it equals
    merged.sort(kind="stable")  # which sees that there are two ascending runs
    is_value = (merged.astype(np.uint8) & 1).view(bool)
    return torch.from_numpy(np.flatnonzero(is_value)).sub_(torch.arange(len(values)))


def divided(cells: Tensor, n: int) -> Tensor:
    """Return ``cells // n`` of cells that are not negative, int64.

    Examples:
        >>> divided(torch.tensor([0, 19, 20, 59]), 20)
        tensor([0, 0, 1, 2])
    """
    if n == 1:
        return cells
    return torch.from_numpy(cells.numpy() // n) if cells.is_cpu else cells // n


def put_cells_(tensor: Tensor, cells: Tensor, values: Tensor) -> None:
    """Put values ``(n,)`` into some cells of a tensor of any layout, in place; cells are counted as in ``fill_cells_``.

    Examples:
        >>> tensor = torch.zeros(2, 2)
        >>> put_cells_(tensor, torch.tensor([1, 2]), torch.tensor([5.0, 6.0]))
        >>> tensor
        tensor([[0., 5.],
                [6., 0.]])
    """
    tensor[torch.unravel_index(cells, tensor.shape)] = values.to(tensor)


def fill_cells_(tensor: Tensor, cells: Tensor, value: float) -> None:
    """Fill some cells of a tensor of any layout, in place; cells are counted as in ``tensor.flatten()``.

    Examples:
        >>> tensor = torch.ones(2, 3)
        >>> fill_cells_(tensor, torch.tensor([1, 5]), 0)
        >>> tensor
        tensor([[1., 0., 1.],
                [1., 1., 0.]])
    """
    if tensor.is_contiguous():
        tensor.view(-1).index_fill_(0, cells, value)
    else:
        tensor[torch.unravel_index(cells, tensor.shape)] = value


def renumbered(n: int, kept: Tensor | None, device: torch.device | None = None) -> Tensor:
    """Return the new number of each of ``n`` of which only some are kept, int64 ``(n,)``; -1 where it is not.

    Args:
        n: How many there are.
        kept: Which stay, int64 ascending; None: all.
        device: Where the answer is.

    Examples:
        >>> renumbered(4, torch.tensor([1, 3]))
        tensor([-1,  0, -1,  1])
    """
    if kept is None:
        return torch.arange(n, device=device)
    numbers = torch.full((n,), -1, device=device)
    numbers[kept.to(numbers.device)] = torch.arange(len(kept), device=device)
    return numbers


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor into bytes, eight cells each, on the CPU.

    Examples:
        >>> pack(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    return torch.from_numpy(np.packbits(mask.detach().flatten().cpu().numpy(), bitorder="little"))


def unpack(packed: Tensor, shape: torch.Size | list[int]) -> Tensor:
    """Undo ``pack`` for a mask of this shape."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).bool().view(shape)
