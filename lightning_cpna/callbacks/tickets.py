"""TicketRewind: lottery tickets, rewound to any step, beside the controls that make a claim a claim."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_cpna._lightning import LightningModule, Trainer
from lightning_cpna.callbacks.base import SparsityCallback, averaging, in_full_shapes, ours
from lightning_cpna.callbacks.fit import Fit
from lightning_cpna.callbacks.log import give_loggers, last_step
from lightning_cpna.callbacks.order import BatchOrder
from lightning_cpna.callbacks.ranks import agree, broadcast
from lightning_cpna.callbacks.scheduled import check_choice, check_targets
from lightning_cpna.plots import log_figure, plot_tickets
from lightning_cpna.schedules import Geometric
from lightning_cpna.scores import Granularity, Score
from lightning_cpna.snapshot import Rewind, Snapshot, restore_masks_, rewind_, take_snapshot
from lightning_cpna.sparsity import Budget, Scope, Sparsity
from lightning_cpna.stacked import Stacked
from lightning_cpna.targets import resolve
from lightning_cpna.tickets import Control, Round, RoundReport, shuffle_masks_
from lightning_cpna.words import in_words


class TicketRewind(SparsityCallback):
    """Find lottery tickets by iterative magnitude pruning, and train them beside their controls, in one fit.

    The fit is a sequence of rounds of ``epochs`` epochs. The first trains the dense network. After it, ``levels`` times, the
    masks tighten to fewer connections, by magnitude, and the network goes back to what it was early in training; then it
    trains for a round. Before each of these rounds the controls get one of their own, with the masks of that level; what the
    network had learned is put aside meanwhile. The fit ends after ``n_epochs`` epochs with the winning ticket.

    A round that went back is bit for bit the fit of the masked network from the same weights, optimizer state and random
    numbers, on one process. Batches come in the order of the first round, if the loader draws from torch's generator; one of
    its own begins again with its seed, and a sampler that counts epochs (``DistributedSampler``) with the first round's. They
    do not if the loader is made anew (``reload_dataloaders_every_n_epochs``), has persistent workers that draw, or the fit
    goes on from a checkpoint that was made between the last batch of a round and its validation.

    ``trainer.global_step`` and ``current_epoch`` go on rising, so give a learning rate scheduler the length of a round; one
    that steps every N epochs counts ``current_epoch``, so that N must divide ``epochs``.
    ``EarlyStopping`` would end the whole fit.

    Args:
        targets: From parameter name or glob (``"net.*.weight"``) to how much of it should remain after the last level: an int
            is a count, a float in (0, 1) a density; every level removes the same fraction of what is left. None: other
            callbacks prune (``CPNAPruning``, ``NeuronPruning``), in the first round or in all, and this one rewinds.
        epochs: The length of a round.
        levels: How often the masks tighten. 1 is one-shot pruning.
        rewind_to: ``"init"``, an optimizer step of the first round, or ``"keep"`` (weights stay, learning rates go back); or
            a ``Rewind``, which also says what goes back. Everything does by default.
        controls: ``"reinit"``: the same masks, fresh random weights. ``"shuffle"``: the same weights, random masks that leave
            every layer as many connections.
        granularity: What is counted and removed: "connection", input "feature"s, or whole "unit"s with what they feed.
        scope: "layer": each parameter that a name matches has its own budget. "shared": they share one.
        monitor: The logged metric that is noted at the end of each round, as ``"val_acc"``.
        name: Prefix of what is logged and key of the saved state; two callbacks need two names.

    Attributes:
        reports: What is known of each round that ended.

    Raises:
        ValueError: If an argument is out of range (here, or when training starts and the module is known).

    Logged: ``{name}/connections``, ``{name}/density``, ``{name}/at_target`` (1 while the last winning ticket trains),
    ``{name}/level``, ``{name}/round`` (from 0), for each target ``connections``, ``effective``, ``density``,
    ``live_units``, ``live_features``; at the end of each round ``{name}/{branch}/{monitor}`` and
    ``{name}/{branch}/connections``, and a picture of the metric against what remains.

    Reference:
        Frankle, Carbin: The lottery ticket hypothesis (2019); Frankle, Dziugaite, Roy, Carbin: Linear mode connectivity and
        the lottery ticket hypothesis (2020); Renda, Frankle, Carbin: Comparing rewinding and fine-tuning (2020).

    Examples:
        >>> ticket = TicketRewind({"net.*.weight": 0.8**5}, epochs=3, levels=5, controls=["reinit"])
        >>> ticket.n_epochs
        33
    """

    _turn = 2

    def __init__(
        self,
        targets: dict[str, int | float] | None = None,
        *,
        epochs: int,
        levels: int = 1,
        rewind_to: Literal["init", "keep"] | int | Rewind = "init",
        controls: Sequence[Control] = (),
        granularity: Granularity = "connection",
        scope: Scope = "layer",
        monitor: str | None = None,
        name: str = "ticket",
    ) -> None:
        if targets is not None:
            check_targets(targets)
        for argument, value in (("epochs", epochs), ("levels", levels)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{argument} is {value!r}; allowed is an int >= 1")
        if not isinstance(controls, list | tuple) or len(set(controls)) < len(controls):
            raise ValueError(f"controls is {controls!r}; allowed is a list of 'reinit' and 'shuffle', each once")
        for control in controls:
            check_choice("controls", control, ("reinit", "shuffle"))
        check_choice("granularity", granularity, ("connection", "feature", "unit"))
        check_choice("scope", scope, ("layer", "shared"))
        if not isinstance(monitor, str | None):
            raise ValueError(f"monitor is {monitor!r}; allowed is the name of a metric that is logged, or None")
        if targets is None and controls and levels > 1:
            raise ValueError(
                f"levels is {levels}; allowed without targets, but with controls, is 1: after the first round nothing goes"
            )
        self._rewind = rewind_to if isinstance(rewind_to, Rewind) else Rewind(rewind_to)
        if "reinit" in controls and isinstance(self._rewind.to, int):
            raise ValueError(
                f"controls has 'reinit', which begins with fresh weights, but rewind_to is {self._rewind.to}; allowed with "
                "it are 'init' and 'keep'"
            )
        self.targets = targets
        self.epochs = epochs
        self.levels = levels
        self.rewind_to = rewind_to
        self.controls = controls
        self.granularity: Granularity = granularity
        self.scope: Scope = scope
        self.monitor = monitor
        self._generator = torch.Generator()
        branches = (*controls, self._rewind.label)
        first = Round(0, self._rewind.label)
        self._rounds = (first, *(Round(level, branch) for level in range(1, levels + 1) for branch in branches))
        super().__init__(name)

    @property
    def n_epochs(self) -> int:
        """How many epochs all rounds take."""
        return self.epochs * len(self._rounds)

    @property
    def _keeps_graph(self) -> bool:  # type: ignore[override]
        return self.granularity == "unit"

    @property
    def _arguments(self) -> dict[str, Any]:
        return {
            "targets": None if self.targets is None else dict(self.targets),
            "epochs": self.epochs,
            "levels": self.levels,
            "rewind_to": repr(self._rewind),
            "controls": list(self.controls),
            "granularity": self.granularity,
            "scope": self.scope,
        }

    # State

    def _begin(self) -> None:
        super()._begin()
        self.reports: tuple[RoundReport, ...] = ()
        self._n_begun = 0  # epochs that began after the first
        self._round_step = 0  # the step at which the round began
        self._n_start = dict[str, int]()
        self._value: tuple[int, float] | None = None  # what validation said last, and in which epoch
        self._order = BatchOrder()
        self._snapshot: Snapshot | None = None
        self._precision = dict[str, Any]()  # AMP's gradient scaler, with the snapshot
        self._aside: Snapshot | None = None  # the winning ticket, while controls train
        self._is_rng_back = False  # whether the generators went back when this fit began
        self._fit_step = 0  # the step at which this fit, perhaps resumed, began
        self._value_before: Tensor | None = None  # what was logged when validation began

    def state_dict(self) -> dict[str, Any]:
        """Return the state: which round it is, what is known of those that ended, and the snapshots."""
        return {
            **super().state_dict(),
            "reports": [asdict(report) for report in self.reports],
            "n_begun": self._n_begun,
            "round_step": self._round_step,
            "n_start": dict(self._n_start),
            "value": self._value,
            "rng": list(self._order.states),
            "generator": self._generator.get_state(),
            "precision": self._precision,
            "snapshot": None if self._snapshot is None else vars(self._snapshot),
            "aside": None if self._aside is None else vars(self._aside),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state from a checkpoint."""
        super().load_state_dict(state_dict)
        self.reports = tuple(RoundReport(**report) for report in state_dict["reports"])
        self._n_begun = state_dict["n_begun"]
        self._round_step = state_dict["round_step"]
        self._n_start = dict(state_dict["n_start"])
        self._value = state_dict["value"]
        self._order = BatchOrder(list(state_dict["rng"]))
        self._generator.set_state(state_dict["generator"])
        self._precision = state_dict["precision"]
        snapshot, aside = state_dict["snapshot"], state_dict["aside"]
        self._snapshot = None if snapshot is None else Snapshot(**snapshot)
        self._aside = None if aside is None else Snapshot(**aside)

    # Before training

    def _find_budgets(self, sparsity: Sparsity, pl_module: LightningModule) -> list[Budget]:
        if self.targets is None:
            return []
        for target in (target for group in resolve(pl_module, self.targets).values() for target in group):
            if target.axes.input is None:
                raise ValueError(
                    f"targets: {target.name!r} is no weight of a layer, but a bias or the scale of a normalisation; allowed "
                    "are names and globs of layers' weights"
                )
        return sparsity.add_budgets(pl_module, self.targets, self.granularity, self.scope)

    def _plan(self, fit: Fit) -> None:
        for name in fit.names if self.granularity == "unit" else ():
            fit.sparsity.with_removable_units(name)

    def _when(self, fit: Fit, budget: Budget) -> str:
        branches = ", ".join(dict.fromkeys(one.branch for one in self._rounds))
        return f"{self.levels} levels, rounds of {self.epochs} epochs: {branches}; {in_words(self._rewind)}"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets; note the random generators, before the first batches are drawn."""
        if isinstance(pl_module, Stacked):
            raise ValueError(f"{self.name}: the module is a stack; allowed is to rewind one network at a time")
        super().on_fit_start(trainer, pl_module)
        if others := [other.name for other in ours(trainer) if isinstance(other, TicketRewind) and other is not self]:
            raise ValueError(
                f"{self.name}: {others[0]!r} rewinds this network, too; allowed is one TicketRewind in a Trainer"
            )
        if self._rewind.sampler:
            try:
                self._order.note(trainer)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
        # The first batches of a resumed fit are drawn before an epoch starts: maybe those of a new round.
        self._is_rng_back = self._rewind.sampler and self._restored and (self._n_begun + 1) % self.epochs == 0
        if self._is_rng_back:
            self._order.rewind_(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the rounds fit into the run; note what the network is, if it has not been trained yet."""
        super().on_train_start(trainer, pl_module)
        fit = self._running()
        self._fit_step = self._step
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(other, "wait_count"):
                warnings.warn(f"{self.name}: {type(other).__name__} would end the whole fit, not a round", stacklevel=2)
        if why := averaging(trainer):
            raise ValueError(f"{self.name}: {why}, which would not go back; allowed is a fit without it")
        if self.controls and any(other._turn == 1 for other in ours(trainer)):
            raise ValueError(
                f"{self.name}: controls is {list(self.controls)}, but another callback goes on exchanging connections, so "
                "that there is no mask to control; allowed is controls=[]"
            )
        if self.targets is None and not fit.sparsity.masks:
            raise ValueError(
                "targets is None, but nothing is or will be pruned; allowed is a dict, or a callback beside it"
            )
        step, is_known = self._rewind.to, pl_module.automatic_optimization and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if isinstance(step, int) and is_known and step > (a_round := self.epochs * _n_steps_an_epoch(trainer)):
            raise ValueError(f"rewind_to is {step}; allowed is a step of the first round, 1 to {a_round}")
        if 0 <= (trainer.max_epochs or -1) < (self._epoch or 0) - self._n_begun + self.n_epochs:
            warnings.warn(
                f"{self.name}: {len(self._rounds)} rounds of {self.epochs} epochs need {self.n_epochs} epochs, but "
                f"max_epochs is {trainer.max_epochs}: the last ones will be missing; use max_epochs={self.n_epochs}",
                stacklevel=2,
            )
        if self._snapshot is None and not self._step:
            seed = int(broadcast(trainer, torch.tensor(torch.initial_seed() % 2**62)))
            self._generator.manual_seed(seed + 1)  # not the one of scores that draw
            if not isinstance(step, int):
                self._take_snapshot(fit)
        for budget in fit.budgets:
            self._n_start.setdefault(budget.label, fit.sparsity.n_remaining(budget))

    def _take_snapshot(self, fit: Fit) -> None:
        with in_full_shapes(fit.trainer):
            self._snapshot = take_snapshot(fit.sparsity, fit.optimizers, _schedulers(fit.trainer))
            self._precision = copy.deepcopy(fit.trainer.precision_plugin.state_dict())

    # While training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a round, if the last one ended; tell samplers which of the round's epochs this is."""
        super().on_train_epoch_start(trainer, pl_module)
        if self._rewind.sampler:
            self._order.set_epoch(trainer, self._n_begun % self.epochs)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """See the base."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._is_rng_back = False

    def _logged(self, trainer: Trainer) -> Tensor | None:
        return None if self.monitor is None else trainer.callback_metrics.get(self.monitor)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what is logged before validation."""
        self._value_before = self._logged(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metric if validation logged it: whoever goes on from a checkpoint of this moment does not know it."""
        value = None if trainer.sanity_checking else self._logged(trainer)
        if value is not None and value is not self._value_before:
            self._value = (self._n_begun, float(value))
        if not trainer.sanity_checking and trainer.is_last_batch and (self.monitor is None or self._has_value()):
            self._note_round(self._running())

    def _has_value(self) -> bool:
        return self._value is not None and self._value[0] == self._n_begun

    def _after_step(self, fit: Fit) -> None:
        step = self._rewind.to
        if isinstance(step, int) and self._snapshot is None and self._step >= step:
            self._take_snapshot(fit)

    def _between_epochs(self, fit: Fit) -> None:
        if self._n_begun == 0 and self.monitor is not None and fit.trainer.check_val_every_n_epoch == 1:
            self._value_of(fit)
        self._note_round(fit)
        self._n_begun += 1
        n_rounds, epoch = divmod(self._n_begun, self.epochs)
        if epoch == 0 and n_rounds < len(self._rounds):
            with in_full_shapes(fit.trainer):
                self._begin_round(fit, self._rounds[n_rounds - 1], self._rounds[n_rounds])

    def _begin_round(self, fit: Fit, last: Round, new: Round) -> None:
        optimizers, schedulers = fit.optimizers, _schedulers(fit.trainer)
        if self._snapshot is None:
            raise ValueError(f"rewind_to is {self._rewind.to}; allowed is a step of the first round, 1 to {self._step}")
        for other in ours(fit.trainer) if self.controls else ():
            if other is not self and not other._at_target(other._running()):
                raise ValueError(
                    f"{self.name}: the first round ended with step {self._step}, but {other.name!r} goes on pruning; allowed "
                    "with controls are schedules that end before, in steps or as fractions of the whole fit"
                )
        if self._aside is not None:  # forget the control
            restore_masks_(fit.sparsity, self._aside, optimizers)
            rewind_(fit.sparsity, self._aside, optimizers=optimizers, schedulers=schedulers)
        if last.level < new.level:
            self._tighten(fit, new.level)
            if new.branch in self.controls:
                self._aside = take_snapshot(fit.sparsity, optimizers, schedulers)
        if new.branch == "shuffle":
            shuffle_masks_(fit.sparsity, self._snapshot, optimizers=optimizers, generator=self._generator)
        what = self._rewind
        if new.branch in self.controls:
            what = replace(what, to="init", weights=True, buffers=True)
        else:
            self._aside = None
        rewind_(
            fit.sparsity,
            self._snapshot,
            what,
            optimizers=optimizers,
            schedulers=schedulers,
            redraw=self._generator if new.branch == "reinit" else None,
            fill=self._generator if new.branch == "shuffle" else None,
        )
        if what.optimizer and self._precision:
            fit.trainer.precision_plugin.load_state_dict(self._precision)
        if what.sampler and not self._is_rng_back:
            self._order.rewind_(fit.trainer)

    def _tighten(self, fit: Fit, level: int) -> None:
        schedule = Geometric(0, self.levels)
        for budget in fit.budgets:
            n = schedule.n_remaining(level, self._n_start[budget.label], budget.n_end)
            if n < fit.sparsity.n_remaining(budget):
                with self._naming_errors(f"pruning {budget.label!r}: "):
                    fit.sparsity.prune_(
                        budget, n, Score("magnitude"), optimizers=fit.optimizers, agree=partial(agree, fit.trainer)
                    )

    def _value_of(self, fit: Fit) -> float | None:
        """Return the metric at the end of the epoch that began last."""
        if self.monitor is None:
            return None
        if self._value is not None and self._has_value():
            return self._value[1]
        if (logged := self._logged(fit.trainer)) is not None:
            return float(logged)
        if self._step > self._fit_step:
            raise ValueError(
                f"monitor is {self.monitor!r}, which was not logged in this round (check_val_every_n_epoch is "
                f"{fit.trainer.check_val_every_n_epoch}); logged were {', '.join(sorted(fit.trainer.callback_metrics))}"
            )
        warnings.warn(
            f"{self.name}: the fit goes on from a checkpoint that was made at a round's end, before {self.monitor!r} was "
            "known: the round's report lacks it",
            stacklevel=2,
        )
        return None

    def _note_round(self, fit: Fit) -> None:
        """Note what is known of the round that ends with this epoch, if one does, and log it, once."""
        n_rounds, epoch = divmod(self._n_begun + 1, self.epochs)
        if epoch or n_rounds > len(self._rounds) or len(self.reports) >= n_rounds:
            return
        trainer, index, value = fit.trainer, len(self.reports), self._value_of(fit)
        sizes = {name: fit.sparsity.size(name) for name in fit.sparsity.masks}
        report = RoundReport(
            self._rounds[index].level,
            self._rounds[index].branch,
            _live(fit),
            sizes,
            self._step - self._round_step,
            value,
        )
        self.reports += (report,)
        self._round_step = self._step
        logged = {f"{self.name}/{report.branch}/connections": float(report.connections)}
        if value is not None:
            logged[f"{self.name}/{report.branch}/{self.monitor}"] = value
        step = last_step(trainer)
        give_loggers(trainer, logged, step)
        if trainer.is_global_zero and value is not None:
            draw = partial(plot_tickets, self.reports, self.monitor)
            log_figure(trainer.loggers, f"{self.name}/tickets", draw, step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the fit with the last round."""
        super().on_train_epoch_end(trainer, pl_module)
        self._is_rng_back = False
        if self._n_begun + 1 == self.n_epochs:
            trainer.should_stop = True

    def _round(self) -> Round:
        return self._rounds[min(self._n_begun // self.epochs, len(self._rounds) - 1)]

    def _at_target(self, fit: Fit) -> bool:
        return self._round() is self._rounds[-1] and super()._at_target(fit)

    def _values(self, fit: Fit) -> dict[str, float]:
        now = self._round()
        return {**self._layer_values(fit), "level": now.level, "round": self._rounds.index(now)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last round, or say that the fit ended before it did."""
        fit = self._running()
        fit.restore()
        if trainer.is_last_batch:
            self._note_round(fit)
        if len(self.reports) < len(self._rounds):
            now = self._round()
            warnings.warn(
                f"{self.name}: training ended after {len(self.reports)} of {len(self._rounds)} rounds, with the network of "
                f"branch {now.branch!r} at level {now.level}",
                stacklevel=2,
            )
        super().on_train_end(trainer, pl_module)


def _live(fit: Fit) -> dict[str, int]:
    return {name: mask.n_live for name, mask in fit.sparsity.masks.items()}


def _schedulers(trainer: Trainer) -> list[Any]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _n_steps_an_epoch(trainer: Trainer) -> float:
    n: float = trainer.num_training_batches
    return n if math.isinf(n) else math.ceil(n / trainer.accumulate_grad_batches)
