"""Callbacks that only look."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

from lightning_cpna._lightning import Callback, LightningModule, Trainer
from lightning_cpna.activations import Watch
from lightning_cpna.callbacks.capture import Capture, running_eagerly, trace_few
from lightning_cpna.graph import Graph
from lightning_cpna.layers import layers_of


class DeadUnitLogger(Callback):
    """Logs, after every validation, how many units of each hidden layer are dead over the (first) validation set.

    A unit that is never active is zero for every example; a constant one is the same for every example. Each process
    looks at its own part of the data, and the first one logs.

    Args:
        name: Prefix of what is logged.

    Logged, for each hidden layer whose units can be followed: ``{name}/{weight}/never_active``,
    ``{name}/{weight}/constant``, and the ``{name}/{weight}/units`` that there are.

    Example:
        >>> DeadUnitLogger().name
        'dead_units'
    """

    def __init__(self, name: str = "dead_units") -> None:
        if not name:
            raise ValueError("name is ''; allowed is any text")
        self.name = name
        self._has_warned = False
        self._graph: Graph | None = None
        self._watch: Watch | None = None
        self._capture: Capture | None = None
        self._watching = contextlib.ExitStack()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running validation."""
        return {**self.__dict__, "_graph": None, "_watch": None, "_capture": None, "_watching": contextlib.ExitStack()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew: the network may have changed."""
        self._graph, self._watch = None, Watch(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the batch."""
        if self._watch is None or dataloader_idx > 0:
            return
        if self._graph is None:
            self._capture = Capture(
                pl_module, [layer.get_parameter("weight") for layer in layers_of(pl_module).values()]
            )
        self._watching.enter_context(running_eagerly(pl_module))
        self._watching.enter_context(self._watch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in what was seen."""
        self._watching.close()
        if self._watch is None or dataloader_idx > 0:
            return
        if self._capture is not None:
            self._graph, _, why = trace_few(pl_module, [], self._capture.finish())
            self._capture = None
            if self._graph is None and not self._has_warned:
                self._has_warned = True
                warnings.warn(f"{self.name}: the module could not be traced, so nothing is logged: {why}", stacklevel=2)
        if self._graph is not None:
            self._watch.digest(self._graph, self._graph.hidden(layers_of(pl_module)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        if self._graph is None or self._watch is None:
            return
        for name in self._graph.hidden(layers_of(pl_module)):
            activity = self._watch.activity(self._graph, name)
            counts = {
                "never_active": int(activity.never_active.sum()),
                "constant": int(activity.constant.sum()),
                "units": len(activity.largest),
            }
            pl_module.log_dict({f"{self.name}/{name}/{key}": float(count) for key, count in counts.items()})
        self._watch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off."""
        self._watching.close()
        if self._capture is not None:
            self._capture.close()
            self._capture = None
