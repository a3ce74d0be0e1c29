"""Units over a data set: what they do, and what the loss rises by if one is replaced by its mean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cpna.activations import UnitActivity, Watch
from lightning_cpna.graph import Graph
from lightning_cpna.layers import change_input, evaluating, layers_of, n_kernel_axes

Loss = Callable[[Any, Any], Tensor]
"""``(module, batch) -> loss``, a scalar: the mean over the examples of the batch."""


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

    Examples:
        >>> from lightning_cpna import trace
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> x = torch.randn(16, 3)
        >>> activity = observe(net, trace(net, x), ["0.weight"], [x], lambda net, x: net(x).square().mean())
        >>> activity["0.weight"].mean_replacement_saliency.shape
        torch.Size([4])
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        check_followed(graph, name)
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
    check_followed(graph, name)
    layers = layers_of(module)
    readers = {layer.weight: layers[layer.weight] for layer in graph.fed_by(name)}
    if missing := sorted(set(readers) - set(means)):
        raise ValueError(f"means has no entry for {missing[0]!r}; allowed are the means of {', '.join(readers)}")
    replaced: dict[str, Tensor] = {}

    def replace(reader: str, x: Tensor) -> Tensor:
        x, at = x.clone(), replaced[reader].to(x.device)
        x.movedim(-1 - n_kernel_axes(readers[reader]), -1)[..., at] = means[reader].to(x)[at]
        return x

    is_read = graph.outgoing_norm(name, dict(module.named_parameters()))[0] > 0
    penalties = torch.zeros(len(is_read), dtype=torch.float64)  # of a unit that nothing reads it is 0
    with evaluating(module), contextlib.ExitStack() as context:
        before = mean_loss(module, batches, loss)
        for reader, owner in readers.items():
            context.callback(change_input(owner, partial(replace, reader)).remove)
        for unit in is_read.nonzero().flatten().tolist():
            for reader in readers:
                inputs, units = graph.columns(reader, name, torch.device("cpu"))
                replaced[reader] = inputs[units == unit]
            penalties[unit] = mean_loss(module, batches, loss) - before
    return penalties


def check_followed(graph: Graph, name: str) -> None:
    """Raise if it is not known what the units of a layer feed."""
    if name not in graph or not graph.fed_by(name):
        hidden = ", ".join(other for other in graph if graph.fed_by(other))
        raise ValueError(f"{name!r} is no layer whose units feed another; allowed here: {hidden or 'none'}")


def mean_loss(module: nn.Module, batches: Sequence[Any], loss: Loss) -> float:
    """Return the mean loss over the examples of all batches."""
    values = [(float(loss(module, batch)), n_examples(batch)) for batch in batches]
    if not values:
        raise ValueError("batches is empty; allowed is at least one batch")
    return sum(value * n for value, n in values) / sum(n for _, n in values)


def n_examples(batch: Any) -> int:
    """Return how many examples a batch has: the length of its first tensor, 1 if it has none."""
    tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim]
    return len(tensors[0]) if tensors else 1
