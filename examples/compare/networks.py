"""The networks: dense, pruned by CPNA, and sparse from the first step."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.compare.methods import Description, Fitted, Method, Settings, logits, n_nonzero
from examples.data import Batches, Split, loader
from examples.features.networks import Classifier
from examples.quiet import quiet_trainer
from examples.xor.problem import Phase, PhaseBatches, Phases
from examples.xor.recipes import Recipe, callbacks, features, hidden_by_score, inputs
from lightning_cpna import Geometric, Growth, NeuronPruning, Restarts, SETRewiring, SparseLinear, find_features
from lightning_cpna.targets import axes_of

LATE_DECAY = 1e-4  # chosen on XOR: what is left late must fit more than it must shrink
REWIRINGS, APART = 100, 5  # chosen: of a run, and how many steps a new connection has at least before the next
STEPS = [1000, 4000, 12000]  # of which real sets get a part
MOST_WEIGHTS = 2**20  # chosen: that a hidden layer has, or a fit to 10,000 features takes ten minutes


def _width(hidden: int, n_features: int) -> int:
    """Let a wide table have fewer hidden units."""
    return min(hidden, MOST_WEIGHTS // n_features)


def _epochs(steps: float, n: int, batch_size: int) -> int:
    return max(1, round(steps / -(-n // batch_size)))


def _fitted(module: nn.Module) -> Fitted:
    """Describe a trained network, whose dead connections are zeros, or not there."""
    module.eval()

    def describe() -> Description:
        first = next(part for part in module.modules() if isinstance(part, nn.Linear | SparseLinear))
        squares = axes_of(first, "weight").sum_of_inputs(first.weight.detach().square())[0]
        return Description(squares.sqrt().numpy(), n_nonzero(module))

    return Fitted(logits(module), describe)


def _train(module: pl.LightningModule, train: Split, recipe: Recipe, seed: int, pruning: list[Any]) -> None:
    phases = [phase for phase, _ in recipe]
    n = len(train.y)
    trainer = quiet_trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[Phases(phases, n), *pruning],
    )
    batches: Any = PhaseBatches(n, phases, torch.Generator().manual_seed(seed))
    trainer.fit(module, DataLoader(Batches(train), sampler=batches, batch_size=None))


class Dropping(Classifier):
    """A classifier that drops inputs while it trains."""

    def __init__(self, n_features: int, n_classes: int, hidden: int, dropout: float) -> None:
        super().__init__(n_features, n_classes, hidden)
        self.dropout = dropout

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        x, y = batch
        return super().training_step((nn.functional.dropout(x, self.dropout), y), batch_idx)


def dense(settings: Settings, train: Split, n_classes: int, seed: int) -> Fitted:
    """Train a dense network."""
    pl.seed_everything(seed, verbose=False)
    n, p = train.x.shape
    module = Dropping(p, n_classes, _width(settings["hidden"], p), settings["dropout"])
    size, lr, decay = settings["batch_size"], settings["lr"], settings["weight_decay"]
    recipe: Recipe = [
        (Phase(_epochs(settings["steps"] * 2 / 3, n, size), size, lr, decay), None),
        (Phase(_epochs(settings["steps"] / 3, n, size), size, lr, decay, lr / 30), None),
    ]
    _train(module, train, recipe, seed, [])
    return _fitted(module)


def cpna(settings: Settings, train: Split, n_classes: int, seed: int) -> Fitted:
    """Train a wide network and anneal it: input features first, if there is a count of them, then connections."""
    pl.seed_everything(seed, verbose=False)
    n, p = train.x.shape
    size, lr, decay = settings["batch_size"], settings["lr"], settings["weight_decay"]
    n_out = settings["units"] * n_classes
    n_in = settings["units"] * settings["inputs"]
    by_features = "features" in settings
    share = settings["steps"] / (1 if by_features else 1.25)

    def phase(part: float, lr: float, weight_decay: float, lr_end: float | None = None) -> Phase:
        return Phase(_epochs(part * share, n, size), size, lr, weight_decay, lr_end)

    hidden = _width(settings["hidden"], p)
    recipe: Recipe = [(phase(0.15, lr, decay), None)]
    if by_features:
        recipe.append((phase(0.2, lr, decay), features(min(settings["features"], p))))
    else:  # single connections, interleaved: wide layers must not be cut to their ends at once
        recipe.append((phase(0.15, lr / 3, LATE_DECAY), hidden_by_score(min(4 * n_out, hidden * n_classes))))
        recipe.append((phase(0.3, lr, decay), inputs(min(4 * n_in, hidden * p), exponent=12)))
    recipe += [
        (phase(0.25, lr / 3, LATE_DECAY), hidden_by_score(n_out)),
        (phase(0.25, lr, LATE_DECAY), inputs(n_in, exponent=0 if by_features else 8)),
        (phase(0.15, lr, LATE_DECAY / 10, lr / 100), None),
    ]
    module = Classifier(p, n_classes, hidden)
    _train(module, train, recipe, seed, callbacks(recipe, n, shrink=True))
    return _fitted(module)


def restarts(settings: Settings, train: Split, n_classes: int, seed: int) -> Fitted:
    """Search the features by restarts, and train and prune a network that has no others."""
    p = train.x.shape[1]
    counts = sorted({min(count, p - 1) for count in (settings["most"], settings["most"] // 2, settings["most"] // 4)})
    subset = max(counts[-1] + 1, round(settings["fraction"] * p))
    plan = Restarts(settings["tries"], subset, batch_size=settings["batch_size"])
    network = partial(Classifier, n_classes=n_classes, hidden=_width(256, subset), lr=settings["lr"])
    trainer, quiet = partial(pl.Trainer, accelerator="cpu"), Console(quiet=True)
    found = find_features(network, trainer, *train, counts, restarts=plan, seed=seed, console=quiet)
    places = torch.tensor(found.features)
    own = {"hidden": 256, "features": len(places), "weight_decay": 1e-3, "units": 64, "inputs": 4}
    fitted = cpna(settings | own, Split(train.x[:, places], train.y), n_classes, seed)

    def describe() -> Description:
        importances = np.zeros(p)
        importances[list(found.features)] = fitted.importances
        return Description(importances, fitted.parameters)

    return Fitted(lambda x: fitted.scores(x[:, places]), describe, certified=found.certificate.holds)


class SparseMLP(pl.LightningModule):
    """Two hidden layers that store their connections only, cross-entropy, AdamW."""

    def __init__(self, n_features: int, n_classes: int, settings: Settings) -> None:
        super().__init__()
        width, epsilon = settings["width"], settings["epsilon"]
        self.net = nn.Sequential(
            nn.Dropout(settings["dropout"]),
            SparseLinear(n_features, width, epsilon),
            nn.ReLU(),
            SparseLinear(width, width, epsilon),
            nn.ReLU(),
            nn.Linear(width, n_classes),
        )
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(batch, class)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(
            self.parameters(), lr=self.settings["lr"], weight_decay=self.settings["weight_decay"], fused=True
        )


def evolved(settings: Settings, train: Split, n_classes: int, seed: int, *, neurons: bool = False) -> Fitted:
    """Train a sparse network by SET; with ``neurons`` by NPSET, which removes four fifths of the units in the first half."""
    pl.seed_everything(seed, verbose=False)
    n, p = train.x.shape
    hidden = ["net.1.weight", "net.3.weight"]
    module = SparseMLP(p, n_classes, settings)
    every = max(APART, settings["steps"] // REWIRINGS)
    pruning: list[Any] = [SETRewiring(hidden, zeta=0.3, growth=Growth("random"), every=every)]
    if neurons:
        schedule, remain = Geometric(0.1, 0.5, every), dict.fromkeys(hidden, 0.2)
        pruning.append(NeuronPruning(remain, schedule=schedule, score="out_degree", compensate=None))
    trainer = quiet_trainer(
        max_steps=settings["steps"],
        max_epochs=-1,
        accelerator="cpu",
        callbacks=pruning,
    )
    trainer.fit(module, loader(train, min(settings["batch_size"], n), seed))
    return _fitted(module)


NETWORK: dict[str, list[Any]] = {"batch_size": [64, 256], "lr": [1e-2, 3e-3, 1e-3]}
CPNA: dict[str, list[Any]] = {
    **NETWORK,
    "steps": STEPS,
    "hidden": [256, 1024],
    "weight_decay": [1e-3, 3e-4],
    "units": [16, 32, 64],
    "inputs": [4, 8, 16],
}
SPARSE: dict[str, list[Any]] = {
    **NETWORK,
    "steps": STEPS,
    "width": [500, 1000],
    "epsilon": [5.0, 10.0, 20.0],
    "dropout": [0.0, 0.3],
    "weight_decay": [1.0, 0.1, 0.01],
}
OURS: dict[str, Method] = {
    "CPNA, features": Method({**CPNA, "features": [4, 5, 10, 20, 50, 100]}, cpna),
    "CPNA, connections": Method(CPNA, cpna),
    "restarts": Method(
        {**NETWORK, "steps": [12000], "most": [5, 10, 20, 50], "fraction": [0.5, 1.0], "tries": [32, 128]}, restarts
    ),
    "SET": Method(SPARSE, evolved),
    "NPSET": Method(SPARSE, partial(evolved, neurons=True)),
}
DENSE: dict[str, Method] = {
    "dense network": Method(
        {
            **NETWORK,
            "hidden": [64, 256, 1024],
            "weight_decay": [1e-2, 1e-3, 1e-4],
            "steps": STEPS,
            "dropout": [0.0, 0.3],
        },
        dense,
    )
}
