"""SET and NPSET on the ASU data sets: `python -m examples.asu`, `--table2`, `--table3`, `--figure1`, `--figure2`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from examples.arguments import add_sweep_arguments, at_least, run_sweep
from examples.asu.figures import figure1, figure2, removal
from examples.asu.problem import METHODS, PROBLEMS
from examples.asu.tables import pivot, sizes, table2, table3
from examples.asu.training import result
from examples.data import is_here
from examples.results import Row, save
from lightning_cpna.sweeps import grid

FIGURE_SETS = ["Lung-discrete", "Yale", "madelon", "PCMAC"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.asu", description=__doc__)
    parser.add_argument("--set", nargs="+", choices=PROBLEMS, dest="sets", help="data sets (default: Lung-discrete)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="methods (default: SET NPSET)")
    parser.add_argument("--table2", action="store_true", help="six methods on every data set that is there")
    parser.add_argument("--table3", action="store_true", help="sizes and compression of all 15, without training")
    parser.add_argument("--figure1", action="store_true", help="accuracy against removed neurons, on four data sets")
    parser.add_argument(
        "--figure2", action="store_true", help="learning curves of SET, NPSET and Dense, on four data sets"
    )
    parser.add_argument("--seeds", type=at_least(1), default=1, help="how many seeds (default: 1)")
    parser.add_argument("--first-seed", type=int, default=100, help="the first of them (default: 100)")
    parser.add_argument(
        "--validate", action="store_true", help="hold out a quarter of the training part instead of the test"
    )
    add_sweep_arguments(parser, "runs/asu")
    return parser.parse_args(arguments)


def train_all(args: argparse.Namespace, sets: Sequence[str], methods: Sequence[str]) -> list[Row]:
    """Train every method on every data set with every seed; what was finished before is read, not run again."""
    settings = grid(seed=_seeds(args), method=methods, set=sets, **({"validate": [True]} if args.validate else {}))
    return run_sweep(
        args,
        partial(result, folder=args.data, board=args.out / "tensorboard"),
        settings,
        title="training",
    )


def _seeds(args: argparse.Namespace) -> range:
    return range(args.first_seed, args.first_seed + args.seeds)


def main(arguments: list[str] | None = None) -> None:
    """Run what was asked for."""
    args = parse(arguments)
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table3:
        rows = sizes()
        console.print(f"results:  {save(rows, args.out, 'table3')}")
        print(table3(rows))
    if args.table2:
        sets = args.sets or [name for name in PROBLEMS if is_here(name, args.data)]
        rows = train_all(args, sets, args.methods or METHODS[:6])
        console.print(f"results:  {save([{**row, 'train': []} for row in rows], args.out, 'table2')}")
        print(table2(rows))
    if args.figure1:
        rows = run_sweep(
            args,
            partial(removal, folder=args.data),
            grid(set=args.sets or FIGURE_SETS, seed=_seeds(args)),
            title="removing",
        )
        console.print(f"results:  {save(rows, args.out, 'figure1')}")
        console.print(f"figure:   {figure1(rows, args.out)}")
    if args.figure2:
        rows = train_all(args, args.sets or FIGURE_SETS, ("SET", "NPSET", "Dense"))
        console.print(f"results:  {save(rows, args.out, 'figure2')}")
        console.print(f"figure:   {figure2(rows, args.out)}")
    if not (args.table2 or args.table3 or args.figure1 or args.figure2):
        rows = train_all(args, args.sets or ["Lung-discrete"], args.methods or ("SET", "NPSET"))
        print(pivot(rows))
    if (board := args.out / "tensorboard").is_dir():
        console.print(f"TensorBoard: tensorboard --logdir {board}")


if __name__ == "__main__":
    main()
