"""What do the units do? Their activations where the next layers read them, and what the loss thinks of each.

A unit's activation is taken at the input of the layers that it feeds: after the nonlinearity, the pooling and whatever
else lies between. Replacing it there by its mean is exactly what adding the mean to the next bias does.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpna.cells import wide
from lightning_cpna.graph import Graph
from lightning_cpna.layers import change_input, layers_of, n_kernel_axes

CONSTANT = 1e-6  # of the largest magnitude: rounding
CHUNK = 2**16  # chosen: numbers at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class UnitActivity:
    """What the units of one layer did on some examples.

    Attributes:
        examples: How many examples were seen.
        largest: The largest magnitude of each unit's activation, ``(unit,)``.
        spread: How far its activations are apart, the greatest less the smallest, ``(unit,)``; where a unit feeds several
            inputs, of the one where they are farthest apart.
        mean_magnitude: The mean magnitude, ``(unit,)``.
        variance: The variance of the activation over examples and positions, ``(unit,)``, likewise.
        means: For each layer that the units feed, by weight name, the mean of each of its inputs, ``(input,)``.
        removal_saliency: ``mean_x |a * dL/da|`` with L the loss of the example, the first-order change when the unit is set
            to zero, ``(unit,)``; None if no gradient was seen. In a training loop L is what is differentiated: of a mean
            over n examples, a loss n times smaller.
        mean_replacement_saliency: ``mean_x |(mean(a) - a) * dL/da|``, likewise when it is set to its mean.
    """

    examples: int
    largest: Tensor
    spread: Tensor
    mean_magnitude: Tensor
    variance: Tensor
    means: Mapping[str, Tensor]
    removal_saliency: Tensor | None
    mean_replacement_saliency: Tensor | None

    @property
    def never_active(self) -> Tensor:
        """Units whose activation is zero for every example, bool ``(unit,)``."""
        return self.largest == 0

    @property
    def constant(self) -> Tensor:
        """Units whose activation is the same for every example, those that are never active among them, ``(unit,)``."""
        return self.spread <= CONSTANT * self.largest


class Watch:
    """Watches what layers read, and the gradients that come back, in a training loop of any kind.

    Args:
        module: The module.
        readers: The layers whose inputs are watched, by weight name; None: every Linear and Conv.

    Raises:
        ValueError: If one of them is no Linear or Conv module.

    Examples:
        >>> from lightning_cpna import trace
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> watch, graph = Watch(net), trace(net, torch.zeros(2, 3))
        >>> with watch:
        ...     net(torch.ones(5, 3)).sum().backward()
        >>> watch.digest(graph, ["0.weight"])
        >>> activity = watch.activity(graph, "0.weight")
        >>> activity.examples, activity.means["2.weight"].shape
        (5, torch.Size([4]))
    """

    def __init__(self, module: nn.Module, readers: Iterable[str] | None = None) -> None:
        self._readers = layers_of(module)
        if readers is not None:
            self.restrict(readers)
        self._context = contextlib.ExitStack()
        self._recorded: dict[str, list[_Call]] = {}
        self.clear()

    def restrict(self, readers: Iterable[str]) -> None:
        """Watch only some of the layers from now on.

        Raises:
            ValueError: If one of them is no Linear or Conv module.
        """
        wanted = set(readers)
        if unknown := sorted(wanted - set(self._readers)):
            raise ValueError(
                f"what {unknown[0]!r} reads cannot be watched: it belongs to no Linear or Conv module; use a score of "
                "weights and compensate=None"
            )
        self._readers = {name: reader for name, reader in self._readers.items() if name in wanted}

    def clear(self) -> None:
        """Forget what was seen."""
        self._sums: dict[str, _Sums] = {}
        self._saliency: dict[str, tuple[Tensor, int]] = {}  # (2, unit), summed over so many examples
        self._examples: dict[str, int] = {}

    def __enter__(self) -> Watch:
        """Begin to watch; what was recorded but not taken in is dropped."""
        self._recorded = {name: [] for name in self._readers}
        for name, reader in self._readers.items():
            self._context.callback(change_input(reader, partial(self._record, name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._context.close()

    def _record(self, name: str, x: Tensor) -> Tensor:
        # The reader's own view, so that the gradient is what comes back from this reader alone.
        view = x.view_as(x) if x.requires_grad or not torch.is_grad_enabled() else _leaf(x)
        call = _Call(view)
        self._recorded[name].append(call)
        if view.requires_grad:
            view.register_hook(call.keep_gradient)  # type: ignore[no-untyped-call]
        return view

    def backward(self, loss: Tensor) -> None:
        """Find the gradients of a batch's mean loss at what was recorded; the parameters' own are left as they are."""
        calls = [call for entries in self._recorded.values() for call in entries if call.x.requires_grad]
        n_examples = max((len(call.x) for call in calls), default=1)
        gradients = torch.autograd.grad(loss * n_examples, [call.x for call in calls], allow_unused=True)
        for call, gradient in zip(calls, gradients, strict=True):
            call.gradient = torch.zeros_like(call.x) if gradient is None else gradient

    @torch.no_grad()
    def digest(self, graph: Graph, names: Iterable[str], means: Mapping[str, Tensor] | None = None) -> None:
        """Take in what was recorded since the last time: call it after each backward pass.

        Args:
            graph: The module's traced layers.
            names: The layers whose units are looked at, by weight name.
            means: The mean of each reader's inputs, by weight name, for the mean replacement saliency; None takes those
                of what was recorded.

        Raises:
            ValueError: If the readers of a layer's units were not watched, or saw different numbers of examples.
        """
        calls: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        at: dict[str, Tensor] = {}
        for reader in dict.fromkeys(layer.weight for name in names for layer in graph.fed_by(name)):
            if reader not in self._readers:
                raise ValueError(f"what {reader!r} reads was not watched; allowed are Linear and Conv modules")
            calls[reader] = [
                (self._rows(reader, call.x), None if call.gradient is None else self._rows(reader, call.gradient))
                for call in self._recorded.get(reader, [])
            ]
            if calls[reader]:
                new = [_Sums.of(part) for x, _ in calls[reader] for part in torch.split(x, _chunk(x))]
                sums = functools.reduce(operator.add, new)
                self._sums[reader] = self._sums[reader] + sums if reader in self._sums else sums
                at[reader] = means[reader] if means else sums.mean
        self._recorded = {name: [] for name in self._readers}
        for name in names:
            seen = [layer.weight for layer in graph.fed_by(name) if calls[layer.weight]]
            if seen:
                self._examples[name] = self._examples.get(name, 0) + sum(len(x) for x, _ in calls[seen[0]])
            back = {reader: [(x, g) for x, g in calls[reader] if g is not None] for reader in seen}
            if any(back.values()):
                self._add_saliency(graph, name, {reader: pairs for reader, pairs in back.items() if pairs}, at)

    def _add_saliency(
        self, graph: Graph, name: str, calls: Mapping[str, Sequence[tuple[Tensor, Tensor]]], means: Mapping[str, Tensor]
    ) -> None:
        """Add by how much each unit's removal, and its replacement, changes each example's loss, to first order."""
        lengths = {tuple(len(x) for x, _ in pairs) for pairs in calls.values()}
        if len(lengths) > 1:
            raise ValueError(
                f"the layers that {name!r} feeds see different numbers of examples, so that what a unit does to an "
                "example's loss cannot be added up; use a score that needs no gradient"
            )
        [sizes] = lengths
        total = torch.zeros(2, len(graph[name].units), dtype=torch.float64)
        for call, size in enumerate(sizes):
            step = min(_chunk(pairs[call][0]) for pairs in calls.values())
            for start in range(0, size, step):
                parts = []
                for reader, pairs in calls.items():
                    x, g = (tensor[start : start + step] for tensor in pairs[call])
                    product, gradient = (x * g, g) if x.ndim == 2 else ((x * g).sum(2), g.sum(2))  # (example, input)
                    at_mean = gradient * means[reader].to(x) - product
                    parts.append([graph.at_units(change, reader, name) for change in (product, at_mean)])
                changes = [
                    functools.reduce(torch.add, change) for change in zip(*parts, strict=True)
                ]  # (example, unit)
                total += torch.stack([change.abs().sum(0) for change in changes]).cpu()
        old, n = self._saliency.get(name, (torch.zeros_like(total), 0))
        self._saliency[name] = (old + total, n + sum(sizes))

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """Turn what a reader reads into ``(example, input)`` or ``(example, input, position)``, in float32 or better."""
        n_kernel = n_kernel_axes(self._readers[name])
        x = wide(x)
        x = x.unsqueeze(0) if x.ndim == n_kernel + 1 else x
        return x.movedim(-1 - n_kernel, 1).flatten(2) if x.ndim > 2 else x

    def means(self) -> dict[str, Tensor]:
        """Return the mean of each reader's inputs so far, ``(input,)``, by weight name."""
        return {name: sums.mean for name, sums in self._sums.items()}

    def has_seen(self, graph: Graph, name: str) -> bool:
        """Tell whether all layers ran that the units of a layer feed."""
        return all(reader.weight in self._sums for reader in graph.fed_by(name))

    def activity(self, graph: Graph, name: str) -> UnitActivity:
        """Return what the units of one layer did.

        Raises:
            ValueError: If nothing was seen of them.
        """
        readers = [layer.weight for layer in graph.fed_by(name)]
        missing = [reader for reader in readers if reader not in self._sums]
        if missing or not readers:
            raise ValueError(
                f"the activations of {name!r} were not seen: {', '.join(missing) or 'no layer'} did not run"
            )
        cells = torch.zeros(5, len(graph[name].units), dtype=torch.float64)
        largest, spread, variance, magnitude, count = cells  # (unit,) each
        for reader in readers:
            sums = self._sums[reader]
            inputs, units = graph.columns(reader, name, torch.device("cpu"))
            largest.scatter_reduce_(0, units, torch.maximum(sums.greatest, -sums.smallest)[inputs], "amax")
            spread.scatter_reduce_(0, units, (sums.greatest - sums.smallest)[inputs], "amax")
            variance.scatter_reduce_(0, units, sums.variance[inputs], "amax")
            magnitude.index_add_(0, units, sums.magnitude[inputs])
            count.index_add_(0, units, torch.full_like(sums.magnitude, sums.count)[inputs])
        summed, n = self._saliency.get(name, (None, 0))
        saliency = None if summed is None else summed / n
        return UnitActivity(
            examples=self._examples[name],
            largest=largest,
            spread=spread,
            mean_magnitude=magnitude / count,
            variance=variance,
            means={reader: self._sums[reader].mean for reader in readers},
            removal_saliency=None if saliency is None else saliency[0],
            mean_replacement_saliency=None if saliency is None else saliency[1],
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what was taken in, as CPU tensors and Python primitives."""
        return {
            "sums": {name: sums.state_dict() for name, sums in self._sums.items()},
            "saliency": {name: list(summed) for name, summed in self._saliency.items()},
            "examples": dict(self._examples),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``."""
        self._sums = {name: _Sums(**sums) for name, sums in state["sums"].items()}
        self._saliency = {name: tuple(summed) for name, summed in state["saliency"].items()}
        self._examples = dict(state["examples"])


class _Call:
    """What a layer read in one call, and the gradient that came back."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.gradient: Tensor | None = None

    def keep_gradient(self, gradient: Tensor) -> None:
        self.gradient = gradient.detach()
        self.x = self.x.detach()  # which lets the graph go


@dataclass
class _Sums:
    """Sums over rows of what a layer reads, float64 ``(input,)`` on the CPU."""

    count: int
    total: Tensor
    square: Tensor
    magnitude: Tensor
    smallest: Tensor
    greatest: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Sums:
        """Add up ``(example, input)`` or ``(example, input, position)``."""
        rows = [0, *range(2, x.ndim)]
        sums = (x.sum(rows), x.square().sum(rows), x.abs().sum(rows), x.amin(rows), x.amax(rows))
        return cls(x.numel() // x.shape[1], *(values.cpu().double() for values in sums))

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.count + other.count,
            self.total + other.total,
            self.square + other.square,
            self.magnitude + other.magnitude,
            torch.minimum(self.smallest, other.smallest),
            torch.maximum(self.greatest, other.greatest),
        )

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        return (self.square / self.count - self.mean.square()).clamp_(min=0.0)

    def state_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _chunk(x: Tensor) -> int:
    """Return how many examples are worked on at a time."""
    return max(1, CHUNK // max(1, x[0].numel())) if len(x) else 1


def _leaf(x: Tensor) -> Tensor:
    """Make a leaf that requires a gradient, of what has none; integers cannot have one."""
    return x.detach().requires_grad_() if x.is_floating_point() else x
