"""What is left of a network that CPNA pruned, retrained (Guo et al., Table 1 and Fig. 7): `python -m examples.xor.retrain`.

One fit has three rounds of the same recipe: CPNA anneals the connections; then the mask that it found is retrained from fresh
random weights, and from the initial weights.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console

from examples.arguments import add_sweep_arguments, at_least, run_sweep
from examples.page import fill
from examples.quiet import quiet_trainer
from examples.results import Row, load, mean_and_spread, save
from examples.xor.problem import Phases, XORDataModule, XORNet
from examples.xor.recipes import PROBLEMS, callbacks, recipe
from examples.xor.training import OF_WEIGHTS
from lightning_cpna import RoundReport, TicketRewind
from lightning_cpna.sweeps import grid

PRUNED = {"cpna_hidden": "hidden layer", "cpna_all": "both layers"}
PAPER = {3: (70.47, 71.68), 4: (52.83, 69.32), 5: (53.21, 66.29)}  # Table 1: random and init
ROUNDS = {"cpna": "CPNA", "reinit": "fresh weights", "init": "initial weights"}
COLOURS = {"cpna": "C2", "reinit": "C3", "init": "C0"}


def retrain(k: int, method: str, seed: int, board: Path, n: int = 3000) -> list[Row]:
    """Prune one network and retrain what is left; return a row a round, with its final test AUC.

    Args:
        k: Dimensions of the XOR.
        method: What is pruned, a key of ``PRUNED``.
        seed: The seed of data, initialisation and batches.
        board: The folder of TensorBoard runs.
        n: Training samples.
    """
    torch.set_num_threads(1)
    pl.seed_everything(seed + OF_WEIGHTS, verbose=False)
    steps = recipe(k, method)
    phases = [phase for phase, _ in steps]
    data = XORDataModule(k, PROBLEMS[k].p, n, seed, phases)
    module = XORNet(PROBLEMS[k].p, PROBLEMS[k].hidden, phases, n)
    ticket = TicketRewind(epochs=1, controls=["reinit"], monitor="auc/test")
    trainer = quiet_trainer(
        max_epochs=ticket.n_epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(board, f"{k}d_retrain_{method}", f"seed_{seed}", default_hp_metric=False),
        callbacks=[Phases(phases, n), *callbacks(steps, n, shrink=True), ticket],
    )
    trainer.fit(module, data)
    return [
        {
            "k": k,
            "method": method,
            "seed": seed,
            "round": report.branch if report.level else "cpna",
            "test_auc": round(100 * _value(report), 4),
            "connections": report.counts,
        }
        for report in ticket.reports
    ]


def _value(report: RoundReport) -> float:
    if report.value is None:
        raise RuntimeError(f"round {report.branch} has no auc/test: nothing was validated at its end")
    return report.value


def table(rows: list[Row]) -> str:
    """Return the results beside the paper's, in Markdown: mean and standard deviation over seeds."""
    found = mean_and_spread(rows, ("k", "method", "round"), "test_auc")
    lines = ["| problem | pruned | seeds | CPNA | fresh weights | initial weights | paper: fresh | paper: initial |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for k, method in dict.fromkeys((key[0], key[1]) for key in found):
        seeds = len({row["seed"] for row in rows if (row["k"], row["method"]) == (k, method)})
        cells = ["{:.1f} ± {:.1f}".format(*found[k, method, name]) for name in ROUNDS]
        paper = [f"{value:.1f}" for value in PAPER[k]] if method == "cpna_hidden" else ["", ""]
        lines.append(f"| {k}-D p={PROBLEMS[k].p} | {PRUNED[method]} | {seeds} | {' | '.join([*cells, *paper])} |")
    return "\n".join(lines)


def draw(rows: list[Row], file: Path) -> None:
    """Draw the test AUC of the seeds in descending order, a panel for each problem and mask (Fig. 7)."""
    problems = sorted({(row["k"], row["method"]) for row in rows}, key=lambda it: (list(PRUNED).index(it[1]), it[0]))
    columns = max(len([k for k, method in problems if method == name]) for name in PRUNED)
    figure, panels = plt.subplots(
        2, columns, figsize=(4.2 * columns, 7), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in panels.flat:
        axes.set_axis_off()
    for row, (name, pruned) in zip(panels, PRUNED.items(), strict=True):
        for axes, (k, method) in zip(row, (it for it in problems if it[1] == name), strict=False):
            for kind, label in ROUNDS.items():
                aucs = [r["test_auc"] for r in rows if (r["k"], r["method"], r["round"]) == (k, method, kind)]
                axes.plot(range(1, len(aucs) + 1), sorted(aucs, reverse=True), "o-", color=COLOURS[kind], label=label)
            axes.set(title=f"{k}-D, p={PROBLEMS[k].p}; {pruned} pruned", xlabel="trial, sorted", ylim=(45, 101))
            axes.set_axis_on()
            axes.grid(alpha=0.3)
        row[0].set_ylabel("test AUC, %")
    panels[0][0].legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Retrain over seeds; write results, figure and TensorBoard runs; with ``--page`` fill in that file's table."""
    parser = argparse.ArgumentParser(prog="python -m examples.xor.retrain", description=__doc__)
    parser.add_argument("--k", nargs="+", type=int, choices=PROBLEMS, default=[3], help="dimensions (default: 3)")
    parser.add_argument(
        "--methods", nargs="+", choices=PRUNED, default=list(PRUNED), help="what is pruned (default: both)"
    )
    parser.add_argument("--seeds", type=at_least(1), default=2, help="how many seeds (default: 2)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    add_sweep_arguments(parser, "runs/xor_retrain", data=False)
    parser.add_argument(
        "--from-results", nargs="+", type=Path, help="train nothing: gather the results of these folders"
    )
    parser.add_argument("--page", type=Path, help="a file with the marks of the table")
    args = parser.parse_args(arguments)
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.from_results:
        rows = [row for folder in args.from_results for row in load(folder, "retrain")]
    else:
        rows = run_sweep(
            args,
            partial(retrain, board=args.out / "tensorboard"),
            grid(k=args.k, method=args.methods, seed=range(args.first_seed, args.first_seed + args.seeds)),
            title="retraining",
        )
    console.print(f"results:      {save(rows, args.out, 'retrain')}")
    draw(rows, args.out / "retrain.png")
    print(table(rows))
    console.print(f"figure:       {args.out / 'retrain.png'}")
    if args.page:
        args.page.write_text(fill(args.page.read_text(), "examples.xor.retrain", table(rows)))


if __name__ == "__main__":
    main()
