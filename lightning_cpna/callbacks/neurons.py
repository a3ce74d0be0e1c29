"""NeuronPruning: whole units removed on a schedule, with what they are fed and what they feed."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_cpna._lightning import LightningModule, Trainer
from lightning_cpna.activations import Watch
from lightning_cpna.callbacks.capture import running_eagerly
from lightning_cpna.callbacks.fit import Fit
from lightning_cpna.callbacks.ranks import agree
from lightning_cpna.callbacks.scheduled import ScheduledPruning, check_choice, check_function, check_targets
from lightning_cpna.layers import layers_of
from lightning_cpna.observe import mean_replacement_penalties
from lightning_cpna.rescale import rescale_, verify_rescaling
from lightning_cpna.schedules import (
    Cubic,
    EpochFraction,
    Schedule,
    ScheduleFunction,
    in_window,
    resolved_schedule,
)
from lightning_cpna.scores import Score
from lightning_cpna.sparsity import Budget, Scope, Sparsity
from lightning_cpna.targets import resolve
from lightning_cpna.unit_scores import UnitInputs, UnitScore, UnitScoreFunction, UnitScoreKind
from lightning_cpna.words import in_words


class NeuronPruning(ScheduledPruning):
    """Remove whole units (rows of a Linear, filters of a Conv) down to an exact number while the network trains.

    A removed unit loses all incoming and outgoing connections, for good. A layer never loses its last unit. Name the
    weights of hidden layers: the outputs of the network stay.

    Args:
        targets: From the name or glob of a hidden layer's weight (``"net.[02].weight"``) to how many of its units should
            remain: an int is a count, a float in (0, 1) a fraction. With an ``EpochFraction``, which says how many go,
            a list of names; a dict sets what it does not go below.
        schedule: When, and how many stay: a ``Schedule`` or function ``(step, n_start, n_end) -> int`` of optimizer steps,
            or an ``EpochFraction`` (NPSET), which acts when the next epoch starts. None: ``Cubic(0.25, 0.75)``.
        score: Which stay: the name of a score, a ``UnitScore``, or a function of ``UnitInputs``. Scores of activations use
            the batch that ends with the step (or the batches of the epoch) after which units go, as they are in training:
            with dropout on, and with gradients from before the step. If a layer did not run in that batch, its units go
            after one in which it does.
        compensate: "mean": what a removed unit fed the next layers in the mean goes into their biases. None: it is lost.
        normalize: Whether the units are scaled to norm 1, and what they feed by the old norm, at every step of the
            schedule's window (Guo et al., Eq. 3); with ``score="path"`` that is node-wise CPNA.
        scope: "layer": each layer that a name matches has its own budget. "shared": they share one, and the scores of
            each layer are divided by their norm.
        shrink: Whether the tensors really shrink during the fit, once units and features are dead: training gets faster.
            Parameters stay the same objects, and every checkpoint has the full shapes; so do the tensors after the fit,
            where ``compact`` makes the small network. Not with DDP, ``torch.compile``, averaged or tied weights.
        name: Prefix of what is logged and key of the saved state; two callbacks need two names.

    Raises:
        ValueError: If an argument is out of range (here, or when training starts and the module is known).

    Logged, as by ``CPNAPruning``: ``{name}/connections``, ``{name}/density``, ``{name}/at_target``, and for each target
    ``remaining`` (units), ``connections``, ``effective``, ``target``, ``density``, ``threshold``, ``live_units``,
    ``live_features``.

    Reference:
        Evci: Detecting dead weights and units in neural networks (2018); Guo, She, Wu, Barbu: Finding deep local optima
        using network pruning, Section 3 (hidden nodes).

    Examples:
        >>> NeuronPruning({"net.0.weight": 16}, score="path").name
        'neurons'
    """

    def __init__(
        self,
        targets: dict[str, int | float] | list[str],
        *,
        schedule: Schedule | EpochFraction | ScheduleFunction | None = None,
        score: UnitScoreKind | UnitScore | UnitScoreFunction = "mean_replacement",
        compensate: Literal["mean"] | None = "mean",
        normalize: bool = False,
        scope: Scope = "layer",
        shrink: bool = False,
        name: str = "neurons",
    ) -> None:
        schedule = Cubic(0.25, 0.75) if schedule is None else schedule
        check_choice("compensate", compensate, ("mean", None))
        check_choice("normalize", normalize, (True, False))
        check_choice("scope", scope, ("layer", "shared"))
        if isinstance(targets, list):
            if not targets or not isinstance(schedule, EpochFraction):
                raise ValueError(
                    f"targets is {targets!r}; allowed is a dict from name to what should remain, or, with an EpochFraction, "
                    "which says how many go of each layer, a list of names"
                )
            if scope == "shared":
                raise ValueError(
                    "scope is 'shared'; allowed with an EpochFraction, which says how many go of each, is 'layer'"
                )
        else:
            check_targets(targets)
        if isinstance(schedule, EpochFraction) and normalize:
            raise ValueError("normalize is True; allowed with an EpochFraction, which acts between epochs, is False")
        if not isinstance(score, str):
            check_function("score", score, 1, "UnitScore")
        if isinstance(score, Score):
            raise ValueError(f"score is {score}; allowed is the name of a unit's score, a UnitScore or a function")
        self.targets = targets
        self.score = score
        self.compensate = compensate
        self.normalize = normalize
        self.scope: Scope = scope
        self._score: UnitScore | UnitScoreFunction = UnitScore(score) if isinstance(score, str) else score
        if shrink and isinstance(schedule, EpochFraction) and self._needs_watch:
            raise ValueError(
                "shrink is True with an EpochFraction; allowed with it are scores of weights (norm, path, degrees, ...) and "
                "compensate=None, as activations are watched for a whole epoch"
            )
        self._seen: dict[str, Any] | None = None
        self._unresolved = self._resolved = schedule
        super().__init__(schedule, self._score.seed if isinstance(self._score, UnitScore) else 0, name, shrink)

    @property
    def _keeps_graph(self) -> bool:  # type: ignore[override]
        return isinstance(self.schedule, EpochFraction)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {"targets": self.targets if isinstance(self.targets, list) else dict(self.targets), "scope": self.scope}

    def state_dict(self) -> dict[str, Any]:
        """Return the state; where units go when an epoch starts, with what was seen in the epoch before."""
        state = super().state_dict()
        if self._fit is not None:
            self._remember(self._fit)
        return {**state, "seen": self._seen}

    def _remember(self, fit: Fit) -> None:
        """Note what is needed when the next epoch starts."""
        if isinstance(self.schedule, EpochFraction):
            self._seen = None if fit.watch is None else fit.watch.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the connectivity and let go of the optimizers."""
        self._remember(self._running())
        super().on_train_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state from a checkpoint."""
        super().load_state_dict(state_dict)
        self._seen = state_dict["seen"]

    def _begin(self) -> None:
        super()._begin()
        self._seen = None

    @property
    def _needs_watch(self) -> bool:
        """Whether the units' activations must be known."""
        score = self._score
        known = isinstance(score, UnitScore) and not score.needs_activity and score.kind != "penalty"
        return self.compensate == "mean" or not known

    def _find_budgets(self, sparsity: Sparsity, pl_module: LightningModule) -> list[Budget]:
        targets = self.targets
        if isinstance(targets, list):
            assert isinstance(self.schedule, EpochFraction)
            names = [target.name for group in resolve(pl_module, targets).values() for target in group]
            counts = {name: max(self._n_start.get(name) or [sparsity.n_units(name)]) for name in names}
            targets = {name: self.schedule.n_remaining(self.schedule.last, n) for name, n in counts.items()}
        return sparsity.add_budgets(pl_module, targets, "unit", self.scope)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from what a checkpoint knows; refuse what the score cannot do."""
        super().on_train_start(trainer, pl_module)
        fit = self._running()
        if isinstance(self.schedule, EpochFraction) and 0 <= (trainer.max_epochs or -1) < self.schedule.last + 2:
            warnings.warn(
                f"{self.name}: the schedule's last units go when epoch {self.schedule.last + 1} (from 0) starts, but the run "
                f"has {trainer.max_epochs} epochs: its counts will not be reached; lower last, or train longer",
                stacklevel=2,
            )
        if self._is_penalty and not pl_module.automatic_optimization:
            raise ValueError(
                f"{self.name}: score is 'penalty', which repeats training_step to know the loss; allowed with manual "
                "optimisation is another score"
            )
        if self._seen is not None:
            fit.watch = Watch(pl_module)
            fit.watch.load_state_dict(self._seen)

    @property
    def _is_penalty(self) -> bool:
        return isinstance(self._score, UnitScore) and self._score.kind == "penalty"

    def _can_plan(self, fit: Fit) -> bool:
        """See the base; layers that did not run yet can wait, what is no layer cannot."""
        waiting = set(fit.names) - set(fit.sparsity.graph or ())
        return not waiting or fit.sparsity.graph is None or not waiting <= set(layers_of(fit.module))

    def _plan(self, fit: Fit) -> None:
        for name in fit.names:
            graph = fit.sparsity.with_removable_units(name)
            for reader in graph.fed_by(name) if self.compensate == "mean" else ():
                if reader.bias is None:
                    raise ValueError(
                        f"compensate is 'mean', but {reader.weight!r}, which reads the units of {name!r}, has no bias to "
                        "which their mean could be added; allowed is compensate=None, or bias=True in that layer"
                    )
            if self.normalize and (obstacles := graph[name].obstacles):
                raise ValueError(
                    f"normalize: the units of {name!r} cannot be rescaled without changing the network's function: "
                    f"{'; '.join(obstacles)}; allowed is normalize=False"
                )
        self._resolved = resolved_schedule(self._unresolved, fit.trainer.estimated_stepping_batches)
        if fit.watch is not None:
            fit.watch.restrict(layer.weight for name in fit.names for layer in graph.fed_by(name))
        if self.normalize:
            verify_rescaling(fit.module, fit.sparsity.calls, graph, fit.names)

    def _when(self, fit: Fit, budget: Budget) -> str:
        time = "epochs" if isinstance(self._resolved, EpochFraction) else "optimizer steps"
        after = "; what they say on average goes into the biases behind them" if self.compensate == "mean" else ""
        after += "; the units are normalised" if self.normalize else ""
        return f"{time}: {in_words(self._resolved)}; score: {in_words(self._score)}{after}"

    # Watching

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the batch, if units may go after it."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        fit = self._running()
        fit.watching.close()  # of a batch that made no step
        if self._needs_watch and self._may_prune_after(fit):
            fit.batch = (batch, batch_idx) if self._is_penalty else None
            fit.watch = fit.watch or Watch(pl_module)
            fit.watching.enter_context(running_eagerly(pl_module))
            fit.watching.enter_context(fit.watch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off, now that the gradients are known, so that the module can be copied."""
        if pl_module.automatic_optimization:
            self._running().watching.close()

    def _may_prune_after(self, fit: Fit) -> bool:
        if not fit.planned:
            return True
        if isinstance(self.schedule, EpochFraction):
            return self.schedule.first <= fit.trainer.current_epoch <= self.schedule.last
        return any(
            self._wanted(budget, current, self._resolved, self._step + 1) != current
            for budget in fit.budgets
            for current in [fit.sparsity.counts(budget)]
        )

    def _take_in(self, fit: Fit) -> None:
        """Take in what was watched in the batch that ended with this step."""
        fit.watching.close()
        if fit.watch is not None and fit.sparsity.graph is not None:
            fit.watch.digest(fit.sparsity.graph, fit.names)

    # Pruning

    @torch.no_grad()
    def _after_step(self, fit: Fit) -> None:
        self._take_in(fit)
        if isinstance(self.schedule, EpochFraction):
            return
        self._prune_all(fit, self._step)
        if fit.watch is not None:
            fit.watch.clear()
        schedule, graph = self._resolved, fit.sparsity.graph
        if self.normalize and graph is not None and in_window(schedule, self._step):
            rescale_(fit.sparsity.tensors, graph, fit.names)  # last, as what was watched is in the scale of before

    @torch.no_grad()
    def _between_epochs(self, fit: Fit) -> None:
        """Remove the units that an ``EpochFraction`` removes after the epoch that ended."""
        if isinstance(self.schedule, EpochFraction):
            self._prune_all(fit, fit.trainer.current_epoch - 1)
            if fit.watch is not None:
                fit.watch.clear()

    def _prune_all(self, fit: Fit, time: int) -> None:
        for budget in fit.budgets:
            if self._has_seen(fit, budget):
                self._reach(fit, budget, self._resolved, time, partial(self._prune, fit, budget))

    def _has_seen(self, fit: Fit, budget: Budget) -> bool:
        """Tell whether all that scores and means need was watched."""
        watch, graph = fit.watch, fit.sparsity.graph
        if not self._needs_watch:
            return True
        return watch is not None and graph is not None and all(watch.has_seen(graph, name) for name in budget.names)

    def _prune(self, fit: Fit, budget: Budget, n: list[int]) -> float:
        sparsity = fit.sparsity
        means = fit.trainer.strategy.broadcast(fit.watch.means()) if fit.watch is not None else {}
        scores = {name: self._score(self._inputs(fit, name, means)) for name in budget.names}
        return sparsity.prune_units_(
            budget,
            n,
            scores,
            means=means if self.compensate == "mean" else None,
            optimizers=fit.optimizers,
            agree=partial(agree, fit.trainer),
        )

    def _inputs(self, fit: Fit, name: str, means: dict[str, Tensor]) -> UnitInputs:
        graph = fit.sparsity.with_removable_units(name)
        return UnitInputs.of(
            fit.sparsity,
            name,
            self._generator,
            activity=None if fit.watch is None else fit.watch.activity(graph, name),
            penalize=None
            if fit.batch is None
            else partial(mean_replacement_penalties, fit.module, graph, name, [fit.batch], _training_loss, means),
        )


def _training_loss(pl_module: LightningModule, batch: tuple[Any, int]) -> Tensor:
    """Compute the loss of a training step without what else it does: logging."""
    with _no_log(pl_module), pl_module.trainer.precision_plugin.train_step_context():
        n_arguments = len(inspect.signature(pl_module.training_step).parameters)
        output = pl_module.training_step(*batch[: min(2, n_arguments)])
    return torch.as_tensor(output["loss"] if isinstance(output, dict) else output)


@contextlib.contextmanager
def _no_log(pl_module: LightningModule) -> Iterator[None]:
    pl_module.log = pl_module.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del pl_module.log, pl_module.log_dict
