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
from lightning_cpna.targets import Axes, ListedAxes, resolve

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
        if self.n_live == self.dead.numel():
            return
        integer = _INTEGERS[tensor.dtype]
        if self._bits is None or self._bits.dtype != integer or self._bits.device != tensor.device:
            self._bits = self.dead.to(tensor.device, integer).sub_(1)
        tensor.view(integer).bitwise_and_(self._bits)  # masking bits is ten times faster than masked_fill_ on the CPU

    def move_(self, dying: Tensor, born: Tensor) -> None:
        """Let some live connections rest and others live in their place: cells of the flattened parameter, int64."""
        fill_cells_(self.dead, dying, True)
        fill_cells_(self.dead, born, False)
        self.n_live += len(born) - len(dying)
        self._bits = self._live_cells = None
        self.version += 1

    def closed_units(self, axes: Axes) -> Tensor:
        """Tell which units have nothing that lives or may ever live, bool ``(member, unit)``."""
        return axes.sum_of_units(~self.removed) == 0

    def closed_inputs(self, axes: Axes) -> Tensor:
        """Tell which inputs have nothing that lives or may ever live, bool ``(member, input)``."""
        return axes.sum_of_inputs(~self.removed) == 0

    def to_(self, device: torch.device) -> None:
        """Move the mask to a device, if it is elsewhere."""
        if self.dead.device != device:
            self.dead, self.removed = self.dead.to(device), self.removed.to(device)
            self._bits = None

    def state_dict(self) -> dict[str, Any]:
        """Return the mask as packed CPU tensors and Python primitives."""
        return {"shape": list(self.dead.shape), "dead": pack(self.dead), "removed": pack(self.removed)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Mask:
        """Build the mask that ``state_dict`` describes."""
        if "closed" in state:
            return ListMask.from_state_dict(state)
        return cls(unpack(state["dead"], state["shape"]), unpack(state["removed"], state["shape"]))


class ListMask(Mask):
    """The mask of a weight that is a list of its connections: what is not in the list does not live.

    A connection of the list that dies is dropped from it as soon as that is possible. So what is removed for good is kept
    beside it: it must not come back.

    Attributes:
        units: The units that are removed for good, bool ``(unit,)``.
        inputs: The inputs that are, bool ``(input,)``.
        cells: The single connections that are, ``unit * n_inputs + input``, ascending, int64.
    """

    def __init__(self, n: int, units: Tensor, inputs: Tensor, cells: Tensor) -> None:
        nothing = torch.zeros(1, dtype=torch.bool, device=units.device).expand(n)  # takes no memory
        super().__init__(nothing, nothing)
        self.units, self.inputs, self.cells = units, inputs, cells

    @classmethod
    def of(cls, parameter: Tensor, axes: ListedAxes) -> ListMask:
        """Return a mask in which everything lives."""
        units = torch.zeros(axes.layer.out_features, dtype=torch.bool, device=parameter.device)
        inputs = torch.zeros(axes.layer.in_features, dtype=torch.bool, device=parameter.device)
        return cls(len(parameter), units, inputs, torch.zeros(0, dtype=torch.int64, device=parameter.device))

    def cut(self, rows: Tensor | None, columns: Tensor | None) -> ListMask:
        """Return the mask if only some units and inputs stay, int64 (None: all); of the others nothing lives."""
        units, inputs = _kept(self.units, rows), _kept(self.inputs, columns)
        numbers = [_numbers(len(self.units), rows), _numbers(len(self.inputs), columns)]
        unit = numbers[0].to(self.cells.device)[self.cells // len(self.inputs)]
        place = numbers[1].to(self.cells.device)[self.cells % len(self.inputs)]
        there = (unit >= 0) & (place >= 0)
        return ListMask(len(self.dead), units, inputs, unit[there] * len(inputs) + place[there])

    def full(self, kept: Kept) -> ListMask:
        """Return the mask of the layer before some units and inputs were cut, which are removed for good."""
        assert kept.columns is not None
        rows, columns = kept.rows.to(self.cells.device), kept.columns.to(self.cells.device)
        units, inputs = self.units.new_ones(kept.shape[0]), self.inputs.new_ones(kept.shape[1])
        units[rows], inputs[columns] = self.units, self.inputs
        unit, place = self.cells // len(self.inputs), self.cells % len(self.inputs)
        return ListMask(len(self.dead), units, inputs, rows[unit] * kept.shape[1] + columns[place])

    def is_outdated(self, parameter: Tensor, axes: ListedAxes) -> bool:
        """Tell whether the layer has taken other connections since, from a file."""
        fits = (len(self.units), len(self.inputs)) == (axes.layer.out_features, axes.layer.in_features)
        return fits and len(self.dead) != len(parameter)

    def move_(self, dying: Tensor, born: Tensor) -> None:
        """Refuse: what is not in the list cannot be born in it.

        Raises:
            TypeError: Always.
        """
        raise TypeError("connections of a SparseLinear are exchanged by rewire_, not by its mask")

    def _remove(self, cells: Tensor, n: int) -> int:
        if self.n_live == len(self.dead):
            self.dead = self.dead.new_zeros(len(self.dead))
            self.removed = self.dead.clone()
        return super()._remove(cells, n)

    def close_(self, units: Tensor | None = None, inputs: Tensor | None = None) -> None:
        """Remember that some units or inputs, bool ``(group,)``, are removed for good."""
        if units is not None:
            self.units |= units
        if inputs is not None:
            self.inputs |= inputs
        self.version += 1

    def follow_(self, dead: Tensor) -> None:
        """Follow the list, in which the connections that do not live have other places now, int64 ``(n,)``."""
        self.dead.fill_(False)
        self.dead[dead] = True
        self.removed = self.dead.clone()
        self._bits = self._live_cells = None
        self.version += 1

    def drop_(self, axes: ListedAxes) -> None:
        """Take what is dead out of the mask, before it is dropped from the list, and remember what was removed."""
        gone = cells_of(self.removed)
        gone = gone[~(self.units[axes.units_of(gone, gone)] | self.inputs[axes.inputs_of(gone, gone)])]
        if len(gone):
            self.cells = torch.unique(torch.cat([self.cells, axes.layer.cells[gone]]))
        self.dead = self.removed = self.dead.new_zeros(1).expand(self.n_live)
        self._bits = self._live_cells = None
        self.version += 1

    def closed_units(self, axes: Axes) -> Tensor:
        """See the base."""
        return self.units[None]

    def closed_inputs(self, axes: Axes) -> Tensor:
        """See the base."""
        return self.inputs[None]

    def to_(self, device: torch.device) -> None:
        """See the base."""
        super().to_(device)
        self.units, self.inputs, self.cells = self.units.to(device), self.inputs.to(device), self.cells.to(device)

    def state_dict(self) -> dict[str, Any]:
        """See the base."""
        closed = {"units": pack(self.units), "inputs": pack(self.inputs), "cells": self.cells.cpu()}
        sizes = {"n_units": len(self.units), "n_inputs": len(self.inputs)}
        return {**super().state_dict(), "closed": closed | sizes}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ListMask:
        """See the base."""
        closed = state["closed"]
        units, inputs = unpack(closed["units"], [closed["n_units"]]), unpack(closed["inputs"], [closed["n_inputs"]])
        mask = cls(state["shape"][0], units, inputs, closed["cells"])
        mask.remove_(unpack(state["removed"], state["shape"]))
        return mask


def _kept(values: Tensor, places: Tensor | None) -> Tensor:
    return values if places is None else values[places.to(values.device)]


def _numbers(n: int, places: Tensor | None) -> Tensor:
    """Return the new number of each of ``n``, -1 where it does not stay, int64 ``(n,)``."""
    if places is None:
        return torch.arange(n)
    numbers = torch.full((n,), -1)
    numbers[places.cpu()] = torch.arange(len(places))
    return numbers


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

    def add(self, name: str, parameter: Tensor, axes: Axes | None = None) -> None:
        """Give a parameter a mask in which everything lives; one that it has already stays, on the parameter's device.

        Args:
            name: Its canonical name.
            parameter: The parameter.
            axes: Its axes; needed where it is a list of connections.

        Raises:
            ValueError: If the mask that is there has another shape than the parameter.
        """
        if name not in self._masks:
            if isinstance(axes, ListedAxes):
                self._masks[name] = ListMask.of(parameter, axes)
            else:
                dead = torch.zeros_like(parameter, dtype=torch.bool, requires_grad=False)
                self._masks[name] = Mask(dead, dead.clone())
        mask = self._masks[name]
        if isinstance(mask, ListMask) and isinstance(axes, ListedAxes) and mask.is_outdated(parameter, axes):
            mask = self._masks[name] = ListMask(len(parameter), mask.units, mask.inputs, mask.cells)
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
            if name in kept and isinstance(mask, ListMask):
                mask = mask.full(kept[name])
            elif name in kept:
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
            "masks": {name: mask.state_dict() for name, mask in self._masks.items()},
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
        self._masks = {name: Mask.from_state_dict(entry) for name, entry in state["masks"].items()}


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
            masks.add(target.name, target.parameter, target.axes)
            if not isinstance(target.axes, ListedAxes):  # which says itself what lives
                masks[target.name].remove_(target.parameter.detach() == 0)
    return masks
