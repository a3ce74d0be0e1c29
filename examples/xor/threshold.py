"""Test AUC against p, for several numbers of samples (Guo et al., Fig. 3): `python -m examples.xor.threshold`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from matplotlib.figure import Figure

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.results import Row, counted, mean_and_spread
from examples.xor.dense import BATCH_SIZE, dense
from examples.xor.pruned import pruned
from lightning_cpna.sweeps import grid

K, HIDDEN, FIRST_SEED = 3, 1024, 3000
METHODS = {"nn": "NN", "fsa_cpna": "FSA + CPNA"}


class Size(NamedTuple):
    """How much is trained: data sets, their numbers of samples by method, and their dimensions."""

    seeds: int
    samples: dict[str, list[int]]
    dimensions: list[int]


SIZES = {
    "quick": Size(1, {"nn": [500, 1000, 3000], "fsa_cpna": [500, 1000]}, [5, 20, 60]),
    "reduced": Size(
        3, {"nn": [500, 1000, 3000, 10000], "fsa_cpna": [500, 1000, 3000]}, [5, 10, 15, 20, 30, 40, 60, 80, 120]
    ),
    "full": Size(
        10,
        {method: [500, 1000, 3000, 10000] for method in METHODS},
        [5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 160],
    ),
}
LEARNED = 90.0  # chosen
STEPS = 1200  # chosen: of NN, for any number of samples


def draw(rows: list[Row]) -> Figure:
    """Draw the test AUC against p: a line for each number of samples, mean and range over data sets."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    samples = sorted({row["n"] for row in rows})
    for axes, (method, title) in zip(drawn.subplots(1, 2, sharey=True), METHODS.items(), strict=True):
        for colour, n in enumerate(samples):
            own = [row for row in rows if (row["method"], row["n"]) == (method, n)]
            if not own:
                continue
            dimensions = sorted({row["p"] for row in own})
            aucs = [
                torch.tensor([row["test_auc"] for row in own if row["p"] == p], dtype=torch.float64) for p in dimensions
            ]
            axes.plot(
                dimensions, [float(part.mean()) for part in aucs], "o-", ms=3, color=f"C{colour}", label=f"n = {n}"
            )
            low, high = ([float(bound(part)) for part in aucs] for bound in (torch.amin, torch.amax))
            axes.fill_between(dimensions, low, high, color=f"C{colour}", alpha=0.15, lw=0)
        axes.set(title=title, xlabel="dimensions p", ylim=(45, 101))
        axes.grid(alpha=0.3)
    drawn.axes[0].set_ylabel("test AUC, %")
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    n_sets = len({row["data_seed"] for row in rows})
    drawn.suptitle(f"{K}-D XOR, {HIDDEN} hidden units, mean and range over {counted(n_sets, 'data set')}")
    return drawn


def table(rows: list[Row]) -> str:
    """Return in Markdown the highest p of those tried whose test AUC is at least `LEARNED` in the mean over data sets."""
    found = mean_and_spread(rows, ("method", "n", "p"), "test_auc")
    lines = ["| training samples | " + " | ".join(METHODS.values()) + " |", "| ---: | ---: | ---: |"]
    for n in sorted({row["n"] for row in rows}):
        cells = []
        for method in METHODS:
            means = {p: mean for (name, size, p), (mean, _) in found.items() if (name, size) == (method, n)}
            learned = [p for p, mean in means.items() if mean >= LEARNED]
            cells.append(str(max(learned)) if learned else "none" if means else "")
        lines.append(f"| {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Train, write the results, and draw them."""
    sizes = {name: f"{counted(it.seeds, 'data set')}, {len(it.dimensions)} dimensions" for name, it in SIZES.items()}
    args = parse("examples.xor.threshold", __doc__, arguments, sizes=sizes)
    size = SIZES[args.size]
    seeds = range(FIRST_SEED, FIRST_SEED + size.seeds)
    problems = {"k": [K], "hidden": [HIDDEN], "p": size.dimensions, "data_seed": seeds}
    nn = [
        setting
        for n in size.samples["nn"]
        for setting in grid(**problems, n=[n], n_inits=[1], epochs=[STEPS // (n // BATCH_SIZE)], weight_decay=[1e-3])
    ]
    fsa_cpna = grid(**problems, n=size.samples["fsa_cpna"], method=["fsa_cpna"])
    rows = [{"method": "nn", **row} for row in run_sweep(args, dense, nn, title="NN")]
    rows += run_sweep(args, pruned, fsa_cpna, title="FSA + CPNA")
    finish(args, "examples.xor.threshold", rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
