"""The k-dimensional XOR experiment (Guo, She, Wu, Barbu, Table 1 and Fig. 8): `python -m examples.xor`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from pathlib import Path

import joblib
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.arguments import at_least
from examples.xor.figures import TITLES, save_figures
from examples.xor.recipes import METHODS, PROBLEMS, recipe
from examples.xor.table import rich_tables
from examples.xor.training import Job, Run, train


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
    parser.add_argument(
        "--jobs", type=at_least(1), default=os.cpu_count(), help="parallel processes (default: the cores)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/xor"), help="where everything is written (default: runs/xor)"
    )
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


def run_all(jobs: list[Job], n_jobs: int, out: Path, console: Console) -> list[Run]:
    """Train jobs in parallel processes, with a progress bar each."""
    totals = [sum(phase.steps(job.n) for phase, _ in recipe(job.k, job.method)) for job in jobs]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"))
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars,
    ):
        steps = np.memmap(Path(folder) / "steps", dtype=np.int64, mode="w+", shape=len(jobs))
        tasks = [
            bars.add_task(f"{job.k}-D {TITLES[job.method]}, seed {job.seed}", total=total)
            for job, total in zip(jobs, totals, strict=True)
        ]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                for task, step in zip(tasks, steps, strict=True):
                    bars.update(task, completed=int(step))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            runs: list[Run] = joblib.Parallel(n_jobs=n_jobs)(
                joblib.delayed(train)(job, out, steps, index) for index, job in enumerate(jobs)
            )
        finally:
            done.set()
            watcher.join()
        for task, total in zip(tasks, totals, strict=True):
            bars.update(task, completed=total)
    return runs


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table beside the paper's, and write results, figures and TensorBoard runs."""
    args = parse(arguments)
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = run_all(args.jobs_to_run, args.jobs, args.out, console)
    results = [run.as_dict() for run in runs]
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    figures = save_figures(runs, args.out)
    console.print(*rich_tables(results))
    console.print(f"results:      {args.out / 'results.json'}")
    for figure in figures:
        console.print(f"figure:       {figure}")
    board = os.path.relpath(Path(sys.executable).parent / "tensorboard")
    console.print(f"TensorBoard:  {board} --logdir {args.out / 'tensorboard'}")


if __name__ == "__main__":
    main()
