"""Figure 1: accuracy against removed neurons. Figure 2: learning curves of SET, NPSET and Dense."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from examples.asu.training import RECIPES, accuracy, data, run
from examples.results import Row
from lightning_cpna import Sparsity, UnitInputs, UnitScore, trace

WHICH = ("first", "second", "both")
FRACTIONS = [i / 20 for i in range(20)]
ORDERS = {
    "fewest outgoing first": UnitScore("out_degree"),
    "most outgoing first": UnitScore("out_degree", largest_first=True),
    "random": UnitScore("random"),
}


def removal(set: str, seed: int, folder: Path | None = None) -> list[Row]:
    """Train a SET network, and remove ever more neurons of it, without training on.

    Returns:
        The test accuracies at the removed ``FRACTIONS``, a row for each hidden layer and order.
    """
    _, module = run(set, "SET", seed, folder)
    train, test = data(set, seed, folder, RECIPES[set].inputs)
    rows = []
    for which in WHICH:
        for order, score in ORDERS.items():
            work = copy.deepcopy(module)
            sparsity = Sparsity(work)
            sparsity.graph = trace(work, train.x[:2])
            first, second, _ = work.weights
            weights = {"first": [first], "second": [second], "both": [first, second]}[which]
            budgets = sparsity.add_budgets(work, dict.fromkeys(weights, 1), "unit")
            generator = torch.Generator().manual_seed(seed)
            accuracies = []
            for fraction in FRACTIONS:
                for weight, budget in zip(weights, budgets, strict=True):
                    n_units = len(sparsity.graph[weight].units)
                    stay = n_units - int(fraction * n_units)
                    if stay < sparsity.n_units(weight):
                        scores = score(UnitInputs.of(sparsity, weight, generator))
                        sparsity.prune_units_(budget, stay, {weight: scores})
                accuracies.append(round(accuracy(work, test), 3))
            rows.append({"set": set, "seed": seed, "layer": which, "order": order, "test": accuracies})
    return rows


def figure1(rows: list[Row], folder: Path) -> Path:
    """Draw the test accuracy against the fraction of neurons that are removed, one panel a data set and layer."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure = Figure(figsize=(10, 2.6 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), len(WHICH), squeeze=False, sharex=True, sharey="row")
    for line, name in zip(axes, sets, strict=True):
        for panel, which in zip(line, WHICH, strict=True):
            for order in ORDERS:
                runs = [row["test"] for row in rows if _is(row, set=name, layer=which, order=order)]
                values, removed = torch.tensor(runs), [100 * fraction for fraction in FRACTIONS]  # (seed, fraction)
                panel.plot(removed, values.mean(0), label=order)
                panel.fill_between(removed, values.amin(0), values.amax(0), alpha=0.15)
            panel.set_title(f"{name}, {which} hidden layer{'s' * (which == 'both')}", fontsize=9)
            panel.grid(alpha=0.3)
        line[0].set_ylabel("test accuracy, %")
    for panel in axes[-1]:
        panel.set_xlabel("neurons removed, %")
    axes[0, 0].legend(fontsize=8)
    file = folder / "figure1.png"
    figure.savefig(file, dpi=110)
    return file


def figure2(rows: list[Row], folder: Path) -> Path:
    """Draw training and test accuracy and their gap against the epoch, one line of panels a data set."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(11, 2.6 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), 3, squeeze=False)
    for line, name in zip(axes, sets, strict=True):
        for colour, method in enumerate(methods):
            runs = [row for row in rows if _is(row, set=name, method=method)]
            train, test = (torch.tensor([row[part] for row in runs]) for part in ("train", "test"))  # (seed, epoch)
            for panel, values in zip(line, (train, test, train - test), strict=True):
                mean = values.mean(0)
                panel.plot(range(1, len(mean) + 1), mean, color=f"C{colour}", lw=1.2, label=method)
                panel.fill_between(
                    range(1, len(mean) + 1), values.amin(0), values.amax(0), color=f"C{colour}", alpha=0.12, lw=0
                )
        for panel, title in zip(line, ("training accuracy, %", "test accuracy, %", "gap, points"), strict=True):
            panel.set_title(f"{name}: {title}", fontsize=9)
            panel.grid(alpha=0.3)
    for panel in axes[-1]:
        panel.set_xlabel("epoch")
    axes[0, 1].legend(fontsize=8)
    file = folder / "figure2.png"
    figure.savefig(file, dpi=110)
    return file


def _is(row: Row, **wanted: Any) -> bool:
    return all(row[key] == value for key, value in wanted.items())
