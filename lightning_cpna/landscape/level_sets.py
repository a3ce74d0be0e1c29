"""Walks along which the loss is constant: where does it lead to go down in something else, and what changes on the way?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lightning_cpna.landscape.surface import LossSurface

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Objective = Literal["l2", "random", "brownian"] | Callable[[Tensor], Tensor]
MAX_CORRECTIONS = 20  # chosen: two to six are made; where so many do not do, the step was too long
SHORTEST = 1e-4  # of the step: chosen, a walk that needs shorter ones has arrived at a kink or a corner
FLAT = 1e-9  # of the objective's gradient: chosen, so little of it along the level set is rounding


@dataclass(frozen=True)
class LevelSetPath:
    """A walk on a level set, and what was seen at each recorded place.

    Attributes:
        points: The places, ``(m, n)``.
        steps: How many steps had been made, int64 ``(m,)``.
        losses: The loss, float64 ``(m,)``.
        level: What it should be.
        objective: What goes down, float64 ``(m,)``: half the squared norm for "l2", NaN for a random direction.
        angles: The angle between the gradients of the objective and of the loss, in degrees, ``(m,)``; at 180 nothing can be
            gained any more. NaN for a random direction, and where the objective is flat.
        others: What else was looked at, by name, ``(m,)`` each.
        distance: The length of all steps.
        evaluations: How many gradients of the loss were computed.
        stopped: Why the walk ended: "evaluations", "steps", "stationary" (there is no direction in which the objective
            falls) or "stuck" (nor is there a step that is long enough).
    """

    points: Tensor
    steps: Tensor
    losses: Tensor
    level: float
    objective: Tensor
    angles: Tensor
    others: Mapping[str, Tensor]
    distance: float
    evaluations: int
    stopped: Literal["evaluations", "steps", "stationary", "stuck"]

    @property
    def deviation(self) -> float:
        """The largest distance of the loss from the level, relative to it."""
        return float((self.losses - self.level).abs().max()) / self.level

    @property
    def norms(self) -> Tensor:
        """The norm of the weights at each place, ``(m,)``."""
        norms: Tensor = torch.linalg.vector_norm(self.points, dim=1)
        return norms

    def pca(self, components: int = 2, *, standardize: bool = False) -> tuple[Tensor, Tensor]:
        """Project the places onto their principal components.

        Args:
            components: How many.
            standardize: Whether every coordinate is first scaled to variance 1, as in the paper.

        Returns:
            The projections, ``(m, components)``, and the share of the variance that each component has.

        Raises:
            ValueError: If there are fewer places or coordinates than components.
            ImportError: If scikit-learn is not installed.
        """
        try:
            from sklearn.decomposition import PCA
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise ImportError("pca needs scikit-learn: pip install 'lightning-cpna[analysis]'") from error

        if not 1 <= components <= (most := min(self.points.shape)):
            raise ValueError(
                f"components is {components}; allowed is an int from 1 to {most}, the places or coordinates"
            )
        points = self.points.double().cpu().numpy()
        if standardize:
            points = StandardScaler().fit_transform(points)
        pca = PCA(components)
        found = torch.from_numpy(pca.fit_transform(points))
        return found, torch.from_numpy(pca.explained_variance_ratio_)


def walk_level_set(
    surface: LossSurface,
    start: Tensor | None = None,
    objective: Objective = "l2",
    *,
    level: float | None = None,
    step: float = 0.05,
    tolerance: float = 1e-4,
    max_steps: int = 500,
    max_evaluations: int = 2000,
    record_every: int = 10,
    others: Mapping[str, LossSurface] | None = None,
    seed: int = 0,
) -> LevelSetPath:
    """Walk where the loss is constant, in the direction in which something else falls.

    Each step goes along the tangent, down the part of the objective's gradient that is orthogonal to the gradient of the
    loss; then Newton's method along the gradient of the loss brings it back to the level, one correction at least. A step
    that cannot be brought back, or does not lower the objective, is tried again at half the length.

    Args:
        surface: The loss; of a sparse network only its live weights move.
        start: Where the walk begins, ``(n,)``; None: the module's own weights.
        objective: What goes down: "l2" is half the squared norm of the weights, a function takes the point to a tensor of
            one number (``lambda w: w.abs().sum()``). Or where the walk goes instead: "random" is one direction all the time,
            "brownian" a new one at every step.
        level: The loss that is kept, positive; None: that of the start. From any other the walk is first brought to it.
        step: The length of a step.
        tolerance: How far the loss may be from the level, relative to it.
        max_steps: Steps after which the walk ends.
        max_evaluations: Gradients of the loss after which it ends.
        record_every: Steps from one recorded place to the next; the first and the last are always recorded.
        others: What else is looked at, by name: functions of the same coordinates, as the loss on a test set.
        seed: Of the random directions.

    Returns:
        The walk.

    Raises:
        ValueError: If an argument is out of range, or the start cannot be brought to the level.

    Reference:
        Tahir, Katz: Numerical exploration of training loss level-sets in deep neural networks (2020); the walk is theirs,
        Newton's correction and the fixed length of steps are ours (theirs stops at the kinks of ReLU).

    Examples:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        >>> surface = LossSurface(net, [x], lambda net, x: net(x).square().mean())  # the square of the first weight
        >>> path = walk_level_set(surface, torch.tensor([2.0, 1.0], dtype=torch.float64), step=0.1)
        >>> path.points[-1].round(decimals=3).tolist(), path.stopped
        ([2.0, 0.0], 'stationary')
    """
    _check(objective, level, step, tolerance, max_steps, max_evaluations, record_every)
    others = others or {}
    surface.check_others(others)
    walk = _Walk(surface, objective, step, tolerance, max_evaluations, torch.Generator().manual_seed(seed))
    walk.begin(surface.point() if start is None else start, level)
    records = [walk.record(0, others)]
    stopped: Literal["evaluations", "steps", "stationary", "stuck"] = "steps"
    made = 0
    while made < max_steps:
        if walk.evaluations >= max_evaluations:
            stopped = "evaluations"
            break
        direction = walk.direction()
        if direction is None:
            stopped = "stationary"
            break
        if not walk.advance(direction):
            stopped = "evaluations" if walk.evaluations >= max_evaluations else "stuck"
            break
        made += 1
        if made % record_every == 0:
            records.append(walk.record(made, others))
    if records[-1].step != made:
        records.append(walk.record(made, others))
    return LevelSetPath(
        points=torch.stack([record.point for record in records]),
        steps=torch.tensor([record.step for record in records]),
        losses=_column([record.loss for record in records]),
        level=walk.level,
        objective=_column([record.objective for record in records]),
        angles=_column([record.angle for record in records]),
        others={name: _column([record.others[name] for record in records]) for name in others},
        distance=walk.distance,
        evaluations=walk.evaluations,
        stopped=stopped,
    )


@dataclass(frozen=True)
class _Record:
    step: int
    point: Tensor
    loss: float
    objective: float
    angle: float
    others: dict[str, float]


class _Walk:
    """Where a walk is."""

    def __init__(
        self,
        surface: LossSurface,
        objective: Objective,
        step: float,
        tolerance: float,
        max_evaluations: int,
        generator: torch.Generator,
    ) -> None:
        self.surface, self.objective, self.step, self.tolerance = surface, objective, step, tolerance
        self.max_evaluations, self.generator = max_evaluations, generator
        self.evaluations, self.distance = 0, 0.0
        self.fixed: Tensor | None = None

    def begin(self, point: Tensor, level: float | None) -> None:
        """Go to the level."""
        self.point = point.detach().clone()
        self._check_objective()
        self.loss, self.gradient = self._evaluate(self.point)
        self.level = self.loss if level is None else level
        if not (math.isfinite(self.level) and self.level > 0):
            raise ValueError(
                f"start has the loss {self.loss:g}; allowed is a level > 0, as the tolerance is relative to it"
            )
        if level is not None and abs(self.loss - level) > self.tolerance * level:
            found = self._corrected(self.point)
            if found is None:
                raise ValueError(f"level is {level:g}, and the start of loss {self.loss:g} could not be brought to it")
            self.point, self.loss, self.gradient = found

    def direction(self) -> Tensor | None:
        """Return the unit vector of the next step, ``(n,)``; None if the objective falls no more along the level set."""
        if self.objective == "brownian" or (self.objective == "random" and self.fixed is None):
            self.fixed = torch.randn(len(self.point), generator=self.generator, dtype=torch.float64).to(self.point)
        down = -self._objective_gradient() if self.fixed is None else self.fixed
        normal = self.gradient / self.gradient.norm()
        tangent = down - (down @ normal) * normal
        tangent = tangent - (tangent @ normal) * normal
        if not float(tangent.norm()) > FLAT * float(down.norm()):
            return None
        return torch.nn.functional.normalize(tangent, dim=0)

    def advance(self, direction: Tensor) -> bool:
        """Make a step; return whether one could be made."""
        step = self.step
        while step >= SHORTEST * self.step and self.evaluations < self.max_evaluations:
            found = self._corrected(self.point + step * direction)
            if found is not None and self._gains(found[0]):
                self.distance += float((found[0] - self.point).norm())
                self.point, self.loss, self.gradient = found
                return True
            step /= 2
        return False

    def _gains(self, point: Tensor) -> bool:
        """Tell whether the objective falls on the way to a point; where there is only a direction, any will do."""
        return self.fixed is not None or bool(self._objective_value(point) < self._objective_value(self.point))

    def record(self, made: int, others: Mapping[str, LossSurface]) -> _Record:
        """Note what is seen here."""
        value, angle = math.nan, math.nan
        if self.objective not in ("random", "brownian"):
            value = float(self._objective_value(self.point))
            along = self._objective_gradient()
            if bool(along.any()):
                cosine = float(along @ self.gradient / (along.norm() * self.gradient.norm()))
                angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
        seen = {name: other.loss(self.point) for name, other in others.items()}
        return _Record(made, self.point.clone(), self.loss, value, angle, seen)

    def _check_objective(self) -> None:
        if not callable(self.objective):
            return
        value = self.objective(self.point.detach().requires_grad_())
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                f"objective returned {value!r}; allowed is a function of the point, (n,), that returns a tensor of one "
                "number which can be differentiated"
            )

    def _objective_value(self, point: Tensor) -> Tensor:
        if self.objective == "l2":
            return point.square().sum() / 2
        assert callable(self.objective)
        return self.objective(point)

    def _objective_gradient(self) -> Tensor:
        if self.objective == "l2":
            return self.point
        with torch.enable_grad():
            at = self.point.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._objective_value(at), at)
        return gradient

    def _evaluate(self, point: Tensor) -> tuple[float, Tensor]:
        self.evaluations += 1
        return self.surface.gradient(point)

    def _corrected(self, point: Tensor) -> tuple[Tensor, float, Tensor] | None:
        """Bring a point to the level by Newton's method along the gradient; None if that fails."""
        loss, gradient = self._evaluate(point)
        for _ in range(MAX_CORRECTIONS):
            square = float(gradient @ gradient)
            if self.evaluations >= self.max_evaluations or not (math.isfinite(loss) and 0 < square < math.inf):
                return None
            point = point - (loss - self.level) / square * gradient
            loss, gradient = self._evaluate(point)
            if abs(loss - self.level) <= self.tolerance * self.level:
                return point, loss, gradient
        return None


def plot_level_set(path: LevelSetPath) -> Figure:
    """Draw a walk: what fell, what the others did, and the walk in the plane of its two principal components.

    Args:
        path: From ``walk_level_set``.

    Returns:
        A matplotlib figure with three panels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(path.steps, path.norms, color="C0")
    left.set(xlabel="step", ylabel="norm of the weights")
    left.set_title(f"loss {path.level:.3g}, within {path.deviation:.1g} of it")
    for name, values in path.others.items():
        middle.plot(path.steps, values, label=name)
    middle.plot(path.steps, path.losses, "k:", label="loss that is kept")
    middle.set(xlabel="step", ylabel="others")
    middle.legend()
    if len(path.points) > 1:
        places, shares = path.pca()
        right.plot(places[:, 0], places[:, 1], "-", color="0.6")
        points = right.scatter(places[:, 0], places[:, 1], c=path.steps, cmap="viridis", zorder=3)
        figure.colorbar(points, ax=right, label="step")
        right.set_title(f"{float(shares.sum()):.1%} of the variance")
    right.set(xlabel="first principal component", ylabel="second")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    return figure


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _check(
    objective: Objective,
    level: float | None,
    step: float,
    tolerance: float,
    max_steps: int,
    max_evaluations: int,
    record_every: int,
) -> None:
    if not callable(objective) and objective not in ("l2", "random", "brownian"):
        raise ValueError(
            f"objective is {objective!r}; allowed is 'l2', 'random', 'brownian' or a function of the point"
        )
    for name, value in (("step", step), ("tolerance", tolerance), ("level", 1.0 if level is None else level)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; allowed is a float > 0")
    for name, count in (("max_steps", max_steps), ("max_evaluations", max_evaluations), ("record_every", record_every)):
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} is {count!r}; allowed is an int >= 1")
