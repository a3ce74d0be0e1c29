"""The k-dimensional XOR experiment (Guo, She, Wu, Barbu, Table 1 and Fig. 8): `python -m examples.xor`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console

from examples.arguments import add_sweep_arguments, at_least, run_sweep
from examples.xor.figures import save_figures
from examples.xor.recipes import METHODS, PROBLEMS
from examples.xor.table import rich_tables
from examples.xor.training import Job, Run, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.xor", description=__doc__)
    parser.add_argument("--k", choices=["3", "4", "5", "all"], default="3", help="dimensions of the XOR (default: 3)")
    parser.add_argument("--p", type=int, help="dimensions of the data (default: the paper's 60, 40, 20)")
    parser.add_argument(
        "--n", type=at_least(2), default=3000, help="training samples; as many for the test (default: 3000)"
    )
    parser.add_argument("--hidden", type=int, help="hidden units (default: the paper's 1024, 2048, 4096)")
    parser.add_argument("--seeds", type=at_least(1), default=2, help="how many seeds (default: 2)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["nn", "cpna_hidden", "cpna_all", "fsa_cpna"],
        help="what to train (default: nn cpna_hidden cpna_all fsa_cpna)",
    )
    add_sweep_arguments(parser, "runs/xor", data=False)
    args = parser.parse_args(arguments)
    ks = list(PROBLEMS) if args.k == "all" else [int(args.k)]
    if args.p is not None and args.p < max(ks):
        parser.error(f"argument --p: {args.p} is less than k; allowed is {max(ks)} or more")
    args.jobs_to_run = [
        Job(k, args.p or PROBLEMS[k].p, args.n, args.hidden or PROBLEMS[k].hidden, method, args.first_seed + i)
        for k in ks
        for method in args.methods
        for i in range(args.seeds)
    ]
    return args


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table beside the paper's, and write results, figures and TensorBoard runs."""
    args = parse(arguments)
    console = Console()
    rows = run_sweep(
        args, partial(run, board=args.out / "tensorboard"), map(asdict, args.jobs_to_run), title="training"
    )
    runs = [Run.of_row(row) for row in rows]
    results = [run.as_dict() for run in runs]
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    files = save_figures(runs, args.out)
    console.print(*rich_tables(results))
    console.print(f"results:      {args.out / 'results.json'}")
    for file in files:
        console.print(f"{'figure' if file.suffix == '.png' else 'curves'}:       {file}")
    board = os.path.relpath(Path(sys.executable).parent / "tensorboard")
    console.print(f"TensorBoard:  {board} --logdir {args.out / 'tensorboard'}")


if __name__ == "__main__":
    main()
