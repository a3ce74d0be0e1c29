"""What is alive? Exact counts of connections, units and features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lightning_cpna.graph import Graph
from lightning_cpna.masks import Masks
from lightning_cpna.targets import ListedAxes, Target


@dataclass(frozen=True)
class LayerReport:
    """What is alive in one parameter.

    Attributes:
        name: Canonical name of the parameter.
        connections: Live connections.
        size: All connections, live or not.
        target: How many connections should remain (of each member of a stacked network), or None if nobody asked.
        live_units: Units with a live incoming connection and, where it is known what they feed, a live outgoing one.
        units: All units.
        live_features: Inputs with a live connection.
        features: All inputs.
        effective: Live connections on a path from an input of the network to an output, as far as the trace knows it; None
            where the layer was not traced. The others carry a constant, or feed nothing.
    """

    name: str
    connections: int
    size: int
    target: int | None
    live_units: int
    units: int
    live_features: int
    features: int
    effective: int | None = None

    @property
    def density(self) -> float:
        """The live fraction of the connections."""
        return self.connections / self.size


@dataclass(frozen=True)
class BudgetReport:
    """What remains of what a callback counts.

    Attributes:
        label: A parameter's name, or the pattern of a budget that layers share.
        granularity: What is counted: "connection", "feature" or "unit".
        remaining: How many there are (of the member of a stacked network with the most).
        target: How many should remain.
    """

    label: str
    granularity: str
    remaining: int
    target: int


@dataclass(frozen=True)
class SparsityReport:
    """What is alive in the masked parameters of a module.

    Attributes:
        layers: One report a masked parameter, in the order in which the masks were made.
        budgets: One for everything that the last fit's callbacks count down.
    """

    layers: tuple[LayerReport, ...]
    budgets: tuple[BudgetReport, ...] = ()

    @property
    def connections(self) -> int:
        """Live connections of all masked parameters."""
        return sum(layer.connections for layer in self.layers)

    @property
    def size(self) -> int:
        """All connections of all masked parameters, live or not."""
        return sum(layer.size for layer in self.layers)

    @property
    def density(self) -> float:
        """The live fraction of all masked connections."""
        return self.connections / self.size if self.size else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as Python primitives.

        Examples:
            >>> SparsityReport((LayerReport("w", 2, 8, 2, 1, 2, 2, 4),)).as_dict()["totals"]
            {'connections': 2, 'size': 8, 'density': 0.25}
        """
        return {
            "layers": {layer.name: {**dataclasses.asdict(layer), "density": layer.density} for layer in self.layers},
            "budgets": [dataclasses.asdict(budget) for budget in self.budgets],
            "totals": {"connections": self.connections, "size": self.size, "density": self.density},
        }

    def table(self) -> Table:
        """Return the report as a rich table."""
        table = Table(title="What is alive")
        if not self.layers:
            table.caption = "no masks are known for this module; infer_masks reads them off its zeros"
        names = {layer.name for layer in self.layers}
        others = [it for it in self.budgets if it.granularity != "connection" or it.label not in names]
        if others:
            lines = [f"{it.label}: {it.remaining:,} {it.granularity}s, target {it.target:,}" for it in others]
            table.caption = Text("\n".join(lines))
        table.add_column("parameter")
        for title in ("connections", "effective", "target", "density", "live units", "live features"):
            table.add_column(title, justify="right")
        for layer in self.layers:
            table.add_row(
                Text(layer.name),
                f"{layer.connections:,} / {layer.size:,}",
                "" if layer.effective is None else f"{layer.effective:,}",
                "" if layer.target is None else f"{layer.target:,}",
                f"{layer.density:.4g}",
                f"{layer.live_units:,} / {layer.units:,}",
                f"{layer.live_features:,} / {layer.features:,}",
            )
        table.add_section()
        table.add_row("total", f"{self.connections:,} / {self.size:,}", "", "", f"{self.density:.4g}", "", "")
        return table

    def __str__(self) -> str:
        return as_text(self.table())


def as_text(table: Table) -> str:
    """Render a rich table without colours."""
    console = Console(width=110, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def live_units(masks: Masks, graph: Graph | None, targets: Mapping[str, Target], name: str) -> Tensor:
    """Tell which units of a layer live, bool ``(member, unit)``.

    A unit lives if it has a live incoming connection and feeds something: the output of the network, or a further layer
    through a live connection. Where the graph does not know what the units feed, the incoming connections decide.
    """
    incoming = targets[name].axes.sum_of_units(live_mask(masks, targets[name])) > 0  # (member, unit)
    if graph is None or name not in graph or graph[name].lost or not graph.fed_by(name):
        return incoming
    return incoming & feeds_something(masks, graph, targets, name)


def feeds_something(masks: Masks, graph: Graph, targets: Mapping[str, Target], name: str) -> Tensor:
    """Tell which units of a traced layer have a live outgoing connection or are an output, bool ``(member, unit)``."""
    live = {layer.weight: live_mask(masks, targets[layer.weight]) for layer in graph.fed_by(name)}
    return graph.outgoing_norm(name, {name: targets[name].parameter, **live}) > 0


def may_feed(masks: Masks, graph: Graph, targets: Mapping[str, Target], name: str) -> Tensor:
    """Tell which units of a traced layer feed something, or may again: what only does not live may be regrown.

    Returns:
        Bool ``(member, unit)``.
    """
    feeds = torch.full((1, 1), graph[name].is_output, device=targets[name].parameter.device)
    for reader in graph.fed_by(name):
        axes, parameter = reader.axes, targets[reader.weight].parameter
        if reader.weight in masks:
            open_inputs = ~masks[reader.weight].closed_inputs(axes)  # (member, input)
        else:
            open_inputs = feeds.new_ones(axes.n_members(parameter), axes.n_inputs(parameter))
        feeds = feeds | (graph.at_units(open_inputs.long(), reader.weight, name) > 0)
    return feeds


def effective_masks(masks: Masks, graph: Graph, targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Mark the live connections of the masked layers that lie on a path from an input of the network to an output.

    What feeds a layer counts as reached, and what its units feed as read, where the trace does not know it.

    Returns:
        By weight, bool of the weight's shape.

    Examples:
        >>> from lightning_cpna import Sparsity, trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
        >>> sparsity = Sparsity(net)
        >>> sparsity.graph = trace(net, torch.rand(3, 2))
        >>> sparsity.add_mask("2.weight")
        >>> sparsity.remove_("0.weight", torch.tensor([[False, False], [True, True]]))
        >>> effective_masks(sparsity.masks, sparsity.graph, sparsity.targets)["2.weight"]
        tensor([[ True, False]])
    """
    found = {  # in the others, which are dense, every unit reads every input
        name: live_mask(masks, targets[name])
        for name, layer in graph.items()
        if name in masks or isinstance(layer.axes, ListedAxes)
    }
    reached, read = dict[str, Tensor](), dict[str, Tensor]()  # (member, unit), (member, input)
    for name, layer in graph.items():
        axes, weight = layer.axes, targets[name].parameter
        inputs = torch.ones(axes.n_members(weight), len(layer.sources), dtype=torch.bool, device=weight.device)
        for producer in graph.feeding(name):
            inputs = inputs & graph.at_inputs(reached[producer.weight], name, producer.weight, default=True)
        if name in found:
            axes.view(found[name]).logical_and_(axes.along_inputs(inputs, found[name]))
            reached[name] = axes.sum_of_units(found[name]) > 0
        else:
            read[name], reached[name] = inputs, inputs.any(1, keepdim=True).expand(-1, len(layer.units))
    for name, layer in reversed(list(graph.items())):
        units = torch.full_like(reached[name], layer.is_output or layer.lost is not None)
        for reader in graph.fed_by(name):
            units = units | (graph.at_units(read[reader.weight].long(), reader.weight, name) > 0)
        if name in found:
            layer.axes.view(found[name]).logical_and_(layer.axes.along_units(units, found[name]))
            read[name] = layer.axes.sum_of_inputs(found[name]) > 0
        else:
            read[name] = read[name] & units.any(1, keepdim=True)
    return {name: live for name, live in found.items() if name in masks}


def live_mask(masks: Masks, target: Target) -> Tensor:
    """Return which connections of a parameter live; all of them if it has no mask."""
    if target.name in masks:
        return masks[target.name].live
    return torch.ones_like(target.parameter, dtype=torch.bool, requires_grad=False)


def sparsity_report(
    masks: Masks,
    targets: Mapping[str, Target],
    graph: Graph | None = None,
    budgets: Sequence[BudgetReport] = (),
) -> SparsityReport:
    """Count what is alive.

    Args:
        masks: The masks of a module.
        targets: Its parameters, from ``targets.all_targets``.
        graph: Its traced layers; without them units count as live by their incoming connections alone.
        budgets: What should remain.

    Examples:
        >>> from lightning_cpna.targets import all_targets
        >>> net = torch.nn.Linear(4, 2, bias=False)
        >>> masks = Masks()
        >>> masks.add("weight", net.weight)
        >>> _ = masks["weight"].remove_(torch.tensor([[True, True, True, False], [True] * 4]))
        >>> layer = sparsity_report(masks, all_targets(net)).layers[0]
        >>> layer.connections, layer.live_units, layer.live_features
        (1, 1, 1)
    """
    layers = []
    wanted = {budget.label: budget.target for budget in budgets if budget.granularity == "connection"}
    effective = {} if graph is None else effective_masks(masks, graph, targets)
    for name, mask in masks.items():
        axes = targets[name].axes
        features = axes.live_features(mask.live)
        units = live_units(masks, graph, targets, name)
        layers.append(
            LayerReport(
                name=name,
                connections=mask.n_live,
                size=axes.size(mask.dead),
                target=wanted.get(name),
                live_units=int(units.sum()),
                units=units.numel(),
                live_features=int(features.sum()),
                features=features.numel(),
                effective=int(effective[name].sum()) if name in effective else None,
            )
        )
    return SparsityReport(tuple(layers), tuple(budgets))
