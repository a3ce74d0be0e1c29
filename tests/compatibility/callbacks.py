"""The callbacks of the matrix, as a LightningCLI's configuration names them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from tests.compatibility.networks import Network

Config = dict[str, Any]


def _config(name: str, /, **arguments: Any) -> Config:
    return {"class_path": f"lightning_cpna.{name}", "init_args": arguments}


def _gradual() -> Config:
    return _config("Geometric", start=0.2, end=0.7)


def _cpna(network: Network) -> Config:
    targets = dict(network.connections)
    return _config("CPNAPruning", targets=targets, schedule=_gradual(), score="magnitude", normalize=False)


def _normalised(network: Network) -> Config:
    targets = dict([list(network.connections.items())[-1]])
    return _config("CPNAPruning", targets=targets, schedule=_gradual(), normalize=True, name="normalised")


def _neurons(network: Network, score: str = "norm") -> Config:
    return _config("NeuronPruning", targets=dict(network.units), schedule=_gradual(), score=score, compensate=None)


def _set(network: Network) -> Config:
    growth = _config("Growth", kind="random", seed=0)
    targets = list(network.connections) if network.is_sparse else dict(network.connections)
    return _config("SETRewiring", targets=targets, every=3, growth=growth)


def _tickets(network: Network, **arguments: Any) -> Config:
    return _config("TicketRewind", epochs=3, **({"targets": dict(network.connections), "levels": 2} | arguments))


CALLBACKS: dict[str, Callable[[Network], list[Config]]] = {
    "CPNAPruning": lambda network: [_cpna(network)],
    "CPNAPruning, normalising": lambda network: [_normalised(network)],
    "NeuronPruning": lambda network: [_neurons(network)],
    "SETRewiring": lambda network: [_set(network)],
    "TicketRewind": lambda network: [_tickets(network)],
    "SETRewiring + NeuronPruning": lambda network: [_set(network), _neurons(network, "out_degree")],
    "SETRewiring + TicketRewind": lambda network: [_set(network), _tickets(network, targets=None, levels=2)],
}


def make(config: Any) -> Any:
    """Build what a configuration names."""
    if isinstance(config, dict) and "class_path" in config:
        package, name = config["class_path"].rsplit(".", 1)
        arguments = {key: make(value) for key, value in config["init_args"].items()}
        return getattr(importlib.import_module(package), name)(**arguments)
    return config
