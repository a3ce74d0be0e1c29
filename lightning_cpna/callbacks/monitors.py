"""Callbacks that only look."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lightning_cpna._lightning import Callback, LightningModule, Trainer
from lightning_cpna.activations import Watch
from lightning_cpna.callbacks.capture import Capture, running_eagerly, trace_few
from lightning_cpna.callbacks.log import give_loggers, last_step
from lightning_cpna.graph import Graph
from lightning_cpna.landscape.alignment import Alignment, alignment, filters_of, plot_alignment
from lightning_cpna.layers import layers_of
from lightning_cpna.plots import log_figure, that_take

STATE_VERSION = 1


class DeadUnitLogger(Callback):
    """Logs, after every validation, how many units of each hidden layer are dead over the (first) validation set.

    A unit that is never active is zero for every example; a constant one is the same for every example. Each process
    looks at its own part of the data, and the first one logs.

    Args:
        name: Prefix of what is logged.

    Logged, for each hidden layer whose units can be followed: ``{name}/{weight}/never_active``,
    ``{name}/{weight}/constant``, and the ``{name}/{weight}/units`` that there are.

    Examples:
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


class AlignmentLogger(Callback):
    """Records the weight vectors of layers over training, so that one can watch them cluster.

    It looks when the fit begins and after every so many training epochs. For each layer it logs the median angle of the
    vectors to the centres of their clusters (see ``landscape.alignment``), the share that is within 15 degrees, and the frame
    potential; TensorBoard also gets a figure beside that of the beginning, and the vectors themselves for its projector,
    where the steps are told apart by name. A layer whose vectors are no longer finite, or all zero, is left out; where fewer
    vectors than clusters are left, each is a cluster.

    Args:
        layers: Names of the weights, for instance ``["net.0.weight"]``.
        n_clusters: Clusters of each layer's vectors.
        every_n_epochs: Epochs from one look to the next.
        name: Prefix of what is logged.

    Raises:
        ValueError: If an argument is out of range, or, when the fit begins, a layer is not there or has fewer vectors than
            clusters.

    Logged, for each layer: ``{name}/{weight}/median_angle``, ``{name}/{weight}/within_15`` and
    ``{name}/{weight}/frame_potential``; as a figure and as an embedding ``{name}/{weight}``.

    Examples:
        >>> AlignmentLogger(["net.0.weight"], n_clusters=4).every_n_epochs
        1
    """

    def __init__(
        self, layers: Sequence[str], *, n_clusters: int = 4, every_n_epochs: int = 1, name: str = "alignment"
    ) -> None:
        layers = [layers] if isinstance(layers, str) else list(layers)
        if not layers:
            raise ValueError("layers is empty; allowed is at least one name of a weight")
        for argument, value in (("n_clusters", n_clusters), ("every_n_epochs", every_n_epochs)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{argument} is {value!r}; allowed is an int >= 1")
        if not name:
            raise ValueError("name is ''; allowed is any text")
        self.layers, self.n_clusters, self.every_n_epochs, self.name = layers, n_clusters, every_n_epochs, name
        self._first: dict[str, Tensor] = {}
        self._clustered: dict[str, Alignment] = {}  # the same, once a figure has shown it

    @property
    def state_key(self) -> str:
        """The key in a checkpoint, one for each name."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self._first, self._clustered = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return the vectors of the beginning."""
        return {"version": STATE_VERSION, "first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the vectors of the beginning from a checkpoint."""
        if state_dict.get("version") != STATE_VERSION:
            raise ValueError(
                f"{self.name}: the checkpoint has version {state_dict.get('version')!r}; this release reads {STATE_VERSION}"
            )
        self._first = dict(state_dict["first"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the beginning; where training goes on from a checkpoint, the beginning is the checkpoint's."""
        if self._first:
            return
        self._first = {layer: filters_of(pl_module, layer) for layer in self.layers}
        for layer, vectors in self._first.items():
            if (n := int((vectors != 0).any(1).sum())) < self.n_clusters:
                raise ValueError(f"n_clusters is {self.n_clusters}; allowed for {layer!r} is at most {n}, its vectors")
        self._record(trainer, pl_module, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._record(trainer, pl_module, last_step(trainer))

    def _record(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        loggers: list[Any] = trainer.loggers
        if not trainer.is_global_zero or not loggers:
            return
        for layer in self.layers:
            filters = filters_of(pl_module, layer)
            n_vectors = int((filters != 0).any(1).sum())
            if n_vectors == 0 or not bool(filters.isfinite().all()):
                continue
            found = alignment(filters, min(self.n_clusters, n_vectors))
            tag = f"{self.name}/{layer}"
            values = {
                "median_angle": found.angle(),
                "within_15": found.share_within(15),
                "frame_potential": found.frame_potential,
            }
            give_loggers(trainer, {f"{tag}/{key}": value for key, value in values.items()}, step)
            for add_embedding in that_take("add_embedding", loggers):
                add_embedding(
                    found.filters,
                    metadata=list(zip(found.units.tolist(), found.clusters.tolist(), strict=True)),
                    metadata_header=["unit", "cluster"],
                    tag=tag,
                    global_step=step,
                )
            if layer not in self._clustered:
                self._clustered[layer] = alignment(self._first[layer], self.n_clusters)
            log_figure(loggers, tag, partial(plot_alignment, found, self._clustered[layer]), step)
