"""Small problems whose landscapes the tests look at."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cpna.landscape import LossSurface


def cross_entropy(net: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def error(net: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    wrong: Tensor = net(batch[0]).argmax(1) != batch[1]
    return wrong.double().mean()


def squares(net: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(net(batch[0]), batch[1])


def blobs(
    n: int = 96, features: int = 5, classes: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return overlapping classes, ``(n, features)`` and ``(n,)``."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    y = torch.arange(n) % classes
    x = centres[y] + torch.randn(n, features, generator=generator, dtype=torch.float64)
    return x.to(dtype), y


def net(hidden: int = 8, features: int = 5, classes: int = 3, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes)).to(dtype)


def trained(module: nn.Module, batch: tuple[Tensor, Tensor], steps: int = 200, lr: float = 0.01) -> nn.Module:
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(module, batch).backward()
        optimizer.step()
    module.zero_grad()
    return module


def surface(module: nn.Module | None = None, batch: tuple[Tensor, Tensor] | None = None, **options: Any) -> LossSurface:
    return LossSurface(module or net(), [batch or blobs()], cross_entropy, **options)
