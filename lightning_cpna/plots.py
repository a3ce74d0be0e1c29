"""Pictures: of a schedule before training, of the connections that are left after it, of lottery tickets."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from lightning_cpna.report import live_mask
from lightning_cpna.sparsity import Sparsity
from lightning_cpna.targets import ListedAxes, Target

if TYPE_CHECKING:
    from lightning_cpna.graph import Graph
    from lightning_cpna.schedules import Schedule
    from lightning_cpna.tickets import RoundReport

POSITIVE, NEGATIVE, LIVE, DEAD = "#2166ac", "#b2182b", "#333333", "#dddddd"
MAX_LINES = 2000  # chosen: more lines than that are a grey block


def plot_schedule(schedule: Schedule, n_start: int, n_end: int, total_steps: int) -> Figure:
    """Draw how many remain at each optimizer step.

    Examples:
        >>> from lightning_cpna.schedules import Annealing
        >>> plot_schedule(Annealing(0.2, 0.6), 1000, 10, total_steps=500).axes[0].get_ylabel()
        'remaining'
    """
    resolved = schedule.resolved(total_steps)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = range(total_steps + 1)
    axes.step(steps, [resolved.n_remaining(step, n_start, n_end) for step in steps], where="post", color=POSITIVE)
    axes.axhline(n_end, color=DEAD, zorder=0)
    axes.set(xlabel="optimizer step", ylabel="remaining", yscale="log", title=repr(schedule))
    return figure


@dataclass(frozen=True)
class Connectivity:
    """The live connections of a chain of layers, from the features to the outputs.

    Attributes:
        layers: For each layer its weight's name, and three tensors ``(n_connections,)``: which unit of the layer before
            (int64), which unit of this layer (int64), and the weight (for convolutions the norm of the kernel).
        sizes: The number of features, then the number of units of each layer.
        inputs: What the first layer reads: features, or what the trace could not follow.
    """

    layers: tuple[tuple[str, Tensor, Tensor, Tensor], ...]
    sizes: tuple[int, ...]
    inputs: str = "features"


def connectivity(sparsity: Sparsity) -> Connectivity:
    """Read the connectivity of a chain of traced layers that ends at an output.

    It is the chain with the most layers that have a mask, and the longest of these; connections that skip layers, and other
    branches, are left out. Of a stack, it is that of the first member.

    Raises:
        ValueError: If it is no Sparsity, or the module was not traced.
    """
    if not isinstance(sparsity, Sparsity):
        raise ValueError(f"sparsity is a {type(sparsity).__name__}; allowed is what sparsity_of(module) returns")
    graph = sparsity.graph
    if not graph:
        raise ValueError("sparsity: the module was not traced, so it is not known which layer feeds which")
    chain = _longest_chain(graph, sparsity.masks)
    layers, sizes = [], []
    for position, name in enumerate(chain):
        target = sparsity.targets[name]
        units, inputs, weight = _live_connections(sparsity, target)
        if position == 0:
            sources = inputs
            sizes.append(target.axes.groups * target.axes.n_inputs(target.parameter))
        else:
            owner = graph[name].sources - graph[chain[position - 1]].units.start  # (input,)
            inside = (owner[inputs] >= 0) & (owner[inputs] < len(graph[chain[position - 1]].units))
            units, inputs, weight = units[inside], inputs[inside], weight[inside]
            sources = owner[inputs]
        layers.append((name, sources, units, weight))
        sizes.append(target.axes.n_units(target.parameter))
    read = "features" if graph[chain[0]].unknown_source is None else f"inputs of {chain[0]}"
    return Connectivity(tuple(layers), tuple(sizes), read)


def _longest_chain(graph: Graph, masks: Collection[str]) -> list[str]:
    """Return the chain of layers with the most masks, then the longest, then the one that ran last."""

    def length(chain: list[str]) -> tuple[int, int]:
        return sum(name in masks for name in chain), len(chain)

    chains: dict[str, list[str]] = {}
    for name in graph:
        feeding = [chains[layer.weight] for layer in reversed(graph.feeding(name))]
        chains[name] = [*max(feeding, key=length, default=[]), name]
    ends = [name for name in graph if graph[name].is_output] or list(graph)
    return max((chains[name] for name in reversed(ends)), key=length)


def _live_connections(sparsity: Sparsity, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit, input and weight of the live connections, of convolutions the norm of the kernel, ``(n,)`` each."""
    live, weight = live_mask(sparsity.masks, target), target.parameter.detach().float()
    if isinstance(target.axes, ListedAxes):
        cells = live.nonzero().flatten()
        places = (target.axes.units_of(cells, weight), target.axes.inputs_of(cells, weight), weight[cells])
        units, inputs, weight = (part.cpu() for part in places)
        return units.long(), inputs.long(), weight
    live = target.axes.view(live)[0, ..., None].flatten(2).any(2).cpu()  # (unit, input)
    weight = target.axes.view(weight)[0, ..., None].flatten(2).cpu()  # (unit, input, kernel)
    weight = weight[..., 0] if weight.shape[2] == 1 else weight.norm(dim=2)
    units, inputs = live.nonzero(as_tuple=True)
    group = units // (len(live) // target.axes.groups)  # the units of a group read its channels
    return units, inputs + group * live.shape[1], weight[units, inputs]


def plot_connectivity(result: Connectivity, feature_names: Iterable[str] | None = None) -> Figure:
    """Draw which feature reaches the output through which unit: features at the bottom, outputs on top.

    Blue connections are positive, red negative, their width the magnitude. Only what is connected is drawn; of more than
    2000 connections of a layer the largest.

    Args:
        result: The connectivity.
        feature_names: Names of the inputs, in their order.

    Raises:
        ValueError: If there are not as many names as inputs.
    """
    names = list(map(str, range(result.sizes[0])) if feature_names is None else feature_names)
    if len(names) != result.sizes[0]:
        raise ValueError(f"feature_names has {len(names)} names; allowed are {result.sizes[0]}, one for each input")
    used = [_used(result, level) for level in range(len(result.sizes))]
    figure = Figure(figsize=(10, 2 + 2 * len(result.layers)), layout="constrained")
    axes = figure.subplots()
    places = [{unit: (i + 0.5) / max(len(row), 1) for i, unit in enumerate(row)} for row in used]
    for level, (_, sources, units, weight) in enumerate(result.layers):
        largest = weight.abs().argsort(descending=True)[:MAX_LINES].tolist()
        scale = float(weight.abs().max()) if len(weight) else 1.0
        lines, colors, widths = [], [], []
        for i in largest:
            source, unit, value = int(sources[i]), int(units[i]), float(weight[i])
            if source in places[level] and unit in places[level + 1]:
                lines.append([(places[level][source], level), (places[level + 1][unit], level + 1)])
                colors.append(POSITIVE if value >= 0 else NEGATIVE)
                widths.append(0.3 + 2.7 * abs(value) / max(scale, 1e-12))
        axes.add_collection(LineCollection(lines, colors=colors, linewidths=widths, alpha=0.7))
    for level, place in enumerate(places):
        axes.scatter(list(place.values()), [level] * len(place), s=max(8, 90 - len(place)), color=LIVE, zorder=3)
    if len(used[0]) <= 60:
        for feature, x in places[0].items():
            axes.annotate(
                names[feature],
                (x, 0),
                xytext=(0, -8),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8,
                rotation=90 if len(used[0]) > 30 else 0,
            )
    titles = [result.inputs, *(f"units of {name}" for name, *_ in result.layers)]
    labels = [f"{t}\n{len(row)} of {n} connected" for t, row, n in zip(titles, used, result.sizes, strict=True)]
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlim=(0, 1), ylim=(-0.35, len(labels) - 0.8), xticks=[])
    counts = " + ".join(f"{len(weight):,}" for *_, weight in result.layers)
    axes.set_title(f"{counts} connections; blue is positive, red negative, the width is the magnitude")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _used(result: Connectivity, level: int) -> list[int]:
    """Return the units of a level that are connected, in their order."""
    units = [result.layers[level][1]] if level < len(result.layers) else []
    if level > 0:
        units.append(result.layers[level - 1][2])
    used: list[int] = torch.unique(torch.cat(units)).tolist()
    return used


def plot_tickets(reports: Sequence[RoundReport], metric: str | None) -> Figure:
    """Draw the metric against the fraction of connections that remains, one line a branch; the dense network is dotted.

    Args:
        reports: Of the rounds.
        metric: What it is called.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for branch in dict.fromkeys(report.branch for report in reports):
        line = [report for report in reports if report.branch == branch and report.level > 0]
        axes.plot(
            [100 * report.density for report in line],
            [math.nan if report.value is None else report.value for report in line],
            "o-",
            label=branch,
        )
    if reports and reports[0].value is not None:
        axes.axhline(reports[0].value, color="black", linestyle=":", label="dense")
    densities = [100 * report.density for report in reports if report.level > 0] or [100.0]
    axes.set(xscale="log", xlabel="connections that remain, %", ylabel=metric or "")
    axes.set_xlim(1.2 * max(densities), min(densities) / 1.2)
    readable_log_axis(axes)
    if axes.lines:
        axes.legend()
    return figure


def readable_log_axis(axes: Axes) -> None:
    """Label a logarithmic horizontal axis with plain numbers."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def log_figure(loggers: Iterable[Any], tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Give a figure to every logger that takes figures (TensorBoard and its kin)."""
    for add_figure in that_take("add_figure", loggers):
        with torch.no_grad():
            add_figure(tag, draw(), global_step=step)


def that_take(what: str, loggers: Iterable[Any]) -> list[Callable[..., None]]:
    """Return this method of the loggers' experiments that have it; that of a ``fast_dev_run`` has everything."""
    experiments = [getattr(logger, "experiment", None) for logger in loggers]
    return [getattr(it, what) for it in experiments if hasattr(it, what) and type(it).__name__ != "_DummyExperiment"]
