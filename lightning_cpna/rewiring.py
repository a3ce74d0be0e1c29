"""Rewiring: the weakest connections of a layer make room for as many new ones (SET, RigL)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_cpna.cells import cells_of, count_true, distinct, others, pick, put_cells_, together, wide, within
from lightning_cpna.draws import draw_cells
from lightning_cpna.growth import Factors, check_zeta
from lightning_cpna.mask import ListMask
from lightning_cpna.moments import zero_
from lightning_cpna.selection import keep_top_rows, nth_of
from lightning_cpna.sparse import Exchange
from lightning_cpna.sparsity import Sparsity
from lightning_cpna.targets import ListedAxes

BLOCK = 2**22  # chosen: gradients of a sparse layer that are computed at a time


class Decision(NamedTuple):
    """What a rewiring does.

    Attributes:
        dying: Which connections go, as cells of the flattened parameter, int64 ``(n,)``.
        born: Which come: ``unit * inputs + input`` (or cells of the flattened dense parameter), int64 ``(n,)``.
        values: With which weights, float64 ``(n,)``.
    """

    dying: Tensor
    born: Tensor
    values: Tensor


def weakest(weights: Tensor, zeta: float, generator: torch.Generator | None = None) -> Tensor:
    """Mark the zeta fraction of the smallest positive and of the largest negative weights (SET).

    Weights that are exactly zero count inside the fraction, and go first; of more of them than go, random ones do.

    Args:
        weights: ``(n,)``.
        zeta: The fraction.
        generator: Chooses among zeros; a CPU generator.

    Returns:
        Bool ``(n,)``.

    Raises:
        ValueError: If a weight is not finite.

    Examples:
        >>> weakest(torch.tensor([0.1, 0.5, -0.2, -0.9, 0.3, -0.4]), zeta=0.34)
        tensor([ True, False,  True, False, False, False])
    """
    weights = wide(weights.detach())
    if not len(weights):
        return torch.zeros(0, dtype=torch.bool, device=weights.device)
    if not all(math.isfinite(edge) for edge in torch.aminmax(weights)):
        n_bad = len(weights) - count_true(torch.isfinite(weights))
        raise ValueError(f"{n_bad} of {len(weights)} weights are not finite; which are the weakest would be arbitrary")
    zeros = cells_of(within(weights, 0, 0))
    n_zero, n_gone = len(zeros), math.floor(zeta * len(weights) + 1e-9)
    if n_zero > n_gone:
        zeros = zeros[torch.randperm(n_zero, generator=generator)[:n_gone].sort().values.to(zeros.device)]
        rest = 0.0
    else:
        rest = (zeta * len(weights) - n_zero) / max(1, len(weights) - n_zero)
    n_negative = count_true(within(weights, -math.inf, 0)) - n_zero
    n_low = math.floor(rest * n_negative + 1e-9)
    n_high = math.floor(rest * (len(weights) - n_zero - n_negative) + 1e-9)
    low = float(nth_of(weights[None], n_negative - n_low)) if n_low else 0.0
    high = float(nth_of(weights[None], n_negative + n_zero + n_high - 1)) if n_high else 0.0
    gone = within(weights, low, high)
    if count_true(gone) > len(zeros) + n_low + n_high:
        gone &= weights != 0
        gone[zeros] = True
        for n, weak, edge in ((n_low, gone & (weights < 0), low), (n_high, gone & (weights > 0), high)):
            if n_tied := count_true(weak) - n:
                gone[cells_of(weak & (weights == edge))[-n_tied:]] = False
    return gone


@torch.no_grad()
def rewire_(
    sparsity: Sparsity,
    name: str,
    zeta: float,
    *,
    std: float = 0.0,
    gradient: Tensor | Sequence[Factors] | None = None,
    optimizers: Iterable[Optimizer] = (),
    generator: torch.Generator | None = None,
    agree: Callable[[Decision], Decision] | None = None,
) -> int:
    """Let the weakest connections of a layer go and as many others come, in place.

    The number of connections stays exactly what it is. One that has just gone is free, and may come back; what is removed
    for good never does. Weights that come have no moments, those of all others are left as they are. In a layer where all
    live that ever may (a dense one that ``plant_`` did not make sparse), nothing is exchanged.

    Args:
        sparsity: The module and its masks.
        name: The layer's weight: with a mask, or of a ``SparseLinear``.
        zeta: Which fraction goes, see ``weakest``.
        std: New weights begin with ``N(0, std^2)``.
        gradient: Those with the largest gradients come: of the weight's shape, or, of a ``SparseLinear``, its factors. None:
            random ones do.
        optimizers: Where the moments are.
        generator: For what is drawn; a CPU generator, None is torch's global one.
        agree: Given the decision, answers the one that every process takes; None: there is only one process.

    Returns:
        How many were exchanged.

    Raises:
        ValueError: If zeta is no fraction, the parameter is no weight, a weight is not finite, or the gradient is
            of the other storage's kind.

    Examples:
        >>> from lightning_cpna import SparseLinear, Sparsity
        >>> layer = SparseLinear(100, 50, epsilon=2)
        >>> rewire_(Sparsity(layer), "weight", zeta=0.3) in range(88, 91), len(layer.weight)
        (True, 300)
    """
    check_zeta(zeta)
    if name not in sparsity.targets or sparsity.targets[name].axes.input is None:
        raise ValueError(
            f"name is {name!r}; allowed is the name of a weight: {', '.join(_weights(sparsity)) or 'none'}"
        )
    sparsity.add_mask(name)
    target, mask = sparsity.targets[name], sparsity.masks[name]
    parameter, axes = target.parameter, target.axes
    rests = not mask.all_live
    weights = parameter.detach().flatten()
    try:
        gone = weakest(weights.index_select(0, mask.live_cells) if rests else weights, zeta, generator)
    except ValueError as error:
        raise ValueError(f"rewiring {name!r}: {error}") from error
    dying = pick(mask.live_cells, gone) if rests else cells_of(gone)
    del weights, gone  # at a million neurons every list counts
    if not len(dying):
        return 0
    if isinstance(axes, ListedAxes) and isinstance(mask, ListMask):
        staying = others(len(mask.dead), dying)
        grid: _Flat = _Grid(axes, mask, staying)
    else:
        there = mask.live.flatten()
        there[dying] = False
        grid = _Flat(cells_of(there | mask.removed.flatten()), there.numel())
    if grid.n_free == len(dying):
        return 0
    places = None
    if gradient is None:
        born, places = grid.draw(len(dying), generator)
    else:
        born = grid.best(gradient, len(dying))
    del grid
    values = torch.zeros(len(dying), dtype=torch.float64)
    if std:
        values = torch.randn(len(dying), generator=generator).double() * std
    if agree is not None:
        dying, born, values = agree(Decision(dying, born, values))
        places = None
    if isinstance(axes, ListedAxes) and isinstance(mask, ListMask):
        dead = axes.layer.cells[mask.dead] if rests else None
        if places is None:
            axes.layer.rewire_(dying, born, values, optimizers)
        else:
            axes.layer.exchange_(Exchange(dying, staying, born, places, values), optimizers)
        if dead is not None:
            mask.follow_(torch.searchsorted(axes.layer.cells, dead))
    else:
        zero_(parameter, torch.cat([dying, born]), optimizers)
        put_cells_(parameter, born, values)
        mask.move_(dying, born)
    return len(dying)


@torch.no_grad()
def plant_(
    sparsity: Sparsity,
    name: str,
    n: int,
    *,
    generator: torch.Generator | None = None,
    agree: Callable[[Tensor], Tensor] = lambda cells: cells,
) -> None:
    """Leave a dense layer random connections, in place; the others rest, and may be grown.

    The weights that live are divided by the square root of the density, so that what the units sum up varies as before.

    Args:
        sparsity: The module and its masks.
        name: The layer's weight, all of which lives.
        n: How many connections live.
        generator: A CPU generator; None is torch's global one.
        agree: Given the cells that live, answers those that every process takes.

    Examples:
        >>> from lightning_cpna import Sparsity
        >>> net = torch.nn.Linear(10, 4)
        >>> plant_(Sparsity(net), "weight", 8)
        >>> int(net.weight.count_nonzero())
        8
    """
    sparsity.add_mask(name)
    mask, parameter = sparsity.masks[name], sparsity.targets[name].parameter
    nothing = torch.empty(0, dtype=torch.int64, device=parameter.device)
    live = agree(draw_cells(nothing, parameter.numel(), n, generator).cells).to(parameter.device)
    mask.move_(others(parameter.numel(), live), nothing)
    mask.apply_(parameter)
    parameter.div_(math.sqrt(n / parameter.numel()))


def _weights(sparsity: Sparsity) -> list[str]:
    return [name for name, target in sparsity.targets.items() if target.axes.input is not None]


class _Flat:
    """The cells of a dense layer, some of which are taken."""

    def __init__(self, taken: Tensor, n_cells: int) -> None:
        self.taken, self.n_cells = taken, n_cells

    @property
    def n_free(self) -> int:
        return self.n_cells - len(self.taken)

    def draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Draw free cells; return them, and where they will be in the layer's list, None if that is not known."""
        return draw_cells(self.taken, self.n_cells, n, generator).cells, None

    def best(self, gradient: Tensor | Sequence[Factors], n: int) -> Tensor:
        if not isinstance(gradient, Tensor):
            raise ValueError(
                "gradient is a list of factors; allowed for a dense layer is a tensor of the weight's shape"
            )
        scores = wide(gradient.abs().flatten())
        scores[self.taken] = -torch.inf
        best, _ = keep_top_rows(scores[None], n)
        return cells_of(best[0])


class _Grid(_Flat):
    """The cells of a sparse layer that are not closed, numbered one after another."""

    def __init__(self, axes: ListedAxes, mask: ListMask, staying: Tensor) -> None:
        self.layer, self.mask = axes.layer, mask
        taken = axes.layer.cells.index_select(0, staying)
        if len(mask.cells):
            taken = together(taken, distinct(mask.cells))
        self.units, self.inputs = cells_of(~mask.units), cells_of(~mask.inputs)
        self.is_whole = len(self.units) == len(mask.units) and len(self.inputs) == len(mask.inputs)
        super().__init__(self._number(taken), len(self.units) * len(self.inputs))

    def _number(self, cells: Tensor) -> Tensor:
        """Turn cells of the layer into those of the grid; closed ones are left out."""
        if self.is_whole:
            return cells
        units, inputs = cells // self.layer.in_features, cells % self.layer.in_features
        is_open = ~(self.mask.units[units] | self.mask.inputs[inputs])
        place = (~self.mask.units).cumsum(0) - 1, (~self.mask.inputs).cumsum(0) - 1
        return place[0][units[is_open]] * len(self.inputs) + place[1][inputs[is_open]]

    def _cells(self, numbers: Tensor) -> Tensor:
        if self.is_whole:
            return numbers
        units, inputs = numbers // len(self.inputs), numbers % len(self.inputs)
        return self.units[units] * self.layer.in_features + self.inputs[inputs]

    def draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        cells, n_before = draw_cells(self.taken, self.n_cells, n, generator)
        if self.is_whole and not len(self.mask.cells):  # what is taken is what stays in the list
            return cells, n_before.add_(torch.arange(n, device=cells.device))
        return self._cells(cells), None

    def best(self, gradient: Tensor | Sequence[Factors], n: int) -> Tensor:
        """Find the largest gradients a block of units at a time."""
        if isinstance(gradient, Tensor) or not gradient:
            raise ValueError("gradient is no list of factors; allowed for a SparseLinear is a list of at least one")
        gradient = [part.wide() for part in gradient]
        width = len(self.inputs)
        scores, found = torch.empty(0, device=self.taken.device), self.taken[:0]
        for units in torch.split(torch.arange(len(self.units), device=self.taken.device), max(1, BLOCK // width)):
            block = sum(
                part.scale * part.output_gradient[:, self.units[units]].t() @ part.x[:, self.inputs]
                for part in gradient
            )
            assert isinstance(block, Tensor)
            start, stop = int(units[0]) * width, (int(units[-1]) + 1) * width
            first, last = torch.searchsorted(self.taken, torch.tensor([start, stop], device=self.taken.device)).tolist()
            new = block.abs().flatten()
            new[self.taken[first:last] - start] = -torch.inf
            scores, found = torch.cat([scores.to(new), new]), torch.cat([found, torch.arange(start, stop).to(found)])
            best, _ = keep_top_rows(scores[None], min(n, len(scores)))
            scores, found = scores[best[0]], found[best[0]]
        return self._cells(found)
