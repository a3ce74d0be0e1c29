"""What every callback here shares: one set of masks a module, real optimizer steps, and a state that resumes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_cpna._lightning import Callback, LightningModule, Trainer
from lightning_cpna.callbacks.board import ConnectivityPictures, PlanRow, log_text, plan_text
from lightning_cpna.callbacks.capture import Capture, is_compiled, trace_few
from lightning_cpna.callbacks.fit import Fit
from lightning_cpna.callbacks.log import Log, last_step
from lightning_cpna.cells import cells_of
from lightning_cpna.graph import Graph
from lightning_cpna.layers import layers_of
from lightning_cpna.mask import ListMask
from lightning_cpna.moments import is_elementwise, optimizer_of, zero_moments_
from lightning_cpna.report import SparsityReport
from lightning_cpna.shrink import Shrinking
from lightning_cpna.sparse import SparseLinear
from lightning_cpna.sparsity import Budget, Sparsity, sparsity_of
from lightning_cpna.stacked import Stacked
from lightning_cpna.targets import all_targets

CHECKPOINT_KEY = "lightning_cpna"
STATE_VERSION = 3
MANY = 0.01  # chosen: of a weight, the share of zeros that no initialisation draws by chance
SHRINK_FRACTION, SHRINK_PAUSE = 0.1, 10  # chosen: a cut costs about as much as a few steps of the larger network
_UNSERVED = ("FSDP", "DeepSpeed", "ModelParallel", "XLA")


class SparsityCallback(Callback):
    """Base of the callbacks: masks that hold, steps that count, and a checkpoint that resumes.

    A step is one real optimizer step of the optimizer that owns the first target: not a batch, and not a step that AMP's
    gradient scaler skipped. Subclasses answer the five questions below.

    Args:
        name: Prefix of everything that is logged, and key of the callback's state; two callbacks need two names.
        shrink: Whether dead units and features leave the tensors while the fit goes on.
    """

    def __init__(self, name: str, shrink: bool = False) -> None:
        if not name:
            raise ValueError("name is ''; allowed is any text that no other callback uses")
        if type(shrink) is not bool:
            raise ValueError(f"shrink is {shrink!r}; allowed is True or False")
        self.shrink = shrink
        self.name = name
        self._begin()
        self._fit: Fit | None = None

    _epoch: int | None  # the last one whose start was seen
    _graph: dict[str, Any] | None  # as it was when it was noted last

    # The five questions

    def _find_budgets(self, sparsity: Sparsity, pl_module: LightningModule) -> list[Budget]:
        """What should remain? Asked when a fit starts."""
        raise NotImplementedError

    def _plan(self, fit: Fit) -> None:
        """What will be done when? Asked once the targets have run, and again when more of the network was seen."""
        raise NotImplementedError

    def _after_step(self, fit: Fit) -> None:
        """What is done after this optimizer step?"""
        raise NotImplementedError

    def _when(self, fit: Fit, budget: Budget) -> str:
        """When, and by which rule? In words, for the plan that the loggers get."""
        raise NotImplementedError

    _turn = (
        0  # between epochs those who remove units go first, then those who change connections, then those who rewind
    )
    _keeps_graph = False  # whether what is done between epochs needs the graph, also before this fit traced a batch

    def _between_epochs(self, fit: Fit) -> None:
        """What is done when an epoch starts that is not the first?"""

    def _before_masking(self, fit: Fit, optimizer: Optimizer) -> None:
        """What must be seen of the gradients before those of connections that do not live become zero?"""

    def _at_target(self, fit: Fit) -> bool:
        """Is every count reached?"""
        return all(fit.sparsity.n_remaining(budget) <= budget.n_end for budget in fit.budgets)

    def _values(self, fit: Fit) -> dict[str, float]:
        """What is logged beside connections, density and ``at_target``? Without the callback's name."""
        raise NotImplementedError

    # Identity and state

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return f"{type(self).__qualname__}{{'name': {self.name!r}}}"

    @property
    def _arguments(self) -> dict[str, Any]:
        """What a resumed fit must not change, as Python primitives."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the callback's state; the masks are in the checkpoint beside it.

        A callback before this one may save between an optimizer step and the end of its batch. What this one does after
        the step is done first, so that the checkpoint holds it; like Lightning, ask for the state on every rank.
        """
        if self._fit is not None:
            self._catch_up(self._fit)
            self._note_graph(self._fit)
        return {
            "version": STATE_VERSION,
            "arguments": tree_map(_primitive, self._arguments),
            "step": self._handled_step,
            "epoch": self._epoch,
            "graph": self._graph,
            "ways": dict(self._ways),
        }

    def _note_graph(self, fit: Fit) -> None:
        graph = fit.sparsity.full_graph or fit.sparsity.graph
        if self._keeps_graph and graph is not None:
            self._graph = graph.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the callback's state from a checkpoint.

        Raises:
            ValueError: If the state is of a version that this release does not know.
        """
        self._check_version(state_dict)
        self._step = self._handled_step = state_dict["step"]
        self._epoch = state_dict["epoch"]
        self._graph = state_dict["graph"]
        self._ways = dict(state_dict["ways"])
        self._restored = True

    def _check_version(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("version") != STATE_VERSION:
            raise ValueError(
                f"{self.name}: the checkpoint's state has version {state_dict.get('version')!r}; "
                f"this release reads {STATE_VERSION}"
            )

    def _check_arguments(self, state_dict: dict[str, Any]) -> None:
        for argument, value in self._arguments.items():
            if state_dict["arguments"][argument] != value:
                raise ValueError(
                    f"{self.name}: {argument} is {value!r}; allowed is what it was when the checkpoint was made, "
                    f"{state_dict['arguments'][argument]!r}; to go on to others, load the weights alone and infer_masks"
                )

    @contextlib.contextmanager
    def _naming_errors(self, what: str = "") -> Iterator[None]:
        """Say in an error whose it is, and at which step."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.name}: at step {self._step}, {what}{error}") from error

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the masks, once."""
        if self._is_first(trainer):
            sparsity = sparsity_of(pl_module)
            _renew_lists(checkpoint["state_dict"], trainer)
            checkpoint[CHECKPOINT_KEY] = sparsity.masks.full(sparsity.kept).state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Load the masks, once, and forget an earlier fit: the state that the checkpoint has of it is loaded after this.

        Raises:
            ValueError: If a fit would go on with other arguments than it had.
        """
        if trainer.training:
            self._begin()
        if CHECKPOINT_KEY in checkpoint and self._is_first(trainer):
            states = checkpoint["callbacks"]
            for callback in ours(trainer):
                if (state := states.get(callback.state_key)) is not None:
                    callback._check_version(state)
                    if trainer.training:
                        callback._check_arguments(state)
            sparsity_of(pl_module).load_masks(checkpoint[CHECKPOINT_KEY])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that a callback can be copied and pickled at any time."""
        return {**self.__dict__, "_fit": None}

    def _is_first(self, trainer: Trainer) -> bool:
        return ours(trainer)[0] is self

    # Before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be served."""
        strategy = type(trainer.strategy).__name__
        ancestors = [kind.__name__ for kind in type(trainer.strategy).__mro__]
        if stage == "fit" and any(name.startswith(_UNSERVED) for name in ancestors):
            raise NotImplementedError(
                f"{type(self).__name__} cannot work with {strategy}, which splits or hides parameters; "
                "use strategy='ddp' or a single device"
            )
        if stage == "fit" and trainer.global_step == 0:
            self._begin()

    def _begin(self) -> None:
        """Forget an earlier fit."""
        self._step = self._handled_step = 0
        self._restored = False
        self._epoch = None
        self._graph = None
        self._ways = dict[str, str]()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the targets, and hold the masks that are there already (a resumed run, a second fit)."""
        sparsity, leads = sparsity_of(pl_module), self._is_first(trainer)
        if leads:
            sparsity.drops = trainer.world_size == 1  # as DDP's buckets have fixed sizes
            sparsity.graph, sparsity.untraced, sparsity.calls, sparsity.budgets = None, None, [], []
            sparsity.find_targets(pl_module)
            sparsity.masks.apply_(sparsity.tensors)
        log, pictures = Log(trainer, self.name), ConnectivityPictures(f"{self.name}/connectivity")
        self._fit = Fit(trainer, pl_module, sparsity, self._find_budgets(sparsity, pl_module), leads, log, pictures)
        for name in self._fit.names:
            n_zeros = int((sparsity.tensors[name] == 0).sum())
            mask = sparsity.masks[name]
            if (
                not isinstance(mask, ListMask)
                and mask.all_live
                and mask.dead.numel() > n_zeros > MANY * mask.dead.numel()
            ):
                warnings.warn(
                    f"{self.name}: {name!r} has {n_zeros} exact zeros but no mask, so they will train; to keep them, set "
                    "sparsity_of(module).masks = infer_masks(module, [...]) before fit, beside this callback",
                    stacklevel=2,
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimizers."""
        fit = self._running()
        if trainer.global_step and not self._step and not self._restored:
            warnings.warn(
                f"{self.name}: training goes on from step {trainer.global_step}, but there is no state of a "
                f"{type(self).__name__} of this name: its schedule starts from step 0",
                stacklevel=2,
            )
        for budget in () if self._restored else fit.budgets:
            if (n := fit.sparsity.n_remaining(budget)) < budget.n_end:
                warnings.warn(
                    f"{self.name}: only {n} of {budget.label!r} are left, where {budget.n_end} should remain; what is gone "
                    "does not come back",
                    stacklevel=2,
                )
        self._restored = False
        self._epoch = trainer.current_epoch if self._epoch is None else self._epoch
        fit.optimizers = list(trainer.optimizers)
        if self._graph is not None and fit.sparsity.graph is None:
            axes = {name: target.axes for name, target in fit.sparsity.targets.items()}
            fit.sparsity.graph = Graph.from_state_dict(self._graph, axes)
        if not fit.optimizers:
            raise ValueError(f"{self.name}: configure_optimizers returned no optimizer; allowed is at least one")
        owners = []
        for name in fit.names:
            owner = optimizer_of(fit.optimizers, fit.sparsity.tensors[name])
            if owner is None or not fit.sparsity.tensors[name].requires_grad:
                why = "is in no optimizer" if owner is None else "is frozen (requires_grad=False)"
                raise ValueError(f"targets: {name!r} {why}; allowed are parameters that are trained")
            owners.append(owner)
        listed = [name for name, layer in layers_of(pl_module).items() if isinstance(layer, SparseLinear)]
        if listed and (averages := averaging(trainer)):
            raise ValueError(
                f"targets: connections of {listed[0]!r}, a SparseLinear, come and go, but {averages}; allowed are masks "
                "on a dense layer"
            )
        owner = owners[0] if owners else fit.optimizers[0]
        fit.handles.append(owner.register_step_post_hook(self._count_step))
        if fit.leads:
            self._hold_masks(fit, pl_module)
            if any(callback.shrink for callback in ours(trainer)):
                _refuse_to_shrink(trainer, pl_module)
                fit.shrinking = Shrinking(pl_module, fit.sparsity, fit.optimizers)

    def _hold_masks(self, fit: Fit, pl_module: LightningModule) -> None:
        """See to it that nothing which the optimizers do, or did, revives a connection."""
        sparsity = fit.sparsity
        for optimizer in fit.optimizers:
            if not is_elementwise(optimizer):
                fit.handles.append(
                    optimizer.register_step_post_hook(lambda *_: sparsity.masks.apply_(sparsity.tensors))
                )
            if not pl_module.automatic_optimization:  # raw optimizers pass by Lightning's hook
                fit.handles.append(optimizer.register_step_pre_hook(lambda *_: sparsity.mask_gradients_()))
        for name, mask in sparsity.masks.items():
            owner = optimizer_of(fit.optimizers, sparsity.tensors[name])
            if owner is not None and not mask.all_live:
                zero_moments_(owner, sparsity.tensors[name], cells_of(mask.dead))

    # While training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what is done between two epochs: neurons before connections, in whatever order the callbacks stand."""
        if self._running().leads:
            self._turn_epochs(trainer)

    def _turn_epochs(self, trainer: Trainer) -> None:
        for callback in sorted(ours(trainer), key=lambda callback: callback._turn):
            if callback._epoch != trainer.current_epoch:
                callback._epoch = trainer.current_epoch
                callback._between_epochs(callback._running())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the first batches of a fit, until it is seen which layers feed the targets; cut what died, if asked to."""
        fit = self._running()
        if fit.leads:  # an epoch after one that was resumed behind its last batch does not say that it starts
            self._turn_epochs(trainer)
        if fit.shrinking is not None and fit.planned:
            self._shrink(fit, fit.shrinking)
        if fit.capture is not None:  # of a batch that was skipped
            fit.capture.close()
        if fit.leads and not all(one._running().planned for one in ours(trainer)):
            names = {name for budget in fit.sparsity.budgets for name in budget.names}
            fit.capture = Capture(pl_module, [fit.sparsity.tensors[name] for name in names])

    def _shrink(self, fit: Fit, shrinking: Shrinking) -> None:
        """Cut what is dead, whenever a tenth of the connections has died since the last time, or dying has paused."""
        live = fit.sparsity.n_live()
        if live != fit.last_live:
            fit.last_live, fit.changed_at = live, self._step
        at_cut = fit.live_at_cut or fit.sparsity.n_connections()
        paused = self._step - fit.changed_at >= SHRINK_PAUSE and live != at_cut
        if live < (1 - SHRINK_FRACTION) * at_cut or paused:
            shrinking.shrink_()
            fit.live_at_cut = fit.last_live = fit.sparsity.n_live()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Mask the gradients, so that neither clipping nor moments see a connection that does not live."""
        fit = self._running()
        if fit.leads:
            for callback in ours(trainer):
                callback._before_masking(callback._running(), optimizer)
            fit.sparsity.mask_gradients_()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act, if the batch ended with a real optimizer step, and log."""
        fit, step = self._running(), trainer.fit_loop.epoch_loop._batches_that_stepped
        for callback in ours(trainer):  # what is counted here must hold when all have acted
            callback._act(callback._running(), step)
        if not trainer.fit_loop._should_accumulate() and fit.log.is_due(self._at_target(fit)):
            values = self._totals(fit) | self._values(fit)
            fit.log.show(pl_module, values)
            fit.log.give(values, step)
            self._draw(fit, step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how many connections there are."""
        fit = self._running()
        values = self._totals(fit)
        fit.log.show(pl_module, values, sync_dist=True, reduce_fx="max")
        fit.log.give(values, last_step(trainer))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let who monitors a validation know how many connections there are."""
        if self._fit is not None and not trainer.sanity_checking:
            self._fit.log.show(pl_module, self._totals(self._fit), sync_dist=True, reduce_fx="max")

    def _act(self, fit: Fit, step: int) -> None:
        """Do what is to be done after a batch, if it is not done yet."""
        if not fit.planned:
            self._see(fit)
        if fit.planned and not fit.is_told:
            self._tell_plan(fit, step)
        self._catch_up(fit)

    def _totals(self, fit: Fit) -> dict[str, float]:
        """Count what lives in all of this callback's layers, for the log."""
        names = fit.names or list(fit.sparsity.masks)
        for name in names:  # other masks can have been set since
            fit.sparsity.add_mask(name)
        live = sum(fit.sparsity.masks[name].n_live for name in names)
        size = sum(fit.sparsity.size(name) for name in names)
        return {"connections": live, "density": live / size, "at_target": self._at_target(fit)}

    def _see(self, fit: Fit) -> None:
        """Look at what ran in this batch, and plan once the targets did."""
        leader = ours(fit.trainer)[0]
        leader._trace(leader._running())
        if not fit.planned and self._can_plan(fit):
            self._plan(fit)
            self._note_ways(fit)
            fit.planned = True

    def _note_ways(self, fit: Fit) -> None:
        """Note how each budget is reached, and say so if that is another way than it was."""
        before, self._ways = self._ways, {budget.label: self._when(fit, budget) for budget in fit.budgets}
        for label, way in self._ways.items():
            if label in before and way != before[label]:
                warnings.warn(
                    f"{self.name}: {label!r} goes on by {way}, where the fit before had {before[label]}", stacklevel=2
                )

    def _tell_plan(self, fit: Fit, step: int) -> None:
        """Give the loggers the plan as text."""
        fit.is_told = True
        if fit.budgets and fit.trainer.is_global_zero:
            rows = [
                PlanRow(b.label, b.granularity, fit.sparsity.n_remaining(b), b.n_end, self._ways[b.label])
                for b in fit.budgets
            ]
            log_text(fit.trainer.loggers, f"{self.name}/plan", plan_text(rows), step)

    def _draw(self, fit: Fit, step: int, *, last: bool = False) -> None:
        """Give the loggers a picture of the connectivity, if there is something new to see, and nothing is cut out of it."""
        is_whole = fit.sparsity.full_graph is None
        if fit.leads and fit.trainer.is_global_zero and fit.sparsity.graph and is_whole:
            fit.pictures.draw(fit.trainer.loggers, fit.sparsity, step, last=last)

    def _can_plan(self, fit: Fit) -> bool:
        """Is enough known for a plan? After a step there must be one; before, it can wait until all targets ran."""
        return self._step > self._handled_step or set(fit.names) <= set(fit.sparsity.graph or ())

    def _catch_up(self, fit: Fit) -> None:
        """Do what is done after an optimizer step, if that is still to be done."""
        if self._step > self._handled_step:
            if not fit.planned:
                self._see(fit)
            if fit.planned:
                self._after_step(fit)
            self._handled_step = self._step
            self._mask_averages(fit)

    def _mask_averages(self, fit: Fit) -> None:
        """Mask the copies that weight-averaging callbacks keep (EMA, SWA); an average of zeros stays zero by itself."""
        version = sum(mask.version for mask in fit.sparsity.masks.values())
        if not fit.leads or version == fit.averaged_version:
            return
        fit.averaged_version = version
        for callback in fit.trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if isinstance(average, nn.Module):
                tensors = all_targets(getattr(average, "module", average))
                fit.sparsity.masks.apply_({name: target.parameter for name, target in tensors.items()})

    def _trace(self, fit: Fit) -> None:
        """Trace what was captured in this batch, together with what is known of earlier ones."""
        if (capture := fit.capture) is None:
            return
        fit.capture = None
        for callback in ours(fit.trainer):  # the copy that is traced must not have the hooks
            callback._running().watching.close()
        sparsity, new = fit.sparsity, capture.finish()
        graph, calls, why = trace_few(fit.module, sparsity.calls, new)
        if graph is None:
            sparsity.untraced = why
        # A graph without calls is from a checkpoint.
        elif sparsity.graph is None or not sparsity.calls or len(graph) > len(sparsity.graph):
            sparsity.graph, sparsity.calls = graph, calls
            for callback in ours(fit.trainer):
                if (other := callback._running()).planned:
                    callback._plan(other)

    def _count_step(self, optimizer: Optimizer, *_: Any) -> None:
        found_inf = getattr(
            optimizer, "found_inf", None
        )  # a fused optimizer steps, but does nothing, when AMP found one
        if found_inf is None or not bool(found_inf):
            self._step += 1

    def _running(self) -> Fit:
        if self._fit is None:
            raise RuntimeError(f"{self.name}: no fit is running")
        return self._fit

    # After training

    def _layer_values(self, fit: Fit) -> dict[str, float]:
        """Count what lives in each layer, for the log."""
        values: dict[str, float] = {}
        for layer in fit.sparsity.report().layers:
            if not fit.names or layer.name in fit.names:
                values |= {
                    f"{layer.name}/connections": layer.connections,
                    f"{layer.name}/density": layer.density,
                    f"{layer.name}/live_units": layer.live_units,
                    f"{layer.name}/live_features": layer.live_features,
                }
                if layer.effective is not None:
                    values[f"{layer.name}/effective"] = layer.effective
        return values

    def report(self, pl_module: LightningModule) -> SparsityReport:
        """Count what is alive in all masked parameters of a module that is or was trained with this callback."""
        return sparsity_of(pl_module).report()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the last values, draw the connectivity, say so if a count was not reached, and let go of the optimizers."""
        fit = self._running()
        self._note_graph(fit)
        fit.restore()
        step = last_step(trainer)
        fit.log.give(self._totals(fit) | self._values(fit), step)
        self._draw(fit, max(0, step), last=True)
        for budget in fit.budgets:
            if (n := fit.sparsity.n_remaining(budget)) > budget.n_end:
                warnings.warn(
                    f"{self.name}: training ended with {n} of {budget.label!r}, where {budget.n_end} should remain "
                    f"({self._step} optimizer steps were counted)",
                    stacklevel=2,
                )
        fit.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the fit; a step that was made counts, what it would have pruned goes with the next one."""
        self._handled_step = self._step
        if self._fit is not None:
            self._fit.release()
            self._fit = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the fit; hold the masks once more, after callbacks that put averages into the module."""
        if self._fit is not None:
            self._fit.release()
            if stage == "fit":
                self._fit.sparsity.drops = True
                self._fit.sparsity.find_targets(pl_module)
                self._fit.sparsity.drop_dead_(self._fit.optimizers)
                self._fit.sparsity.masks.apply_(self._fit.sparsity.tensors)
            self._fit = None


def _primitive(value: Any) -> Any:
    """Make a NumPy float one of Python's, which a checkpoint that is loaded safely can hold."""
    return float(value) if isinstance(value, float) else value


@contextlib.contextmanager
def in_full_shapes(trainer: Trainer) -> Iterator[None]:
    """Give tensors that were made smaller their full shapes meanwhile; they shrink again with the next batch."""
    fit = ours(trainer)[0]._running()
    shrinks = fit.shrinking is not None
    fit.restore()
    yield
    if shrinks:
        fit.shrinking, fit.live_at_cut = Shrinking(fit.module, fit.sparsity, fit.optimizers), 0


def ours(trainer: Trainer) -> list[SparsityCallback]:
    """List our callbacks that act on the masks, in the trainer's order."""
    return [c for c in trainer.callbacks if isinstance(c, SparsityCallback)]  # type: ignore[attr-defined]


def _renew_lists(state_dict: dict[str, Any], trainer: Trainer) -> None:
    """Put the connections of sparse layers into a state that was taken before ``state_dict`` of a callback pruned them."""
    prefixes = [key.removesuffix("crow_indices") for key in state_dict if key.endswith("crow_indices")]
    if prefixes:
        now = trainer.strategy.lightning_module_state_dict()
        for prefix in prefixes:
            state_dict |= {prefix + part: now[prefix + part] for part in ("weight", "crow_indices", "col_indices")}


def _refuse_to_shrink(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise where tensors cannot change their shapes while the fit goes on."""
    why = None
    if trainer.world_size > 1:
        why = f"{type(trainer.strategy).__name__} trains in {trainer.world_size} processes"
    elif any(is_compiled(part) for part in pl_module.modules()):
        why = "the module is compiled"
    elif isinstance(pl_module, Stacked):
        why = "the module is a stack, whose members lose different units"
    why = why or averaging(trainer)
    if why is not None:
        raise ValueError(
            f"shrink is True, but {why}; allowed is shrink=False, and compact() after the fit (of a member of a stack)"
        )


def averaging(trainer: Trainer) -> str | None:
    """Say which callback keeps averages of the weights, if one does."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "_average_model"):
            return f"{type(callback).__name__} keeps averages of the weights"
    return None
