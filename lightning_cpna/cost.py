"""What a network costs: parameters, multiplications, time."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_cpna.layers import evaluating
from lightning_cpna.sparse import SparseLinear

REPEATS, SECONDS = 30, 0.5  # chosen: the medians repeat within some percent


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: How many numbers its parameters hold.
        macs: Multiply-adds of its Linear, Conv and SparseLinear modules for one example, biases not counted.
        latency: Seconds of a forward pass, the median of up to 30, by batch size.
    """

    parameters: int
    macs: int
    latency: Mapping[int, float]


@torch.no_grad()
def cost_of(module: nn.Module, example: Tensor | tuple[Tensor, ...], batch_sizes: Sequence[int] = ()) -> Cost:
    """Count and time a network in eval mode.

    Args:
        module: The network; it is left as it is.
        example: A batch of inputs, ``(batch, ...)``, or several, which are the arguments of its forward.
        batch_sizes: The batch sizes at which its forward pass is timed.

    Examples:
        >>> cost_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(5, 3))
        Cost(parameters=26, macs=20, latency={})
    """
    inputs = (example,) if isinstance(example, Tensor) else example
    n = len(inputs[0])
    macs = 0

    def count(layer: Any, args: Any, output: Tensor) -> None:
        nonlocal macs
        # Every output of a layer, and every input of a transposed one, is one product with its weight.
        passes = args[0] if isinstance(layer, _ConvTransposeNd) else output
        if isinstance(layer, SparseLinear):  # every row is one product with each connection
            macs += output.numel() // layer.out_features * len(layer.weight) // n
        else:
            macs += passes.numel() * math.prod(layer.weight.shape[1:]) // n

    layers = [part for part in module.modules() if isinstance(part, nn.Linear | _ConvNd | SparseLinear)]
    with evaluating(module), contextlib.ExitStack() as context:
        for layer in layers:
            context.callback(layer.register_forward_hook(count).remove)
        module(*inputs)
        context.close()
        latency = {}
        for size in batch_sizes:
            rows = torch.arange(size, device=inputs[0].device) % n
            latency[size] = _seconds(module, tuple(x[rows] for x in inputs))
    return Cost(sum(parameter.numel() for parameter in module.parameters()), macs, latency)


def _seconds(module: nn.Module, batch: tuple[Tensor, ...]) -> float:
    times: list[float] = []
    for _ in range(2):
        module(*batch)
    while len(times) < REPEATS and sum(times) < SECONDS:
        if batch[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        module(*batch)
        if batch[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
