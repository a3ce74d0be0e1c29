"""Walks of constant training loss (Tahir, Katz 2020): `python -m examples.landscape.level_sets`.

From a trained network, weights are changed while the training loss stays what it is: so that the weights get smaller, in one
random direction, or in a new random direction at every step. What becomes of the test loss? And are small weights that are
found this way better than those of a network that is trained with weight decay, for as many gradients together?
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.data import Split
from examples.landscape.networks import cross_entropy, error, mlp, some_digits, train, xor
from examples.results import Row, mean_and_spread
from lightning_cpna.landscape import LevelSetPath, LossSurface, walk_level_set
from lightning_cpna.sweeps import grid

MODULE = "examples.landscape.level_sets"
LR, TRAINING, EVALUATIONS = 0.01, 2000, 2000
STEP = {"l2": 0.05, "random": 0.5, "brownian": 0.5}  # the lengths of steps


class Case(NamedTuple):
    """A problem, an activation, and the training loss that is kept."""

    data: str
    activation: str
    loss: float

    def __str__(self) -> str:
        """Name it."""
        return f"{self.data}, {self.activation}, loss {self.loss:g}"


CASES = [
    Case(data, activation, loss)
    for data in ("XOR", "digits")
    for activation in ("tanh", "relu")
    for loss in (1e-2, 1e-3)
]
WIDTHS = {"XOR": [10, 64, 1], "digits": [64, 32, 10]}
WALKS = ["l2", "random", "brownian"]
TITLES = {"l2": "weights shrink", "random": "one random direction", "brownian": "Brownian"}
DECAYS = [1e-5, 1e-4, 1e-3]


def _data(name: str, seed: int) -> tuple[Split, Split]:
    return xor(2, 10, 1000, seed) if name == "XOR" else some_digits(1257, seed)


def walk(*, data: str, activation: str, loss: float, seed: int) -> list[Row]:
    """Train one network to a loss, and walk from it in the three ways."""
    torch.set_num_threads(1)
    training, test = _data(data, seed)
    net = mlp(WIDTHS[data], seed, activation)
    train(net, training, TRAINING, LR, loss=loss)
    surface = LossSurface(net, [training], cross_entropy)
    others = {"test_loss": LossSurface(net, [test], cross_entropy), "test_error": LossSurface(net, [test], error)}
    found: list[Row] = []

    def add(way: str, path: LevelSetPath) -> None:
        places, shares = path.pca()
        found.extend(
            {
                "way": way,
                "step": int(path.steps[i]),
                "training_loss": float(path.losses[i]),
                "norm": float(path.norms[i]),
                "angle": None if path.angles[i].isnan() else float(path.angles[i]),
                "first": float(places[i, 0]),
                "second": float(places[i, 1]),
                "shown": float(shares.sum()),
                "deviation": path.deviation,
                "distance": path.distance,
                **{name: float(values[i]) for name, values in path.others.items()},
            }
            for i in range(len(path.points))
        )

    for way in WALKS:
        options: dict[str, Any] = {"objective": way, "step": STEP[way], "seed": seed}
        add(
            way,
            walk_level_set(
                surface, max_steps=EVALUATIONS, max_evaluations=EVALUATIONS, record_every=10, others=others, **options
            ),
        )
    return found


def decay(*, data: str, activation: str, decay: float, seed: int) -> Row:
    """Train one network with a weight decay, for as many gradients as another is trained and walks."""
    torch.set_num_threads(1)
    training, test = _data(data, seed)
    net = mlp(WIDTHS[data], seed, activation)
    train(net, training, TRAINING + EVALUATIONS, LR, weight_decay=decay)
    surfaces = {
        "training_loss": LossSurface(net, [training], cross_entropy),
        "test_loss": LossSurface(net, [test], cross_entropy),
        "test_error": LossSurface(net, [test], error),
    }
    point = surfaces["training_loss"].point()
    measured = {name: surface.loss(point) for name, surface in surfaces.items()}
    return {"way": "weight decay", "norm": float(point.norm()), **measured}


def _decays(rows: list[Row], case: Case) -> list[Row]:
    """Return the networks with weight decay that belong to a case."""
    decays = [row for row in rows if row["way"] == "weight decay"]
    return [row for row in decays if (row["data"], row["activation"]) == (case.data, case.activation)]


def _ends(rows: list[Row], case: Case, way: str) -> list[tuple[Row, Row]]:
    """Return the first and the last place of each seed's walk."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if _is(row, case) and row["way"] == way and row["seed"] == seed]
        found.append((own[0], own[-1]))
    return found


def _is(row: Row, case: Case) -> bool:
    return (row["data"], row["activation"], row.get("loss")) == tuple(case)


def table(rows: list[Row]) -> str:
    """Return what the walks came to, in Markdown: means over the seeds."""
    lines = [
        "| case | norm: start, end | test loss: start, end | test error | largest deviation "
        "| one random direction: test loss | Brownian: test loss "
        "| trained with weight decay 1e-5, 1e-4, 1e-3: test (training) loss |",
        "|---|---|---|---|---:|---:|---:|---|",
    ]
    for case in CASES:
        ends = _ends(rows, case, "l2")

        def change(name: str, style: str, ends: list[tuple[Row, Row]] = ends) -> str:
            return " → ".join(format(sum(pair[i][name] for pair in ends) / len(ends), style) for i in (0, 1))

        ratios = [
            sum(last["test_loss"] / first["test_loss"] for first, last in found) / len(found)
            for found in (_ends(rows, case, way) for way in ("random", "brownian"))
        ]
        decays = _decays(rows, case)
        tests, reached = (mean_and_spread(decays, ("decay",), name) for name in ("test_loss", "training_loss"))
        trained = ", ".join(f"{tests[(decay,)][0]:.3f} ({reached[(decay,)][0]:.1g})" for decay in DECAYS)
        lines.append(
            f"| {case} | {change('norm', '.1f')} | {change('test_loss', '.4f')} | {change('test_error', '.1%')} | "
            f"{max(last['deviation'] for _, last in ends):.0e} | {ratios[0]:.1f} times | {ratios[1]:.2f} times | "
            f"{trained} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row]) -> Figure:
    """Draw one walk of each kind, and where all of them lead."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    panels = figure.subplots(2, 3)
    shown = CASES[-1]
    own = [row for row in rows if _is(row, shown) and row["seed"] == 0]
    for way, colour in zip(WALKS, ("C0", "C3", "C1"), strict=True):
        path = [row for row in own if row["way"] == way]
        for axes, value in ((panels[0, 0], "norm"), (panels[0, 1], "test_loss")):
            axes.plot([row["step"] for row in path], [row[value] for row in path], colour, label=TITLES[way])
    panels[0, 1].plot(
        [row["step"] for row in own if row["way"] == "l2"],
        [row["training_loss"] for row in own if row["way"] == "l2"],
        "k:",
        label="training loss, which is kept",
    )
    panels[0, 0].set(xlabel="step", ylabel="norm of the weights", title=f"{shown}: the weights")
    panels[0, 1].set(xlabel="step", ylabel="loss", yscale="log", title=f"{shown}: the test loss")
    panels[0, 0].legend()
    panels[0, 1].legend(loc="center right", bbox_to_anchor=(1, 0.35))
    for axes, way in ((panels[0, 2], "l2"), (panels[1, 2], "brownian")):
        path = [row for row in own if row["way"] == way]
        points = axes.scatter(
            [row["first"] for row in path], [row["second"] for row in path], c=[row["step"] for row in path]
        )
        figure.colorbar(points, ax=axes, label="step")
        axes.set(xlabel="first principal component", ylabel="second")
        axes.set_title(f"{TITLES[way]}: {path[0]['shown']:.0%} of the variance in this plane")
    for axes, data in zip(panels[1, :2], WIDTHS, strict=True):
        for case, colour in zip([case for case in CASES if case.data == data], ("C0", "C1", "C2", "C4"), strict=False):
            for first, last in _ends(rows, case, "l2"):
                axes.plot([first["norm"], last["norm"]], [first["test_loss"], last["test_loss"]], alpha=0)
                axes.annotate(
                    "",
                    (last["norm"], last["test_loss"]),
                    (first["norm"], first["test_loss"]),
                    arrowprops={"arrowstyle": "->", "color": colour},
                )
            axes.plot([], [], color=colour, label=f"{case.activation}, training loss {case.loss:g}")
            decays = _decays(rows, case)
            axes.plot([row["norm"] for row in decays], [row["test_loss"] for row in decays], "x", color=colour)
        axes.plot([], [], "kx", label="trained with weight decay")
        axes.set(
            xlabel="norm of the weights", ylabel="test loss", yscale="log", title=f"{data}: shrinking at equal loss"
        )
        axes.legend(fontsize=8, loc="upper left" if data == "XOR" else "lower right")
    for axes in panels.flatten():
        axes.grid(alpha=0.3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Walk everywhere, write table and figure."""
    args = parse(MODULE, __doc__, arguments, seeds=2)
    settings = [{**case._asdict(), "seed": seed} for case in CASES for seed in range(args.seeds)]
    kinds = dict.fromkeys((case.data, case.activation) for case in CASES)
    decays = [
        {"data": data, "activation": activation, **setting}
        for data, activation in kinds
        for setting in grid(decay=DECAYS, seed=range(args.seeds))
    ]
    rows = run_sweep(args, walk, settings, title="level sets")
    rows += run_sweep(args, decay, decays, title="weight decay")
    finish(args, MODULE, rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
