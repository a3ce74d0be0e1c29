"""What the pruning callbacks share: targets, a schedule, and counts that fall from where they began."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_cpna._lightning import LightningModule, Trainer
from lightning_cpna.callbacks.base import SparsityCallback
from lightning_cpna.callbacks.fit import Fit
from lightning_cpna.schedules import Schedule, ScheduleFunction, n_remaining
from lightning_cpna.sparsity import Budget


class ScheduledPruning(SparsityCallback):
    """Base of the callbacks that prune down to a count on a schedule.

    Args:
        schedule: When, and how many stay; or None.
        seed: The seed of scores that draw.
        name: Prefix of everything that is logged, and key of the callback's state.
        shrink: Whether dead units and features leave the tensors while the fit goes on.
    """

    def __init__(self, schedule: Schedule | ScheduleFunction | None, seed: int, name: str, shrink: bool) -> None:
        check_function("schedule", schedule, 3, "Annealing, Cubic, Geometric, Linear or OneShot")
        self.schedule = schedule
        self._seed = seed
        self._generator = torch.Generator()
        super().__init__(name, shrink)

    def state_dict(self) -> dict[str, Any]:
        """Return the step, the counts at which pruning began, and the random generator's state."""
        return {
            **super().state_dict(),
            "n_start": dict(self._n_start),
            "thresholds": dict(self._thresholds),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state from a checkpoint."""
        super().load_state_dict(state_dict)
        self._n_start = dict(state_dict["n_start"])
        self._thresholds = dict(state_dict["thresholds"])
        self._generator.set_state(state_dict["generator"])

    def _begin(self) -> None:
        super()._begin()
        self._n_start = dict[str, list[int]]()  # of each member
        self._thresholds = dict[str, float]()
        self._generator.manual_seed(self._seed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the schedule's fractions can be turned into steps, and that the run is long enough."""
        super().on_train_start(trainer, pl_module)
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            return
        total = trainer.estimated_stepping_batches
        schedule = (self.schedule or Schedule(0.0, 1.0)).resolved(total)
        last = total - trainer.global_step + self._step
        if self.schedule is not None and pl_module.automatic_optimization and total > 0 and last < schedule.end:
            warnings.warn(
                f"{self.name}: the schedule ends at optimizer step {schedule.end}, but the run has {last:.0f}: its counts "
                "will not be reached; lower its end, give it as a fraction, or train longer",
                stacklevel=2,
            )

    def _reach(
        self, fit: Fit, budget: Budget, schedule: ScheduleFunction, time: int, prune: Callable[[list[int]], float]
    ) -> None:
        """Prune a budget to what its schedule asks for at this step or epoch, if that is less than remains."""
        current = fit.sparsity.counts(budget)
        self._n_start.setdefault(budget.label, current)
        wanted = self._wanted(budget, current, schedule, time)
        if wanted != current:
            with self._naming_errors(f"pruning {budget.label!r}: "):
                self._thresholds[budget.label] = prune(wanted)
            is_at_end = [n == budget.n_end < before for n, before in zip(wanted, current, strict=True)]
            if any(is_at_end):
                fit.sparsity.remove_dead_units_(fit.optimizers, is_at_end)

    def _wanted(self, budget: Budget, current: list[int], schedule: ScheduleFunction, time: int) -> list[int]:
        """Ask the schedule how many of each member should remain: no more than do."""
        n_start = self._n_start.get(budget.label, current)
        return [
            min(own, n_remaining(schedule, time, began, budget.n_end))
            for own, began in zip(current, n_start, strict=True)
        ]

    def _values(self, fit: Fit) -> dict[str, float]:
        values = self._layer_values(fit)
        for budget in fit.budgets:
            values[f"{budget.label}/target"] = budget.n_end
            values[f"{budget.label}/remaining"] = fit.sparsity.n_remaining(budget)
            values[f"{budget.label}/threshold"] = self._thresholds.get(budget.label, 0.0)
        return values


def check_targets(targets: object) -> None:
    """Raise if targets are not a dict from parameter name to a count or density."""
    if not isinstance(targets, Mapping):
        raise ValueError(f"targets is {targets!r}; allowed is a dict from parameter name to what should remain")
    if not targets:
        raise ValueError("targets is empty; allowed is at least one parameter name with the count that should remain")
    for pattern, wanted in targets.items():
        valid = (0.0 < wanted < 1.0) if isinstance(wanted, float) else (type(wanted) is int and wanted >= 1)
        if not valid:
            raise ValueError(
                f"targets: {pattern!r} is {wanted!r}; allowed is a count (int >= 1) or a density in (0, 1)"
            )


def check_choice(argument: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise if a value is none of those that are allowed."""
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
        raise ValueError(f"{argument} is {value!r}; allowed is one of {', '.join(map(repr, allowed))}")


def check_function(argument: str, value: object, n_arguments: int, ours: str) -> None:
    """Raise if a value is neither None, nor of one of our classes, nor a function of so many arguments."""
    if value is None:
        return
    if isinstance(value, type) or not callable(value):
        raise ValueError(f"{argument} is {value!r}; allowed is an instance of {ours}, or a function")
    try:
        signature = inspect.signature(value)
    except ValueError:  # a function written in C, which does not tell
        return
    try:
        signature.bind(*range(n_arguments))
    except TypeError:
        raise ValueError(f"{argument} is {value!r}; allowed is a function of {n_arguments} argument(s)") from None
