"""Who feeds whom? The layers of a network, and which unit owns which input of which layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_cpna.cells import wide
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
        self._one_to_one = {
            (consumer, producer)
            for (consumer, producer), (_, units) in self._columns.items()
            if len(units) == len(self[producer].units) == len(self[consumer].sources)
            and torch.equal(units, torch.arange(len(units), device=units.device))
        }

    def cut(self, rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> Graph:
        """Return the graph of smaller layers.

        Args:
            rows: Which units of a layer are left, int64 ``(n,)``, by weight name; of the others all.
            columns: Which of its inputs, likewise.
        """
        numbers = torch.full((max((layer.units.stop for layer in self.values()), default=0),), -1)  # old to new
        start, layers = 0, []
        for name, layer in self.items():
            left = torch.arange(layer.units.start, layer.units.stop)
            left = left[rows[name]] if name in rows else left
            numbers[left] = torch.arange(start, start + len(left))
            layers.append(dataclasses.replace(layer, units=range(start, start + len(left))))
            start += len(left)
        for layer in layers:
            sources = layer.sources.cpu()
            sources = sources[columns[layer.weight]] if layer.weight in columns else sources
            layer.sources = torch.where(sources >= 0, numbers[sources.clamp(min=0)], -1)
        return Graph(layers)

    def with_axes(self, axes: Mapping[str, Axes]) -> Graph:
        """Return the same graph of weights with other axes, by name."""
        return Graph([dataclasses.replace(layer, axes=axes[layer.weight]) for layer in self.values()])

    def state_dict(self) -> dict[str, Any]:
        """Return the graph as CPU tensors and Python primitives, without the axes."""
        layers = []
        for layer in self.values():
            fields = dict(vars(layer))
            fields |= {"units": [layer.units.start, layer.units.stop], "sources": layer.sources.cpu()}
            del fields["axes"]
            layers.append({**fields, "obstacles": list(layer.obstacles)})
        return {"layers": layers}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], axes: Mapping[str, Axes]) -> Graph:
        """Build the graph that ``state_dict`` describes.

        Args:
            state: What ``state_dict`` returned.
            axes: The axes of the weights, by name.

        Examples:
            >>> layer = Layer("w", None, Axes(), range(2), torch.tensor([-1, -1, -1]), is_output=True)
            >>> Graph.from_state_dict(Graph([layer]).state_dict(), {"w": Axes()})["w"].units
            range(0, 2)
        """
        return cls(
            [
                Layer(**{**layer, "axes": axes[layer["weight"]], "units": range(*layer["units"])})
                for layer in state["layers"]
            ]
        )

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

    def hidden(self, layers: Collection[str]) -> list[str]:
        """Return the layers, all among some, of which it is known what their units feed, and that they are no output."""
        found = []
        for name, layer in self.items():
            readers = {reader.weight for reader in self.fed_by(name)}
            if readers and layer.lost is None and not layer.is_output and {name, *readers} <= set(layers):
                found.append(name)
        return found

    def is_last(self, name: str) -> bool:
        """Tell whether a layer's units are outputs of the network and feed nothing else."""
        return self[name].is_output and not self.fed_by(name)

    def columns(self, consumer: str, producer: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which inputs of ``consumer`` the units of ``producer`` feed, and by which unit (0-based), int64 ``(n,)``."""
        inputs, units = self._columns[consumer, producer]
        if inputs.device != device:
            inputs, units = self._columns[consumer, producer] = inputs.to(device), units.to(device)
        return inputs, units

    def at_inputs(self, values: Tensor, consumer: str, producer: str, default: float) -> Tensor:
        """Take values of a producer's units, ``(member, unit)``, to the inputs that they feed.

        Returns:
            ``(member, input)``, the default where other units or none feed an input; do not write to it.
        """
        if (consumer, producer) in self._one_to_one:
            return values
        inputs, units = self.columns(consumer, producer, values.device)
        spread = values.new_full((values.shape[0], len(self[consumer].sources)), default)
        spread[:, inputs] = values[:, units]
        return spread

    def at_units(self, values: Tensor, consumer: str, producer: str) -> Tensor:
        """Sum values of a consumer's inputs, ``(member, input)``, over what each unit of the producer feeds.

        Returns:
            ``(member, unit)``; do not write to it.
        """
        if (consumer, producer) in self._one_to_one:
            return values
        inputs, units = self.columns(consumer, producer, values.device)
        summed = values.new_zeros(values.shape[0], len(self[producer].units))
        return summed.index_add_(1, units, values[:, inputs])

    def incoming_norm(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the norm of each unit's weights (bias left out), ``(member, unit)``, in float32 or better."""
        return self[name].axes.norm_of_units(wide(tensors[name].detach()))

    def outgoing_norm(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the norm of the weights that each unit feeds, ``(member, unit)``; reaching the output counts as 1."""
        layer = self[name]
        squares = []
        for consumer in self.fed_by(name):
            per_input = consumer.axes.sum_of_inputs(wide(tensors[consumer.weight].detach()).square())  # (member, input)
            squares.append(self.at_units(per_input, consumer.weight, name))
        if layer.is_output or not squares:
            w = tensors[name]
            shape = (layer.axes.n_members(w), layer.axes.n_units(w))
            squares.append(torch.full(shape, float(layer.is_output), dtype=_wide_type(w), device=w.device))
        return functools.reduce(torch.add, squares).sqrt()

    def feeding_norm(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return for each input of a layer the norm of the unit that feeds it, ``(member, input)``; 1 where none does."""
        layer = self[name]
        w = tensors[name]
        shape = (layer.axes.n_members(w), layer.axes.n_inputs(w))
        norms = torch.ones(shape, dtype=_wide_type(w), device=w.device)
        for producer in self.feeding(name):
            norms *= self.at_inputs(self.incoming_norm(producer.weight, tensors), name, producer.weight, default=1.0)
        return norms


def owned(sources: Tensor, layer: Layer) -> Tensor:
    """Mark the global unit numbers that belong to a layer."""
    return (sources >= layer.units.start) & (sources < layer.units.stop)


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
