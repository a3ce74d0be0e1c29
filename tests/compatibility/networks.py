"""The networks of the matrix: each takes ``(n, 16)`` and returns ``(n, 2)``."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cpna import SparseLinear
from tests import helpers


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 2))


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
        )
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x.unflatten(1, (1, 4, 4))).mean(dim=(2, 3)))
        return out


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 10, batch_first=True)
        self.head = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x.unflatten(1, (4, 4)))[0][:, -1])
        return out


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer(self.embed(x.unflatten(1, (4, 4)))).mean(dim=1))
        return out


class Sparse(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(SparseLinear(16, 24, 3), nn.ReLU(), SparseLinear(24, 20, 3), nn.ReLU(), nn.Linear(20, 2))


class Network(NamedTuple):
    """A network, how many connections of two weights should remain, and how many units of one."""

    build: type[nn.Module]
    connections: dict[str, int]
    units: dict[str, int]
    is_sparse: bool = False


NETWORKS = {
    "MLP": Network(MLP, {"net.0.weight": 60, "net.2.weight": 50}, {"net.0.weight": 10}),
    "CNN with BatchNorm": Network(
        CNN, {"net.features.0.weight": 30, "net.features.3.weight": 80}, {"net.features.0.weight": 5}
    ),
    "LSTM": Network(LSTM, {"net.lstm.weight_ih_l0": 40, "net.head.0.weight": 50}, {"net.head.0.weight": 7}),
    "Transformer encoder": Network(
        Encoder,
        {"net.layer.self_attn.in_proj_weight": 60, "net.layer.linear1.weight": 70},
        {"net.layer.linear1.weight": 9},
    ),
    "SparseLinear": Network(Sparse, {"net.0.weight": 60, "net.2.weight": 50}, {"net.0.weight": 10}, True),
}


class Steps(helpers.Steps):
    """Those of the helpers, for two classes."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.forward_(batch[0]), batch[1])


def module(name: str, package: Any, *mixins: type) -> Any:
    """Return a LightningModule of a package that trains the network."""

    class Trained(*mixins, Steps, package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = NETWORKS[name].build()

        def __reduce__(self) -> Any:  # a process that is spawned must make the class again
            return _again, (name, package.__name__, mixins), self.__dict__

    torch.manual_seed(0)
    return Trained()


def _again(name: str, package: str, mixins: tuple[type, ...]) -> Any:
    return module(name, importlib.import_module(package), *mixins)


def data() -> DataLoader[Any]:
    x = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=12)
