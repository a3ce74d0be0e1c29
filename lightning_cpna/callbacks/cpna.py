"""CPNAPruning: connection pruning with normalisation and annealing, from a wide network down to an exact count."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from lightning_cpna._lightning import LightningModule
from lightning_cpna.callbacks.fit import Fit
from lightning_cpna.callbacks.ranks import agree
from lightning_cpna.callbacks.scheduled import ScheduledPruning, check_choice, check_function, check_targets
from lightning_cpna.graph import Graph
from lightning_cpna.rescale import Moments, rescalable, rescale_, verify_rescaling
from lightning_cpna.schedules import (
    Annealing,
    EpochFraction,
    Geometric,
    Schedule,
    ScheduleFunction,
    in_window,
    resolved_schedule,
)
from lightning_cpna.scores import Granularity, Score, ScoreFunction, ScoreInputs, ScoreKind
from lightning_cpna.sparsity import Budget, Scope, Sparsity
from lightning_cpna.unit_scores import UnitScore
from lightning_cpna.words import in_words

# When nothing is said: the fractions of the run before the first window and after the last one.
PRETRAINING, FINE_TUNING = 0.25, 0.15


@dataclass(frozen=True)
class Stage:
    """Budgets that are annealed together.

    Attributes:
        budgets: What should remain.
        schedule: When, in optimizer steps.
        producers: The layers whose units are normalised, by weight name.
    """

    budgets: tuple[Budget, ...]
    schedule: ScheduleFunction
    producers: tuple[str, ...]

    def acts(self, step: int) -> bool:
        """Tell whether pruning has begun."""
        return not isinstance(self.schedule, Schedule) or step >= self.schedule.start

    def normalizes(self, step: int) -> bool:
        """Tell whether this step normalises."""
        return bool(self.producers) and in_window(self.schedule, step)


class CPNAPruning(ScheduledPruning):
    """Anneal connections, input features or units down to an exact number while the network trains.

    With nothing but ``targets`` it does what works: it trains the wide network for a quarter of the run, then normalises
    the units that feed the output layer (Eq. 3) and anneals its connections (Eq. 2), then anneals the earlier layers by
    path score without normalisation, the last one first, and leaves the last 15 % of the run to train what remains.

    Normalisation keeps the network's function, which is checked on the first training batch in float64; removed
    connections never return; incoming connections of units that feed nothing any more go with them.

    Args:
        targets: From parameter name or glob (``"net.*.weight"``) to how much of it should remain: an int is a count, a
            float in (0, 1) a density.
        schedule: When, and how many stay: a ``Schedule``, or a function ``(step, n_start, n_end) -> int``. All targets
            follow it together. None: one window after the other, as above.
        granularity: What is annealed: "connection", whole input features ("feature": columns of the weight, by norm, the
            feature selection with annealing of Barbu et al. 2017), or whole "unit"s with what they feed.
        score: Which stay: the name of a score, a ``Score``, or a function of ``ScoreInputs``. None: "path" for
            connections and units, "magnitude" for features.
        normalize: Whether units that feed the targets are normalised at every step of the schedule's window. None: when
            connections are annealed, wherever units feed them. True: likewise, and it is an error if none do. False: never
            (the paper's CPA). The optimizer's moments are left alone, which trains best; "transform" scales them with
            the weights and "reset" clears them.
        scope: "layer": each parameter that a name matches has its own budget. "shared": they share one.
        shrink: Whether the tensors really shrink during the fit, once units and features are dead: training gets faster.
            Parameters stay the same objects, and every checkpoint has the full shapes; so do the tensors after the fit,
            where ``compact`` makes the small network. Not with DDP, ``torch.compile``, averaged or tied weights.
        name: Prefix of what is logged and key of the saved state; two callbacks need two names.

    Raises:
        ValueError: If an argument is out of range (here, or when training starts and the module is known).

    Logged (to every logger, and for ``ModelCheckpoint`` and ``EarlyStopping`` to monitor): ``{name}/connections``,
    ``{name}/density``, ``{name}/at_target`` (1 once every count is reached), and for each target ``connections``,
    ``effective``, ``target``, ``remaining``, ``density``, ``threshold``, ``live_units``, ``live_features``. TensorBoard also
    gets a text, ``{name}/plan``, and pictures, ``{name}/connectivity``: at the beginning, whenever three quarters of a
    layer's have gone, and at the end.

    Reference:
        Guo, She, Wu, Barbu: Finding deep local optima using network pruning, Algorithm 1.

    Examples:
        >>> CPNAPruning({"net.0.weight": 24, "net.2.weight": 12}).name
        'cpna'
    """

    def __init__(
        self,
        targets: dict[str, int | float],
        *,
        schedule: Schedule | ScheduleFunction | None = None,
        granularity: Granularity = "connection",
        score: ScoreKind | Score | ScoreFunction | None = None,
        normalize: bool | Literal["transform", "reset"] | None = None,
        scope: Scope = "layer",
        shrink: bool = False,
        name: str = "cpna",
    ) -> None:
        check_choice("granularity", granularity, ("connection", "feature", "unit"))
        check_choice("scope", scope, ("layer", "shared"))
        check_choice("normalize", normalize, (True, False, "transform", "reset", None))
        check_targets(targets)
        if not isinstance(score, str):
            check_function("score", score, 1, "Score")
        if isinstance(score, UnitScore):
            raise ValueError(f"score is {score}; allowed is the name of a connection's score, a Score or a function")
        if isinstance(schedule, EpochFraction):
            raise ValueError(f"schedule is {schedule}, which counts epochs; allowed is a schedule that counts steps")
        self.targets = targets
        self.granularity: Granularity = granularity
        self.score = score
        self.normalize = normalize
        self.scope: Scope = scope
        self._score = _score_of(score, granularity)
        self._moments: Moments = "keep" if isinstance(normalize, bool) or normalize is None else normalize
        self._stages: list[Stage] = []
        super().__init__(schedule, self._score.seed if isinstance(self._score, Score) else 0, name, shrink)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {"targets": dict(self.targets), "granularity": self.granularity, "scope": self.scope}

    def _find_budgets(self, sparsity: Sparsity, pl_module: LightningModule) -> list[Budget]:
        return sparsity.add_budgets(pl_module, self.targets, self.granularity, self.scope)

    def _plan(self, fit: Fit) -> None:
        graph = fit.sparsity.graph
        needs_graph = (
            self.schedule is None
            or self.granularity == "unit"
            or (self.granularity == "connection" and self.normalize is not False)
            or (isinstance(self._score, Score) and self._score.kind in ("path", "normalized"))
        )
        if graph is None and needs_graph:
            raise ValueError(
                f"{self.name}: the module could not be traced on a training batch ({fit.sparsity.untraced}); use "
                "normalize=False with score='magnitude' and a schedule, which need no trace"
            )
        if graph is None and fit.leads:
            warnings.warn(
                f"the module could not be traced, so dead units are neither counted nor removed: {fit.sparsity.untraced}",
                stacklevel=2,
            )
        for name in fit.names:
            if self.granularity == "unit":
                fit.sparsity.with_removable_units(name)
            if isinstance(self._score, Score):
                self._score.check(ScoreInputs(fit.sparsity.targets[name], fit.sparsity.tensors, graph, self._generator))
        total = fit.trainer.estimated_stepping_batches
        staged = _in_windows(fit.budgets, graph) if self.schedule is None else [(fit.budgets, self.schedule)]
        self._stages = [
            Stage(
                tuple(budgets),
                resolved_schedule(schedule, total),
                self._producers(budgets, graph, first=position == 0),
            )
            for position, (budgets, schedule) in enumerate(staged)
        ]
        producers = list(dict.fromkeys(name for stage in self._stages for name in stage.producers))
        if graph is not None and producers:
            verify_rescaling(fit.module, fit.sparsity.calls, graph, producers)

    def _producers(self, budgets: list[Budget], graph: Graph | None, first: bool) -> tuple[str, ...]:
        """Return the layers whose units a stage normalises."""
        names = [name for budget in budgets for name in budget.names]
        if self.normalize is None:
            if isinstance(self._score, Score) and self._score.kind == "normalized":
                return ()  # the score that needs no rescaling
            names = [n for n in names if self.granularity == "connection" and (first or self.schedule is not None)]
            names = [n for n in names if graph is None or n not in graph or _is_fed(graph, n)]
        return () if self.normalize is False or graph is None else tuple(rescalable(graph, names))

    def _when(self, fit: Fit, budget: Budget) -> str:
        stage = next(stage for stage in self._stages if budget in stage.budgets)
        normalised = ", ".join(f"`{name}`" for name in stage.producers)
        after = f"; the units of {normalised} are normalised" if normalised else ""
        after += f", moments: {self._moments}" if normalised and self._moments != "keep" else ""
        return f"optimizer steps: {in_words(stage.schedule)}; score: {in_words(self._score)}{after}"

    @torch.no_grad()
    def _after_step(self, fit: Fit) -> None:
        sparsity = fit.sparsity
        for stage in self._stages:
            if stage.normalizes(self._step) and sparsity.graph is not None:
                rescale_(
                    sparsity.tensors,
                    sparsity.graph,
                    stage.producers,
                    optimizers=fit.optimizers,
                    moments=self._moments,
                )
            if stage.acts(self._step):
                for budget in stage.budgets:
                    self._reach(fit, budget, stage.schedule, self._step, partial(self._prune, fit, budget))

    def _prune(self, fit: Fit, budget: Budget, n: list[int]) -> float:
        return fit.sparsity.prune_(
            budget,
            n,
            self._score,
            optimizers=fit.optimizers,
            generator=self._generator,
            agree=partial(agree, fit.trainer),
        )


def _score_of(score: ScoreKind | Score | ScoreFunction | None, granularity: Granularity) -> Score | ScoreFunction:
    if score is None:
        return Score("magnitude" if granularity == "feature" else "path")
    return Score(score) if isinstance(score, str) else score


def _is_fed(graph: Graph, name: str) -> bool:
    """Tell whether a layer is fed by units, known or not, and not by the input of the network."""
    return bool(graph.feeding(name)) or graph[name].unknown_source is not None


def _in_windows(budgets: list[Budget], graph: Graph | None) -> list[tuple[list[Budget], ScheduleFunction]]:
    """Give every budget a window of its own, the layer next to the output first."""
    order = {name: position for position, name in enumerate(graph or ())}
    latest_first = sorted(budgets, key=lambda budget: -max(order.get(name, -1) for name in budget.names))
    width = (1.0 - PRETRAINING - FINE_TUNING) / len(budgets)
    starts = [PRETRAINING + position * width for position in range(len(budgets))]
    schedules = [
        Annealing(starts[0], starts[0] + width / 2),
        *(Geometric(start, start + width) for start in starts[1:]),
    ]
    return [([budget], schedule) for budget, schedule in zip(latest_first, schedules, strict=True)]
