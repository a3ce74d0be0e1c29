"""Which units are dead, and what are the others worth? A report over a data set, and its plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lightning_cpna.activations import UnitActivity
from lightning_cpna.graph import Graph
from lightning_cpna.layers import evaluating, layers_of
from lightning_cpna.observe import Loss, mean_loss, mean_replacement_penalties, observe
from lightning_cpna.report import as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USELESS = 1e-3  # of the loss: chosen, as good as nothing beside what a step of training changes


@dataclass(frozen=True)
class LayerUnits:
    """What the units of one layer do.

    Attributes:
        name: The layer's weight.
        activity: Their activations and first-order saliencies.
        penalties: What the loss rises by if each is replaced by its mean, ``(unit,)``; None if nobody asked.
        never_active: Units whose activation is zero for every example, bool ``(unit,)``.
        constant: Units whose activation is the same for every example (those that are never active among them): replacing
            them by their mean is free.
        useless: Units whose mean replacement penalty (or, without it, saliency) is in magnitude below a thousandth of the
            loss.
    """

    name: str
    activity: UnitActivity
    penalties: Tensor | None
    never_active: Tensor
    constant: Tensor
    useless: Tensor


@dataclass(frozen=True)
class UnitReport:
    """What the units of a network do.

    Attributes:
        layers: One entry a layer.
        loss: The loss over the data.
    """

    layers: tuple[LayerUnits, ...]
    loss: float

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return the counts of dead units, by layer."""
        return {
            layer.name: {
                "units": len(layer.never_active),
                "never_active": int(layer.never_active.sum()),
                "constant": int(layer.constant.sum()),
                "useless": int(layer.useless.sum()),
            }
            for layer in self.layers
        }

    def table(self) -> Table:
        """Return the counts as a rich table."""
        table = Table(title="Units that are dead")
        table.add_column("layer")
        for title in ("units", "never active", "constant", "useless"):
            table.add_column(title, justify="right")
        for name, counts in self.as_dict().items():
            table.add_row(Text(name), *(f"{count:,}" for count in counts.values()))
        return table

    def __str__(self) -> str:
        return as_text(self.table())


def unit_report(
    module: nn.Module,
    graph: Graph,
    batches: Sequence[Any],
    loss: Loss,
    names: Iterable[str] | None = None,
    *,
    penalties: bool = False,
) -> UnitReport:
    """Run a module over some batches and report what its units do.

    Args:
        module: The module; it is run in eval mode and left as it is.
        graph: Its traced layers (from ``trace``).
        batches: The batches; a ``DataLoader`` that does not shuffle will do.
        loss: Computes the mean loss of a batch.
        names: The layers, by weight name; None: every hidden Linear and Conv layer whose units can be followed.
        penalties: Whether the exact mean replacement penalties are computed: a pass over the data for each unit.

    Returns:
        The report.

    Raises:
        ValueError: If no layer is left to look at, or a layer's units cannot be followed.

    Reference:
        Evci: Detecting dead weights and units in neural networks (2018), Section 3.

    Examples:
        >>> from lightning_cpna import trace
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> net[0].weight.data[1] = 0
        >>> net[0].bias.data[1] = -1
        >>> x = torch.randn(64, 3)
        >>> report = unit_report(net, trace(net, x), [x], lambda net, x: net(x).square().mean())
        >>> bool(report.layers[0].never_active[1])
        True
    """
    names = [names] if isinstance(names, str) else names
    chosen = list(names) if names is not None else graph.hidden(layers_of(module))
    if not chosen:
        raise ValueError("names is None, and the module has no hidden Linear or Conv layer whose units can be followed")
    activity = observe(module, graph, chosen, batches, loss)
    with evaluating(module), torch.no_grad():
        total = mean_loss(module, batches, loss)
    found = []
    for name in chosen:
        seen = activity[name]
        exact = mean_replacement_penalties(module, graph, name, batches, loss, seen.means) if penalties else None
        worth = exact if exact is not None else seen.mean_replacement_saliency
        assert worth is not None
        found.append(
            LayerUnits(
                name=name,
                activity=seen,
                penalties=exact,
                never_active=seen.never_active,
                constant=seen.constant,
                useless=worth.abs() < USELESS * abs(total),
            )
        )
    return UnitReport(tuple(found), total)


def plot_units(report: UnitReport) -> Figure:
    """Draw, layer by layer, what the units are worth, sorted, and which of them are dead.

    Args:
        report: From ``unit_report``.

    Returns:
        A matplotlib figure with a panel a layer.
    """
    from matplotlib.figure import Figure

    n_layers = max(1, len(report.layers))
    figure = Figure(figsize=(5 * n_layers, 3.8), layout="constrained")
    for panel, layer in enumerate(report.layers, start=1):
        axes = figure.add_subplot(1, n_layers, panel)
        worth = layer.penalties if layer.penalties is not None else layer.activity.mean_replacement_saliency
        assert worth is not None
        order = worth.argsort(descending=True)
        ranks, heights = torch.arange(len(order)) + 1, worth[order]
        label = "penalty" if layer.penalties is not None else "saliency"
        axes.plot(ranks, heights, color="C0")
        for flags, colour, size, text in (
            (layer.useless, "C1", 9, "useless"),
            (layer.constant, "C2", 6, "constant"),
            (layer.never_active, "C3", 3, "never active"),
        ):
            marked = flags[order]
            axes.plot(
                ranks[marked], heights[marked], "o", color=colour, markersize=size, label=f"{text}: {int(flags.sum())}"
            )
        useless = USELESS * abs(report.loss)
        axes.axhspan(-useless, useless, color="0.9", zorder=0)
        axes.set_yscale("symlog", linthresh=useless or 1e-12)
        axes.set(xlabel="unit, the most valuable first", title=f"{layer.name}: {len(order)} units")
        axes.set_ylabel(f"mean replacement {label}; grey: under {USELESS:g} of the loss")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
