"""Paths between sparse solutions (Evci et al. 2019): `python -m examples.landscape.evci`.

A dense network is trained, pruned by magnitude and trained on: the good solution. The mask that is found is trained from
fresh weights: the bad one. Is there a way down from the bad to the good one along the live weights, or through all only?
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.data import Split
from examples.landscape.networks import cross_entropy, error, mlp, some_digits, take_masks_, train, xor
from examples.results import Row
from lightning_cpna import Score, sparsity_of
from lightning_cpna.landscape import Curve, LossSurface, fit_curve, follow, line
from lightning_cpna.sweeps import grid

MODULE = "examples.landscape.evci"
STEPS, FINE_TUNING, LR = 1000, 3000, 0.01  # dense, and sparse; the bad solution is trained for as many together
CURVE_STEPS = 400


class Task(NamedTuple):
    """A problem, its network, and how much of it stays.

    Attributes:
        title: What the figure calls it.
        widths: Of the network.
        density: The share of weights that stays.
    """

    title: str
    widths: list[int]
    density: float


TASKS = {
    "xor": Task("XOR, 10 % of the weights", [10, 64, 1], 0.1),
    "digits": Task("digits, 12 % of the weights", [64, 32, 10], 0.12),
}
PATHS = ["line", "quadratic, live weights", "quadratic, all weights", "cubic, live weights", "cubic, all weights"]
DEGREES = {"line": 1, "quadratic": 2, "cubic": 3}


def _data(task: str, seed: int) -> Split:
    if task == "xor":
        return xor(2, 10, 1000, seed, torch.float32)[0]
    return some_digits(1257, seed, dtype=torch.float32)[0]


def _pruned(net: nn.Module, density: float) -> nn.Module:
    """Remove the smallest weights of each layer."""
    sparsity = sparsity_of(net)
    for budget in sparsity.add_budgets(net, {"*.weight": density}):
        sparsity.prune_(budget, budget.n_end, Score("magnitude"))
    return net


def _same_mask(net: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Return a network of other weights and the mask of a pruned one."""
    other = copy.deepcopy(net)
    other.load_state_dict(weights)
    take_masks_(other, net)
    return other


def paths(*, task: str, seed: int) -> list[Row]:
    """Train the solutions of one seed, and look along the paths between them."""
    torch.set_num_threads(1)
    batch, (_, widths, density) = _data(task, seed), TASKS[task]
    good = mlp(widths, seed, dtype=torch.float32)
    initial = {name: value.clone() for name, value in good.state_dict().items()}
    train(good, batch, STEPS, LR)
    _pruned(good, density)
    train(good, batch, FINE_TUNING, LR)
    bad = _same_mask(good, dict(mlp(widths, 1000 + seed, dtype=torch.float32).state_dict()))
    first = _same_mask(good, initial)
    fresh = copy.deepcopy(bad.state_dict())
    train(bad, batch, STEPS + FINE_TUNING, LR)
    live = LossSurface(good, [batch], cross_entropy)
    every = LossSurface(good, [batch], cross_entropy, masks={})
    found: list[Row] = []

    def look(path: str, surface: LossSurface, curve: Curve) -> None:
        errors = LossSurface(good, [batch], error, masks={} if surface is every else None)
        seen = follow(surface, curve, others={"error": errors})
        summary = {
            "barrier": round(seen.barrier_above_worse_end, 6),
            "monotone": int(seen.is_monotone),
            "gradient_start": round(seen.gradient_norms[0], 6),
            "gradient_end": round(seen.gradient_norms[1], 6),
        }
        found.extend(
            {"path": path, "t": round(t, 4), "loss": round(loss, 6), "error": round(wrong, 4), **summary}
            for t, loss, wrong in zip(seen.t.tolist(), seen.losses.tolist(), seen.others["error"].tolist(), strict=True)
        )

    look("initialisation to good", live, line(live.point(first.state_dict()), live.point()))
    look("fresh to good", live, line(live.point(fresh), live.point()))
    for path in PATHS:
        surface = every if "all" in path else live
        ends = surface.point(bad.state_dict()), surface.point(good.state_dict())
        look(path, surface, fit_curve(surface, *ends, DEGREES[path.split(",")[0]], steps=CURVE_STEPS))
    return found


def table(rows: list[Row]) -> str:
    """Return the barriers in Markdown."""
    ends = [row for row in rows if row["t"] == 0.0]
    lines = ["| path from the bad to the good solution | XOR | digits |", "|---|---:|---:|"]
    for path in PATHS:
        cells = [[row["barrier"] for row in ends if (row["task"], row["path"]) == (task, path)] for task in TASKS]
        lines.append(f"| {path} | " + " | ".join(", ".join(f"{value:.3f}" for value in cell) for cell in cells) + " |")
    for which, gradient, t in (("bad", "gradient_start", 0.0), ("good", "gradient_end", 1.0)):
        ends_of = [[row for row in rows if (row["task"], row["path"], row["t"]) == (task, "line", t)] for task in TASKS]
        texts = [
            ", ".join(f"{row['loss']:.3f} ({row['error']:.1%}, {row[gradient]:.3f})" for row in own) for own in ends_of
        ]
        lines.append(f"| loss (error, norm of the gradient) of the {which} solution | {' | '.join(texts)} |")
    for path in ("initialisation to good", "fresh to good"):
        counts = []
        for task in TASKS:
            own = [row for row in ends if (row["task"], row["path"]) == (task, path)]
            counts.append(f"{sum(row['monotone'] for row in own)} of {len(own)} fall all the way")
        lines.append(f"| straight line, {path} | {counts[0]} | {counts[1]} |")
    return "\n".join(lines)


def draw(rows: list[Row]) -> Figure:
    """Draw the paths of seed 0, and the barriers of all."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    panels = figure.subplots(2, 3)
    for (task, (title, *_)), (left, middle, right) in zip(TASKS.items(), panels, strict=True):
        own = [row for row in rows if row["task"] == task]
        for axes, names in ((left, ["initialisation to good", "fresh to good"]), (middle, PATHS)):
            for name, style in zip(names, ["k-", "C0-", "C1-", "C0--", "C1--"], strict=False):
                curve = [row for row in own if row["path"] == name and row["seed"] == 0]
                axes.plot([row["t"] for row in curve], [row["loss"] for row in curve], style, label=name)
            axes.set(ylabel="loss", yscale="log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        left.set(xlabel="t, from untrained weights to the good solution", title=f"{title}: straight lines down")
        middle.set(xlabel="t, from the bad solution to the good one", title=f"{title}: between solutions")
        seeds = sorted({row["seed"] for row in own})
        for seed in seeds:
            heights = [
                next(row["barrier"] for row in own if (row["path"], row["seed"]) == (path, seed)) for path in PATHS
            ]
            right.plot(range(len(PATHS)), heights, "o", color="C0", alpha=0.7)
        right.set_xticks(range(len(PATHS)), [path.replace(", ", "\n") for path in PATHS], fontsize=8)
        right.set(ylabel="highest loss above that of the bad end", title=f"{title}: barrier, one dot a seed")
        right.set_yscale("symlog", linthresh=1e-3)
        right.set_ylim(-2e-4, 2 * max(row["barrier"] for row in own))
        right.grid(alpha=0.3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Train everything, write table and figure."""
    args = parse(MODULE, __doc__, arguments, seeds=3)
    rows = run_sweep(args, paths, grid(task=list(TASKS), seed=range(args.seeds)), title="paths")
    finish(args, MODULE, rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
