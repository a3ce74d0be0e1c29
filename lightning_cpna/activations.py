"""What do the units do? Their activations where the next layers read them, and what the loss thinks of each.

A unit's activation is taken at the input of the layers that it feeds: after the nonlinearity, the pooling and whatever
else lies between. Replacing it there by its mean is exactly what adding the mean to the next bias does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from lightning_cpna.graph import Graph
from lightning_cpna.targets import all_targets

Loss = Callable[[Any, Any], Tensor]
"""``(module, batch) -> loss``, a scalar: the mean over the examples of the batch."""


@dataclass(frozen=True)
class UnitActivity:
    """What the units of one layer did on some examples.

    Attributes:
        examples: How many examples were seen.
        largest: The largest magnitude of each unit's activation, ``(unit,)``.
        mean_magnitude: The mean magnitude, ``(unit,)``.
        variance: The variance of the activation over examples and positions, ``(unit,)``; the largest one, where a unit
            feeds several inputs.
        means: For each layer that the units feed, by weight name, the mean of each of its inputs, ``(input,)``.
        removal_saliency: ``mean_x |a * dL/da|``, the first-order change of the loss when the unit is set to zero,
            ``(unit,)``; None if no gradient was seen.
        mean_replacement_saliency: ``mean_x |(mean(a) - a) * dL/da|``, likewise when it is set to its mean.
    """

    examples: int
    largest: Tensor
    mean_magnitude: Tensor
    variance: Tensor
    means: Mapping[str, Tensor]
    removal_saliency: Tensor | None
    mean_replacement_saliency: Tensor | None


class Watch:
    """Watches what layers read, and the gradients that come back, in a training loop of any kind.

    Args:
        module: The module.
        readers: The layers whose inputs are watched, by weight name; None: every Linear and Conv.

    Raises:
        ValueError: If one of them is no Linear or Conv module.

    Example:
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
        self._saliency: dict[str, Tensor] = {}  # (2, unit), summed over examples
        self._examples: dict[str, int] = {}

    def __enter__(self) -> Watch:
        """Begin to watch; what was recorded but not taken in is dropped."""
        self._recorded = {name: [] for name in self._readers}
        for name, reader in self._readers.items():
            self._context.callback(reader.register_forward_pre_hook(partial(self._record, name)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._context.close()

    def _record(self, name: str, reader: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # The reader's own view, so that the gradient is what comes back from this reader alone.
        view = args[0].view_as(args[0]) if args[0].requires_grad or not torch.is_grad_enabled() else _leaf(args[0])
        call = _Call(view)
        self._recorded[name].append(call)
        if view.requires_grad:
            view.register_hook(call.keep_gradient)
        return (view, *args[1:])

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
        now: dict[str, _Sums] = {}
        for reader in dict.fromkeys(layer.weight for name in names for layer in graph.fed_by(name)):
            if reader not in self._readers:
                raise ValueError(f"what {reader!r} reads was not watched; allowed are Linear and Conv modules")
            calls[reader] = [
                (self._rows(reader, call.x), None if call.gradient is None else self._rows(reader, call.gradient))
                for call in self._recorded.get(reader, [])
            ]
            now[reader] = _Sums()
            for x, _ in calls[reader]:
                now[reader].add(x)
                self._sums.setdefault(reader, _Sums()).add(x)
        self._recorded = {name: [] for name in self._readers}
        for name in names:
            seen = [layer.weight for layer in graph.fed_by(name) if calls[layer.weight]]
            if not seen:
                continue
            self._examples[name] = self._examples.get(name, 0) + sum(len(x) for x, _ in calls[seen[0]])
            changes = [
                self._first_order(graph, name, reader, calls[reader], means[reader] if means else now[reader].mean)
                for reader in seen
            ]
            known = [change for change in changes if change is not None]
            if len({change.shape for change in known}) > 1:
                raise ValueError(
                    f"the layers that {name!r} feeds see different numbers of examples, so that what a unit does to an "
                    "example's loss cannot be added up; use a score that needs no gradient"
                )
            if known:
                total = torch.stack(known).sum(0).abs().sum(1).double().cpu()  # (2, unit)
                self._saliency[name] = total + self._saliency.get(name, 0)

    def _first_order(
        self, graph: Graph, name: str, reader: str, calls: Sequence[tuple[Tensor, Tensor | None]], mean: Tensor
    ) -> Tensor | None:
        """Return each example's change of the loss by one reader, at removal and at replacement, ``(2, example, unit)``."""
        found = []
        for x, g in calls:
            if g is None:
                return None
            at_zero, at_mean = -(x * g).sum(2), ((mean.to(x)[None, :, None] - x) * g).sum(2)  # (example, input)
            found.append(torch.stack([graph.at_units(change, reader, name) for change in (at_zero, at_mean)]))
        return torch.cat(found, dim=1)

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """Turn what a reader reads into ``(example, input, position)``, in float32 or better."""
        n_kernel = n_kernel_axes(self._readers[name])
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide.unsqueeze(0) if wide.ndim == n_kernel + 1 else wide
        return wide.movedim(-1 - n_kernel, 1).flatten(2) if wide.ndim > 2 else wide.unsqueeze(2)

    def means(self) -> dict[str, Tensor]:
        """Return the mean of each reader's inputs so far, ``(input,)``, by weight name."""
        return {name: sums.mean for name, sums in self._sums.items()}

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
        cells = torch.zeros(4, len(graph[name].units), dtype=torch.float64)
        largest, variance, magnitude, count = cells  # (unit,) each
        for reader in readers:
            sums = self._sums[reader]
            inputs, units = graph.columns(reader, name, torch.device("cpu"))
            largest.scatter_reduce_(0, units, sums.largest[inputs], "amax")
            variance.scatter_reduce_(0, units, sums.variance[inputs], "amax")
            magnitude.index_add_(0, units, sums.magnitude[inputs])
            count.index_add_(0, units, torch.full_like(sums.magnitude, sums.count)[inputs])
        saliency = self._saliency.get(name)
        saliency = None if saliency is None else saliency / self._examples[name]
        return UnitActivity(
            examples=self._examples[name],
            largest=largest,
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
            "saliency": dict(self._saliency),
            "examples": dict(self._examples),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``."""
        self._sums = {name: _Sums(**sums) for name, sums in state["sums"].items()}
        self._saliency, self._examples = dict(state["saliency"]), dict(state["examples"])


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

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    square: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    magnitude: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    largest: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, x: Tensor) -> None:
        """Add ``(example, input, position)``."""
        wide = x if x.device.type == "mps" else x.double()
        sums = (wide.sum((0, 2)), wide.square().sum((0, 2)), wide.abs().sum((0, 2)), wide.abs().amax((0, 2)))
        total, square, magnitude, largest = (values.double().cpu() for values in sums)
        self.count += x.shape[0] * x.shape[2]
        self.total, self.square, self.magnitude = self.total + total, self.square + square, self.magnitude + magnitude
        self.largest = torch.maximum(self.largest, largest)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        return (self.square / self.count - self.mean.square()).clamp_(min=0.0)

    def state_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _leaf(x: Tensor) -> Tensor:
    """Make a leaf that requires a gradient, of what has none; integers cannot have one."""
    return x.detach().requires_grad_() if x.is_floating_point() else x


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Find the Linear and Conv modules, by the canonical names of their weights."""
    names = {id(target.parameter): name for name, target in all_targets(module).items()}
    return {
        names[id(part.weight)]: part
        for part in module.modules()
        if isinstance(part, nn.Linear | _ConvNd) and id(part.weight) in names
    }


def n_kernel_axes(reader: nn.Module) -> int:
    """Return how many axes follow that of the inputs in what a Linear or Conv module reads."""
    return reader.get_parameter("weight").ndim - 2


def observe(
    module: nn.Module, graph: Graph, names: Iterable[str], batches: Sequence[Any], loss: Loss
) -> dict[str, UnitActivity]:
    """Run a module over some batches and see what the units of its layers do.

    The module is run in eval mode, twice: first for the means, then for the saliencies at these means. Its mode, weights
    and gradients are left as they are.

    Args:
        module: The module.
        graph: Its traced layers.
        names: The layers whose units are looked at, by weight name.
        batches: The batches; a ``DataLoader`` that does not shuffle will do.
        loss: Computes the mean loss of a batch.

    Returns:
        One ``UnitActivity`` a layer.

    Reference:
        Evci: Detecting dead weights and units in neural networks (2018), Section 3.

    Example:
        >>> from lightning_cpna import trace
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> x = torch.randn(16, 3)
        >>> activity = observe(net, trace(net, x), ["0.weight"], [x], lambda net, x: net(x).square().mean())
        >>> activity["0.weight"].mean_replacement_saliency.shape
        torch.Size([4])
    """
    names = list(names)
    watch = Watch(module, {layer.weight for name in names for layer in graph.fed_by(name)})
    with evaluating(module), watch:
        for batch in batches:
            with torch.no_grad():
                loss(module, batch)
            watch.digest(graph, names)
        means = watch.means()
        watch.clear()
        for batch in batches:
            with torch.enable_grad():
                value = loss(module, batch)
            watch.backward(value)
            watch.digest(graph, names, means)
    return {name: watch.activity(graph, name) for name in names}


@torch.no_grad()
def mean_replacement_penalties(
    module: nn.Module,
    graph: Graph,
    name: str,
    batches: Sequence[Any],
    loss: Loss,
    means: Mapping[str, Tensor],
) -> Tensor:
    """Return what the loss rises by when each unit, one at a time, is replaced by its mean: exact, a pass a unit.

    Args:
        module: The module; it is run in eval mode and left as it is.
        graph: Its traced layers.
        name: The layer.
        batches: The batches.
        loss: Computes the mean loss of a batch.
        means: The mean of each reader's inputs, from ``UnitActivity.means``.

    Returns:
        The penalties, float64 ``(unit,)``.
    """
    layers = layers_of(module)
    readers = {layer.weight: layers[layer.weight] for layer in graph.fed_by(name)}
    replaced: dict[str, Tensor] = {}

    def replace(reader: str, owner: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, at = args[0].clone(), replaced[reader].to(args[0].device)
        x.movedim(-1 - n_kernel_axes(owner), -1)[..., at] = means[reader].to(x)[at]
        return (x, *args[1:])

    def mean_loss() -> float:
        values = [(float(loss(module, batch)), _n_examples(batch)) for batch in batches]
        return sum(value * n for value, n in values) / sum(n for _, n in values)

    with evaluating(module), contextlib.ExitStack() as context:
        before = mean_loss()
        for reader, owner in readers.items():
            context.callback(owner.register_forward_pre_hook(partial(replace, reader)).remove)
        penalties = []
        for unit in range(len(graph[name].units)):
            for reader in readers:
                inputs, units = graph.columns(reader, name, torch.device("cpu"))
                replaced[reader] = inputs[units == unit]
            penalties.append(mean_loss() - before)
    return torch.tensor(penalties, dtype=torch.float64)


def _n_examples(batch: Any) -> int:
    tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim]
    return len(tensors[0]) if tensors else 1


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and afterwards every part of it back into its own."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
