"""How fast Hessian spectra are, beside curvlinops, and double backward passes from a new forward pass each time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.landscape.networks import cross_entropy, mlp, some_digits, train
from lightning_cpna.landscape import LossSurface, hessian_spectrum

pytestmark = pytest.mark.benchmark
STEPS, PROBES, ROUNDS = 80, 10, 3


def naive(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Run Lanczos on lists of tensors, each product by two backward passes from a new forward pass."""
    weights = list(net.parameters())

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))

    def less(a: list[Tensor], b: list[Tensor], times: float) -> list[Tensor]:
        return [x - times * y for x, y in zip(a, b, strict=True)]

    def unit(a: list[Tensor]) -> list[Tensor]:
        return [x / dot(a, a) ** 0.5 for x in a]

    for _ in range(PROBES):
        basis = [unit([torch.randn_like(weight) for weight in weights])]
        for _ in range(STEPS):
            gradients = torch.autograd.grad(cross_entropy(net, batch), weights, create_graph=True)
            new = list(torch.autograd.grad(gradients, weights, basis[-1]))
            for vector in basis:
                new = less(new, vector, dot(new, vector))
            basis.append(unit(new))


def test_the_spectrum_of_the_digits_net_is_three_times_as_fast() -> None:
    batch, _ = some_digits(1257, 0, dtype=torch.float32)
    net = mlp([64, 32, 10], 0, dtype=torch.float32)
    train(net, batch, 300, 0.01)
    surface = LossSurface(net, [batch], cross_entropy)
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: hessian_spectrum(surface, steps=STEPS, probes=PROBES),
        "naive": lambda: naive(net, batch),
    }
    try:
        from curvlinops import HessianLinearOperator
        from curvlinops.papyan2020traces.spectrum import fast_lanczos
    except ImportError:
        print("curvlinops is not installed, so it is not measured")
    else:
        operator = HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), [tuple(batch)])

        def peer() -> None:
            for _ in range(PROBES):
                fast_lanczos(operator, STEPS)

        ways["curvlinops"] = peer
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items()))
    for name, seconds in medians.items():
        if name != "ours":
            print(f"ours is {seconds / medians['ours']:.1f} times as fast as {name}")
            assert seconds >= 3 * medians["ours"]
