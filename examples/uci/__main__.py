"""Pruned and dense networks on five UCI sets (Guo, She, Wu, Barbu, Table 3): `python -m examples.uci car`."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.arguments import add_sweep_arguments, at_least, run_sweep
from examples.uci.recipes import METHODS, PROBLEMS, add_sets, named, phases, searched, shortened
from examples.uci.runs import check_data, retrain
from examples.uci.tables import differences, table3
from lightning_cpna.sweeps import save_rows

CHOSEN = Path(__file__).parent / "results" / "chosen.json"
SIDE_BY_SIDE = 10  # chosen: networks in one fit; more gain little, and share a core
FIRST_SEED = 10  # the recipes' phases come from a study on splits 0 to 4, and the settings from a search on split 0
PROTOCOLS = ("paper", "honest")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.uci", description=__doc__)
    add_sets(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["NN (best)", "NN (equivalent)", "CPNA"],
        help="what to train (default: the three of the paper)",
    )
    parser.add_argument(
        "--protocol",
        choices=[*PROTOCOLS, "both"],
        default="both",
        help="paper: all of the training part, best epoch on the test part; honest: epoch chosen on a tenth of it",
    )
    parser.add_argument("--seeds", type=at_least(1), help="how many splits (default: 20, of isolet 10; 2 with --quick)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help=f"the first of them (default: {FIRST_SEED})")
    parser.add_argument("--quick", action="store_true", help="a tenth of the epochs, in the folder quick")
    parser.add_argument(
        "--chosen",
        type=Path,
        default=CHOSEN,
        help="settings that examples.uci.search has written (default: the committed)",
    )
    add_sweep_arguments(parser, "runs/uci")
    args = parser.parse_args(arguments)
    args.sets, args.methods = named(args.sets), list(dict.fromkeys(args.methods))
    if args.quick:
        args.out = args.out / "quick"
    args.protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)
    chosen = json.loads(args.chosen.read_text()) if args.chosen.is_file() else {}
    wanted = [(name, searched(method)) for name in args.sets for method in args.methods]
    if missing := [
        f"{method} on {name}" for name, method in dict.fromkeys(wanted) if method not in chosen.get(name, {})
    ]:
        parser.error(
            f"argument --chosen: {args.chosen} has nothing for {', '.join(missing)}; python -m examples.uci.search writes it"
        )
    args.settings = [
        setting(name, method, protocol, chosen[name], seeds, args.quick)
        for name in args.sets
        for method in args.methods
        for protocol in args.protocols
        for seeds in _groups(args.first_seed, args.seeds or (2 if args.quick else PROBLEMS[name].splits))
    ]
    return args


def setting(
    name: str, method: str, protocol: str, chosen: dict[str, dict[str, Any]], seeds: list[int], quick: bool
) -> dict[str, Any]:
    """Return the arguments of `retrain`."""
    problem, epochs = PROBLEMS[name], phases(PROBLEMS[name], method)
    choice = dict(chosen[searched(method)])
    if method == "nodes":
        choice["n_hidden"] = problem.equivalent
    plan = {key: choice.pop(key) for key in ("hidden", "batch_size", "score")}
    return {
        "set": name,
        "method": method,
        "protocol": protocol,
        "epochs": list(shortened(epochs, 10) if quick else epochs),
        **plan,
        "choice": choice,
        "seeds": seeds,
    }


def _groups(first: int, n: int) -> list[list[int]]:
    seeds = list(range(first, first + n))
    return [seeds[i : i + SIDE_BY_SIDE] for i in range(0, n, SIDE_BY_SIDE)]


def main(arguments: list[str] | None = None) -> None:
    """Train what was not trained before, write the results of this command, and print the tables."""
    args = parse(arguments)
    check_data(args.sets, args.data)
    console = Console()
    rows = run_sweep(
        args,
        partial(retrain, folder=args.data),
        args.settings,
        title="training",
    )
    rows = [
        {key: value for key, value in (row | row["choice"]).items() if key not in ("choice", "seeds", "epochs")}
        for row in rows
    ]
    for ending in ("csv", "parquet"):
        console.print(f"results:  {save_rows(rows, args.out / f'table3.{ending}')}")
    print(f"{table3(rows)}\n\n{differences(rows)}")
    if args.quick:
        console.print("This was a quick look, of a tenth of the epochs: what it shows need not hold at full length.")


if __name__ == "__main__":
    main()
