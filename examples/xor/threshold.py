"""Test AUC against p, for several numbers of samples (Guo et al., Fig. 3): `python -m examples.xor.threshold`."""

from __future__ import annotations

import argparse

import torch
from matplotlib.figure import Figure

from examples.arguments import add_sizes, add_sweep_arguments, run_sweep
from examples.results import Row, save_figure
from examples.xor.dense import dense
from examples.xor.pruned import pruned
from lightning_cpna.sweeps import grid

K, HIDDEN, FIRST_SEED = 3, 1024, 3000
SAMPLES = [1000, 3000, 10000]
DIMENSIONS = {
    "quick": [5, 20, 60],
    "reduced": [5, 10, 15, 20, 30, 40, 60, 80, 120],
    "full": [5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 120, 160],
}
SEEDS = {"quick": 1, "reduced": 3, "full": 10}
METHODS = {"nn": "NN", "fsa_cpna": "FSA + CPNA"}


def draw(rows: list[Row]) -> Figure:
    """Draw the test AUC against p: a line for each number of samples, mean and range over data sets."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    for axes, (method, title) in zip(drawn.subplots(1, 2, sharey=True), METHODS.items(), strict=True):
        for colour, n in enumerate(SAMPLES):
            own = [row for row in rows if (row["method"], row["n"]) == (method, n)]
            dimensions = sorted({row["p"] for row in own})
            aucs = [torch.tensor([row["test_auc"] for row in own if row["p"] == p]) for p in dimensions]
            axes.plot(
                dimensions, [float(part.mean()) for part in aucs], "o-", ms=3, color=f"C{colour}", label=f"n = {n}"
            )
            low, high = ([float(bound(part)) for part in aucs] for bound in (torch.amin, torch.amax))
            axes.fill_between(dimensions, low, high, color=f"C{colour}", alpha=0.15, lw=0)
        axes.set(title=title, xlabel="dimensions p", ylim=(45, 101))
        axes.grid(alpha=0.3)
    drawn.axes[0].set_ylabel("test AUC, %")
    drawn.axes[0].legend(frameon=False)
    n_sets = len({row["data_seed"] for row in rows})
    drawn.suptitle(f"{K}-D XOR, {HIDDEN} hidden units, mean and range over {n_sets} data sets")
    return drawn


def main(arguments: list[str] | None = None) -> None:
    """Train, write the results, and draw them."""
    parser = argparse.ArgumentParser(prog="python -m examples.xor.threshold", description=__doc__)
    add_sizes(parser, {size: f"{SEEDS[size]} data sets, {len(DIMENSIONS[size])} dimensions" for size in SEEDS})
    add_sweep_arguments(parser, "runs/xor_threshold", data=False)
    args = parser.parse_args(arguments)
    seeds, dimensions = range(FIRST_SEED, FIRST_SEED + SEEDS[args.size]), DIMENSIONS[args.size]
    problems = {"k": [K], "hidden": [HIDDEN], "n": SAMPLES, "p": dimensions, "data_seed": seeds}
    nn = grid(**problems, n_inits=[1], epochs=[100], weight_decay=[1e-3])
    rows = [{"method": "nn", **row} for row in run_sweep(args, dense, nn, title="NN")]
    rows += run_sweep(args, pruned, grid(method=["fsa_cpna"], **problems), title="FSA + CPNA")
    save_figure(rows, draw(rows), args.out, "threshold")


if __name__ == "__main__":
    main()
