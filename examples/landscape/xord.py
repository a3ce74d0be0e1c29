"""Why larger networks find all patterns of XORD (Brutzkus, Globerson 2019): `python -m examples.landscape.xord`.

An example is a row of pairs of signs. It is positive if one of its pairs is (1, 1) or (-1, -1). A layer of k positive and k
negative filters looks at every pair; of each filter the largest answer counts. Nearly all positive examples of the training
set have both patterns, so that a network that has found one of them may have no error there, and still errs in the test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.results import Row
from lightning_cpna.landscape import alignment, draw_vectors, frame_potential
from lightning_cpna.sweeps import grid

MODULE = "examples.landscape.xord"
FILTERS = [2, 4, 10, 50, 120]  # k
PAIRS, SAMPLES, TEST = 9, 40, 2000
DIVERSE = 0.98, 0.5  # the share of positive examples that have both patterns, in training and in the test
LR, SCALE, STEPS = 0.05, 0.02, 8_000
MARGINS = [8.0, 1.0]  # m of the loss max(0, m - N) of positives, beside max(0, 1 + N) of negatives
PATTERNS = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])


class Filters(nn.Module):
    """k positive and k negative filters over pairs, ReLU, the largest over the pairs, and their signed sum."""

    def __init__(self, k: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * k, 2, generator=generator) * SCALE / k**1.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs, ``(n,)``, of ``(n, pair, 2)``."""
        answers = F.relu(x @ self.weight.T).amax(1)  # (n, filter)
        positive, negative = answers.chunk(2, dim=1)
        return positive.sum(1) - negative.sum(1)


def data(n: int, diverse: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw examples, ``(n, pair, 2)``, half of them positive, and their labels.

    Args:
        n: How many.
        diverse: The share of positive examples that have both positive patterns.
        generator: Draws them.
    """
    y = torch.arange(n) % 2 == 0
    x = PATTERNS[2 + torch.randint(0, 2, (n, PAIRS), generator=generator)]
    both = torch.rand(n, generator=generator) < diverse
    first = torch.randint(0, 2, (n,), generator=generator)
    places = torch.rand(n, PAIRS, generator=generator).argsort(1)[:, :2]
    for i in y.nonzero().flatten().tolist():
        x[i, places[i, 0]] = PATTERNS[first[i]]
        if both[i]:
            x[i, places[i, 1]] = PATTERNS[1 - first[i]]
    return x, y


def train(*, k: int, margin: float, seed: int) -> Row:
    """Train one network by gradient descent until no example has any loss, and see what its filters have found."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    (x, y), (test_x, test_y) = data(SAMPLES, DIVERSE[0], generator), data(TEST, DIVERSE[1], generator)
    net = Filters(k, generator)
    start = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR / k)
    for _ in range(STEPS):
        outputs = net(x)
        losses = torch.where(y, margin - outputs, 1 + outputs).clamp(min=0)
        if not bool(losses.any()):
            break
        optimizer.zero_grad()
        torch.autograd.backward(losses.mean())
        optimizer.step()
    weight = net.weight.detach()
    with torch.no_grad():
        parts = (x, y), (test_x, test_y)
        error, test_error = (float(((net(inputs) > 0) != labels).float().mean()) for inputs, labels in parts)
    states = {"start": alignment(start), "end": alignment(weight)}
    alone = F.relu(weight[:k] @ PATTERNS[:2].T).sum(0) > F.relu(weight[k:] @ PATTERNS[:2].T).sum(0)
    return {
        "training_error": error,
        "test_error": test_error,
        "both_patterns": int(alone.all()),
        **{f"angle_{name}": state.angle() for name, state in states.items()},
        **{f"angle90_{name}": state.angle(0.9) for name, state in states.items()},
        **{f"within_{name}": state.share_within(15) for name, state in states.items()},
        **{f"potential_{name}": state.frame_potential for name, state in states.items()},
        "potential_positive_start": frame_potential(start[:k]),
        "potential_positive_end": frame_potential(weight[:k]),
        "filters_start": start.tolist(),
        "filters_end": weight.tolist(),
    }


def table(rows: list[Row]) -> str:
    """Return what each k came to, in Markdown: medians of the angles, means of the rest."""
    lines = [
        "| margin | k | no training error | test error of those | without any | both patterns found "
        "| angle to the centre: start, end | frame potential: start, end | of the positive filters |",
        "|---:|---:|---:|---:|---:|---:|---|---|---|",
    ]
    for margin, k in itertools.product(MARGINS, FILTERS):
        own = [row for row in rows if (row["margin"], row["k"]) == (margin, k)]
        learned = [row for row in own if row["training_error"] == 0]
        perfect = sum(row["test_error"] == 0 for row in learned)
        error = f"{sum(row['test_error'] for row in learned) / len(learned):.3f}" if learned else ""

        def change(name: str, style: str, own: list[Row] = own) -> str:
            middle = [
                float(torch.tensor([row[f"{name}_{end}"] for row in own]).quantile(0.5)) for end in ("start", "end")
            ]
            return " → ".join(format(value, style) for value in middle)

        lines.append(
            f"| {margin:g} | {k} | {len(learned)} of {len(own)} | {error} | {perfect} of {len(learned)} | "
            f"{sum(row['both_patterns'] for row in own)} of {len(own)} | {change('angle', '.1f')}° | "
            f"{change('potential', '.3f')} | {change('potential_positive', '.3f')} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row]) -> Figure:
    """Draw the filters of a small and a large network, and how the size decides, at the larger margin."""
    rows = [row for row in rows if row["margin"] == MARGINS[0]]
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    panels = figure.subplots(2, 3)
    ranks = range(len(FILTERS))

    def share(k: int, test: Callable[[Row], bool]) -> float:
        own = [row for row in rows if row["k"] == k]
        return sum(map(test, own)) / len(own)

    axes = panels[0, 0]
    tests: dict[str, Callable[[Row], bool]] = {
        "no error in training": lambda row: bool(row["training_error"] == 0),
        "both positive patterns found": lambda row: bool(row["both_patterns"]),
        "no error in training, none in the test": lambda row: bool(row["training_error"] == row["test_error"] == 0),
    }
    for (label, test), style in zip(tests.items(), ("^:", "o-", "s--"), strict=True):
        axes.plot(ranks, [share(k, test) for k in FILTERS], style, label=label)
    axes.set(xlabel="positive filters (and as many negative ones)", ylabel="share of the runs", ylim=(0, 1.05))
    axes.set_title("Large networks find all patterns")
    axes.legend()
    axes = panels[1, 0]
    for end, colour in (("start", "0.6"), ("end", "C0")):
        label = "initialisation" if end == "start" else "trained"
        middle = [
            float(torch.tensor([row[f"angle_{end}"] for row in rows if row["k"] == k]).quantile(0.5)) for k in FILTERS
        ]
        axes.plot(ranks, middle, "o-", color=colour, label=label)
    axes.set(xlabel="positive filters", ylabel="median angle to the cluster's centre, degrees")
    axes.set_title("Their filters cluster")
    axes.legend()
    for axes in panels[:, 0]:
        axes.set_xticks(ranks, [str(k) for k in FILTERS])
        axes.grid(alpha=0.3)
    for k, line in ((4, panels[0, 1:]), (120, panels[1, 1:])):
        own = next(row for row in rows if row["k"] == k and row["seed"] == 0)
        for end, axes in zip(("start", "end"), line, strict=True):
            draw_vectors(axes, alignment(F.normalize(torch.tensor(own[f"filters_{end}"]), dim=1)))
            axes.set(title=f"k = {k}, {'initialisation' if end == 'start' else 'trained'}: directions of all filters")
            axes.set_xlabel("a colour is a cluster")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Train everything, write table and figure."""
    args = parse(MODULE, __doc__, arguments, seeds=20)
    rows = run_sweep(args, train, grid(margin=MARGINS, k=FILTERS, seed=range(args.seeds)), title="XORD")
    figure = draw(rows)
    kept = [{name: value for name, value in row.items() if not name.startswith("filters")} for row in rows]
    finish(args, MODULE, kept, figure, table(rows))


if __name__ == "__main__":
    main()
