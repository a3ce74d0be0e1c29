"""The methods of Table 2, and how each data set's networks are trained."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from examples.asu.problem import EPSILON, METHODS, NEURONS, PROBLEMS, Problem, pruned_widths
from examples.data import Split, asu, loader, standardized, word_counts
from examples.quiet import quiet_trainer
from examples.results import Row
from lightning_cpna import Growth, NeuronPruning, SETRewiring, SparseLinear, sparsity_of


@dataclass(frozen=True)
class Recipe:
    """How the networks of a data set are trained, the same for every method.

    Attributes:
        inputs: How the inputs are scaled.
        batch_size: Examples a step.
        epochs: Passes over the training part.
        lr: The learning rate.
        optimizer: AdamW, or SGD with momentum 0.9.
        weight_decay: Decoupled, times the learning rate, of weights only.
        l1: Soft threshold after each step, times the learning rate, of weights only.
        dropout: Of the inputs.
        std: The standard deviation of new weights, and of the first ones; 0: new ones begin at 0, the first ones with
            He's.
    """

    inputs: Literal["standardized", "word counts"] = "standardized"
    batch_size: int = 2
    epochs: int = 70
    lr: float = 1e-3
    optimizer: Literal["AdamW", "SGD"] = "AdamW"
    weight_decay: float = 1.0
    l1: float = 0.0
    dropout: float = 0.0
    std: float = 0.0


GENES = Recipe()
TEXT = Recipe(inputs="word counts", batch_size=32, epochs=60, weight_decay=0.0)
MADELON = Recipe(batch_size=48, epochs=600, lr=0.03, optimizer="SGD", weight_decay=0.0, l1=0.02, dropout=0.4, std=0.1)
RECIPES = dict.fromkeys(PROBLEMS, GENES) | {"PCMAC": TEXT, "RELATHE": TEXT, "madelon": MADELON}


class MLP(pl.LightningModule):
    """Two hidden ReLU layers, dense or sparse, cross-entropy.

    Args:
        widths: Inputs, hidden units, classes.
        recipe: How it is trained.
        epsilon: About how many connections a sparse layer has, times its inputs and units; None: it is dense.
    """

    def __init__(self, widths: Sequence[int], recipe: Recipe, epsilon: float | None) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Dropout(recipe.dropout)]
        for n_in, n_out in itertools.pairwise(widths):
            layer: nn.Module
            if epsilon is None:
                layer = nn.Linear(n_in, n_out)
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
            else:
                layer = SparseLinear(n_in, n_out, epsilon, replace=True)
                if recipe.std:
                    nn.init.normal_(layer.weight, std=recipe.std)
            layers += [layer, nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.recipe = recipe

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The layers' weights by name."""
        return {name: parameter for name, parameter in self.named_parameters() if name.endswith("weight")}

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(batch, class)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        """Move the weights towards zero by the L1 penalty's proximal step."""
        if self.recipe.l1:
            with torch.no_grad():
                for weight in self.weights.values():
                    weight.copy_(nn.functional.softshrink(weight, self.recipe.l1 * self.recipe.lr))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW or SGD; biases do not decay."""
        weights = list(self.weights.values())
        biases = [parameter for name, parameter in self.named_parameters() if not name.endswith("weight")]
        groups = [
            {"params": weights, "weight_decay": self.recipe.weight_decay},
            {"params": biases, "weight_decay": 0.0},
        ]
        if self.recipe.optimizer == "SGD":
            return torch.optim.SGD(groups, lr=self.recipe.lr, momentum=0.9)
        return torch.optim.AdamW(groups, lr=self.recipe.lr, fused=True)


class Curves(pl.Callback):
    """The accuracy on the training and the test part after every epoch, in percent."""

    def __init__(self, train: Split, test: Split) -> None:
        self.parts = {"train": train, "test": test}
        self.curves: dict[str, list[float]] = {name: [] for name in self.parts}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, and log as ``accuracy/train`` and ``accuracy/test``."""
        for name, part in self.parts.items():
            self.curves[name].append(accuracy(pl_module, part))
            pl_module.log(f"accuracy/{name}", self.curves[name][-1])


@torch.no_grad()
def accuracy(module: nn.Module, split: Split) -> float:
    """Return the accuracy on a split in eval mode, in percent."""
    training = module.training
    right = (module.eval()(split.x).argmax(1) == split.y).float().mean()
    module.train(training)
    return 100 * float(right)


def data(
    name: str, seed: int, folder: Path | None, inputs: str = "standardized", validate: bool = False
) -> tuple[Split, Split]:
    """Return the scaled training and test part; with ``validate``, a quarter of the training part stands for the test."""
    train, test = asu(name, seed, folder)
    if validate:
        rows = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(seed))
        held, rest = rows[: len(rows) // 4], rows[len(rows) // 4 :]
        train, test = Split(train.x[rest], train.y[rest]), Split(train.x[held], train.y[held])
    return (standardized if inputs == "standardized" else word_counts)(train, test)


def build(problem: Problem, method: str, recipe: Recipe) -> tuple[MLP, list[Any]]:
    """Return a method's network and its callbacks.

    "1st NPSET" and "2nd NPSET" remove neurons of one hidden layer only. "Direct SET" and "Direct FC" start where NPSET ends:
    with its widths, and as many connections as Table 3 counts, or all. "Dense" is the network of full width. The paper does
    not define the four; this is how they are read here.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed is one of {', '.join(METHODS)}")
    if method in ("Direct FC", "Dense"):
        return MLP(pruned_widths(problem.widths) if method == "Direct FC" else problem.widths, recipe, None), []
    rewiring = SETRewiring(["net.*.weight"], zeta=0.3, growth=Growth("random", std=recipe.std))
    if method == "Direct SET":
        widths = pruned_widths(problem.widths)
        ends = sum(n_in + n_out for n_in, n_out in itertools.pairwise(widths))
        return MLP(widths, recipe, problem.npset_connections / ends), [rewiring]
    module = MLP(problem.widths, recipe, EPSILON)
    first, second, _ = module.weights
    hidden = {"SET": [], "NPSET": [first, second], "1st NPSET": [first], "2nd NPSET": [second]}[method]
    if not hidden:
        return module, [rewiring]
    neurons = NeuronPruning(hidden, schedule=NEURONS, score="out_degree", compensate=None)
    return module, [rewiring, neurons]


def run(
    name: str,
    method: str,
    seed: int,
    folder: Path | None = None,
    *,
    validate: bool = False,
    recipe: Recipe | None = None,
    logger: Any = False,
) -> tuple[Row, MLP]:
    """Train one network.

    Args:
        name: The data set.
        method: One of ``METHODS``.
        seed: Draws the split, the network and everything else.
        folder: The data folder; None: ``LIGHTNING_CPNA_DATA``, or a download.
        validate: Whether a quarter of the training part stands for the test part, to choose hyper-parameters.
        recipe: How it is trained; None: as this data set's networks are.
        logger: A Lightning logger.

    Returns:
        The result, and the trained network.
    """
    torch.set_num_threads(1)
    recipe = recipe or RECIPES[name]
    train, test = data(name, seed, folder, recipe.inputs, validate)
    pl.seed_everything(seed, verbose=False)
    module, callbacks = build(PROBLEMS[name], method, recipe)
    curves = Curves(train, test)
    trainer = quiet_trainer(
        max_epochs=recipe.epochs,
        accelerator="cpu",
        callbacks=[*callbacks, curves],
        logger=logger,
        log_every_n_steps=len(train.y) // recipe.batch_size,  # once an epoch
    )
    start = time.perf_counter()
    trainer.fit(module, loader(train, recipe.batch_size, seed))
    seconds = time.perf_counter() - start
    sparsity = sparsity_of(module)
    n_hidden = [sparsity.n_units(weight) for weight in list(module.weights)[:-1]]
    row = {
        "set": name,
        "method": method,
        "seed": seed,
        "n_test": len(test.y),
        "connections": sum(weight.numel() for weight in module.weights.values()),
        "neurons": train.x.shape[1] + sum(n_hidden),
        "steps": trainer.global_step,
        "seconds": round(seconds, 2),
        "test": [round(value, 3) for value in curves.curves["test"]],
        "train": [round(value, 3) for value in curves.curves["train"]],
    }
    return row, module


def result(
    *,
    set: str,
    method: str,
    seed: int,
    validate: bool = False,
    folder: Path | None = None,
    board: Path | None = None,
) -> Row:
    """Train one network as `run` does, and return its result.

    Args:
        set: The data set.
        method: One of ``METHODS``.
        seed: As in `run`.
        validate: As in `run`.
        folder: The data folder.
        board: The folder of TensorBoard runs.
    """
    name = f"{set}_{method.replace(' ', '_')}" + "_validation" * validate
    row, _ = run(
        set,
        method,
        seed,
        folder,
        validate=validate,
        logger=TensorBoardLogger(board, name, f"seed_{seed}") if board else False,
    )
    return row
