"""Tables 2 and 3 in Markdown; `python -m examples.asu.tables FOLDER --page RESULTS.md` puts them there."""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.asu.problem import EPSILON, METHODS, NEURONS, PROBLEMS, Problem
from examples.page import fill
from examples.results import Row, load
from lightning_cpna import SparseLinear, Sparsity, UnitInputs, UnitScore, rewire_, trace


def mean_and_spread(values: list[float]) -> str:
    """Return mean and sample standard deviation.

    Examples:
        >>> mean_and_spread([90.0, 92.0])
        '91.0 ± 1.4'
    """
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _grouped(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["set"], row["method"]), []).append(row)
    return groups


def _order(names: set[str], order: Any) -> list[str]:
    return [name for name in order if name in names]


def pivot(rows: list[Row]) -> str:
    """Return a table of the runs: accuracy, connections, neurons and time."""
    lines = [
        "| data set | method | seeds | best test accuracy | after the last epoch | connections | neurons | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, method), group in _grouped(rows).items():
        best, last = [max(row["test"]) for row in group], [row["test"][-1] for row in group]
        size = statistics.mean(row["connections"] for row in group)
        seconds = statistics.mean(row["seconds"] for row in group)
        lines.append(
            f"| {name} | {method} | {len(group)} | {mean_and_spread(best)} | {mean_and_spread(last)} | {size:,.0f} | "
            f"{group[0]['neurons']:,} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def table2(rows: list[Row]) -> str:
    """Return Table 2: the best test accuracy over the epochs, as the paper reports, and below it that after the last.

    The last lines count the data sets where the mean over seeds is at least the paper's number less one test example.
    """
    groups = _grouped(rows)
    names = _order({name for name, _ in groups}, PROBLEMS)
    methods = _order({method for _, method in groups}, METHODS)
    lines = ["| data set | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    reached = {"best": dict.fromkeys(methods, 0), "last": dict.fromkeys(methods, 0)}
    compared = dict.fromkeys(methods, 0)
    for name in names:
        cells = []
        for method in methods:
            group = groups.get((name, method), [])
            if not group:
                cells.append("")
                continue
            best, last = [max(row["test"]) for row in group], [row["test"][-1] for row in group]
            beside = ""
            if (paper := (PROBLEMS[name].accuracy or {}).get(method)) is not None:
                beside = f" ({paper})"
                compared[method] += 1
                for which, values in (("best", best), ("last", last)):
                    reached[which][method] += statistics.mean(values) >= paper - 100 / group[0]["n_test"]
            cells.append(f"{mean_and_spread(best)}{beside}<br>{mean_and_spread(last)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for which, counts in reached.items():
        cells = ["" if not compared[method] else f"{counts[method]} of {compared[method]}" for method in methods]
        lines.append(f"| {which} ≥ paper - 1 example | " + " | ".join(cells) + " |")
    numbers = {method: sorted({len(groups.get((name, method), [])) for name in names}) for method in methods}
    lines.append(
        "| seeds | " + " | ".join("-".join(map(str, (n[0], n[-1])[: len(n)])) for n in numbers.values()) + " |"
    )
    return "\n".join(lines)


def planted(problem: Problem, seed: int) -> nn.Sequential:
    """Draw a network's first connections."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(problem.widths):
        layers += [SparseLinear(n_in, n_out, EPSILON, replace=True), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def expected(n_in: int, n_out: int) -> tuple[float, float]:
    """Return how many different connections a layer's draws are in the mean, and the variance.

    Examples:
        >>> [round(value) for value in expected(300, 300)]
        [5804, 179]
    """
    cells, draws = n_in * n_out, round(EPSILON * (n_in + n_out))
    missed = math.exp(draws * math.log1p(-1 / cells))
    both_missed = math.exp(draws * math.log1p(-2 / cells))
    variance = cells * missed * (1 - missed) + cells * (cells - 1) * (both_missed - missed**2)
    return cells * (1 - missed), variance


def n_weights(net: nn.Module) -> int:
    """Count the connections of a network."""
    return sum(weight.numel() for name, weight in net.named_parameters() if name.endswith("weight"))


def pruned(problem: Problem, seed: int) -> tuple[int, int]:
    """Grow and prune a network's connections without training: NPSET's neurons and connections."""
    net = planted(problem, seed)
    sparsity = Sparsity(net)
    sparsity.graph = trace(net, torch.zeros(1, problem.widths[0]))
    first, second, last = sparsity.graph
    budgets = [budget for name in (first, second) for budget in sparsity.add_budgets(net, {name: 1}, "unit")]
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(NEURONS.last + 1):
        for budget in budgets:
            [name] = budget.names
            n = sparsity.n_units(name)
            stay = NEURONS.n_remaining(epoch, problem.widths[1])
            if stay < n:
                scores = UnitScore("out_degree")(UnitInputs.of(sparsity, name, generator))
                sparsity.prune_units_(budget, stay, {name: scores})
        for name in (first, second, last):
            torch.nn.init.normal_(sparsity.tensors[name], generator=generator)
            rewire_(sparsity, name, 0.3, generator=generator)
    return problem.widths[0] + sum(sparsity.n_units(name) for name in (first, second)), n_weights(net)


def sizes() -> list[Row]:
    """Return the sizes of all 15 networks, from their topologies alone."""
    rows = []
    for name, problem in PROBLEMS.items():
        pairs = list(itertools.pairwise(problem.widths))
        neurons, connections = pruned(problem, seed=0)
        rows.append(
            {
                "set": name,
                "dense": sum(n_in * n_out for n_in, n_out in pairs),
                "SET": round(sum(expected(n_in, n_out)[0] for n_in, n_out in pairs)),
                "spread": round(math.sqrt(sum(expected(n_in, n_out)[1] for n_in, n_out in pairs))),
                "neurons": neurons,
                "NPSET": connections,
            }
        )
    return rows


def table3(rows: list[Row]) -> str:
    """Return Table 3: sizes beside the paper's. SET's are those in the mean over draws, and their standard deviation."""
    lines = [
        "| data set | dense | SET | paper | NPSET neurons | paper | NPSET | paper | of dense |",
        "|---|---:|---:|---|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        problem = PROBLEMS[row["set"]]
        lines.append(
            f"| {row['set']} | {row['dense']:,} | {row['SET']:,} ± {row['spread']} | "
            f"{_beside(row['SET'], problem.set_connections)} | {row['neurons']:,} | {problem.npset_neurons:,} | "
            f"{row['NPSET']:,} | {_beside(row['NPSET'], problem.npset_connections)} | "
            f"{100 * row['NPSET'] / row['dense']:.3f} % |"
        )
    return "\n".join(lines)


def table_million(rows: list[Row]) -> str:
    """Return what a million neurons cost."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---:" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(f"{value:,}" for value in row.values()) + " |" for row in rows)])


def _beside(measured: int, paper: int) -> str:
    return f"{paper:,} ({100 * (measured / paper - 1):+.2f} %)"


TABLES = {"table2": table2, "table3": table3, "million": table_million}


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of committed results, and put them into a page."""
    parser = argparse.ArgumentParser(prog="python -m examples.asu.tables", description=__doc__)
    parser.add_argument("results", type=Path, help="the folder with table2.json, table3.json and million.json")
    parser.add_argument("--page", type=Path, help="the page whose tables are replaced")
    args = parser.parse_args(arguments)
    text = None if args.page is None else args.page.read_text()
    for name, table in TABLES.items():
        print(f"{name}\n\n{table(load(args.results, name))}\n")
        text = None if text is None else fill(text, f"examples.asu {name}", table(load(args.results, name)))
    if text is not None:
        args.page.write_text(text)


if __name__ == "__main__":
    main()
