"""Lottery tickets of LeNet-300-100 on MNIST, beside their controls: `python -m examples.tickets`."""

from __future__ import annotations

import argparse
from functools import partial

from rich.console import Console

from examples.arguments import add_sweep_arguments, at_least, run_sweep
from examples.results import save
from examples.tickets.experiments import EPOCHS, EXPERIMENTS, run
from examples.tickets.figures import draw, gather, table
from lightning_cpna.sweeps import grid


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.tickets", description=__doc__)
    parser.add_argument(
        "--experiments", nargs="+", choices=EXPERIMENTS, default=["iterative"], help="what to run (default: iterative)"
    )
    parser.add_argument("--seeds", type=at_least(1), default=1, help="how many seeds (default: 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--epochs", type=at_least(1), default=EPOCHS, help=f"of each round (default: {EPOCHS})")
    add_sweep_arguments(parser, "runs/tickets")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run experiments over seeds, those that were not run before; write their results and figures."""
    args = parse(arguments)
    console = Console()
    rows = run_sweep(
        args,
        partial(run, folder=args.data, board=args.out / "tensorboard"),
        grid(
            experiment=args.experiments,
            seed=range(args.first_seed, args.first_seed + args.seeds),
            epochs=[args.epochs],
        ),
        title="training",
    )
    for name in args.experiments:
        own = [row for row in rows if row["experiment"] == name]
        console.print(f"results:  {save(own, args.out, name)}")
    print(table(gather(args.out)))
    for figure in draw(args.out):
        console.print(f"figure:   {figure}")
    console.print(f"TensorBoard: tensorboard --logdir {args.out / 'tensorboard'}")


if __name__ == "__main__":
    main()
