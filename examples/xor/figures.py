"""The figures of the XOR experiment."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from examples.results import Row
from examples.xor.training import Run
from lightning_cpna import plot_connectivity
from lightning_cpna.sweeps import save_rows

TITLES = {
    "nn": "NN",
    "cpa_hidden": "CPA (hidden)",
    "cpna_hidden": "CPNA (hidden)",
    "cpna_all": "CPNA (all)",
    "cpna_all_plain": "CPNA (all) A=0",
    "fsa_cpna": "FSA + CPNA",
}
COLORS = {"train": "#b2182b", "test": "#2166ac", "hidden": "#b2182b", "input": "#2166ac"}


def training_figure(runs: list[Run]) -> Figure:
    """Draw cross-entropy and AUC over training, one column a method (Guo et al., Fig. 8)."""
    figure = Figure(figsize=(3.6 * len(runs) + 0.6, 6), layout="constrained")
    rows = figure.subplots(2, len(runs), squeeze=False, sharey="row")
    for column, run in enumerate(runs):
        for row, quantity in enumerate(("loss", "auc")):
            axes = rows[row][column]
            for split in ("train", "test"):
                axes.plot(run.history["step"], run.history[f"{quantity}/{split}"], color=COLORS[split], label=split)
            for boundary in run.boundaries[:-1]:
                axes.axvline(boundary, color="#bbbbbb", linewidth=0.8, zorder=0)
            axes.set_xlabel("optimizer step" if row else "")
        rows[0][column].set_title(f"{TITLES[run.job.method]}\ntest AUC {run.test_auc:.2f} %")
    rows[0][0].set(ylabel="cross-entropy", ylim=(0, 1.0))
    rows[1][0].set(ylabel="AUC", ylim=(0.45, 1.01))
    rows[0][0].legend(frameon=False)
    job = runs[0].job
    figure.suptitle(f"{job.k}-D XOR in {job.p} dimensions, seed {job.seed}; grey lines: the recipe's phases")
    return figure


def connections_figure(runs: list[Run]) -> Figure:
    """Draw the live connections of both layers over training, one column a method."""
    figure = Figure(figsize=(3.6 * len(runs) + 0.6, 3.6), layout="constrained")
    figure.suptitle(f"seed {runs[0].job.seed}; inputs of units that feed nothing go when the hidden layer is done")
    (row,) = figure.subplots(1, len(runs), squeeze=False, sharey=True)
    for axes, run in zip(row, runs, strict=True):
        for layer in ("input", "hidden"):
            axes.plot(run.history["step"], run.history[f"connections/{layer}"], color=COLORS[layer], label=layer)
        axes.set(xlabel="optimizer step", yscale="log", title=TITLES[run.job.method])
    row[0].set_ylabel("live connections")
    row[0].legend(frameon=False)
    return figure


def curves(runs: list[Run]) -> list[Row]:
    """Return what both figures over training show, a row for each method and validation."""
    return [
        {"method": run.job.method, **{name: values[i] for name, values in run.history.items()}}
        for run in runs
        for i in range(len(run.history["step"]))
    ]


def save_figures(runs: list[Run], out: Path) -> list[Path]:
    """Draw the first seed of every problem and method, and write its curves; return the files."""
    files: list[Path] = []
    for k, p in dict.fromkeys((run.job.k, run.job.p) for run in runs):
        first = min(run.job.seed for run in runs if (run.job.k, run.job.p) == (k, p))
        shown = [run for run in runs if (run.job.k, run.job.p, run.job.seed) == (k, p, first)]
        files.append(save_rows(curves(shown), out / f"{k}d_p{p}_training.csv"))
        figures = {"training": training_figure(shown), "connections": connections_figure(shown)}
        for run in shown:
            if run.connections[run.connectivity.layers[0][0]] < run.job.p * run.job.hidden:
                names = [f"x{i + 1}" for i in range(p)]
                figures[f"connectivity_{run.job.method}"] = plot_connectivity(run.connectivity, names)
        for name, figure in figures.items():
            files.append(out / f"{k}d_p{p}_{name}.png")
            figure.savefig(files[-1], dpi=100)
    return files
