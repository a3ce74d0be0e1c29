"""The figures and the table of the ticket experiments, from their rows of results."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from examples.page import fill
from examples.results import Row, load, mean_and_spread
from lightning_cpna.plots import readable_log_axis

COLOURS = {"init": "C0", "step 100": "C2", "keep": "C4", "reinit": "C3", "shuffle": "C1", "dense": "black"}
LABELS = {
    "init": "winning ticket", "step 100": "rewound to step 100",
    "keep": "weights kept", "reinit": "fresh weights", "shuffle": "random mask", "dense": "dense",
}  # fmt: skip


def lines(axes: Axes, rows: Iterable[Row]) -> None:
    """Draw the accuracy against what remains, a line a branch: mean and standard deviation over seeds."""
    found = mean_and_spread(rows, ("branch", "level", "density"), "accuracy")
    for branch in dict.fromkeys(key[0] for key in found):
        points = sorted((key[2], *value) for key, value in found.items() if key[0] == branch)
        if branch == "dense":
            axes.axhline(points[0][1], color="black", linestyle=":", linewidth=1, label="dense")
            continue
        axes.errorbar(
            [100 * density for density, _, _ in points],
            [mean for _, mean, _ in points],
            [spread for *_, spread in points],
            color=COLOURS[branch],
            marker=".",
            capsize=2,
            label=LABELS[branch],
        )
    axes.set(xscale="log", xlabel="weights that remain, %", ylabel="test accuracy, %")
    readable_log_axis(axes)
    axes.grid(alpha=0.3)


def draw_levels(results: dict[str, list[Row]]) -> Any:
    """Draw tickets from init, from step k and with their weights kept, iterative and one-shot, beside the controls."""
    parts = [
        (title, [row for name in names for row in results.get(name, []) if name == first or row["branch"] != "dense"])
        for title, first, names in (
            ("a little after every round", "iterative", ("iterative", "rewinding", "keeping")),
            ("all at once", "one-shot", ("one-shot",)),
        )
        if first in results
    ]
    figure, panels = plt.subplots(
        1, len(parts), figsize=(6.5 * len(parts), 4.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (title, rows) in zip(panels[0], parts, strict=True):
        lines(axes, rows)
        axes.set(title=f"pruned {title}")
        axes.invert_xaxis()
        axes.legend(fontsize=8)
    return figure


def draw_objection(results: dict[str, list[Row]]) -> Any:
    """Draw winning tickets against fresh weights, for every recipe, weights above and units below."""
    rows = results["objection"]
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    figure, panels = plt.subplots(
        2, len(recipes), figsize=(4.6 * len(recipes), 8), sharey="row", layout="constrained", squeeze=False
    )
    for i, what in enumerate(("weights", "units")):
        for j, recipe in enumerate(recipes):
            lines(panels[i][j], [row for row in rows if (row["what"], row["recipe"]) == (what, recipe)])
            panels[i][j].set(title=f"{what} removed; {recipe}")
            panels[i][j].invert_xaxis()
            panels[i][j].legend(fontsize=8)
    return figure


def draw_transfer(results: dict[str, list[Row]]) -> Any:
    """Draw what tickets of the digits 0 to 4 reach on 5 to 9."""
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    lines(axes, results["transfer"])
    axes.set(title="trained on the digits 5 to 9")
    axes.invert_xaxis()
    axes.legend(fontsize=8)
    return figure


FIGURES = {
    "tickets": (draw_levels, ("iterative", "one-shot")),
    "objection": (draw_objection, ("objection",)),
    "transfer": (draw_transfer, ("transfer",)),
}


def table(results: dict[str, list[Row]]) -> str:
    """Return what the figures show at some densities, in Markdown: mean and standard deviation over seeds."""
    lines = [
        "| weights that remain | pruned | winning ticket | rewound to step 100 | weights kept | fresh weights | random mask |"
    ]
    lines.append("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    branches = ("init", "step 100", "keep", "reinit", "shuffle")
    for pruned, names in (("iteratively", ("iterative", "rewinding", "keeping")), ("at once", ("one-shot",))):
        rows = [row for name in names for row in results.get(name, [])]
        found = mean_and_spread(rows, ("branch", "level", "density"), "accuracy")
        if pruned == "iteratively" and found:
            mean, spread = next(value for key, value in found.items() if key[0] == "dense")
            lines.append(f"| 100 % | | {mean:.2f} ± {spread:.2f} | | | | |")
        shown = {key[2]: {k[0]: v for k, v in found.items() if k[2] == key[2]} for key in found if key[0] == "init"}
        for density in sorted(shown, reverse=True):
            cells = [
                "{:.2f} ± {:.2f}".format(*shown[density][branch]) if branch in shown[density] else ""
                for branch in branches
            ]
            lines.append(f"| {100 * density:.1f} % | {pruned} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gather(folder: Path) -> dict[str, list[Row]]:
    """Read the results of all experiments that are in a folder."""
    return {path.stem: load(folder, path.stem) for path in sorted(folder.glob("*.json"))}


def draw(folder: Path) -> list[Path]:
    """Draw the figures of what there is in a folder of results, into it; return the files."""
    results = gather(folder)
    files = []
    for name, (draw_one, needed) in FIGURES.items():
        if any(part in results for part in needed):
            figure = draw_one(results)
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=110)
            plt.close(figure)
    return files


def main() -> None:
    """Draw the figures of results; with ``--page`` put the table into that file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where examples.tickets wrote its results")
    parser.add_argument("--page", type=Path, help="a file with the marks of the table")
    args = parser.parse_args()
    draw(args.folder)
    if args.page:
        args.page.write_text(fill(args.page.read_text(), "examples.tickets", table(gather(args.folder))))


if __name__ == "__main__":
    main()
