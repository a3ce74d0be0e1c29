"""Networks of one hidden layer on the UCI sets: how their connections are pruned, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from examples.data import Split, Splits
from examples.results import Row
from examples.side_by_side import Member, Networks, fit, seeded, steps_an_epoch
from lightning_cpna import Annealing, CPNAPruning, Geometric, sparsity_of

Method = Literal["NN", "CPNA", "CPA", "score only", "nodes"]
EVERY = 5  # chosen: optimizer steps from one pruning to the next; every step is as good, and takes longer


class Epochs(NamedTuple):
    """How long each phase is.

    Attributes:
        pretraining: Dense.
        hidden: The connections to the output layer are annealed.
        input: The connections from the input are annealed.
        fine_tuning: The learning rate falls.
    """

    pretraining: int
    hidden: int
    input: int
    fine_tuning: int


class Plan(NamedTuple):
    """What all networks of a fit have in common.

    Attributes:
        method: What is pruned, and how.
        hidden: Hidden units.
        batch_size: Samples a step.
        epochs: The phases.
        score: By which the input connections are kept: "path" or "magnitude".
    """

    method: Method
    hidden: int
    batch_size: int
    epochs: Epochs
    score: str


class Job(NamedTuple):
    """One network of a fit.

    Attributes:
        data: What it is trained, chosen and tested on.
        seed: Of its initialisation and its batches.
        lr: Adam's learning rate.
        weight_decay: Adam's coupled weight decay; a tenth of it in the fine-tuning of a pruned network.
        n_hidden: The connections to the output layer that remain, or for ``nodes`` the units.
        n_input: The connections from the input that remain.
    """

    data: Splits
    seed: int
    lr: float
    weight_decay: float
    n_hidden: int = 0
    n_input: int = 0


class Curves(pl.Callback):
    """The accuracies of every network on its validation and test part after each epoch, in percent.

    Args:
        data: The parts by network.
        first: The epoch from which on they are measured.
    """

    def __init__(self, data: Sequence[Splits], first: int) -> None:
        self.data, self.first = data, first
        self.validation: list[list[float]] = []  # by epoch, then network
        self.test: list[list[float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure."""
        if trainer.current_epoch >= self.first:
            pairs = list(zip(pl_module.nets, self.data, strict=True))
            self.validation.append([accuracy(net, data.validation) for net, data in pairs])
            self.test.append([accuracy(net, data.test) for net, data in pairs])


@torch.no_grad()
def accuracy(net: nn.Module, split: Split) -> float:
    """Return the accuracy on a split, in percent; NaN if it is empty."""
    return 100 * float((net(split.x).argmax(1) == split.y).float().mean())


def callbacks(jobs: Sequence[Job], plan: Plan, steps: int) -> list[CPNAPruning]:
    """Return what prunes the networks, by the optimizer steps of an epoch.

    The connections to the output layer follow Eq. 2, whose descent is the first half of its phase; those from the input
    go geometrically. ``nodes`` removes whole hidden units in the first of the two phases, by the product of the norms of
    what they read and what they feed, which normalisation does not change.
    """
    if plan.method == "NN":
        return []
    ends = [steps * sum(plan.epochs[:n]) for n in (1, 2, 3)]
    descent = Annealing(ends[0], (ends[0] + ends[1]) // 2, every=EVERY)
    if plan.method == "nodes":
        units: dict[str, int | float] = {f"nets.{i}.0.weight": job.n_hidden for i, job in enumerate(jobs)}
        return [CPNAPruning(units, schedule=descent, granularity="unit", normalize=False, name="units")]
    hidden: dict[str, int | float] = {f"nets.{i}.2.weight": job.n_hidden for i, job in enumerate(jobs)}
    inputs: dict[str, int | float] = {f"nets.{i}.0.weight": job.n_input for i, job in enumerate(jobs)}
    return [
        CPNAPruning(
            hidden,
            schedule=descent,
            score="normalized" if plan.method == "score only" else "magnitude",
            normalize=plan.method == "CPNA",
            name="hidden",
        ),
        CPNAPruning(
            inputs,
            schedule=Geometric(ends[1], ends[2], every=EVERY),
            score=plan.score,  # type: ignore[arg-type]
            normalize=False,
            name="input",
        ),
    ]


def train(jobs: Sequence[Job], plan: Plan) -> list[Row]:
    """Train networks side by side.

    Returns:
        For each, in percent: ``final``, the test accuracy after the last epoch; ``best``, the highest of any epoch in which
        no more is pruned; ``chosen``, that of the last of the epochs with the highest validation accuracy, if there is a
        validation part; ``validation``, that accuracy after the last epoch. And the connections of both layers: those that
        are live, and the effective ones, which lie on a path from an input to an output.
    """
    members = [Member(_network(job, plan.hidden), job.data.train, job.seed, job.lr, job.weight_decay) for job in jobs]
    is_dense = plan.method == "NN"
    module = Networks(
        members,
        nn.functional.cross_entropy,
        sum(plan.epochs),
        plan.epochs.fine_tuning,
        decay=1.0 if is_dense else 0.1,
    )
    curves = Curves([job.data for job in jobs], 0 if is_dense else sum(plan.epochs[:3]))
    fit(module, plan.batch_size, [*callbacks(jobs, plan, steps_an_epoch(members, plan.batch_size)), curves])
    validation, test = torch.tensor(curves.validation), torch.tensor(curves.test)  # (epoch, network)
    return [accuracies(validation[:, i], test[:, i]) | connections(module, f"nets.{i}") for i in range(len(jobs))]


def _network(job: Job, hidden: int) -> nn.Module:
    x, y = job.data.train
    n_features, n_classes = x.shape[1], int(y.max()) + 1
    return seeded(
        job.seed,
        lambda: nn.Sequential(nn.Linear(n_features, hidden), nn.ReLU(), nn.Linear(hidden, n_classes)),
    )


def accuracies(validation: Tensor, test: Tensor) -> Row:
    """Summarise the curves of one network, ``(epoch,)`` each; a part that is empty says nothing."""
    found: Row = {}
    if not test.isnan().any():
        found |= {"best": float(test.max()), "final": float(test[-1])}
    if not validation.isnan().any():
        found["validation"] = float(validation[-1])
        if "final" in found:
            latest = len(validation) - 1 - int(validation.flip(0).argmax())
            found["chosen"] = float(test[latest])
    return {name: round(value, 4) for name, value in found.items()}


def connections(module: nn.Module, net: str) -> Row:
    """Count a network's connections: live, and effective."""
    masks = sparsity_of(module).masks
    first, second = f"{net}.0.weight", f"{net}.2.weight"
    inputs, outputs = (
        masks[name].live if name in masks else torch.ones_like(module.get_parameter(name), dtype=torch.bool)
        for name in (first, second)
    )  # (unit, feature), (class, unit)
    used = inputs.any(1) & outputs.any(0)  # (unit,)
    return {
        "live_input": int(inputs.sum()),
        "live_hidden": int(outputs.sum()),
        "effective_input": int(inputs[used].sum()),
        "effective_hidden": int(outputs[:, used].sum()),
        "live_units": int(used.sum()),
    }
