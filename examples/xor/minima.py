"""The local minima of one network, sorted (Guo et al., Figs. 1 and 2): `python -m examples.xor.minima`."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.results import Row, counted
from examples.xor.dense import dense
from lightning_cpna.sweeps import grid

K, N, HIDDEN = 3, 3000, 20
DIMENSIONS = [3, 10, 20, 30, 40]
SIZES = {"quick": (10, 1, 100), "reduced": (100, 2, 300), "full": (100, 10, 300)}  # initialisations, data sets, epochs
WEIGHT_DECAY = 1e-3  # without any, the loss has no minimum: it falls as the weights grow


def settings(size: str) -> list[Row]:
    """Return what is trained."""
    n_inits, n_sets, epochs = SIZES[size]
    return grid(
        k=[K],
        n=[N],
        hidden=[HIDDEN],
        n_inits=[n_inits],
        epochs=[epochs],
        weight_decay=[WEIGHT_DECAY],
        data_seed=range(n_sets),
        p=DIMENSIONS,
    )


def by_rank(rows: list[Row], p: int, value: str) -> Tensor:
    """Return a value of the minima, in the order of the training loss, ``(data set, rank)``."""
    sets = sorted({row["data_seed"] for row in rows})
    ordered = [
        sorted((row for row in rows if (row["p"], row["data_seed"]) == (p, seed)), key=lambda row: row["loss"])
        for seed in sets
    ]
    return torch.tensor([[row[value] for row in one] for one in ordered], dtype=torch.float64)


def draw(rows: list[Row]) -> Figure:
    """Draw the training loss and the test AUC of the minima in the order of the loss: mean and range over data sets."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for colour, p in enumerate(dict.fromkeys(row["p"] for row in rows)):
        for axes, value in ((left, "loss"), (right, "test_auc")):
            values = by_rank(rows, p, value)
            ranks = range(1, values.shape[1] + 1)
            axes.plot(ranks, values.mean(0), color=f"C{colour}", label=f"p = {p}")
            axes.fill_between(ranks, values.amin(0), values.amax(0), color=f"C{colour}", alpha=0.15, lw=0)
    left.set(ylabel="training cross-entropy", xlabel="initialisation, by training loss")
    right.set(ylabel="test AUC, %", xlabel="initialisation, by training loss")
    drawn.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    first = rows[0]
    n_sets = len({row["data_seed"] for row in rows})
    drawn.suptitle(
        f"{first['k']}-D XOR in p dimensions, {first['hidden']} hidden units: {first['n_inits']} initialisations, "
        f"mean and range over {counted(n_sets, 'data set')}"
    )
    return drawn


def table(rows: list[Row]) -> str:
    """Return in Markdown how the minima of a data set differ: the mean over data sets of what is worst, median and best."""
    lines = [
        "| p | training loss: lowest, median, highest | test AUC % of these | AUC > 95 | gradient: median norm |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in dict.fromkeys(row["p"] for row in rows):
        loss, auc = by_rank(rows, p, "loss").mean(0), by_rank(rows, p, "test_auc")
        middle = len(loss) // 2
        share = (auc > 95).float().mean()
        auc, gradient = auc.mean(0), by_rank(rows, p, "gradient").median()
        lines.append(
            f"| {p} | {loss[0]:.3f}, {loss[middle]:.3f}, {loss[-1]:.3f} "
            f"| {auc[0]:.1f}, {auc[middle]:.1f}, {auc[-1]:.1f} | {share:.0%} | {gradient:.4f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Train, write the minima, and draw them."""
    sizes = {name: f"{a} initialisations on {counted(b, 'data set')}" for name, (a, b, _) in SIZES.items()}
    args = parse("examples.xor.minima", __doc__, arguments, sizes=sizes)
    rows = run_sweep(args, dense, settings(args.size), title="minima")
    finish(args, "examples.xor.minima", rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
