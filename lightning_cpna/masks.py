"""Which stay? Exact top-k selection, and the masks that say which connections live."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cpna.cells import cells_of, count_true, fill_cells_, pack, pick, unpack
from lightning_cpna.targets import resolve

STATE_VERSION = 1


_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


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

    Example:
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
        raise ValueError(f"scores: {n_nan} of {rows.numel()} are NaN; pruning would be arbitrary")


def _at_least_the_nth(rows: Tensor, n: int) -> tuple[Tensor, Tensor, int, float]:
    """Mark what is at least the ``n``-th largest of its row.

    Returns:
        The marks, that score ``(member, 1)``, the number of marks, and the lowest of those scores, NaN if any score is.
    """
    position = rows.shape[1] - n
    if not rows.is_cpu:
        nth = torch.kthvalue(rows, position + 1, dim=1, keepdim=True).values
        keep = rows >= nth
        return keep, nth, int(keep.sum()), float(torch.where(rows.isnan().any(), torch.nan, nth.min()))
    scores = rows.numpy()  # NumPy's selection and comparison take a tenth of torch's time
    threshold = np.partition(scores, position, axis=1)[:, position, None]
    marks = scores >= threshold
    lowest = float(threshold.min()) if not np.isnan(scores.max()) else math.nan
    return torch.from_numpy(marks), torch.from_numpy(threshold), int(np.count_nonzero(marks)), lowest


def _unrow(rows: Tensor, like: Tensor, member_axis: int) -> Tensor:
    keep = torch.empty_like(like, dtype=torch.bool)
    moved = keep.movedim(member_axis, 0)
    moved.copy_(rows.view(moved.shape))
    return keep


class Mask:
    """The mask of one dense parameter.

    A connection has two facts: whether it is *live*, and whether it is *removed for good*. What is removed for good is
    never live again; what is only not live may be regrown.

    Attributes:
        dead: Bool tensor of the parameter's shape, True where the connection is not live.
        removed: Bool tensor of the parameter's shape, True where it is removed for good.
        n_live: The number of live connections.
        version: Counts the changes, so that what is derived from the mask can be kept until the next one.
    """

    def __init__(self, dead: Tensor, removed: Tensor) -> None:
        self.dead = dead
        self.removed = removed
        self.n_live = dead.numel() - count_true(dead)
        self.version = 0
        self._bits: Tensor | None = None  # no bit set where the connection is not live, every bit elsewhere
        self._live_cells: Tensor | None = None

    @property
    def live(self) -> Tensor:
        """Bool tensor of the parameter's shape, True where the connection lives."""
        return ~self.dead

    @property
    def live_cells(self) -> Tensor:
        """Where the live connections are in the flattened parameter, in order, int64 ``(n_live,)``."""
        if self._live_cells is None or self._live_cells.device != self.dead.device:
            self._live_cells = cells_of(~self.dead)
        return self._live_cells

    def remove_(self, where: Tensor) -> int:
        """Remove connections (bool, of the parameter's shape) for good; return how many live ones that took.

        Raises:
            ValueError: If the shape is another one.
        """
        if where.shape != self.dead.shape:
            raise ValueError(
                f"where has shape {tuple(where.shape)}; allowed is the parameter's, {tuple(self.dead.shape)}"
            )
        return self.remove_cells_(cells_of(where))

    def remove_cells_(self, cells: Tensor) -> int:
        """Remove connections (cells of the flattened parameter, each once) for good; return as ``remove_``."""
        return self._remove(cells, n=len(cells) - count_true(self.dead.flatten()[cells]))

    def keep_(self, keep: Tensor) -> Tensor:
        """Remove live connections for good, all that are not marked.

        Args:
            keep: Which stay, bool ``(n_live,)`` in the order of ``live_cells``.

        Returns:
            The cells that went.
        """
        cells = self.live_cells
        gone, stays = pick(cells, ~keep), pick(cells, keep)
        self._remove(gone, n=len(gone))
        self._live_cells = stays
        return gone

    def _remove(self, cells: Tensor, n: int) -> int:
        self.n_live -= n
        fill_cells_(self.removed, cells, True)
        fill_cells_(self.dead, cells, True)
        if self._bits is not None and self._bits.device == cells.device:
            fill_cells_(self._bits, cells, 0)
        else:
            self._bits = None
        self._live_cells = None
        self.version += 1
        return n

    def apply_(self, tensor: Tensor) -> None:
        """Set the connections that are not live to zero, in place; what was infinite or NaN there is zero too."""
        integer = _INTEGERS[tensor.dtype]
        if self._bits is None or self._bits.dtype != integer or self._bits.device != tensor.device:
            self._bits = self.dead.to(tensor.device, integer).sub_(1)
        tensor.view(integer).bitwise_and_(self._bits)  # masking bits is ten times faster than masked_fill_ on the CPU

    def to_(self, device: torch.device) -> None:
        """Move the mask to a device, if it is elsewhere."""
        if self.dead.device != device:
            self.dead, self.removed = self.dead.to(device), self.removed.to(device)
            self._bits = None


@dataclass
class Kept:
    """What is left of a parameter whose tensor was made smaller.

    Attributes:
        shape: The full shape.
        rows: Which units are left, int64 ``(n,)``.
        columns: Which inputs are left, int64 ``(n,)``; None for a bias.
    """

    shape: torch.Size
    rows: Tensor
    columns: Tensor | None

    @classmethod
    def all_of(cls, tensor: Tensor) -> Kept:
        """Describe a tensor of which everything is left."""
        columns = torch.arange(tensor.shape[1]) if tensor.ndim > 1 else None
        return cls(tensor.shape, torch.arange(tensor.shape[0]), columns)

    def select(self, tensor: Tensor) -> Tensor:
        """Take what is left out of a tensor of the full shape."""
        small = tensor.index_select(0, self.rows.to(tensor.device))
        return small if self.columns is None else small.index_select(1, self.columns.to(tensor.device))

    def expand(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """Put what is left back into the full shape.

        Example:
            >>> Kept(torch.Size([2, 3]), torch.tensor([1]), torch.tensor([0, 2])).expand(torch.tensor([[5, 6]]))
            tensor([[0, 0, 0],
                    [5, 0, 6]])
        """
        full = tensor.new_full(self.shape, fill)
        rows = self.rows.to(tensor.device)
        if self.columns is None:
            full[rows] = tensor
        else:
            full[rows[:, None], self.columns.to(tensor.device)] = tensor
        return full

    def cut(self, rows: Tensor | None, columns: Tensor | None) -> Kept:
        """Return what is left if only some of these rows and columns stay (None: all)."""
        return Kept(
            self.shape,
            self.rows if rows is None else self.rows[rows],
            self.columns if self.columns is None or columns is None else self.columns[columns],
        )


class Masks(Mapping[str, Mask]):
    """The masks of a module, by canonical parameter name.

    Zero is a legal live weight: what lives is what the mask says, never ``value != 0``.

    Example:
        >>> net = nn.Linear(3, 1, bias=False)
        >>> masks = Masks()
        >>> masks.add("weight", net.weight)
        >>> masks["weight"].remove_(torch.tensor([[True, False, True]]))
        2
        >>> masks.apply_(dict(net.named_parameters()))
        >>> int((net.weight != 0).sum()), masks["weight"].n_live
        (1, 1)
    """

    def __init__(self) -> None:
        self._masks: dict[str, Mask] = {}

    def __getitem__(self, name: str) -> Mask:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def add(self, name: str, parameter: Tensor) -> None:
        """Give a parameter a mask in which everything lives; one that it has already stays, on the parameter's device.

        Raises:
            ValueError: If the mask that is there has another shape than the parameter.
        """
        if name not in self._masks:
            dead = torch.zeros_like(parameter, dtype=torch.bool, requires_grad=False)
            self._masks[name] = Mask(dead, dead.clone())
        mask = self._masks[name]
        if mask.dead.shape != parameter.shape:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(mask.dead.shape)}, the parameter {tuple(parameter.shape)}: "
                "it belongs to another architecture"
            )
        mask.to_(parameter.device)

    def replace(self, masks: Mapping[str, Mask]) -> None:
        """Put other masks in the place of some."""
        self._masks |= masks

    def full(self, kept: Mapping[str, Kept]) -> Masks:
        """Return the masks in the full shapes of parameters that were made smaller; what was cut is removed for good."""
        masks = Masks()
        for name, mask in self._masks.items():
            if name in kept:
                mask = Mask(kept[name].expand(mask.dead, True), kept[name].expand(mask.removed, True))
            masks._masks[name] = mask
        return masks

    def apply_(self, parameters: Mapping[str, Tensor]) -> None:
        """Set every connection that is not live to zero, in place."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                mask.apply_(parameters[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the masks as packed CPU tensors and Python primitives; ``torch.load(weights_only=True)`` reads them."""
        return {
            "version": STATE_VERSION,
            "masks": {
                name: {"shape": list(mask.dead.shape), "dead": pack(mask.dead), "removed": pack(mask.removed)}
                for name, mask in self._masks.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the masks by those of ``state_dict``.

        Raises:
            ValueError: If the state is of a version that this release does not know; nothing is changed then.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"masks: the state has version {state.get('version')!r}; this release reads {STATE_VERSION}"
            )
        self._masks = {
            name: Mask(unpack(entry["dead"], entry["shape"]), unpack(entry["removed"], entry["shape"]))
            for name, entry in state["masks"].items()
        }


def infer_masks(module: nn.Module, patterns: list[str]) -> Masks:
    """Read masks off the zeros of a module, for instance one loaded from a file that holds weights only.

    Exact where no live weight is zero, as with pruning; a weight regrown at zero and not yet trained counts as removed.

    Args:
        module: The module with zeros in its weights.
        patterns: Which parameters, as in ``targets.resolve``.

    Example:
        >>> net = nn.Linear(3, 1, bias=False)
        >>> _ = nn.init.constant_(net.weight, 1.0)
        >>> net.weight.data[0, 1] = 0
        >>> infer_masks(net, ["weight"])["weight"].live
        tensor([[ True, False,  True]])
    """
    masks = Masks()
    for targets in resolve(module, patterns).values():
        for target in targets:
            masks.add(target.name, target.parameter)
            masks[target.name].remove_(target.parameter.detach() == 0)
    return masks
