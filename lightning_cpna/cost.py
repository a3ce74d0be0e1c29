"""What a network costs: parameters, multiplications, time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cpna.activations import layers_of

REPEATS, SECONDS = 30, 0.5  # chosen: the medians repeat within some percent


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: How many numbers its parameters hold.
        macs: Multiply-adds of its Linear and Conv layers for one example, biases not counted.
        latency: Seconds of a forward pass, the median of up to 30, by batch size.
    """

    parameters: int
    macs: int
    latency: Mapping[int, float]


@torch.no_grad()
def cost_of(module: nn.Module, example: Tensor, batch_sizes: Sequence[int] = ()) -> Cost:
    """Count and time a network as it is, in its own mode.

    Args:
        module: The network.
        example: A batch of inputs, ``(batch, ...)``.
        batch_sizes: The batch sizes at which its forward pass is timed.

    Example:
        >>> cost_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(5, 3))
        Cost(parameters=26, macs=20, latency={})
    """
    macs = 0

    def count(layer: Any, _: Any, output: Tensor) -> None:
        nonlocal macs
        macs += output.numel() * math.prod(layer.weight.shape[1:]) // len(example)

    handles = [layer.register_forward_hook(count) for layer in layers_of(module).values()]
    try:
        module(example)
    finally:
        for handle in handles:
            handle.remove()
    rows = {size: example[torch.arange(size, device=example.device) % len(example)] for size in batch_sizes}
    latency = {size: _seconds(module, batch) for size, batch in rows.items()}
    return Cost(sum(parameter.numel() for parameter in module.parameters()), macs, latency)


def _seconds(module: nn.Module, batch: Tensor) -> float:
    times: list[float] = []
    for _ in range(2):
        module(batch)
    while len(times) < REPEATS and sum(times) < SECONDS:
        if batch.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        module(batch)
        if batch.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
