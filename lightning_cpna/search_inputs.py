"""What a search is given, checked and brought into one form."""

from __future__ import annotations

import itertools
import math
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cpna._lightning import LightningModule
from lightning_cpna.compact import compact
from lightning_cpna.layers import evaluating
from lightning_cpna.tracing import trace

MAX_SCALE = 10.0  # chosen: by how much the scales of columns may differ without a warning
MAX_REPEATED = 0.01  # chosen: what part of the rows may be there before without a warning


def tensor_of(argument: str, values: Any) -> Tensor:
    """Return a table of numbers as a tensor on the CPU.

    Examples:
        >>> tensor_of("x", [[1, 2]])
        tensor([[1, 2]])
    """
    if isinstance(values, Tensor):
        return values.detach().cpu()
    array = np.asarray(values)
    if array.dtype.kind not in "bfiu":
        kinds = zip(values.columns, values.dtypes, strict=True) if hasattr(values, "columns") else ()
        others = {name: str(kind) for name, kind in kinds if getattr(kind, "kind", "O") not in "bfiu"}
        if hasattr(values, "columns") and not others:  # numbers and bools, or a type that has missing values
            return torch.tensor(values.to_numpy(float, na_value=math.nan))
        what = f"columns of other types: {dict(itertools.islice(others.items(), 10))}" if others else str(array.dtype)
        ways = {
            "x": "pandas.get_dummies(x)",
            "y": "pandas.factorize(y)[0] for cross_entropy, (y == 'yes').astype('float32') for binary_cross_entropy",
        }
        raise ValueError(f"{argument} holds {what}; allowed are numbers, as of {ways[argument]}")
    return torch.tensor(array)


def counts_of(n_features: int | Sequence[int]) -> tuple[int, ...]:
    """Return how many features are wanted, descending.

    Examples:
        >>> counts_of([2, 5]), counts_of(3)
        ((5, 2), (3,))
    """
    several = n_features if isinstance(n_features, Iterable) else [n_features]
    counts = {operator.index(count) for count in several if hasattr(count, "__index__")}
    if not counts or not all(hasattr(count, "__index__") for count in several):
        raise ValueError(f"n_features is {n_features!r}; allowed is an int, or several")
    return tuple(sorted(counts, reverse=True))


def subset_sizes(subset: float | Sequence[float], p: int, most: int) -> list[int]:
    """Turn what a user wants to draw into numbers of features, more than are wanted.

    Examples:
        >>> subset_sizes([1.0, 0.5, 0.01], p=20, most=4)
        [20, 10, 5]
    """
    wanted = list(subset) if isinstance(subset, Sequence) else [subset]
    sizes = [max(most + 1, round(one * p)) if isinstance(one, float) and 0 < one <= 1 else one for one in wanted]
    if not sizes or not all(hasattr(size, "__index__") and most < size <= p for size in sizes):
        raise ValueError(
            f"subset is {subset}; allowed is more than the {most} features wanted, up to {p}, or a fraction in (0, 1]"
        )
    return [int(size) for size in dict.fromkeys(sizes)]


def check(network: Any, trainer: Any, x: Tensor, y: Tensor, counts: Sequence[int], names: list[Any] | None) -> None:
    """Raise if a search cannot be made of these; warn of columns of other scales, of rows that repeat, and of odd labels.

    Args:
        network: From a number of features to a network.
        trainer: The class ``Trainer``, or a function as it.
        x: The examples.
        y: Their labels.
        counts: How many features are wanted.
        names: What the columns are called.
    """
    if isinstance(network, nn.Module) or not callable(network):
        raise ValueError(
            f"network is a {type(network).__name__}; allowed is a class or function of the number of features"
        )
    if not callable(trainer):
        raise ValueError(f"trainer is a {type(trainer).__name__}; allowed is the class Trainer, or a function as it")
    ours = {"max_epochs", "callbacks", "logger", "log_every_n_steps", "enable_checkpointing"}
    if isinstance(trainer, partial) and (given := sorted(ours & set(trainer.keywords))):
        raise ValueError(f"trainer: {given[0]} is given, which the search says itself; allowed are other arguments")
    if twice := [name for name, n in Counter(names or ()).items() if n > 1]:
        raise ValueError(f"x has several columns of the name {twice[0]!r}; allowed is each name once")
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed is (n, p)")
    if y.dtype == torch.bool:
        raise ValueError(
            "y has type torch.bool; allowed are floats for binary_cross_entropy, as of y.astype('float32'), ints for "
            "cross_entropy, as of y.astype(int)"
        )
    if y.ndim < 1 or len(y) != len(x):
        raise ValueError(f"y has shape {tuple(y.shape)}; allowed is one label for each of the {len(x)} rows of x")
    if n_bad := int((~y.isfinite()).flatten(1).any(dim=1).sum() if y.ndim > 1 else (~y.isfinite()).sum()):
        raise ValueError(f"y has values that are not finite in {n_bad} of {len(y)} rows; allowed are numbers")
    if len(x) < 4:
        raise ValueError(f"x has {len(x)} rows; allowed is 4 or more, of which some are held out")
    if len(torch.unique(y, dim=0)) < 2:
        raise ValueError("y is the same in every row; allowed are two labels or more")
    if not x.isfinite().all():
        places = (~x.isfinite().all(dim=0)).nonzero().flatten().tolist()
        columns = places if names is None else [names[place] for place in places]
        raise ValueError(f"x has values that are not finite in columns {columns[:10]}; allowed are numbers")
    if not all(1 <= count < x.shape[1] for count in counts):
        raise ValueError(f"n_features is {list(counts)}; allowed are 1 to {x.shape[1] - 1}, fewer than x has columns")
    spread, mean = torch.std_mean(x.double(), dim=0)
    spread, mean = spread[spread > 0], mean[spread > 0].abs()
    if len(spread) and (spread.max() > MAX_SCALE * spread.min() or (mean > MAX_SCALE * spread).any()):
        warnings.warn(
            f"x has columns whose standard deviations are from {spread.min():.2g} to {spread.max():.2g} and whose means are "
            f"up to {mean.max():.2g}: features are ranked by the norms of their weights, so scale the columns alike first",
            stacklevel=3,
        )
    if (n_repeated := len(x) - len(set(zip(_hashes(x), _hashes(y), strict=True)))) > MAX_REPEATED * len(x):
        warnings.warn(
            f"{n_repeated} rows of x and y are there before. If they are copies, or of the same patient, say, a certificate "
            "does not hold: merge them first. (Independent examples of few values may be alike.)",
            stacklevel=3,
        )
    labels = torch.unique(y)
    if y.is_floating_point() and len(labels) == 2 and labels.tolist() != [0, 1]:
        warnings.warn(
            f"y has the values {labels[0]:g} and {labels[1]:g}: binary_cross_entropy takes 0.0 and 1.0", stacklevel=3
        )


def _hashes(table: Tensor) -> Iterator[int]:
    """Return a hash of each row's bits."""
    rows = table.reshape(len(table), -1).contiguous().view(torch.uint8).numpy()
    return (hash(row.tobytes()) for row in rows)


def try_out(network: LightningModule, x: Tensor, y: Tensor) -> None:
    """Let a network by itself compute the loss of a batch, so that what it cannot do is said by itself."""
    try:
        _training_step(network, x, y)
    except Exception as error:
        if "is not attached to a `Trainer`" in str(error):
            return  # what it does with one is seen when it has one
        error.add_note(
            f"network: this is its training_step with x {tuple(x.shape)} {x.dtype} and y {tuple(y.shape)} {y.dtype}; "
            "batches have 1 example or more; classes must be ints, other labels floats of the shape of the outputs"
        )
        raise


def _training_step(network: Any, x: Tensor, y: Tensor) -> Any:
    """Return what a network's training_step returns of a batch, without a trainer, in eval mode."""
    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(), evaluating(network):
        warnings.filterwarnings("ignore", message=".*self.trainer. reference is not registered")
        return network.training_step((x, y), 0)


def first_weight(network: LightningModule, x: Tensor, y: Tensor) -> tuple[str, bool]:
    """Find the one weight that reads the features, and tell whether the network can do with fewer.

    Args:
        network: The network; half of its features are taken from it.
        x: Some examples.
        y: Their labels.
    """
    graph = trace(network, x)
    first = [name for name, layer in graph.items() if layer.unknown_source is None and bool((layer.sources < 0).all())]
    if len(first) != 1 or network.get_parameter(first[0]).ndim != 2:
        raise ValueError(
            f"network: {', '.join(first) or 'no traced layer'} read the features; allowed is one Linear layer that does"
        )
    network.get_parameter(first[0]).detach()[:, ::2] = 0
    compacted = compact(network, x, batch_sizes=())
    if compacted.features is None:
        return first[0], False
    try:
        losses = [_training_step(network, x, y), _training_step(compacted.module, x[:, compacted.features], y)]
    except Exception:  # it needs all of its features, or a trainer, which it does not have yet: nothing is dropped
        return first[0], False
    whole, less = (torch.as_tensor(loss["loss"] if isinstance(loss, Mapping) else loss) for loss in losses)
    return first[0], torch.allclose(whole, less, rtol=1e-5, atol=1e-8)
