"""The figures and tables of the saliency experiments, from their rows of results."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from examples.page import fill
from examples.results import Row, load, mean_and_spread

COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9")
LABELS = {
    "magnitude": "magnitude", "first_order": "first order |w g|", "second_order": "second order", "hessian": "|w (H w)|",
    "hessian_diagonal": "Hessian diagonal", "random": "random", "norm": "norm", "path": "path", "activation": "activation",
    "gradient": "gradient x activation", "mean_replacement": "mean replacement saliency",
    "penalty": "mean replacement penalty", "frame_potential": "frame potential", "inner_product": "inner product",
}  # fmt: skip


def _lines(axes: Axes, rows: list[Row], line: str, x: str, y: str) -> None:
    found = mean_and_spread(rows, (line, x), y)
    for i, kind in enumerate(dict.fromkeys(row[line] for row in rows)):
        points = sorted(key[1] for key in found if key[0] == kind)
        mean = np.array([found[kind, point][0] for point in points])
        spread = np.array([found[kind, point][1] for point in points])
        style = {"color": "0.5", "linestyle": "--"} if kind == "random" else {"color": COLOURS[i]}
        axes.plot(points, mean, marker=".", label=LABELS.get(kind, str(kind)), **style)  # type: ignore[arg-type]
        axes.fill_between(points, mean - spread, mean + spread, alpha=0.15, linewidth=0, color=style["color"])
    axes.grid(alpha=0.3)


def draw_curves(rows: list[Row], out: Path) -> list[Path]:
    """Draw accuracy against sparsity: weights, units set to zero, units replaced by their mean."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), sharey=True, layout="constrained")
    parts = [
        ("weights set to zero", [row for row in rows if row["what"] == "weights"]),
        ("units set to zero", [row for row in rows if row["what"] == "units" and row["replace"] == "zero"]),
        ("units replaced by their mean", [row for row in rows if row["what"] == "units" and row["replace"] == "mean"]),
    ]
    for axes, (title, part) in zip(panels, parts, strict=True):
        _lines(axes, part, "score", "sparsity", "accuracy")
        axes.set(title=title, xlabel="removed")
        axes.legend(fontsize=8, loc="lower left")
    panels[0].set(ylabel="test accuracy %", ylim=(0, 101))
    n_seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"LeNet-300-100 on MNIST, removed at once, not trained after: mean and spread of {n_seeds} seeds")
    return _save(figure, out / "curves.png")


def removable_table(rows: list[Row]) -> str:
    """Return how many units can go, in Markdown."""
    found = mean_and_spread(rows, ("score", "replace"), "removable")
    lines = ["| score | set to zero | replaced by their mean |", "| --- | ---: | ---: |"]
    for kind in dict.fromkeys(row["score"] for row in rows):
        cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in (found[kind, "zero"], found[kind, "mean"])]
        lines.append(f"| {LABELS[kind]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_removable(rows: list[Row], out: Path) -> list[Path]:
    """Write the table."""
    return _write(removable_table(rows), out / "removable.md")


def stops(rows: list[Row], tolerance: float = 0.3) -> list[Row]:
    """Choose for each seed and score the last note whose validation accuracy is at most so much below the dense one."""
    chosen = []
    runs: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        runs[row["seed"], row["score"]].append(row)
    for notes in runs.values():
        dense = notes[0]
        good = [row for row in notes if row["validation_accuracy"] >= dense["validation_accuracy"] - tolerance]
        chosen.append(
            {
                **good[-1],
                "times_smaller": good[-1]["dense_parameters"] / good[-1]["parameters"],
                "lost": dense["test_accuracy"] - good[-1]["test_accuracy"],
            }
        )
    return chosen


def draw_smaller(rows: list[Row], out: Path) -> list[Path]:
    """Draw test accuracy against parameters, and print where validation says stop."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for i, kind in enumerate(dict.fromkeys(row["score"] for row in rows)):
        for seed in sorted({row["seed"] for row in rows}):
            run = [row for row in rows if (row["score"], row["seed"]) == (kind, seed)]
            label = LABELS[kind] if seed == 0 else None
            sizes = [row["dense_parameters"] / row["parameters"] for row in run]
            axes.plot(sizes, [row["test_accuracy"] for row in run], color=f"C{i}", alpha=0.7, label=label)
    chosen = stops(rows)
    for i, kind in enumerate(dict.fromkeys(row["score"] for row in rows)):
        ends = [row for row in chosen if row["score"] == kind]
        axes.plot([e["times_smaller"] for e in ends], [e["test_accuracy"] for e in ends], "o", color=f"C{i}")
    axes.set(xscale="log", xlabel="times fewer parameters", ylabel="test accuracy %", ylim=(94, 99))
    axes.set_title("Units removed while LeNet-300-100 trains on; dots: the stop")
    axes.grid(alpha=0.3)
    axes.legend()
    return [*_save(figure, out / "smaller.png"), *_write(smaller_table(rows), out / "smaller.md")]


def smaller_table(rows: list[Row]) -> str:
    """Return how small the networks get, in Markdown."""
    lines = [
        "| score | times fewer parameters | test points lost | units left, by seed |",
        "| --- | ---: | ---: | --- |",
    ]
    for kind in dict.fromkeys(row["score"] for row in rows):
        ends = [row for row in stops(rows) if row["score"] == kind]
        cells = []
        for key in ("times_smaller", "lost"):
            values = [row[key] for row in ends]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        units = ", ".join("-".join(map(str, row["units"])) for row in ends)
        lines.append(f"| {LABELS[kind]} | {' | '.join(cells)} | {units} |")
    return "\n".join(lines)


def draw_concentration(rows: list[Row], out: Path) -> list[Path]:
    """Draw accuracy as units go, smallest or largest saliency first, for each width, on true and shuffled labels."""
    figure, panels = plt.subplots(2, 3, figsize=(15, 8.4), layout="constrained")
    for i, labels in enumerate(("true", "shuffled")):
        part = [row for row in rows if row["labels"] == labels]
        shown = "validation_accuracy" if labels == "true" else "training_accuracy"
        for axes, first in zip(panels[i], ("smallest", "largest"), strict=False):
            _lines(axes, [row for row in part if row["first"] == first], "width", "removed", shown)
            axes.set(title=f"{labels} labels, {first} first", xlabel="units removed", ylim=(0, 101))
            axes.set_ylabel(shown.replace("_", " ") + " %")
            axes.legend(title="width", fontsize=8)
        shares = mean_and_spread(part, ("width",), "share_of_top_tenth")
        widths = sorted(width for (width,) in shares)
        panels[i][2].errorbar(
            widths, [shares[w,][0] for w in widths], [shares[w,][1] for w in widths], marker="o", capsize=3
        )
        panels[i][2].axhline(0.1, color="0.5", linestyle="--")
        panels[i][2].set(
            xscale="log", xlabel="width", ylim=(0, 1), title=f"{labels} labels: does importance concentrate?"
        )
        panels[i][2].set_ylabel("share of the top tenth in the summed penalty")
        panels[i][2].grid(alpha=0.3)
    return _save(figure, out / "concentration.png")


def _save(figure: Any, file: Path) -> list[Path]:
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return [file]


def _write(table: str, file: Path) -> list[Path]:
    file.write_text(table + "\n")
    print(table)
    return [file]


FIGURES: dict[str, Callable[[list[Row], Path], list[Path]]] = {
    "curves": draw_curves,
    "removable": draw_removable,
    "smaller": draw_smaller,
    "concentration": draw_concentration,
}
TABLES: dict[str, Callable[[list[Row]], str]] = {"removable": removable_table, "smaller": smaller_table}


def main() -> None:
    """Draw the figures of results; with ``--page`` put the tables into that file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where examples.saliency wrote its results")
    parser.add_argument("--page", type=Path, help="a file with the marks of the tables")
    args = parser.parse_args()
    for name, draw in FIGURES.items():
        if (args.folder / f"{name}.json").is_file():
            draw(load(args.folder, name), args.folder)
            if args.page and name in TABLES:
                table = TABLES[name](load(args.folder, name))
                args.page.write_text(fill(args.page.read_text(), f"examples.saliency {name}", table))


if __name__ == "__main__":
    main()
