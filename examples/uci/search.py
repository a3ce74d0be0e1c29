"""The search for each set's settings, on folds of the training part of one split: `python -m examples.uci.search car`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import partial
from typing import Any

from rich.console import Console

from examples.arguments import add_sweep_arguments, at_least, run_sweep
from examples.results import Row, mean_and_spread
from examples.uci.recipes import PROBLEMS, add_sets, dense, named, phases, shortened
from examples.uci.runs import check_data, cross_validate
from examples.uci.training import Epochs
from lightning_cpna.sweeps import grid, log_hparams, save_rows

HIDDEN, WEIGHT_DECAY, BATCH_SIZES = (
    [16, 32, 64, 128, 256, 512],
    [1e-4, 1e-3, 1e-2, 1e-1],
    [16, 32, 64],
)  # the paper's grid
LEARNING_RATES = [1e-3, 3e-3, 1e-2]
SMALL_WEIGHT_DECAY = [0.0, 1e-5, 1e-4, 1e-3]  # for few connections
LEVELS = [0.5, 0.75, 1.0]  # of the paper's connections
STAGES = {
    "pruning": ("lr", "weight_decay"),
    "levels": ("score", "n_hidden", "n_input"),
    "grid": ("hidden", "batch_size", "weight_decay"),
    "rates": ("lr", "weight_decay"),
}
# Of the five folds, where one draw does not tell the settings apart.
DRAWS = {("segmentation", "pruning"): 5, ("segmentation", "levels"): 5}
BEFORE = {"levels": ("pruning", "CPNA"), "rates": ("grid", "NN (best)")}  # by stage: which it needs, for which method
Choice = dict[str, Any]


def settings(stage: str, name: str, chosen: dict[str, Choice]) -> list[dict[str, Any]]:
    """Return what a stage trains for a set.

    First CPNA's learning rate and weight decay, at the paper's connections; then the score of its input connections, and
    how many of all remain. Then the paper's grid for the dense network, and for it and NN (equivalent) the learning rate.

    Args:
        stage: One of `STAGES`.
        name: The set.
        chosen: What the stages before chose, by method.
    """
    problem = PROBLEMS[name]

    def setting(method: str, hidden: int, batch_size: int, epochs: Epochs, choices: list[Choice], score: str) -> Choice:
        return {
            "set": name,
            "method": method,
            "hidden": hidden,
            "batch_size": batch_size,
            "epochs": list(epochs),
            "score": score,
            "choices": choices,
        }

    if stage in ("pruning", "levels"):
        n_input, n_hidden = problem.paper["CPNA"].connections
        common = ("CPNA", problem.start, problem.batch_size, problem.epochs)
        if stage == "pruning":
            choices = grid(lr=[1e-3, 3e-3], weight_decay=SMALL_WEIGHT_DECAY, n_hidden=[n_hidden], n_input=[n_input])
            return [setting(*common, choices, "path")]
        rates = {key: chosen["CPNA"][key] for key in STAGES["pruning"]}
        choices = [rates | {"n_hidden": int(level * n_hidden), "n_input": int(level * n_input)} for level in LEVELS]
        return [setting(*common, choices, score) for score in ("path", "magnitude")]
    if stage == "grid":
        epochs = dense(problem.grid_epochs, problem.grid_epochs // 3)
        return [
            setting("NN (best)", hidden, batch_size, epochs, grid(lr=[1e-3], weight_decay=WEIGHT_DECAY), "path")
            for hidden in HIDDEN
            for batch_size in BATCH_SIZES
        ]
    hidden, batch_size, weight_decay = (chosen["NN (best)"][key] for key in STAGES["grid"])
    best = grid(lr=LEARNING_RATES, weight_decay=[weight_decay])
    equivalent = grid(lr=LEARNING_RATES, weight_decay=SMALL_WEIGHT_DECAY)
    return [
        setting("NN (best)", hidden, batch_size, phases(problem, "NN (best)"), best, "path"),
        setting(
            "NN (equivalent)", problem.equivalent, batch_size, phases(problem, "NN (equivalent)"), equivalent, "path"
        ),
    ]


def best(rows: Iterable[Row], keys: tuple[str, ...]) -> Choice:
    """Return the entries of the rows with the highest mean validation accuracy; of equals, the first."""
    means = mean_and_spread(rows, keys, "validation")
    winner = max(means, key=lambda values: means[values][0])
    return dict(zip(keys, winner, strict=True))


def choose(stage: str, rows: list[Row], chosen: dict[str, Choice]) -> dict[str, Choice]:
    """Return the choices for a set, by method, with those of a stage added."""
    found = dict(chosen)
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        kept = {
            key: own[0][key] for key in ("hidden", "batch_size", "score", "lr", "n_hidden", "n_input") if key in own[0]
        }
        found[method] = found.get(method, {}) | kept | best(own, STAGES[stage])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run stages of the search one after the other; write every result, and what is chosen."""
    parser = argparse.ArgumentParser(prog="python -m examples.uci.search", description=__doc__)
    add_sets(parser)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all, in this order")
    parser.add_argument(
        "--runs",
        type=at_least(1),
        help="draws of the five folds for each setting (default: 1, for CPNA on segmentation 5; paper: 10)",
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, in the folder quick")
    add_sweep_arguments(parser, "runs/uci")
    args = parser.parse_args(arguments)
    args.sets = named(args.sets)
    if args.quick:
        args.out = args.out / "quick"
    console = Console()
    sets, file = args.sets, args.out / "chosen.json"
    chosen: dict[str, dict[str, Choice]] = json.loads(file.read_text()) if file.is_file() else {}
    stages = sorted(args.stages, key=list(STAGES).index)
    for stage in stages:
        earlier, method = BEFORE.get(stage, ("", ""))
        missing = [name for name in sets if method not in chosen.get(name, {})]
        if missing and earlier not in ("", *stages):
            parser.error(f"argument --stages: {stage} comes after {earlier}, which {file} has not for {missing}")
    check_data(sets, args.data)
    for stage in stages:
        wanted = [
            setting | {"run": run} | ({"epochs": list(shortened(Epochs(*setting["epochs"]), 10))} if args.quick else {})
            for name in sets
            for setting in settings(stage, name, chosen.get(name, {}))
            for run in range(args.runs or DRAWS.get((name, stage), 1))
        ]
        rows = run_sweep(
            args,
            partial(cross_validate, folder=args.data),
            wanted,
            title=f"search: {stage}",
        )
        rows = [{key: value for key, value in row.items() if key not in ("choices", "epochs")} for row in rows]
        console.print(f"results:  {save_rows(rows, args.out / f'search_{stage}.csv')}")
        for name in sets:
            own = [row for row in rows if row["set"] == name]
            chosen[name] = choose(stage, own, chosen.get(name, {}))
            console.print(f"{name}: {chosen[name]}")
            keys = tuple(dict.fromkeys(("method", "score", "hidden", "batch_size", *STAGES[stage])))
            means = mean_and_spread(own, keys, "validation")
            points = [
                dict(zip(keys, values, strict=True)) | {"validation": mean} for values, (mean, _) in means.items()
            ]
            log_hparams(points, keys, ["validation"], args.out / "tensorboard" / stage / name)
        file.write_text(json.dumps(chosen, indent=1) + "\n")
    console.print(f"chosen:   {file}; to train with it: python -m examples.uci ... --chosen {file}")
    console.print(f"TensorBoard: {args.out / 'tensorboard'}")


if __name__ == "__main__":
    main()
