"""Lottery tickets of LeNet-300-100 on MNIST, beside their controls: `python -m examples.tickets`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import joblib
from rich.console import Console
from rich.progress import track

from examples.arguments import at_least
from examples.results import save, save_whole
from examples.tickets.experiments import EPOCHS, EXPERIMENTS
from examples.tickets.figures import draw, gather, table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.tickets", description=__doc__)
    parser.add_argument(
        "--experiments", nargs="+", choices=EXPERIMENTS, default=["iterative"], help="what to run (default: iterative)"
    )
    parser.add_argument("--seeds", type=at_least(1), default=1, help="how many seeds (default: 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--epochs", type=at_least(1), default=EPOCHS, help=f"of each round (default: {EPOCHS})")
    parser.add_argument("--data", type=Path, help="folder with mnist/*.gz (default: LIGHTNING_CPNA_DATA, or download)")
    parser.add_argument(
        "--jobs", type=at_least(1), default=os.cpu_count(), help="parallel processes (default: the cores)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/tickets"), help="where everything is written (runs/tickets)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run experiments over seeds, those that were not run before; write their results and figures."""
    args = parse(arguments)
    console = Console()
    folder = args.out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    wanted = {(name, seed): folder / f"{name}_{seed}.json" for seed in seeds for name in args.experiments}
    calls = [
        joblib.delayed(_run)(name, seed, args.epochs, args.data, args.out / "tensorboard", file)
        for (name, seed), file in wanted.items()
        if not file.is_file()
    ]
    runs = joblib.Parallel(n_jobs=args.jobs, return_as="generator_unordered")(calls)
    for _ in track(runs, "training", total=len(calls), console=console):
        pass
    for name in args.experiments:
        rows = [row for seed in seeds for row in json.loads(wanted[name, seed].read_text())]
        console.print(f"results:  {save(rows, args.out, name)}")
    print(table(gather(args.out)))
    for figure in draw(args.out):
        console.print(f"figure:   {figure}")
    console.print(f"TensorBoard: tensorboard --logdir {args.out / 'tensorboard'}")


def _run(name: str, seed: int, epochs: int, data: Path | None, board: Path, file: Path) -> None:
    save_whole([{"seed": seed, **row} for row in EXPERIMENTS[name](seed, data, board, epochs)], file)


if __name__ == "__main__":
    main()
