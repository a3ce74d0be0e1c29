"""The experiments: each is one function of a seed that returns rows of results."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from examples.data import Split, Splits, digits, mnist
from examples.results import Row
from examples.saliency.training import Classifier, accuracy, cross_entropy, fit, trained
from lightning_cpna import (
    Geometric,
    NeuronPruning,
    Sparsity,
    UnitInputs,
    UnitScore,
    Watch,
    compact,
    keep_top,
    mean_replacement_penalties,
    observe,
    trace,
    weight_saliencies,
)

WEIGHT_KINDS = ("magnitude", "first_order", "second_order", "hessian", "hessian_diagonal", "random")
UNIT_KINDS = (
    "norm", "path", "activation", "gradient", "mean_replacement", "penalty", "frame_potential", "inner_product", "random",
)  # fmt: skip
SPARSITIES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LENET = (784, 300, 100, 10)
WIDTHS = (16, 64, 256, 1024)
FRACTIONS_OF_WIDTH = tuple(i / 20 for i in range(20))
N_SHUFFLED, EPOCHS_SHUFFLED = 5000, 100  # chosen: even 64 units fit these shuffled labels in part, 1024 fully
SCORED = 2000  # chosen: training examples on which saliencies are computed


def scored_batch(data: Splits) -> tuple[Tensor, Tensor]:
    """Return the training examples on which saliencies are computed."""
    return data.train.x[:SCORED], data.train.y[:SCORED]


def curves(seed: int, folder: Path | None) -> list[Row]:
    """Test accuracy of LeNet-300-100 on MNIST against sparsity, weights and units removed at once, nothing trained after."""
    data = mnist(seed, folder)
    module = trained(LENET, data, epochs=10, batch_size=128, seed=seed)
    rows = []
    for kind in WEIGHT_KINDS:
        scores = weight_scores(module, data, kind, seed)
        flat = torch.cat([score.flatten() for score in scores.values()])
        for sparsity in SPARSITIES:
            keep = keep_top(flat, round((1 - sparsity) * len(flat)))
            twin = copy.deepcopy(module)
            parts = torch.split(keep, [score.numel() for score in scores.values()])
            for (name, score), part in zip(scores.items(), parts, strict=True):
                twin.get_parameter(name).data.mul_(part.view(score.shape))
            row = {"what": "weights", "score": kind, "replace": "zero", "sparsity": sparsity}
            rows.append({**row, "accuracy": accuracy(twin, data.test)})
    for kind in UNIT_KINDS:
        for replace in ("zero", "mean"):
            remover = UnitRemover(module, data, kind, seed)
            for fraction in FRACTIONS:
                remover.keep(remover.n_units - round(fraction * remover.n_units), replace)
                row = {"what": "units", "score": kind, "replace": replace, "sparsity": fraction}
                rows.append({**row, "accuracy": accuracy(remover.module, data.test)})
    return [{"seed": seed, **row} for row in rows]


def weight_scores(module: Classifier, data: Splits, kind: str, seed: int) -> dict[str, Tensor]:
    """Score all weights."""
    names = [name for name, _ in module.named_parameters() if name.endswith("weight")]
    if kind in ("magnitude", "random"):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: module.get_parameter(name).detach().abs()
            if kind == "magnitude"
            else torch.rand(module.get_parameter(name).shape, generator=generator)
            for name in names
        }
    return weight_saliencies(module, names, [scored_batch(data)], cross_entropy, kind)  # type: ignore[arg-type]


class UnitRemover:
    """Removes units of a copy of a network in the order of a score, those of all hidden layers together.

    Args:
        module: The network.
        data: Its data; the score is computed on training examples, once.
        kind: The score.
        seed: For random scores.
        largest_first: Whether the units with the largest scores go first.

    Attributes:
        module: The copy.
        n_units: How many units it has.
    """

    def __init__(self, module: Classifier, data: Splits, kind: str, seed: int, largest_first: bool = False) -> None:
        self.module = copy.deepcopy(module)
        self._sparsity = Sparsity(self.module)
        self._sparsity.graph = graph = trace(self.module, data.train.x[:4])
        batch, names = scored_batch(data), module.hidden
        activity = observe(self.module, graph, names, [batch], cross_entropy)
        means = {reader: mean for name in names for reader, mean in activity[name].means.items()}
        self._watch, self._batch, self._names = Watch(self.module, means), batch, names
        self.n_units = sum(len(graph[name].units) for name in names)
        score = UnitScore(kind, largest_first=largest_first)  # type: ignore[arg-type]
        self._scores = {}
        for name in names:
            inputs = UnitInputs.of(
                self._sparsity,
                name,
                torch.Generator().manual_seed(seed),
                activity=activity[name],
                penalize=partial(mean_replacement_penalties, self.module, graph, name, [batch], cross_entropy, means),
            )
            self._scores[name] = score(inputs)
        hidden = "".join(name.split(".")[1] for name in names)
        [self._budget] = self._sparsity.add_budgets(
            self.module, {f"net.[{hidden}].weight": len(names)}, "unit", "shared"
        )

    def keep(self, n: int, replace: str) -> None:
        """Remove all but the ``n`` best units; each is replaced by "zero", or by its "mean" as it is by then."""
        graph = self._sparsity.graph
        if graph is None or n >= self._sparsity.n_remaining(self._budget):
            return
        means = None
        if replace == "mean":
            with torch.no_grad(), self._watch:
                self.module(self._batch[0])
            self._watch.clear()
            self._watch.digest(graph, self._names)
            means = self._watch.means()
        self._sparsity.prune_units_(self._budget, n, self._scores, means=means)


def smaller(seed: int, folder: Path | None) -> list[Row]:
    """How small does LeNet-300-100 get on MNIST, unit by unit, while it trains on? The stop is chosen on validation.

    The network is trained for ten epochs, then for forty more while the hidden units of both layers together fall
    geometrically from 400 to 12. Each epoch is noted; the last one whose validation accuracy is at most 0.3 points below
    the dense network's is the stop.
    """
    data = mnist(seed, folder)
    rows = []
    for kind in ("mean_replacement", "norm", "random"):
        module = trained(LENET, data, epochs=10, batch_size=128, seed=seed)
        pruning = NeuronPruning(
            {"net.[02].weight": 12}, schedule=Geometric(0.0, 1.0), score=UnitScore(kind), scope="shared"
        )
        notes = Notes(data)
        notes.note(module)
        fit(module, data, epochs=40, batch_size=128, seed=seed + 1, callbacks=[pruning, notes])
        rows += [{"seed": seed, "score": kind, **row} for row in notes.rows]
    return rows


class Notes(pl.Callback):
    """Notes after every epoch how accurate the network is, and how large once it is compacted."""

    def __init__(self, data: Splits) -> None:
        self.data, self.rows = data, list[Row]()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note."""
        if not trainer.sanity_checking:
            self.note(pl_module)

    def note(self, module: pl.LightningModule) -> None:
        """Compact a copy, and note its size and its accuracies."""
        net = module.get_submodule("net")
        compacted = compact(net, self.data.train.x[:100], batch_sizes=())
        x = {name: Split(compacted.inputs(split.x), split.y) for name, split in self.data._asdict().items()}
        self.rows.append(
            {
                "validation_accuracy": accuracy(compacted.module, x["validation"]),
                "test_accuracy": accuracy(compacted.module, x["test"]),
                "parameters": compacted.after.parameters,
                "dense_parameters": compacted.before.parameters,
                "units": [p.shape[0] for p in compacted.module.parameters() if p.ndim == 2][:-1],
            }
        )


def removable(seed: int, folder: Path | None) -> list[Row]:
    """Units of 64-128-10 on the digits that can go before the test accuracy falls by more than half a point."""
    data = digits(seed)
    module = trained((64, 128, 10), data, epochs=100, batch_size=64, seed=seed)
    before = accuracy(module, data.test)
    rows = []
    for kind in UNIT_KINDS:
        for replace in ("zero", "mean"):
            remover = UnitRemover(module, data, kind, seed)
            n = remover.n_units
            while n > 1:
                remover.keep(n - 1, replace)
                if accuracy(remover.module, data.test) < before - 0.5:
                    break
                n -= 1
            rows.append(
                {
                    "seed": seed,
                    "score": kind,
                    "replace": replace,
                    "removable": remover.n_units - n,
                    "units": remover.n_units,
                    "dense_accuracy": before,
                }
            )
    return rows


def concentration(seed: int, folder: Path | None) -> list[Row]:
    """Does importance concentrate in few units as the width grows, and on shuffled labels? One hidden layer on MNIST.

    For each width, with true and with shuffled training labels: the accuracy (validation, and training) as units go,
    smallest or largest |mean replacement saliency| first, and what the training loss rises by as each unit goes alone.
    """
    rows = []
    for labels in ("true", "shuffled"):
        data = mnist(seed, folder)
        order = torch.randperm(N_SHUFFLED, generator=torch.Generator().manual_seed(seed))
        train = Split(data.train.x[:N_SHUFFLED], data.train.y[:N_SHUFFLED])
        data = data._replace(train=train if labels == "true" else Split(train.x, train.y[order]))
        for width in WIDTHS:
            module = trained((784, width, 10), data, epochs=EPOCHS_SHUFFLED, batch_size=100, seed=seed)
            graph = trace(module, data.train.x[:4])
            batch = scored_batch(data)
            means = observe(module, graph, module.hidden, [batch], cross_entropy)["net.0.weight"].means
            penalties = mean_replacement_penalties(module, graph, "net.0.weight", [batch], cross_entropy, means)
            shares = penalties.clamp(min=0.0).sort(descending=True).values
            top = float(shares[: max(1, width // 10)].sum() / shares.sum().clamp(min=1e-12))
            for largest_first in (False, True):
                remover = UnitRemover(module, data, "mean_replacement", seed, largest_first)
                for fraction in FRACTIONS_OF_WIDTH:
                    remover.keep(max(1, width - round(fraction * width)), "zero")
                    rows.append(
                        {
                            "seed": seed,
                            "labels": labels,
                            "width": width,
                            "first": "largest" if largest_first else "smallest",
                            "removed": fraction,
                            "validation_accuracy": accuracy(remover.module, data.validation),
                            "training_accuracy": accuracy(remover.module, data.train),
                            "share_of_top_tenth": top,
                        }
                    )
    return rows


EXPERIMENTS = {"curves": curves, "removable": removable, "smaller": smaller, "concentration": concentration}
