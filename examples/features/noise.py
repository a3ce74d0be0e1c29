"""Searches where there is nothing to find, which must not be certified: `python -m examples.features.noise`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from rich.console import Console

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.data import asu, standardized
from examples.features.networks import Classifier
from examples.results import Row
from examples.xor.problem import Phase, XORData, XORNet
from lightning_cpna import Tries, find_features

FIRST_SEED = 5000


class Problem(NamedTuple):
    """Data of which the labels are shuffled.

    Attributes:
        title: What it is called in the table.
        counts: How many features are wanted.
        tries: How they are searched.
    """

    title: str
    counts: list[int]
    tries: Tries


PROBLEMS = {
    "xor": Problem("4-D XOR, p=60, n=3000", [4], Tries(16, 40)),
    "asu": Problem("Lung-discrete, p=325, n=48", [50, 20, 10, 5], Tries(16, batch_size=16)),
}


def search(*, problem: str, seed: int, folder: Path | None) -> Row:
    """Search among shuffled labels.

    Args:
        problem: A key of `PROBLEMS`.
        seed: Of the data, the shuffling and the search.
        folder: The folder with the data.
    """
    _, counts, tries = PROBLEMS[problem]
    generator = torch.Generator().manual_seed(seed)
    network: Callable[[int], pl.LightningModule]
    if problem == "xor":
        examples = XORData(4, 60, 3000, generator)
        x, y = examples.x, examples.y
        network = partial(XORNet, hidden=256, phases=[Phase(1)], n=len(y))
    else:
        train, _ = standardized(*asu("Lung-discrete", seed, folder))
        x, y = train
        network = partial(Classifier, n_classes=int(y.max()) + 1)
    y = y[torch.randperm(len(y), generator=generator)]
    quiet = Console(quiet=True)
    trainer = partial(pl.Trainer, accelerator="cpu")
    found = find_features(network, trainer, x, y, counts, tries=tries, seed=seed, console=quiet)
    it = found.certificate
    losses = [row["loss"] for row in found.rows if not row["is_null"]]
    return {
        "certified": it.holds,
        "margin": round(it.margin, 3),
        "margin_needed": round((it.null_loss - it.limit) / it.null_spread, 3),
        "tries": found.tries,
        "lowest_loss": round(min(losses), 5),
    }


def draw(rows: list[Row]) -> Figure:
    """Draw the largest margin of every search, and what it had to be."""
    drawn = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (name, problem) in zip(drawn.subplots(1, len(PROBLEMS), sharey=True), PROBLEMS.items(), strict=True):
        own = [row for row in rows if row["problem"] == name]
        axes.hist([row["margin"] for row in own], bins=20, color="C0")
        axes.axvline(own[0]["margin_needed"], color="C3", label="needed for a certificate")
        axes.set(title=f"{problem.title}, labels shuffled", xlabel="largest margin of a search, standard deviations")
    drawn.axes[0].set_ylabel("searches")
    drawn.axes[0].legend(frameon=False)
    return drawn


def table(rows: list[Row]) -> str:
    """Return in Markdown how many searches were certified."""
    lines = [
        "| labels shuffled | searches | tries each | features | certified | largest margin | needed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, problem in PROBLEMS.items():
        own = [row for row in rows if row["problem"] == name]
        lines.append(
            f"| {problem.title} | {len(own)} | {problem.tries.n} | {', '.join(map(str, problem.counts))} "
            f"| {sum(row['certified'] for row in own)} | {max(row['margin'] for row in own):.1f} "
            f"| {own[0]['margin_needed']:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Search, write the results, and draw them."""
    args = parse("examples.features.noise", __doc__, arguments, seeds=100, data=True)
    settings = [
        {"problem": problem, "seed": seed}
        for problem in PROBLEMS
        for seed in range(FIRST_SEED, FIRST_SEED + args.seeds)
    ]
    rows = run_sweep(args, partial(search, folder=args.data), settings, title="searches in noise")
    finish(args, "examples.features.noise", rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
