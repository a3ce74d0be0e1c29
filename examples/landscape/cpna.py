"""Why pruning ends deeper than training small does, on the 3-D XOR: `python -m examples.landscape.cpna`.

A network is trained wide and its hidden layer annealed to 12 connections by `CPNAPruning` (Guo et al., Table 1). What is left
is trained again from fresh weights, as long. How do the two solutions differ, is there a way between them, and how does the
pruned one lie to the dense network that it came from?
"""

from __future__ import annotations

import itertools
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.landscape.networks import take_masks_
from examples.quiet import quiet_trainer
from examples.results import Row, mean_and_spread
from examples.xor.problem import Phases, XORDataModule, XORNet
from examples.xor.recipes import PROBLEMS, callbacks, recipe
from examples.xor.training import OF_WEIGHTS
from lightning_cpna import compact
from lightning_cpna.landscape import LossSurface, fit_curve, follow, hessian_spectrum, top_eigenvalues
from lightning_cpna.sweeps import grid

MODULE = "examples.landscape.cpna"
K, N, METHOD = 3, 3000, "cpna_hidden"
SOLUTIONS = ["dense, before pruning", "pruned", "retrained"]
PATHS = {
    "dense to pruned, line": 1,
    "retrained to pruned, line": 1,
    "retrained to pruned, quadratic": 2,
    "retrained to pruned, cubic": 3,
}
CURVE_STEPS = 400
SHOWN = 60  # eigenvalues of the small networks


class Keep(pl.Callback):
    """Keeps the weights that a module has after some optimizer steps.

    Args:
        step: How many.
    """

    def __init__(self, step: int) -> None:
        self.step, self.weights = step, dict[str, Tensor]()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Keep them."""
        if trainer.global_step == self.step:
            self.weights = {name: value.detach().clone() for name, value in pl_module.named_parameters()}


def cross_entropy(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy."""
    return F.binary_cross_entropy_with_logits(net(batch[0]), batch[1])


def auc(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the area under the ROC curve, in percent."""
    return 100 * binary_auroc(net(batch[0]), batch[1].int())


def _fit(module: XORNet, data: XORDataModule, phases: list[Any], *more: pl.Callback) -> None:
    trainer = quiet_trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[Phases(phases, N), *more],
        limit_val_batches=0,
    )
    trainer.fit(module, data)


def _compact(net: XORNet, x: Tensor) -> XORNet:
    """Return a network of the units that are left."""
    found = compact(net, x, batch_sizes=()).module
    assert isinstance(found, XORNet)
    return found


def look(*, seed: int) -> list[Row]:
    """Train the three solutions of one seed, and look at them and between them."""
    torch.set_num_threads(1)
    steps = recipe(K, METHOD)
    phases = [phase for phase, _ in steps]
    ends = list(itertools.accumulate(phase.steps(N) for phase in phases))
    data = XORDataModule(K, PROBLEMS[K].p, N, seed, phases)
    pl.seed_everything(seed + OF_WEIGHTS, verbose=False)
    pruned = XORNet(PROBLEMS[K].p, PROBLEMS[K].hidden, phases, N)
    dense = Keep(ends[0])
    _fit(pruned, data, phases, *callbacks(steps, N, shrink=True), dense)

    pl.seed_everything(seed + 2 * OF_WEIGHTS, verbose=False)
    fresh = XORNet(PROBLEMS[K].p, PROBLEMS[K].hidden, phases, N)
    take_masks_(fresh, pruned)
    small, retrained = (_compact(net, data.train.x[:64]) for net in (pruned, fresh))
    _fit(retrained, data, phases)

    batch, test = (data.train.x, data.train.y), (data.test.x, data.test.y)
    wide = LossSurface(pruned, [batch], cross_entropy, masks={})
    narrow = LossSurface(small, [batch], cross_entropy)
    points = {
        "dense, before pruning": (wide, wide.point(dense.weights)),
        "pruned": (narrow, narrow.point()),
        "retrained": (narrow, narrow.point(retrained.state_dict())),
    }
    tests = {wide: LossSurface(pruned, [test], auc, masks={}), narrow: LossSurface(small, [test], auc)}
    found: list[Row] = []
    for solution, (surface, point) in points.items():
        value, gradient = surface.gradient(point)
        summary: Row = {
            "what": "spectrum",
            "solution": solution,
            "loss": value,
            "gradient": float(gradient.norm()),
            "test_auc": tests[surface].loss(point),
            "coordinates": surface.n,
        }
        if surface is narrow:
            largest = hessian_spectrum(surface, point, exact=True).nodes[0].flip(0)[:SHOWN]
        else:
            largest = top_eigenvalues(surface, point)
        found += [{**summary, "rank": rank, "eigenvalue": one} for rank, one in enumerate(largest.tolist(), start=1)]
    pairs = {
        "dense to pruned": (wide, points["dense, before pruning"][1], wide.point(pruned.state_dict())),
        "retrained to pruned": (narrow, points["retrained"][1], points["pruned"][1]),
    }
    for path, degree in PATHS.items():
        surface, start, end = pairs[path.split(",")[0]]
        seen = follow(
            surface, fit_curve(surface, start, end, degree, steps=CURVE_STEPS), others={"auc": tests[surface]}
        )
        summary = {"what": "path", "path": path, "barrier": seen.barrier_above_worse_end, "length": seen.arc_length}
        found += [
            {**summary, "t": t, "loss": loss, "test_auc": value}
            for t, loss, value in zip(seen.t.tolist(), seen.losses.tolist(), seen.others["auc"].tolist(), strict=True)
        ]
    return found


def table(rows: list[Row]) -> str:
    """Return the solutions and the paths, in Markdown: means and standard deviations over the seeds."""
    first = [row for row in rows if row["what"] == "spectrum" and row["rank"] == 1]
    lines = [
        "| solution | coordinates | training loss | norm of its gradient | test AUC | largest eigenvalue |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for solution in SOLUTIONS:
        own = [row for row in first if row["solution"] == solution]
        cells = []
        for name, style in (("loss", ".3f"), ("gradient", ".4f"), ("test_auc", ".1f"), ("eigenvalue", ".3f")):
            mean, spread = mean_and_spread(own, ("solution",), name)[(solution,)]
            cells.append(f"{mean:{style}} ± {spread:{style}}")
        counts = sorted({row["coordinates"] for row in own})
        count = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
        lines.append(f"| {solution} | {count} | {' | '.join(cells)} |")
    lines += ["", "| path | barrier above the worse end |", "|---|---|"]
    for path in PATHS:
        barriers = [row["barrier"] for row in rows if row["what"] == "path" and row["path"] == path and row["t"] == 0]
        lines.append(f"| {path} | {', '.join(f'{barrier:.3f}' for barrier in barriers)} |")
    return "\n".join(lines)


def draw(rows: list[Row]) -> Figure:
    """Draw the paths and the spectra, the first seed's lines strong and the others' faint."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)
    seeds = sorted({row["seed"] for row in rows})
    colours = dict(zip(PATHS, ("C0", "k", "C1", "C2"), strict=True))
    for path, colour in colours.items():
        column = 0 if path.startswith("dense") else 1
        for seed in seeds:
            own = [row for row in rows if row["what"] == "path" and (row["path"], row["seed"]) == (path, seed)]
            label = path.split(", ", 1)[1] if seed == seeds[0] else None
            style: dict[str, Any] = {"color": colour, "alpha": 1.0 if seed == seeds[0] else 0.35}
            panels[0, column].plot([row["t"] for row in own], [row["loss"] for row in own], **style, label=label)
            if path.startswith("dense"):
                panels[1, 0].plot([row["t"] for row in own], [row["test_auc"] for row in own], **style)
    panels[0, 0].set(xlabel="t, from the dense network (0) to the pruned one (1)", ylabel="training loss")
    panels[0, 0].set_title("From the dense solution to the pruned one")
    panels[1, 0].set(xlabel="t, from the dense network (0) to the pruned one (1)", ylabel="test AUC, %")
    panels[1, 0].set_title("On the same line, the test AUC")
    panels[0, 1].set(xlabel="t, from the retrained network (0) to the pruned one (1)", ylabel="training loss")
    panels[0, 1].set_title("From the retrained solution, of the same connections, to the pruned one")
    panels[0, 1].legend()
    axes = panels[1, 1]
    for solution, colour in zip(SOLUTIONS, ("0.5", "C0", "C3"), strict=True):
        for seed in seeds:
            own = [
                row for row in rows if row["what"] == "spectrum" and (row["solution"], row["seed"]) == (solution, seed)
            ]
            label = solution if seed == seeds[0] else None
            style = {"color": colour, "alpha": 1.0 if seed == seeds[0] else 0.35}
            axes.plot([row["rank"] for row in own], [row["eigenvalue"] for row in own], ".-", **style, label=label)
    axes.set(xlabel="rank", ylabel="eigenvalue of the Hessian", yscale="log", title="The largest eigenvalues")
    axes.legend()
    for axes in panels.flatten():
        axes.grid(alpha=0.3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Train everything, write table and figure."""
    args = parse(MODULE, __doc__, arguments, seeds=5)
    rows = run_sweep(args, look, grid(seed=range(args.seeds)), title="CPNA's solutions")
    finish(args, MODULE, rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
