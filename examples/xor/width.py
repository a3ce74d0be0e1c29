"""Test AUC against the number of hidden units (Guo et al., Figs. 4 and 6): `python -m examples.xor.width`."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.results import Row, counted, mean_and_spread
from examples.xor.dense import dense
from examples.xor.figures import TITLES
from examples.xor.pruned import pruned
from examples.xor.recipes import PROBLEMS
from lightning_cpna.sweeps import grid

N, FIRST_SEED = 3000, 3000
P = 15  # of the 5-D problem on which the three methods are compared
METHODS = ["nn", "cpa_hidden", "cpna_hidden"]
SIZES = {  # seeds, initialisations of NN on each; hidden units of NN, and of the three methods
    "quick": (1, 1, [16, 64, 256], [128]),
    "reduced": (3, 2, [16, 64, 256, 1024, 4096], [256, 512, 1024, 2048]),
    "full": (10, 10, [16, 32, 64, 128, 256, 512, 1024, 2048, 4096], [256, 512, 1024, 2048, 4096]),
}


def draw(rows: list[Row]) -> Figure:
    """Draw the test AUC against the hidden units: of NN on the three problems, and of NN, CPA and CPNA on one."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for colour, (k, problem) in enumerate(PROBLEMS.items()):
        own = [row for row in rows if (row["k"], row["p"], row["figure"]) == (k, problem.p, 4)]
        _line(left, own, f"{k}-D, p = {problem.p}", f"C{colour}")
    for method, shade in zip(METHODS, ("C7", "C1", "C2"), strict=True):
        _line(right, [row for row in rows if (row["method"], row["figure"]) == (method, 6)], TITLES[method], shade)
    left.set_title("NN (Fig. 4)")
    right.set_title(f"5-D, p = {P}: hidden layer to 64 connections (Fig. 6)")
    n_seeds = len({row["data_seed"] for row in rows})
    drawn.suptitle(
        f"XOR, {N} samples; mean and standard deviation over {counted(n_seeds, 'data set')} and the initialisations on each"
    )
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="hidden units", ylabel="test AUC, %")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return drawn


def _line(axes: Axes, rows: list[Row], label: str, colour: str) -> None:
    found = mean_and_spread(rows, ("hidden",), "test_auc")
    widths = sorted(width for (width,) in found)
    means, spreads = zip(*(found[(width,)] for width in widths), strict=True)
    axes.errorbar(widths, means, spreads, fmt="o-", ms=3, capsize=2, color=colour, label=label)


def table(rows: list[Row]) -> str:
    """Return Fig. 6 in Markdown: mean and standard deviation over data sets."""
    found = mean_and_spread((row for row in rows if row["figure"] == 6), ("hidden", "method"), "test_auc")
    lines = [
        "| hidden units | " + " | ".join(TITLES[method] for method in METHODS) + " |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for width in sorted({key[0] for key in found}):
        cells = ["{:.1f} ± {:.1f}".format(*found[width, method]) for method in METHODS]
        lines.append(f"| {width} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Train, write the results, and draw them."""
    sizes = {
        size: f"{counted(it[0], 'data set')}, NN from {counted(it[1], 'initialisation')} on each"
        for size, it in SIZES.items()
    }
    args = parse("examples.xor.width", __doc__, arguments, sizes=sizes)
    n_seeds, n_inits, widths, compared = SIZES[args.size]
    seeds = range(FIRST_SEED, FIRST_SEED + n_seeds)
    nn = [
        setting
        for k, problem in PROBLEMS.items()
        for setting in grid(
            k=[k],
            p=[problem.p],
            n=[N],
            hidden=widths,
            data_seed=seeds,
            n_inits=[n_inits],
            epochs=[100],
            weight_decay=[1e-3],
        )
    ]
    three = grid(k=[5], p=[P], n=[N], hidden=compared, method=METHODS, data_seed=seeds)
    rows = [{"figure": 4, "method": "nn", **row} for row in run_sweep(args, dense, nn, title="Fig. 4")]
    rows += [{"figure": 6, **row} for row in run_sweep(args, pruned, three, title="Fig. 6")]
    finish(args, "examples.xor.width", rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
