"""Every method on every data set, as much searched for each: `python -m examples.compare`."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import rankdata
from scipy.stats.qmc import LatinHypercube
from threadpoolctl import threadpool_limits
from torchmetrics.functional.classification import binary_auroc

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.compare.methods import OTHERS, Fitted, Settings
from examples.compare.networks import DENSE, OURS
from examples.compare.problems import SEARCHED, XOR, held_out, load, present, share_of_steps
from examples.data import Split
from examples.results import Row, counted, mean_and_spread
from lightning_cpna.sweeps import save_rows

METHODS = DENSE | OTHERS | OURS
FIRST_SEED = 6000  # of the splits that are reported
LITTLE = 0.5  # chosen: points that are no difference
OF_FITS = 10_000  # added to it: a method must not draw the numbers that the data of this seed were drawn from


class Size(NamedTuple):
    """How many trials of settings, fits of each, splits, and data sets of each XOR problem."""

    trials: int
    folds: int
    splits: int
    xor: int


SIZES = {"quick": Size(1, 1, 1, 1), "reduced": Size(6, 2, 5, 10), "full": Size(20, 4, 10, 20)}


def measure(fitted: Fitted, split: Split) -> float:
    """Return the AUC in percent where there are two classes, else the accuracy; 0 where a score is no number."""
    scores = fitted.scores(split.x)
    if not scores.isfinite().all():
        return 0.0
    if scores.shape[1] == 2:
        return 100 * float(binary_auroc(scores[:, 1] - scores[:, 0], split.y))
    return 100 * float((scores.argmax(1) == split.y).double().mean())


def drawn(problem: str, method: str, trial: int, n_trials: int) -> Settings:
    """Return the settings of a trial, of a Latin hypercube: every value of a setting is tried about as often.

    They are the same trials for every data set, but for the steps of networks, see `share_of_steps`. A space with few values
    has the same settings several times. Where a method has defaults, they are the first trial.
    """
    space, defaults = METHODS[method].space, METHODS[method].defaults
    if defaults is not None and trial == 0:
        return dict(defaults)
    n_drawn = n_trials - (defaults is not None)
    places = LatinHypercube(len(space), rng=np.random.default_rng(0)).random(n_drawn)[trial - n_trials]
    settings = {
        name: values[int(place * len(values))] for (name, values), place in zip(space.items(), places, strict=True)
    }
    if "steps" in settings:
        settings["steps"] = int(settings["steps"] * share_of_steps(problem))
    return settings


def timed_fit(method: str, settings: str, train: Split, n_classes: int, seed: int) -> tuple[Fitted, float]:
    """Fit a method; return it and the seconds that it took."""
    started = time.perf_counter()
    fitted = METHODS[method].fit(json.loads(settings), train, n_classes, seed)
    return fitted, round(time.perf_counter() - started, 3)


def search(*, problem: str, method: str, trial: int, settings: str, fold: int, folder: Path | None) -> Row:
    """Fit a method with the settings of a trial to what they may be chosen on, and measure it on a quarter of that."""
    data = load(problem, SEARCHED, folder)
    train, held = held_out(data.train, fold)
    with threadpool_limits(limits=1):
        fitted, seconds = timed_fit(method, settings, train, data.n_classes, fold)
        return {"validation": round(measure(fitted, held), 4), "seconds": seconds}


def repeat(*, problem: str, method: str, seed: int, settings: str, folder: Path | None) -> Row:
    """Fit a method with the chosen settings on another split, and test it."""
    data = load(problem, seed, folder)
    with threadpool_limits(limits=1):
        fitted, fit_seconds = timed_fit(method, settings, data.train, data.n_classes, OF_FITS + seed)
        test = measure(fitted, data.test)
        started = time.perf_counter()
        fitted.scores(data.test.x)
        predict_seconds = time.perf_counter() - started
    row: Row = {
        "test": round(test, 4),
        "n_test": len(data.test.y),
        "features": len(fitted.features),
        "parameters": fitted.parameters,
        "fit_seconds": fit_seconds,
        "predict_seconds": round(predict_seconds, 5),
    }
    if fitted.certified is not None:
        row["certified"] = fitted.certified
    if data.relevant is not None:
        right = data.relevant & set(fitted.features)
        row["precision"] = round(len(right) / max(1, len(fitted.features)), 4)
        row["recall"] = round(len(right) / len(data.relevant), 4)
        row["top"] = round(len(data.relevant & set(fitted.top(len(data.relevant)))) / len(data.relevant), 4)
        row["found"], row["missed"] = (" ".join(map(str, sorted(part))) for part in (right, data.relevant - right))
    return row


def best(rows: list[Row]) -> dict[tuple[str, str], str]:
    """Return for every problem and method the settings that were best in the mean on what was held out."""
    chosen: dict[tuple[str, str], tuple[float, str]] = {}
    for (problem, method, settings), (mean, _) in mean_and_spread(
        rows, ("problem", "method", "settings"), "validation"
    ).items():
        so_far = chosen.get((problem, method))
        if so_far is None or mean > so_far[0]:
            chosen[problem, method] = (mean, settings)
    return {key: settings for key, (_, settings) in chosen.items()}


def listed(chosen: dict[tuple[str, str], str]) -> list[Row]:
    """Return the chosen settings as rows that people can read."""
    return [
        {
            "problem": problem,
            "method": method,
            "settings": ", ".join(f"{k}={v}" for k, v in json.loads(settings).items()),
        }
        for (problem, method), settings in chosen.items()
    ]


def draw(rows: list[Row]) -> Figure:
    """Draw the test results: a panel for each problem, a point for each split."""
    problems = _problems(rows)
    columns = min(4, len(problems))
    drawn = Figure(figsize=(3.2 * columns + 1.6, 2.6 * -(-len(problems) // columns)), layout="constrained")
    grid_of_axes = drawn.subplots(-(-len(problems) // columns), columns, sharey=True, squeeze=False).flatten()
    for axes, problem in zip(grid_of_axes, problems, strict=False):
        for place, method in enumerate(METHODS):
            values = [row["test"] for row in rows if (row["problem"], row["method"]) == (problem, method)]
            axes.plot(values, [place] * len(values), "o", ms=3, color="C2" if method in OURS else "C0")
        axes.set(title=problem, yticks=range(len(METHODS)), yticklabels=METHODS)
        axes.grid(alpha=0.3)
    grid_of_axes[0].invert_yaxis()  # which all share
    for axes in grid_of_axes[len(problems) :]:
        axes.set_visible(False)
    drawn.supxlabel("test AUC where there are two classes, else accuracy, %; green: ours; the scales differ")
    return drawn


def table(rows: list[Row], searched: list[Row]) -> str:
    """Return three tables in Markdown: the test results, the features where it is known which matter, and what it costs."""
    return "\n\n".join(part for part in (_results(rows), _features(rows), _costs(rows, searched)) if part)


def _results(rows: list[Row]) -> str:
    """Return the mean of every method on every problem; of several splits the spread, too, and who is first is bold."""
    found = mean_and_spread(rows, ("problem", "method"), "test")
    several = len(rows) > len(found)
    lines = [f"| data set | tested | {' | '.join(METHODS)} |", "| --- | ---: |" + " ---: |" * len(METHODS)]
    ahead = _ahead(rows)
    for problem in _problems(rows):
        cells = []
        for method in METHODS:
            mean, spread = found[problem, method]
            text = f"{mean:.1f} ± {spread:.1f}" if several else f"{mean:.1f}"
            cells.append(f"**{text}**" if several and method in ahead[problem] else text)
        n_test = next(row["n_test"] for row in rows if row["problem"] == problem)
        lines.append(f"| {problem} | {n_test} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ahead(rows: list[Row]) -> dict[str, list[str]]:
    """List for each problem who has the highest mean, or is below it by no more than half a point or one tested row."""
    found = mean_and_spread(rows, ("problem", "method"), "test")
    ahead = {}
    for problem, n_test in {row["problem"]: row["n_test"] for row in rows}.items():
        least = max(found[problem, method][0] for method in METHODS) - max(LITTLE, 100 / n_test)
        ahead[problem] = [method for method in METHODS if found[problem, method][0] >= least]
    return ahead


def _features(rows: list[Row]) -> str:
    """Return how many features are read, how many of these matter, and of those that matter, where that is known."""
    known = _problems([row for row in rows if "recall" in row])
    if not known:
        return ""
    lines = ["| features: precision / recall, top | " + " | ".join(known) + " |", "| --- |" + " ---: |" * len(known)]
    for method in METHODS:
        cells = []
        for problem in known:
            own = [row for row in rows if (row["problem"], row["method"]) == (problem, method)]
            keys = ("features", "precision", "recall", "top")
            count, precision, recall, top = (fmean(row[key] for row in own) for key in keys)
            complete = sum(row["recall"] == 1 for row in own)
            cells.append(f"{count:.0f}: {precision:.2f} / {recall:.2f}, {top:.2f} (all in {complete} of {len(own)})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _costs(rows: list[Row], searched: list[Row]) -> str:
    """Return by method its mean ranks, medians over the problems of what it reads, holds, and takes, and the whole search."""
    found = mean_and_spread(rows, ("problem", "method"), "test")
    lines = [
        "| method | mean rank: XOR, madelon / rest | bold on | features read | parameters "
        "| fit, s (max) | predict, ms | search, s |",
        "| --- |" + " ---: |" * 7,
    ]
    parts = [_problems([row for row in rows if ("recall" in row) == is_known]) for is_known in (True, False)]
    ranks = {
        problem: dict(zip(METHODS, rankdata([-found[problem, method][0] for method in METHODS]), strict=True))
        for problem in _problems(rows)
    }
    ahead = _ahead(rows)
    for method in METHODS:
        n_bold = " / ".join(str(sum(method in ahead[problem] for problem in part)) for part in parts)
        mean_ranks = " / ".join(f"{fmean(ranks[it][method] for it in part):.1f}" if part else "none" for part in parts)
        medians = {}
        for value in ("features", "parameters", "fit_seconds", "predict_seconds"):
            over = mean_and_spread([row for row in rows if row["method"] == method], ("problem",), value)
            medians[value] = median(mean for mean, _ in over.values())
        longest = max(row["fit_seconds"] for row in rows if row["method"] == method)
        in_search = sum(row["seconds"] for row in searched if row["method"] == method)
        lines.append(
            f"| {method} | {mean_ranks} | {n_bold} | {medians['features']:,.0f} | {medians['parameters']:,.0f} "
            f"| {medians['fit_seconds']:.1f} ({longest:.0f}) | {1000 * medians['predict_seconds']:.1f} "
            f"| {in_search:,.0f} |"
        )
    return "\n".join(lines)


def _problems(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["problem"] for row in rows))


def main(arguments: list[str] | None = None) -> None:
    """Search, repeat, write the results, and draw them."""
    sizes = {
        name: f"{counted(it.trials, 'trial')} on {counted(it.folds, 'fold')}, {counted(it.splits, 'split')}, {it.xor} of XOR"
        for name, it in SIZES.items()
    }
    args = parse("examples.compare", __doc__, arguments, sizes=sizes, data=True, problems=present)
    size = SIZES[args.size]
    torch.set_num_threads(1)
    trials = [
        {"problem": problem, "method": method, "trial": trial, "settings": json.dumps(settings), "fold": fold}
        for problem in args.problems
        for method in METHODS
        for trial in range(size.trials)
        for settings in [drawn(problem, method, trial, size.trials)]
        for fold in range(size.folds)
    ]
    searched = run_sweep(args, partial(search, folder=args.data), trials, title="search")
    Console().print(f"searched: {save_rows(searched, args.out / 'search.csv')}")
    chosen = best(searched)
    save_rows(listed(chosen), args.out / "chosen.csv")
    again = [
        {"problem": problem, "method": method, "seed": seed, "settings": chosen[problem, method]}
        for problem, method in chosen
        for seed in range(FIRST_SEED, FIRST_SEED + (size.xor if problem in XOR else size.splits))
    ]
    rows = run_sweep(args, partial(repeat, folder=args.data), again, title="splits")
    finish(args, "examples.compare", rows, draw(rows), table(rows, searched))


if __name__ == "__main__":
    main()
