"""Batches for a stack: each member takes the examples in an order of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


def member_loader(
    tensors: Sequence[Tensor], *, batch_size: int, seeds: Sequence[int], drop_last: bool = False
) -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader of batches for a stack: each member takes the examples in an order of its own.

    The order depends on the member's seed and the epoch alone, so that a member sees what it would see alone, and a resumed
    run what it would have seen. A Trainer says which epoch it is; in a loop of your own, ``loader.sampler.set_epoch`` does.

    Args:
        tensors: Inputs and labels, say, with a leading axis of members, ``(member, n, ...)``; where all read the same,
            ``x.expand(n_members, *x.shape)`` takes no memory. What is on a GPU is read there, at no cost of moving it.
        batch_size: Examples a step, of each member.
        seeds: The seed of each member's order.
        drop_last: Whether an incomplete batch at the end of an epoch is left out.

    Returns:
        A loader of tuples of tensors ``(member, batch, ...)``.

    Raises:
        ValueError: If the tensors have not the same members and examples, or a number is out of range.

    Examples:
        >>> x, y = torch.arange(6.0).expand(2, 6), torch.arange(6).expand(2, 6)
        >>> [batch.shape for batch, _ in member_loader([x, y], batch_size=4, seeds=[0, 1])]
        [torch.Size([2, 4]), torch.Size([2, 2])]
    """
    if others := [type(tensor).__name__ for tensor in tensors if not isinstance(tensor, Tensor)]:
        raise TypeError(f"tensors has a {others[0]}; allowed is a list of tensors, as of TensorDataset")
    sizes = {tuple(tensor.shape[:2]) for tensor in tensors}
    if len(sizes) != 1 or len(size := sizes.pop()) != 2 or size[0] != len(seeds) or not size[1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(
            f"tensors have shapes {shapes}; allowed are (member, n, ...), of the {len(seeds)} members that seeds has"
        )
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; allowed is an int, 1 or more")
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"seeds has {min(seeds)}; allowed is 0 or more")
    order: Any = _Orders(size[1], batch_size, seeds, drop_last)
    return DataLoader(
        _Batches(tensors),
        sampler=order,
        batch_size=None,
        generator=torch.Generator(),  # lest every epoch draw from the global one
    )


class _Batches(Dataset[Any]):
    """An item is a whole batch: the index is the rows of every member, ``(member, batch)``."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, ...]:
        members = torch.arange(len(rows))[:, None]
        return tuple(tensor[members.to(tensor.device), rows.to(tensor.device)] for tensor in self.tensors)


class _Orders(Sampler[Any]):
    def __init__(self, n: int, batch_size: int, seeds: Sequence[int], drop_last: bool) -> None:
        self.n, self.batch_size, self.seeds, self.drop_last = n, batch_size, seeds, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take note of the epoch; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        generators = [torch.Generator().manual_seed(mixed_seed(seed, self.epoch)) for seed in self.seeds]
        orders = torch.stack([torch.randperm(self.n, generator=generator) for generator in generators])
        yield from orders.split(self.batch_size, dim=1)[: len(self)]  # type: ignore[no-untyped-call]


def mixed_seed(*numbers: int) -> int:
    """Mix numbers (0 or more), of which there may be several, into one seed."""
    high, low = np.random.SeedSequence((len(numbers), *numbers)).generate_state(2).tolist()
    return int(high) << 32 | int(low)
