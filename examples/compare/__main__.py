"""Every method on every data set, as much searched for each: `python -m examples.compare`."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.model_selection import ParameterSampler
from threadpoolctl import threadpool_limits
from torchmetrics.functional.classification import binary_auroc

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.compare.methods import OTHERS, Fitted, Settings
from examples.compare.networks import DENSE, OURS
from examples.compare.problems import held_out, load, present
from examples.data import Split
from examples.results import Row, counted, mean_and_spread

METHODS = DENSE | OTHERS | OURS
FIRST_SEED = 6000  # of the splits that are reported; the one that is searched on is of the seed before
SIZES = {"quick": (1, 1), "reduced": (6, 5), "full": (20, 10)}


def measure(fitted: Fitted, split: Split) -> float:
    """Return the AUC in percent where there are two classes, else the accuracy."""
    scores = fitted.scores(split.x)
    if scores.shape[1] == 2:
        return 100 * float(binary_auroc(scores[:, 1] - scores[:, 0], split.y))
    return 100 * float((scores.argmax(1) == split.y).double().mean())


def drawn(method: str, trial: int, n_trials: int) -> Settings:
    """Return the settings of a trial: the same trials for every data set."""
    return dict(list(ParameterSampler(METHODS[method].space, n_trials, random_state=0))[trial])


def search(*, problem: str, method: str, trial: int, n_trials: int, folder: Path | None) -> Row:
    """Fit a method with the settings of a trial on the training part of one split, and measure it on a quarter of that."""
    data = load(problem, FIRST_SEED - 1, folder)
    train, held = held_out(data.train, 0)
    settings = drawn(method, trial, n_trials)
    with threadpool_limits(limits=1):
        fitted = METHODS[method].fit(settings, train, data.n_classes, 0)
        return {"validation": round(measure(fitted, held), 4), "settings": json.dumps(settings)}


def repeat(*, problem: str, method: str, seed: int, settings: str, folder: Path | None) -> Row:
    """Fit a method with the chosen settings on another split, and test it."""
    data = load(problem, seed, folder)
    with threadpool_limits(limits=1):
        started = time.perf_counter()
        fitted = METHODS[method].fit(json.loads(settings), data.train, data.n_classes, seed)
        fit_seconds = time.perf_counter() - started
        test = measure(fitted, data.test)
        started = time.perf_counter()
        fitted.scores(data.test.x)
        predict_seconds = time.perf_counter() - started
    row: Row = {
        "test": round(test, 4),
        "features": len(fitted.features),
        "parameters": fitted.parameters,
        "fit_seconds": round(fit_seconds, 3),
        "predict_seconds": round(predict_seconds, 5),
    }
    if data.relevant is not None:
        right = len(data.relevant & set(fitted.features))
        row["precision"] = round(right / max(1, len(fitted.features)), 4)
        row["recall"] = round(right / len(data.relevant), 4)
    return row


def best(rows: list[Row]) -> dict[tuple[str, str], str]:
    """Return for every problem and method the settings that were best on what was held out."""
    chosen: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["problem"], row["method"])
        if key not in chosen or row["validation"] > chosen[key]["validation"]:
            chosen[key] = row
    return {key: row["settings"] for key, row in chosen.items()}


def draw(rows: list[Row]) -> Figure:
    """Draw the test results: a panel for each problem, a point for each split."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    columns = min(4, len(problems))
    drawn = Figure(figsize=(3.2 * columns + 1.6, 2.6 * -(-len(problems) // columns)), layout="constrained")
    grid_of_axes = drawn.subplots(-(-len(problems) // columns), columns, sharey=True, squeeze=False).flat
    for axes, problem in zip(grid_of_axes, problems, strict=False):
        for place, method in enumerate(METHODS):
            values = [row["test"] for row in rows if (row["problem"], row["method"]) == (problem, method)]
            axes.plot(values, [place] * len(values), "o", ms=3, color="C2" if method in OURS else "C0")
        axes.set(title=problem, yticks=range(len(METHODS)), yticklabels=METHODS)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    for axes in list(grid_of_axes)[len(problems) :]:
        axes.set_visible(False)
    drawn.supxlabel("test AUC where there are two classes, else accuracy, %")
    return drawn


def table(rows: list[Row]) -> str:
    """Return in Markdown the mean and spread of every method on every problem; the best mean is bold."""
    found = mean_and_spread(rows, ("problem", "method"), "test")
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    lines = ["| | " + " | ".join(problems) + " |", "| --- |" + " ---: |" * len(problems)]
    highest = {problem: max(mean for (name, _), (mean, _) in found.items() if name == problem) for problem in problems}
    for method in METHODS:
        cells = []
        for problem in problems:
            if (problem, method) not in found:
                cells.append("")
                continue
            mean, spread = found[problem, method]
            text = f"{mean:.1f} ± {spread:.1f}"
            cells.append(f"**{text}**" if mean == highest[problem] else text)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Search, repeat, write the results, and draw them."""
    sizes = {name: f"{counted(trials, 'trial')} and {counted(n, 'split')}" for name, (trials, n) in SIZES.items()}
    args = parse("examples.compare", __doc__, arguments, sizes=sizes, data=True)
    n_trials, n_splits = SIZES[args.size]
    torch.set_num_threads(1)
    problems = present(args.data)
    settings = [
        {"problem": problem, "method": method, "trial": trial, "n_trials": n_trials}
        for problem in problems
        for method in METHODS
        for trial in range(n_trials)
    ]
    chosen = best(run_sweep(args, partial(search, folder=args.data), settings, title="search"))
    again = [
        {"problem": problem, "method": method, "seed": seed, "settings": chosen[problem, method]}
        for problem, method in chosen
        for seed in range(FIRST_SEED, FIRST_SEED + n_splits)
    ]
    rows = run_sweep(args, partial(repeat, folder=args.data), again, title="splits")
    finish(args, "examples.compare", rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
