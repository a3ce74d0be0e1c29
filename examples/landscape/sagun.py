"""The Hessian at a minimum: outliers and bulk (Sagun et al. 2017): `python -m examples.landscape.sagun`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.landscape.networks import cross_entropy, mlp, some_digits, train
from examples.results import Row, mean_and_spread
from lightning_cpna.landscape import (
    LossSurface,
    follow,
    hessian,
    hessian_spectrum,
    line,
    n_outliers,
    top_eigenvalues,
)
from lightning_cpna.sweeps import grid

MODULE = "examples.landscape.sagun"
SAMPLES, LOSS, LR = 600, 0.01, 0.01
SHOWN = 17  # eigenvalues: the 16 ratios of one to the next
CLASSES, WIDTHS = [2, 3, 5, 10], [4, 8, 16, 24]
CASES = [(classes, 16) for classes in CLASSES] + [(10, width) for width in WIDTHS if width != 16]
SEPARATIONS = [1.0, 1.5, 2.0, 3.0, 4.0]  # distances of the centres of three Gaussian classes
TRIES, STEPS = 10, 2000
SMALL, BASIN_STEPS = 8, 600  # the small batches, and the steps with either size
RATES = {SAMPLES: 0.5, SMALL: 0.2}


def minimum(classes: int, width: int, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Train a network on digits until the loss is 0.01; one that gets stuck is begun anew."""
    batch, _ = some_digits(SAMPLES, seed, classes)
    for attempt in range(TRIES):
        net = mlp([64, width, classes], TRIES * seed + attempt)
        if train(net, batch, STEPS, LR, loss=LOSS) < STEPS:
            return net, batch
    raise RuntimeError(f"none of {TRIES} networks of width {width} reached a loss of {LOSS}")


def spectrum(*, classes: int, width: int, seed: int) -> list[Row]:
    """Return the largest eigenvalues at a minimum, and what share of all is near zero."""
    net, batch = minimum(classes, width, seed)
    surface = LossSurface(net, [batch], cross_entropy)
    whole = hessian_spectrum(surface)
    summary = {"n": surface.n, "bulk": whole.bulk_share, "lowest": whole.lambda_min / whole.lambda_max}
    values = top_eigenvalues(surface, k=SHOWN).tolist()
    return [{"rank": rank, "eigenvalue": value, **summary} for rank, value in enumerate(values, start=1)]


def gauss_newton(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the eigenvalues of the first term of the Hessian, the covariance of the outputs' gradients, descending.

    Each example's gradients of the outputs are weighted by the curvature of the cross-entropy in them (Sagun et al., Eq. 6).
    """
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def outputs(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(net, weights, (x[None],))[0]
        return found

    parts = vmap(jacrev(outputs), in_dims=(None, 0))(weights, batch[0])
    jacobian = torch.cat([part.flatten(2) for part in parts.values()], dim=2)  # (example, output, weight)
    with torch.no_grad():
        p = net(batch[0]).softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]  # (example, output, output)
    values, vectors = torch.linalg.eigh(curvature)
    roots = (values.clamp(min=0).sqrt()[:, :, None] * vectors.mT) @ jacobian  # (example, output, weight)
    singular: Tensor = torch.linalg.svdvals(roots.flatten(0, 1) / len(p) ** 0.5)
    return singular.square()


def both_terms(*, seed: int) -> list[Row]:
    """Return all eigenvalues of the Hessian, and those of its first term."""
    net, batch = minimum(10, 8, seed)
    surface = LossSurface(net, [batch], cross_entropy)
    whole = torch.linalg.eigvalsh(hessian(surface)).flip(0)
    first = gauss_newton(net, batch)
    first = torch.nn.functional.pad(first, (0, max(0, len(whole) - len(first))))
    return [
        {"rank": rank, "eigenvalue": a, "covariance": b}
        for rank, (a, b) in enumerate(zip(whole.tolist(), first.tolist(), strict=False), start=1)
    ]


def separation(*, distance: float, seed: int) -> list[Row]:
    """Return the largest eigenvalues for three Gaussian classes in the plane, by the distance of their centres."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    angles = torch.arange(3, dtype=torch.float64) * 2 * torch.pi / 3
    centres = torch.stack([angles.cos(), angles.sin()], dim=1) * distance / 3**0.5
    y = torch.arange(SAMPLES) % 3
    x = centres[y] + torch.randn(SAMPLES, 2, generator=generator, dtype=torch.float64)
    net = mlp([2, 16, 3], seed)
    train(net, (x, y), STEPS, LR)
    surface = LossSurface(net, [(x, y)], cross_entropy)
    values = top_eigenvalues(surface, k=6).tolist()
    loss = surface.loss(surface.point())
    return [{"rank": rank, "eigenvalue": value, "loss": loss} for rank, value in enumerate(values, start=1)]


def one_basin(*, seed: int) -> list[Row]:
    """Return the loss while small batches go on from where large ones arrived, and on the straight line between both ends."""
    batch, _ = some_digits(SAMPLES, seed)
    net = mlp([64, 16, 10], seed)
    surface = LossSurface(net, [batch], cross_entropy)
    generator = torch.Generator().manual_seed(seed)
    found: list[Row] = []
    start = surface.point()
    for size in (SAMPLES, SMALL):
        optimizer = torch.optim.SGD(net.parameters(), lr=RATES[size])
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0 if size == SMALL else 1.0, BASIN_STEPS)
        start = surface.point()
        for step in range(BASIN_STEPS + 1):
            if size == SMALL and step % 5 == 0:
                found.append({"part": "training", "place": step, "loss": surface.loss(surface.point())})
            rows = torch.randperm(SAMPLES, generator=generator)[:size]
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(net, (batch[0][rows], batch[1][rows])))
            optimizer.step()
            scheduler.step()
    path = follow(surface, line(start, surface.point()))
    return found + [
        {"part": "line", "place": t, "loss": loss}
        for t, loss in zip(path.t.tolist(), path.losses.tolist(), strict=True)
    ]


PARTS: dict[str, Callable[..., list[Row]]] = {
    "spectrum": spectrum,
    "both terms": both_terms,
    "separation": separation,
    "one basin": one_basin,
}


def look(*, what: str, **setting: Any) -> list[Row]:
    """Compute one part of the figure."""
    torch.set_num_threads(1)
    return PARTS[what](**setting)


def settings(n_seeds: int) -> list[Row]:
    """Return what is computed."""
    return [
        *(
            {"what": "spectrum", "classes": classes, "width": width, "seed": seed}
            for classes, width in CASES
            for seed in range(n_seeds)
        ),
        *grid(what=["separation"], distance=SEPARATIONS, seed=range(n_seeds)),
        {"what": "both terms", "seed": 0},
        {"what": "one basin", "seed": 0},
    ]


def case(rows: list[Row], classes: int, width: int) -> list[Row]:
    """Return the rows of a case."""
    return [row for row in rows if row["what"] == "spectrum" and (row["classes"], row["width"]) == (classes, width)]


def eigenvalues(rows: list[Row], classes: int, width: int) -> Tensor:
    """Return the largest eigenvalues of a case, the largest first, ``(seed, eigenvalue)``."""
    values = [row["eigenvalue"] for row in case(rows, classes, width)]
    return torch.tensor(values, dtype=torch.float64).view(-1, SHOWN)


def profile(rows: list[Row], classes: int, width: int) -> Tensor:
    """Return the geometric mean over the seeds of the largest eigenvalues of a case."""
    return eigenvalues(rows, classes, width).log().mean(0).exp()


def table(rows: list[Row]) -> str:
    """Return the cases in Markdown."""
    lines = [
        "| classes | hidden units | weights | largest gap after (mean spectrum) | single networks | largest eigenvalue | "
        "share near zero |",
        "|---:|---:|---:|---:|---|---:|---:|",
    ]
    for classes, width in sorted(CASES):
        own, values = case(rows, classes, width), profile(rows, classes, width)
        single = [n_outliers(one) for one in eigenvalues(rows, classes, width)]
        bulk = sum(row["bulk"] for row in own) / len(own)
        counts = f"{single.count(classes - 1)} of {len(single)} after {classes - 1}"
        lines.append(
            f"| {classes} | {width} | {own[0]['n']} | {n_outliers(values)} | {counts} | {float(values[0]):.2f} | {bulk:.1%} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row]) -> Figure:
    """Draw the five claims."""
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    axes = panels[0]
    for classes in CLASSES:
        values = profile(rows, classes, 16)
        (curve,) = axes.semilogy(torch.arange(SHOWN) + 1, values, ".-", label=f"{classes} classes")
        axes.axvline(classes - 0.5, color=curve.get_color(), linestyle=":")
    axes.set(xlabel="rank", ylabel="eigenvalue", title="Mean spectra: a gap after the classes, less one (dotted)")
    axes.legend()
    axes = panels[1]
    spectra = [row for row in rows if row["what"] == "spectrum" and row["classes"] == 10 and row["rank"] == 1]
    for value, label, colour in (("bulk", "share of eigenvalues near zero", "C0"), ("eigenvalue", "largest", "C3")):
        means = mean_and_spread(spectra, ("width",), value)
        axes.plot(WIDTHS, [means[(width,)][0] for width in WIDTHS], "o-", color=colour, label=label)
    axes.set(
        xlabel="hidden units",
        ylabel="share, or eigenvalue",
        ylim=(0, None),
        title="More units: more of the bulk, the outliers stay",
    )
    axes.legend()
    axes = panels[2]
    separated = [row for row in rows if row["what"] == "separation"]
    means = mean_and_spread(separated, ("rank", "distance"), "eigenvalue")
    for rank in range(1, 5):
        axes.semilogy(
            SEPARATIONS, [means[rank, distance][0] for distance in SEPARATIONS], "o-", label=f"eigenvalue {rank}"
        )
    axes.set(
        xlabel="distance of the centres of three Gaussian classes", title="Large eigenvalues fall as the classes part"
    )
    axes.legend()
    axes = panels[3]
    both = [row for row in rows if row["what"] == "both terms"]
    for value, label, style in (
        ("eigenvalue", "Hessian", "C0-"),
        ("covariance", "covariance of output gradients", "C1--"),
    ):
        axes.semilogy([row["rank"] for row in both], [max(row[value], 1e-12) for row in both], style, label=label)
    axes.set(
        xlabel="rank",
        ylabel="eigenvalue",
        ylim=(1e-7, 3),
        title="The outliers are those of the covariance of output gradients",
    )
    axes.legend()
    for axes, part, label in (
        (panels[4], "training", "step of small batches"),
        (panels[5], "line", "t, on the straight line"),
    ):
        own = [row for row in rows if row["what"] == "one basin" and row["part"] == part]
        axes.plot([row["place"] for row in own], [row["loss"] for row in own], color="C0")
        axes.set(xlabel=label, ylabel="loss on all data", yscale="log" if part == "training" else "linear")
    panels[4].set_title("From the end of large batches, the loss climbs and falls")
    panels[5].set_title("Between both ends, there is no barrier: one basin")
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Compute everything, write table and figure."""
    args = parse(MODULE, __doc__, arguments, seeds=5)
    rows = run_sweep(args, look, settings(args.seeds), title="Hessian spectra")
    finish(args, MODULE, rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
