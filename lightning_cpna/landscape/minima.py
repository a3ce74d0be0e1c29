"""The minima that many restarts end in: how low they are, and which of them are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_cpna.landscape.surface import LossSurface
from lightning_cpna.layers import evaluating
from lightning_cpna.observe import Loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Minima:
    """What restarts ended in, the lowest loss first, those that are not a number last.

    Attributes:
        seeds: Which restart each is.
        modules: The trained modules.
        losses: Their mean losses, float64 ``(m,)``.
        gradient_norms: The norms of the loss's gradient, float64 ``(m,)``: far from zero, a restart has not arrived.
        kinds: A number for each, int64 ``(m,)``, which those have in common that compute the same; the lowest has 0.
        others: What else was measured, by name, float64 ``(m,)`` each.
    """

    seeds: tuple[int, ...]
    modules: tuple[nn.Module, ...]
    losses: Tensor
    gradient_norms: Tensor
    kinds: Tensor
    others: Mapping[str, Tensor]

    @property
    def n_distinct(self) -> int:
        """How many there are that do not compute the same."""
        return int(self.kinds.max()) + 1


def find_minima(
    fit: Callable[[int], nn.Module],
    seeds: Iterable[int],
    batches: Iterable[Any],
    loss: Loss,
    *,
    outputs: Callable[[nn.Module, Any], Tensor] | None = None,
    tolerance: float = 1e-2,
    others: Mapping[str, Callable[[nn.Module], float]] | None = None,
) -> Minima:
    """Train a network again and again, sort what comes out by its loss, and find duplicates.

    Two minima are the same if the networks compute the same on the data: the root mean square of what their outputs differ
    by is at most ``tolerance`` times that of the outputs. So units in another order, and units that are scaled, do not make
    another minimum.

    Args:
        fit: Takes a seed, and returns a trained module: by a ``Trainer``, say, as you would train a single one.
        seeds: The restarts.
        batches: The data, as in ``LossSurface``.
        loss: ``(module, batch) -> loss``, the mean over the batch.
        outputs: ``(module, batch) -> outputs``; None: the module of the batch's first entry.
        tolerance: Up to which difference two are the same.
        others: Further measures of a trained module, by name, as its test error; it is in eval mode then.

    Returns:
        The minima.

    Raises:
        ValueError: If there are no seeds, the tolerance is negative, or batches are tensors and ``outputs`` is None.

    Reference:
        Guo, She, Wu, Barbu: Finding deep local optima using network pruning, Figs. 1 and 2, where losses are sorted.

    Examples:
        >>> def fit(seed):
        ...     net = nn.Linear(1, 1, bias=False)
        ...     _ = nn.init.constant_(net.weight, (-1.0) ** seed)  # the two minima of (w^2 - 1)^2
        ...     return net
        >>> def loss(net, batch):
        ...     return (net.weight.square().sum() - 1).square()
        >>> find_minima(fit, range(4), [(torch.ones(1, 1),)], loss).kinds
        tensor([0, 1, 0, 1])
    """
    seeds = list(seeds)
    if not seeds:
        raise ValueError("seeds is empty; allowed is at least one")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; allowed is a float >= 0")
    batches = list(batches)
    if outputs is None and any(isinstance(batch, Tensor) for batch in batches):
        raise ValueError(
            "outputs is None, and a batch is a tensor; allowed are batches (inputs, ...), or outputs that say what to compare"
        )
    found = []
    for seed in seeds:
        module = fit(seed)
        surface = LossSurface(module, batches, loss)
        value, gradient = surface.gradient(surface.point())
        with torch.no_grad(), evaluating(module):
            computed = torch.cat([_outputs(module, batch, outputs).double().flatten() for batch in surface.batches])
            measured = {name: float(measure(module)) for name, measure in (others or {}).items()}
        found.append((value, seed, module, float(gradient.norm()), computed, measured))
    found.sort(key=lambda one: (math.isnan(one[0]), one[0]))
    return Minima(
        seeds=tuple(one[1] for one in found),
        modules=tuple(one[2] for one in found),
        losses=torch.tensor([one[0] for one in found], dtype=torch.float64),
        gradient_norms=torch.tensor([one[3] for one in found], dtype=torch.float64),
        kinds=_kinds([one[4] for one in found], tolerance),
        others={name: torch.tensor([one[5][name] for one in found], dtype=torch.float64) for name in others or {}},
    )


def plot_minima(minima: Minima, other: str | None = None) -> Figure:
    """Draw the losses of the minima, sorted, each kind in a colour.

    Args:
        minima: From ``find_minima``.
        other: Which of the ``others`` is drawn instead of the loss, in the same order.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ranks = torch.arange(len(minima.seeds)) + 1
    values = minima.losses if other is None else minima.others[other]
    axes.plot(ranks, values, color="0.8", zorder=0)
    axes.scatter(ranks, values, c=minima.kinds % 20, cmap="tab20", vmin=0, vmax=19)
    axes.set(xlabel="minimum, the lowest loss first", ylabel=other or "loss")
    axes.set_title(f"{minima.n_distinct} distinct of {len(minima.seeds)}; one colour: they compute the same")
    axes.grid(alpha=0.3)
    return figure


def _outputs(module: nn.Module, batch: Any, outputs: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    found: Tensor = module(batch[0]) if outputs is None else outputs(module, batch)
    return found


def _kinds(outputs: list[Tensor], tolerance: float) -> Tensor:
    """Number what is the same: each is compared to the first of every kind so far."""
    firsts: list[Tensor] = []
    kinds: list[int] = []
    for computed in outputs:
        for kind, first in enumerate(firsts):
            if float((computed - first).norm()) <= tolerance * max(float(computed.norm()), float(first.norm())):
                kinds.append(kind)
                break
        else:
            kinds.append(len(firsts))
            firsts.append(computed)
    return torch.tensor(kinds)
