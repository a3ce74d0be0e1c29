"""When, and how many stay? Frozen schedules: pure functions from the optimizer step to the number that remains."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ScheduleFunction = Callable[[int, int, int], int]
"""``(step, n_start, n_end) -> n_remaining``: any importable function can be a schedule."""


@dataclass(frozen=True)
class Schedule:
    """From ``n_start`` at step ``start`` down to ``n_end`` at step ``end``.

    Attributes:
        start: The optimizer step at which pruning begins. An int counts steps, a float in [0, 1] is a fraction of the
            run.
        end: The optimizer step at which the target is reached, likewise.
        every: Prune on every this many steps (the last one always counts).
    """

    start: int | float = 0.0
    end: int | float = 0.5
    every: int = 1

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if not 0 <= value <= (1 if isinstance(value, float) else math.inf):
                raise ValueError(
                    f"{name} is {value}; allowed is a step (int >= 0) or a fraction of the run (0.0 to 1.0)"
                )
        if isinstance(self.start, int) is isinstance(self.end, int) and self.end < self.start:
            raise ValueError(f"end is {self.end}; allowed is {self.start} (start) or later")
        if type(self.every) is not int or self.every < 1:
            raise ValueError(f"every is {self.every}; allowed is an int >= 1")

    def fraction_left(self, t: float) -> float:
        """Return the fraction of what is to be removed that is still there at ``t`` in [0, 1); 1 at 0, falling to 0."""
        raise NotImplementedError

    def n_remaining(self, step: int, n_start: int, n_end: int) -> int:
        """Return how many remain after optimizer step ``step`` (the first step is 1).

        Raises:
            ValueError: If ``start`` or ``end`` is still a fraction of the run; ``resolved`` turns it into a step.
        """
        if isinstance(self.start, float) or isinstance(self.end, float):
            raise ValueError("start and end are fractions of the run; call resolved(total_steps) first")
        if step >= self.end:
            return n_end
        elapsed = max(0, step - self.start) // self.every * self.every
        if elapsed == 0:
            return n_start
        return self._between(elapsed / (self.end - self.start), n_start, n_end)

    def __call__(self, step: int, n_start: int, n_end: int) -> int:
        """Be a schedule function: ``n_remaining``."""
        return self.n_remaining(step, n_start, n_end)

    def _between(self, t: float, n_start: int, n_end: int) -> int:
        # The summand outweighs what floats lose, so that a whole number is not rounded down to the one below.
        return n_end + math.floor((n_start - n_end) * (self.fraction_left(t) + 1e-14))

    def window_end(self) -> int | float:
        """Return the step at which the schedule's window ends (``end``, but for schedules that go on after it)."""
        return self.end

    def resolved(self, total_steps: float) -> Self:
        """Return the schedule with fractions of the run turned into steps.

        Raises:
            ValueError: If there are fractions and the length of the run is not known.
        """
        steps: dict[str, int] = {}
        for name in (field.name for field in dataclasses.fields(self) if field.init and field.name in ("start", "end")):
            value = getattr(self, name)
            if isinstance(value, float):
                if not math.isfinite(total_steps) or total_steps < 1:
                    raise ValueError(
                        f"{name}={value} is a fraction of the run, whose number of optimizer steps is not known here; "
                        f"give {name} as a step (int), or set max_steps or max_epochs on the Trainer"
                    )
                value = round(value * total_steps)
            steps[name] = value
        return dataclasses.replace(self, **steps)

    def plot(self, n_start: int, n_end: int, total_steps: int) -> Figure:
        """Draw the remaining number against the step, before any training."""
        from lightning_cpna.plots import plot_schedule

        return plot_schedule(self, n_start, n_end, total_steps)


@dataclass(frozen=True)
class Annealing(Schedule):
    """The annealing schedule of CPNA: fast first, then ever slower (Guo et al., Eq. 2).

    With ``N = 2 * (end - start)`` iterations after pretraining, ``e`` of them done, ``M_0`` connections at the start and
    ``k`` at the end, Eq. 2 keeps ``k + (M_0 - k) * max(0, (N - 2e) / (2 e mu + N))``. It reaches ``k`` at ``e = N/2``,
    which is ``end`` here; the window in which connections are normalised is twice as long as the descent.

    Attributes:
        mu: How fast the number falls at first; 0 is linear. 10 ends as deep as 0, 1 and 50 and trains faster than 0 and
            1 (chosen on the 4-D XOR problem, where all four end within 0.1 AUC points).

    Examples:
        >>> Annealing(start=100, end=300, mu=10).n_remaining(200, n_start=1000, n_end=10)
        92
    """

    mu: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mu >= 0:
            raise ValueError(f"mu is {self.mu}; allowed is a float >= 0")

    def fraction_left(self, t: float) -> float:
        """See the class."""
        return (1 - t) / (1 + self.mu * t)

    def window_end(self) -> int | float:
        """Return the end of Eq. 2's window, twice as far from ``start`` as ``end``."""
        return self.start + 2 * (self.end - self.start)


@dataclass(frozen=True)
class Cubic(Schedule):
    """Automated gradual pruning: ``(1 - t)^3`` (Zhu and Gupta 2017, Eq. 1).

    Examples:
        >>> Cubic(start=0, end=100).n_remaining(50, n_start=1000, n_end=200)
        300
    """

    def fraction_left(self, t: float) -> float:
        """See the class."""
        return (1 - t) ** 3


@dataclass(frozen=True)
class Linear(Schedule):
    """The same number removed at every step.

    Examples:
        >>> Linear(start=0, end=100).n_remaining(50, n_start=1000, n_end=200)
        600
    """

    def fraction_left(self, t: float) -> float:
        """See the class."""
        return 1 - t


@dataclass(frozen=True)
class Geometric(Schedule):
    """The same fraction removed at every step: ``n_start * (n_end / n_start)^t``.

    Examples:
        >>> Geometric(start=0, end=100).n_remaining(50, n_start=1000, n_end=10)
        100
    """

    def _between(self, t: float, n_start: int, n_end: int) -> int:
        return max(n_end, math.floor(n_start * math.pow(n_end / n_start, t) * (1 + 1e-14)))


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at one step: after step ``start`` only ``n_end`` remain (``end`` is not used).

    Examples:
        >>> [OneShot(start=100).n_remaining(step, n_start=1000, n_end=10) for step in (99, 100)]
        [1000, 10]
    """

    end: int | float = dataclasses.field(default=0.0, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", self.start)
        super().__post_init__()


@dataclass(frozen=True)
class EpochFraction:
    """The same fraction of what is left, after each of some epochs (NPSET: 0.04 after epochs 10 to 50).

    ``n -= int(alpha * n)``, so that a layer's last one always stays.

    Attributes:
        alpha: The fraction.
        first: The first epoch (from 0) after which some are removed.
        last: The last one.

    Examples:
        >>> npset = EpochFraction(alpha=0.04, first=10, last=50)
        >>> [npset.n_remaining(epoch, n_start=1000) for epoch in (9, 10, 11, 50)]
        [1000, 960, 922, 198]
    """

    alpha: float = 0.04
    first: int = 10
    last: int = 50

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; allowed is a float in (0, 1)")
        if type(self.first) is not int or self.first < 0:
            raise ValueError(f"first is {self.first}; allowed is an epoch (int >= 0)")
        if type(self.last) is not int or self.last < self.first:
            raise ValueError(f"last is {self.last}; allowed is {self.first} (first) or a later epoch")

    def n_remaining(self, epoch: int, n_start: int) -> int:
        """Return how many remain after an epoch (from 0)."""
        n = n_start
        for _ in range(self.first, min(epoch, self.last) + 1):
            n -= int(self.alpha * n)
        return n

    def __call__(self, epoch: int, n_start: int, n_end: int) -> int:
        """Be a schedule function, of epochs: ``n_remaining``, but not below ``n_end``."""
        return max(n_end, self.n_remaining(epoch, n_start))


def resolved_schedule(schedule: Schedule | ScheduleFunction, total_steps: float) -> Schedule | ScheduleFunction:
    """Turn fractions of the run into steps; a plain function counts steps already."""
    return schedule.resolved(total_steps) if isinstance(schedule, Schedule) else schedule


def in_window(schedule: Schedule | ScheduleFunction, step: int) -> bool:
    """Tell whether a schedule acts at this step; of a function that is not known, so it always may."""
    if not isinstance(schedule, Schedule):
        return True
    return schedule.start <= step <= schedule.window_end() and (step - schedule.start) % schedule.every == 0


def n_remaining(schedule: Schedule | ScheduleFunction, step: int, n_start: int, n_end: int) -> int:
    """Ask a schedule, or a function in its place, for the number that remains, between ``n_end`` and ``n_start``.

    Raises:
        ValueError: If a function answers something that is not a whole number.
    """
    if isinstance(schedule, Schedule):
        return schedule.n_remaining(step, n_start, n_end)
    answer = schedule(step, n_start, n_end)
    if int(answer) != answer:
        raise ValueError(f"schedule: {schedule!r} answered {answer!r} at step {step}; allowed is a whole number")
    return min(n_start, max(n_end, int(answer)))
