"""The mask of one parameter: which of its connections live."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_cpna.cells import cells_of, count_true, fill_cells_, pack, pick, renumbered, unpack
from lightning_cpna.targets import Axes, ListedAxes

_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


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
    def all_of(cls, shape: torch.Size) -> Kept:
        """Describe a parameter of this shape of which everything is left."""
        return cls(shape, torch.arange(shape[0]), torch.arange(shape[1]) if len(shape) > 1 else None)

    def select(self, tensor: Tensor) -> Tensor:
        """Take what is left out of a tensor of the full shape."""
        small = tensor.index_select(0, self.rows.to(tensor.device))
        return small if self.columns is None else small.index_select(1, self.columns.to(tensor.device))

    def expand(self, tensor: Tensor, fill: float = 0) -> Tensor:
        """Put what is left back into the full shape.

        Examples:
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


def _kept(values: Tensor, places: Tensor | None) -> Tensor:
    return values if places is None else values[places.to(values.device)]


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
        self._live_groups: dict[str, Tensor] = {}

    @property
    def live(self) -> Tensor:
        """Bool tensor of the parameter's shape, True where the connection lives."""
        return ~self.dead

    @property
    def all_live(self) -> bool:
        """Whether every connection lives."""
        return self.n_live == self.dead.numel()

    @property
    def live_cells(self) -> Tensor:
        """Where the live connections are in the flattened parameter, in order, int64 ``(n_live,)``."""
        if self._live_cells is None or self._live_cells.device != self.dead.device:
            self._live_cells, self._live_groups = cells_of(~self.dead), {}
        return self._live_cells

    @property
    def live_groups(self) -> dict[str, Tensor]:
        """What somebody found out about each of the ``live_cells`` and put here (its unit, its input), ``(n_live,)``."""
        return self._live_groups

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

        Raises:
            ValueError: If the shape is another one.
        """
        cells = self.live_cells
        if keep.shape != cells.shape:
            raise ValueError(
                f"keep has shape {tuple(keep.shape)}; allowed is {tuple(cells.shape)}, one for each live cell"
            )
        gone, stays = pick(cells, ~keep), cells_of(keep)
        groups = {kind: group.index_select(0, stays) for kind, group in self._live_groups.items()}
        self._remove(gone, n=len(gone))
        self._live_cells, self._live_groups = cells.index_select(0, stays), groups
        return gone

    def _remove(self, cells: Tensor, n: int) -> int:
        self.n_live -= n
        fill_cells_(self.removed, cells, True)
        fill_cells_(self.dead, cells, True)
        if self._bits is not None and self._bits.device == cells.device:
            fill_cells_(self._bits, cells, 0)
        else:
            self._bits = None
        self._live_cells, self._live_groups = None, {}
        self.version += 1
        return n

    def apply_(self, tensor: Tensor) -> None:
        """Set the connections that are not live to zero, in place; what was infinite or NaN there is zero too."""
        if self.all_live:
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
        self._live_groups = {}
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

    A connection of the list dies only when it is removed for good, and is dropped from the list as soon as that is possible.
    So what is removed is kept beside it: it must not come back.

    Attributes:
        units: The units that are removed for good, bool ``(unit,)``.
        inputs: The inputs that are, bool ``(input,)``.
        cells: The single connections that are, ``unit * n_inputs + input``, int64.
    """

    def __init__(self, n: int, units: Tensor, inputs: Tensor, cells: Tensor) -> None:
        nothing = torch.zeros(1, dtype=torch.bool, device=units.device).expand(n)  # takes no memory
        super().__init__(nothing, nothing)
        self.units, self.inputs, self.cells = units, inputs, cells

    @property
    def live_groups(self) -> dict[str, Tensor]:
        """Nothing is kept: the list changes without its mask."""
        return {}

    @classmethod
    def of(cls, parameter: Tensor, axes: ListedAxes) -> ListMask:
        """Return a mask in which everything lives."""
        units = torch.zeros(axes.layer.out_features, dtype=torch.bool, device=parameter.device)
        inputs = torch.zeros(axes.layer.in_features, dtype=torch.bool, device=parameter.device)
        return cls(len(parameter), units, inputs, torch.zeros(0, dtype=torch.int64, device=parameter.device))

    def cut(self, rows: Tensor | None, columns: Tensor | None) -> ListMask:
        """Return the mask if only some units and inputs stay, int64 (None: all); of the others nothing lives."""
        units, inputs = _kept(self.units, rows), _kept(self.inputs, columns)
        device = self.cells.device
        unit = renumbered(len(self.units), rows, device)[self.cells // len(self.inputs)]
        place = renumbered(len(self.inputs), columns, device)[self.cells % len(self.inputs)]
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
        if self.all_live:
            self.dead = self.removed = self.dead.new_zeros(len(self.dead))
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
        self.removed = self.dead
        self._bits = self._live_cells = None
        self.version += 1

    def drop_(self, axes: ListedAxes) -> None:
        """Take what is dead out of the mask, before it is dropped from the list, and remember what was removed."""
        gone = cells_of(self.removed)
        gone = gone[~(self.units[axes.units_of(gone, gone)] | self.inputs[axes.inputs_of(gone, gone)])]
        if len(gone):
            self.cells = torch.cat([self.cells, axes.layer.cells[gone]])
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
