"""Features found in madelon and the ASU sets, and how stable they are: `python -m examples.features.asu`."""

from __future__ import annotations

import itertools
import time
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from examples.arguments import run_sweep
from examples.asu.training import RECIPES, data
from examples.command import finish, parse
from examples.data import ASU, is_here
from examples.features.networks import Classifier
from examples.results import Row, mean_and_spread
from lightning_cpna import Restarts, find_features

COUNTS = [50, 20, 10, 5]
LARGE = 1000  # chosen: training sets with more examples take larger batches
TWINS = 0.5  # chosen: columns of madelon that carry information correlate with another at .69 or more, all others at .1


def search(*, name: str, seed: int, folder: Path | None) -> Row:
    """Search the training part of a set, and test the network that is trained on what is found.

    Args:
        name: The set.
        seed: Of its split and of the search.
        folder: The folder with the data.
    """
    train, test = data(name, seed, folder, RECIPES[name].inputs)
    n, p = train.x.shape
    plan = Restarts(8, p, held_out=1 / 3, batch_size=64 if n > LARGE else 32, level=0.001)
    n_classes = int(torch.cat([train.y, test.y]).max()) + 1
    network = partial(Classifier, n_classes=n_classes, hidden=128, lr=3e-3)
    trainer, quiet = partial(pl.Trainer, accelerator="cpu"), Console(quiet=True)
    started = time.perf_counter()
    found = find_features(network, trainer, *train, COUNTS, restarts=plan, seed=seed, console=quiet)
    with torch.no_grad():
        right = (found.network(test.x[:, list(found.features)]).argmax(1) == test.y).double()
    return {
        "features": len(found.features),
        "columns": " ".join(map(str, found.features)),
        "certified": found.certificate.holds,
        "p_value": found.certificate.p_value,
        "margin": round(found.certificate.margin, 2),
        "seconds": round(time.perf_counter() - started, 1),
        "test_accuracy": round(100 * float(right.mean()), 4),
        "majority": round(100 * float(torch.bincount(test.y).max() / len(test.y)), 4),
        "informative": len(set(found.features) & set(twins(train.x))) if name == "madelon" else None,
    }


def twins(x: Tensor) -> list[int]:
    """Return the columns of ``(n, p)`` that correlate strongly with another one."""
    largest = torch.corrcoef(x.T).abs().fill_diagonal_(0).max(dim=1).values
    return (largest > TWINS).nonzero().flatten().tolist()


def overlap(sets: list[set[str]]) -> float:
    """Return the mean of the Jaccard index over all pairs of sets.

    Examples:
        >>> overlap([{"1", "2"}, {"2", "3"}])
        0.3333333333333333
    """
    pairs = list(itertools.combinations(sets, 2))
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs) if pairs else 1.0


def draw(rows: list[Row]) -> Figure:
    """Draw which of madelon's columns are found, in how many searches."""
    found = [int(column) for row in rows if row["name"] == "madelon" for column in row["columns"].split()]
    columns = sorted(set(found))
    drawn = Figure(figsize=(9, 2.8), layout="constrained")
    axes = drawn.subplots()
    axes.bar([str(column) for column in columns], [found.count(column) for column in columns], color="C2")
    n = sum(row["name"] == "madelon" for row in rows)
    axes.set(title="madelon", xlabel="column", ylabel=f"searches of {n} that found it")
    return drawn


def table(rows: list[Row]) -> str:
    """Return in Markdown what was found, in the mean over seeds."""
    lines = [
        "| data set | searches | certified | margin | features | overlap | test accuracy | most frequent class | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        means = {key: sum(row[key] for row in own) / len(own) for key in ("margin", "features", "majority", "seconds")}
        ((mean, spread),) = mean_and_spread(own, ("name",), "test_accuracy").values()
        same = overlap([set(row["columns"].split()) for row in own])
        lines.append(
            f"| {name} | {len(own)} | {sum(row['certified'] for row in own)} | {means['margin']:.1f} "
            f"| {means['features']:.0f} | {same:.2f} | {mean:.1f} ± {spread:.1f} | {means['majority']:.1f} "
            f"| {means['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Search, write the results, and draw them."""
    args = parse("examples.features.asu", __doc__, arguments, seeds=3, data=True)
    settings = [{"name": name, "seed": seed} for name in ASU if is_here(name, args.data) for seed in range(args.seeds)]
    rows = run_sweep(args, partial(search, folder=args.data), settings, title="searches")
    finish(args, "examples.features.asu", rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
