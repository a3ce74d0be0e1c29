"""Do the filters of a convolution cluster on MNIST? (Brutzkus, Globerson 2019): `python -m examples.landscape.filters`.

A network of one convolution, trained in a Lightning Trainer beside an `AlignmentLogger`, which records its filters for
TensorBoard; the angles of the filters to the centres of four clusters, at the initialisation and in the end.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.data import Split, loader, mnist
from examples.quiet import quiet_trainer
from examples.results import Row, mean_and_spread
from lightning_cpna import AlignmentLogger
from lightning_cpna.landscape import alignment, filters_of, frame_potential_bounds
from lightning_cpna.sweeps import grid

MODULE = "examples.landscape.filters"
FILTERS, KERNEL, CLUSTERS = [16, 64, 256], 3, 4
SAMPLES, EPOCHS, BATCH, LR = 5000, 8, 100, 1e-2
LAYER = "net.0.weight"
BINS = 19  # of the histogram of angles, from 0 to 95 degrees


class ConvNet(pl.LightningModule):
    """A convolution of every other place, ReLU, the largest of every 3 x 3 answers, and a linear layer."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, filters, KERNEL, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(3),
            nn.Flatten(),
            nn.Linear(filters * 16, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(batch, 10)``, of ``(batch, 784)``."""
        logits: Tensor = self.net(x.view(-1, 1, 28, 28))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=LR)


def train(*, filters: int, seed: int, folder: Path | None, board: Path) -> list[Row]:
    """Train one network, and return the angles of its filters at the beginning and in the end, as histograms."""
    torch.set_num_threads(1)
    parts = mnist(seed, folder)
    pl.seed_everything(seed, verbose=False)
    module = ConvNet(filters)
    before = alignment(filters_of(module, LAYER), CLUSTERS)
    trainer = quiet_trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=TensorBoardLogger(board, f"{filters}_filters", f"seed_{seed}", default_hp_metric=False),
        callbacks=[AlignmentLogger([LAYER], n_clusters=CLUSTERS, every_n_epochs=2)],
    )
    trainer.fit(module, loader(Split(parts.train.x[:SAMPLES], parts.train.y[:SAMPLES]), BATCH, seed))
    module.eval()
    with torch.no_grad():
        accuracy = 100 * float((module(parts.test.x).argmax(1) == parts.test.y).float().mean())
    found: list[Row] = []
    for state, result in (("initialisation", before), ("trained", alignment(filters_of(module, LAYER), CLUSTERS))):
        long = result.norms >= result.norms.median()
        summary: dict[str, Any] = {
            "state": state,
            "accuracy": accuracy,
            "angle": result.angle(),
            "angle_by_norm": result.angle(by_norm=True),
            "angle_long": float(result.angles[long].median()),
            "potential": result.frame_potential,
        }
        counts = torch.histc(result.angles, BINS, 0, 5.0 * BINS) / len(result.angles)
        found += [{**summary, "degrees": 5 * i + 2.5, "share": share} for i, share in enumerate(counts.tolist())]
    return found


def table(rows: list[Row]) -> str:
    """Return the angles in Markdown."""
    ends = [row for row in rows if row["degrees"] == 2.5]
    means = {
        name: mean_and_spread(ends, ("filters", "state"), name)
        for name in ("accuracy", "angle", "angle_long", "potential")
    }
    lines = [
        "| filters | test accuracy | median angle: start, end | longer half of them | frame potential | of random ones |",
        "|---:|---:|---|---|---|---:|",
    ]
    for filters in FILTERS:
        cells = [
            " → ".join(format(means[name][filters, state][0], style) for state in ("initialisation", "trained"))
            for name, style in (("angle", ".1f"), ("angle_long", ".1f"), ("potential", ".3f"))
        ]
        accuracy = means["accuracy"][filters, "trained"][0]
        random = frame_potential_bounds(filters, KERNEL**2)[1]
        lines.append(f"| {filters} | {accuracy:.1f} | {cells[0]}° | {cells[1]}° | {cells[2]} | {random:.3f} |")
    return "\n".join(lines)


def draw(rows: list[Row]) -> Figure:
    """Draw the angles before and after, a panel for each number of filters."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    for filters, axes in zip(FILTERS, figure.subplots(1, len(FILTERS), sharey=True), strict=True):
        for state, colour in (("initialisation", "0.6"), ("trained", "C0")):
            own = [row for row in rows if (row["filters"], row["state"]) == (filters, state)]
            shares = mean_and_spread(own, ("degrees",), "share")
            median = mean_and_spread(own, ("state",), "angle")[(state,)][0]
            axes.bar(
                [degrees for (degrees,) in shares],
                [share for share, _ in shares.values()],
                width=4.6,
                color=colour,
                alpha=0.6,
                label=f"{state}: median {median:.0f}°",
            )
            axes.axvline(median, color=colour, linestyle=":")
        axes.set(
            xlabel="angle to the centre of the cluster, degrees", title=f"{filters} filters of {KERNEL} x {KERNEL}"
        )
        axes.legend()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of the filters")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Train everything, write table and figure."""
    args = parse(MODULE, __doc__, arguments, seeds=3, data=True)
    rows = run_sweep(
        args,
        partial(train, folder=args.data, board=args.out / "tensorboard"),
        grid(filters=FILTERS, seed=range(args.seeds)),
        title="filters",
    )
    finish(args, MODULE, rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
