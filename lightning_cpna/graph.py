"""Who feeds whom? The layers of a network, and which unit owns which input of which layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_cpna.targets import Axes


@dataclass
class Layer:
    """A layer whose weight is a parameter, as the trace saw it.

    Attributes:
        weight: Canonical name of the weight.
        bias: Canonical name of the bias, or None.
        axes: Which axis of the weight is what.
        units: The global numbers of its units, a range.
        sources: For each input of the layer the global number of the unit that feeds it, -1 where none does; int64 of
            shape ``(n_inputs,)``.
        unknown_source: Why it is not known what feeds it, or None (``sources`` of -1 are then inputs of the network).
        is_output: Whether its units reach the output of the network.
        obstacles: Why its units cannot be rescaled; empty when they can.
        lost: Where the trace loses its units on the way to a further layer, or None.
    """

    weight: str
    bias: str | None
    axes: Axes
    units: range
    sources: Tensor
    unknown_source: str | None = None
    is_output: bool = False
    obstacles: list[str] = field(default_factory=list)
    lost: str | None = None


class Graph(Mapping[str, Layer]):
    """The traced layers by weight name, in the order in which they ran."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = {layer.weight: layer for layer in layers}
        self._columns: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
        for consumer in layers:
            for producer in layers:
                inputs = owned(consumer.sources, producer).nonzero().flatten()
                if len(inputs):
                    units = consumer.sources[inputs] - producer.units.start
                    self._columns[consumer.weight, producer.weight] = (inputs, units)

    def __getitem__(self, name: str) -> Layer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def feeding(self, name: str) -> list[Layer]:
        """Return the layers whose units feed this one."""
        return [layer for layer in self.values() if (name, layer.weight) in self._columns]

    def fed_by(self, name: str) -> list[Layer]:
        """Return the layers that this one's units feed."""
        return [layer for layer in self.values() if (layer.weight, name) in self._columns]

    def columns(self, consumer: str, producer: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which inputs of ``consumer`` the units of ``producer`` feed, and by which unit (0-based), int64 ``(n,)``."""
        inputs, units = self._columns[consumer, producer]
        if inputs.device != device:
            inputs, units = self._columns[consumer, producer] = inputs.to(device), units.to(device)
        return inputs, units

    def incoming_norm(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the norm of each unit's weights (bias left out), ``(member, unit)``, in float32 or better."""
        w = _wide(self[name].axes.view(tensors[name]))  # (member, unit, input, *kernel)
        norms: Tensor = w.flatten(2).norm(dim=2)
        return norms

    def outgoing_norm(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the norm of the weights that each unit feeds, ``(member, unit)``; reaching the output counts as 1."""
        layer = self[name]
        w = layer.axes.view(tensors[name])
        squares = torch.full(
            w.shape[:2], float(layer.is_output), dtype=_wide_type(w), device=w.device
        )  # (member, unit)
        for consumer in self.fed_by(name):
            inputs, units = self.columns(consumer.weight, name, squares.device)
            v = _wide(consumer.axes.view(tensors[consumer.weight]))  # (member, unit, input, *kernel)
            per_input = v.square().sum([1, *range(3, v.ndim)])  # (member, input)
            squares.index_add_(1, units, per_input[:, inputs].to(squares.dtype))
        return squares.sqrt()

    def feeding_norm(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return for each input of a layer the norm of the unit that feeds it, ``(member, input)``; 1 where none does."""
        layer = self[name]
        w = layer.axes.view(tensors[name])
        norms = torch.ones(w.shape[0], w.shape[2], dtype=_wide_type(w), device=w.device)
        for producer in self.feeding(name):
            inputs, units = self.columns(name, producer.weight, norms.device)
            norms[:, inputs] = self.incoming_norm(producer.weight, tensors)[:, units]
        return norms


def owned(sources: Tensor, layer: Layer) -> Tensor:
    """Mark the global unit numbers that belong to a layer."""
    return (sources >= layer.units.start) & (sources < layer.units.stop)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(_wide_type(tensor))


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
