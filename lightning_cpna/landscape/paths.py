"""Paths between two points: straight lines, Bézier curves of low loss, and how high the barrier on them is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_cpna.landscape.surface import LossSurface

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MONOTONE = 1e-6  # of the range of the loss: chosen, above the rounding of float32


@dataclass(frozen=True)
class Curve:
    """A Bézier curve; of degree 1 it is a straight line.

    Attributes:
        points: The control points, ``(degree + 1, n)``: the curve begins at the first and ends at the last.
    """

    points: Tensor

    @property
    def degree(self) -> int:
        """The polynomial's degree."""
        return len(self.points) - 1

    def __call__(self, t: float) -> Tensor:
        """Return the point ``(n,)`` at t, by de Casteljau's algorithm; t is 0 at the start and 1 at the end.

        Examples:
            >>> curve = Curve(torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 0.0]]))
            >>> curve(0.5)
            tensor([1., 1.])
        """
        points = self.points
        while len(points) > 1:
            points = torch.lerp(points[:-1], points[1:], t)
        return points[0]

    def shares(self, t: float) -> list[float]:
        """Return the share of each control point in the point at t: Bernstein's polynomials."""
        n = self.degree
        return [math.comb(n, i) * t**i * (1 - t) ** (n - i) for i in range(n + 1)]


@dataclass(frozen=True)
class Path:
    """The loss along a curve.

    Attributes:
        curve: The curve.
        t: Where it was looked at, float64 ``(m,)``, ascending.
        losses: The loss there, float64 ``(m,)``.
        others: What else was looked at there, by name, ``(m,)`` each.
        lengths: The distance from each place to the next, float64 ``(m - 1,)``.
        gradient_norms: The norm of the loss's gradient at the first place and at the last: far from zero, an end is no
            minimum, and that there is no barrier says little.
    """

    curve: Curve
    t: Tensor
    losses: Tensor
    others: Mapping[str, Tensor]
    lengths: Tensor
    gradient_norms: tuple[float, float]

    @property
    def barrier_above_worse_end(self) -> float:
        """By how much the highest loss exceeds that of the worse end (Evci et al. 2019): 0 if there is no hump above it.

        The ends are the first and the last place, as for `barrier`: follow the curve from 0 to 1.
        """
        return float(self.losses.max() - torch.maximum(self.losses[0], self.losses[-1]))

    @property
    def barrier(self) -> float:
        """By how much the highest loss exceeds the mean of the ends (Frankle et al. 2020, there of the error)."""
        return barrier(self.losses)

    @property
    def is_monotone(self) -> bool:
        """Whether the loss never rises from the start to the end, but for rounding."""
        return bool(self.losses.diff().max() <= MONOTONE * (self.losses.max() - self.losses.min()))

    @property
    def arc_length(self) -> float:
        """The length of the curve, as the polygon through the places."""
        return float(self.lengths.sum())

    @property
    def mean_loss(self) -> float:
        """The mean of the loss over the length of the curve (Garipov et al. 2018), by trapezoids; of a point its loss."""
        if self.arc_length == 0:
            return float(self.losses[0])
        middles = (self.losses[:-1] + self.losses[1:]) / 2
        return float((middles * self.lengths).sum() / self.lengths.sum())


def barrier(values: Tensor) -> float:
    """Return by how much the highest value along a path exceeds the mean of the ends.

    Of the classification error, networks whose barrier is below 0.02 count as linearly connected.

    Args:
        values: Along the path, ``(m,)``.

    Reference:
        Frankle, Dziugaite, Roy, Carbin: Linear mode connectivity and the lottery ticket hypothesis (2020), Section 2.

    Examples:
        >>> barrier(torch.tensor([0.1, 0.5, 0.3]))
        0.30000001192092896
    """
    return float(values.max() - (values[0] + values[-1]) / 2)


def line(start: Tensor, end: Tensor) -> Curve:
    """Return the straight line from one point ``(n,)`` to another."""
    if start.shape != end.shape or start.ndim != 1:
        raise ValueError(
            f"start and end have shapes {tuple(start.shape)} and {tuple(end.shape)}; allowed is (n,) for both"
        )
    return Curve(torch.stack([start, end]))


def follow(
    surface: LossSurface,
    curve: Curve,
    *,
    start: float = 0.0,
    end: float = 1.0,
    places: int = 61,
    others: Mapping[str, LossSurface] | None = None,
) -> Path:
    """Compute the loss along a curve; where there is BatchNorm, with the statistics that each place has on the data.

    Args:
        surface: The loss.
        curve: The curve, in the surface's coordinates.
        start: The first t; below 0, a line is prolonged beyond its start.
        end: The last t.
        places: How many places are looked at, evenly in t.
        others: Further functions of the same coordinates by name, for instance the error or the loss on a test set.

    Returns:
        The path.

    Raises:
        ValueError: If an argument is out of range, or a surface has other coordinates.

    Reference:
        Garipov, Izmailov, Podoprikhin, Vetrov, Wilson: Loss surfaces, mode connectivity, and fast ensembling of DNNs (2018),
        Section 3 and Appendix A.2; 61 places as there.

    Examples:
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> surface = LossSurface(net, [torch.ones(1, 1)], lambda net, x: (net(x).square() - 1).square().mean())
        >>> path = follow(surface, line(torch.tensor([-1.0]), torch.tensor([1.0])), places=3)
        >>> path.losses, path.barrier_above_worse_end
        (tensor([0., 1., 0.], dtype=torch.float64), 1.0)
    """
    if type(places) is not int or places < 2:
        raise ValueError(f"places is {places!r}; allowed is an int >= 2")
    if not start < end:
        raise ValueError(f"start is {start} and end is {end}; allowed is a start below the end")
    others = others or {}
    surface.check(curve.points[0])
    surface.check_others(others)
    t = torch.linspace(start, end, places, dtype=torch.float64)
    points = [curve(float(at)) for at in t]
    statistics = [surface.batch_norm_statistics(point) for point in points]

    def losses(of: LossSurface) -> Tensor:
        values = [of.loss(point, buffers) for point, buffers in zip(points, statistics, strict=True)]
        return torch.tensor(values, dtype=torch.float64)

    first, last = (surface.gradient(points[i], statistics[i])[1] for i in (0, -1))
    lengths = [float((after - before).norm()) for before, after in itertools.pairwise(points)]
    return Path(
        curve=curve,
        t=t,
        losses=losses(surface),
        others={name: losses(other) for name, other in others.items()},
        lengths=torch.tensor(lengths, dtype=torch.float64),
        gradient_norms=(float(first.norm()), float(last.norm())),
    )


def fit_curve(
    surface: LossSurface,
    start: Tensor,
    end: Tensor,
    degree: int = 2,
    *,
    steps: int = 400,
    lr: float = 0.01,
    per_step: int = 4,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Curve:
    """Find a Bézier curve of low loss between two points.

    Its inner control points start on the straight line, and follow Adam, whose learning rate falls to 0 by a half cosine,
    down the mean loss over the curve. Each step looks at one batch, drawn by the seed, and at one t in each of so many equal
    parts of [0, 1]. The curve stays among the surface's coordinates: between sparse networks in the subspace of their common
    mask, or, on a surface with ``masks={}``, in the space of all weights.

    Args:
        surface: The loss.
        start: Where the curve begins, ``(n,)``.
        end: Where it ends, ``(n,)``.
        degree: 1 for the straight line, of which nothing is trained; 2 or 3 are usual.
        steps: Steps of Adam.
        lr: Its first learning rate.
        per_step: Places on the curve in each step.
        weight_decay: Times half the squared length of the curve's point, added to the loss.
        seed: Of the places and the order of batches.

    Returns:
        The curve.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Garipov et al. (2018), Section 3.2 (there with SGD); Evci, Pedregosa, Gomez, Elsen: The difficulty of training sparse
        neural networks (2019), Section 4, for degrees 2 and 3 between sparse networks.

    Examples:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> def ring(net, x):
        ...     return (net.weight.square().sum() - 1).square()
        >>> surface = LossSurface(net, [torch.ones(1, 2)], ring)
        >>> ends = torch.tensor([-1.0, 0.0]), torch.tensor([0.8, 0.6])
        >>> follow(surface, line(*ends)).barrier > 50 * follow(surface, fit_curve(surface, *ends, degree=3)).barrier
        True
    """
    for name, value, least in (("degree", degree, 1), ("steps", steps, 1), ("per_step", per_step, 1)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}; allowed is an int >= {least}")
    if not lr > 0:
        raise ValueError(f"lr is {lr}; allowed is a float > 0")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}; allowed is a float >= 0")
    surface.check(start)
    surface.check(end)
    straight = line(start, end)
    if degree == 1:
        return straight
    inner = torch.stack([straight(i / degree) for i in range(1, degree)]).requires_grad_()
    optimizer = torch.optim.Adam([inner], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(surface.batches), generator=generator).tolist()
        batch = order.pop()
        curve = Curve(torch.cat([start[None], inner.detach(), end[None]]))
        total = torch.zeros_like(inner)
        for t in ((torch.arange(per_step) + torch.rand(per_step, generator=generator)) / per_step).tolist():
            point = curve(t)
            gradient = surface.batch_gradient(point, batch)[1] + weight_decay * point
            total += torch.tensor(curve.shares(t)[1:-1]).to(gradient)[:, None] * gradient / per_step
        inner.grad = total
        optimizer.step()
        scheduler.step()
    return Curve(torch.cat([start[None], inner.detach(), end[None]]))


def plot_paths(paths: Mapping[str, Path], other: str | None = None) -> Figure:
    """Draw the loss along several paths.

    Args:
        paths: By what they are called.
        other: Which of the ``others`` is drawn instead of the loss.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, path in paths.items():
        axes.plot(path.t, path.losses if other is None else path.others[other], label=name)
    axes.set(xlabel="t, from the start (0) to the end (1)", ylabel=other or "loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
