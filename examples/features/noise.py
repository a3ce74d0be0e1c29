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
from lightning_cpna import Restarts, find_features

FIRST_SEED = 5200


class Problem(NamedTuple):
    """Data of which the labels are shuffled.

    Attributes:
        title: What it is called in the table.
        counts: How many features are wanted.
        plan: How they are searched.
    """

    title: str
    counts: list[int]
    plan: Restarts


PROBLEMS = {
    "xor": Problem("4-D XOR, p=60, n=3000", [4], Restarts(16, 40)),
    "asu": Problem("Lung-discrete, p=325, n=48", [50, 20, 10, 5], Restarts(16, held_out=0.4, batch_size=16)),
}


def search(*, problem: str, seed: int, folder: Path | None) -> Row:
    """Search among shuffled labels.

    Args:
        problem: A key of `PROBLEMS`.
        seed: Of the data, the shuffling and the search.
        folder: The folder with the data.
    """
    _, counts, plan = PROBLEMS[problem]
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
    found = find_features(network, trainer, x, y, counts, restarts=plan, seed=seed, console=quiet)
    return {
        "certified": found.certificate.holds,
        "p_value": found.certificate.p_value,
        "level": found.certificate.level,
        "margin": round(found.certificate.margin, 3),
        "tries": found.n_tries,
    }


def draw(rows: list[Row]) -> Figure:
    """Draw the p-value at the end of every search: by chance they are spread evenly."""
    drawn = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (name, problem) in zip(drawn.subplots(1, len(PROBLEMS), sharey=True), PROBLEMS.items(), strict=True):
        values = sorted(row["p_value"] for row in rows if row["problem"] == name)
        axes.plot(values, [(i + 1) / len(values) for i in range(len(values))], drawstyle="steps-post", color="C0")
        axes.plot([0, 1], [0, 1], "--", color="C3", label="evenly spread")
        axes.set(title=f"{problem.title}, labels shuffled", xlabel="p-value of the best of all tries")
        axes.grid(alpha=0.3)
    drawn.axes[0].set_ylabel("searches with it or less")
    drawn.axes[0].legend(frameon=False)
    return drawn


def table(rows: list[Row]) -> str:
    """Return in Markdown how many searches were certified."""
    lines = [
        "| labels shuffled | searches | tries each | features | certified | lowest p-value | needed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, problem in PROBLEMS.items():
        own = [row for row in rows if row["problem"] == name]
        lines.append(
            f"| {problem.title} | {len(own)} | {problem.plan.n} | {', '.join(map(str, problem.counts))} "
            f"| {sum(bool(row['certified']) for row in own)} | {min(row['p_value'] for row in own):.2g} "
            f"| {own[0]['level']:.2g} |"
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
