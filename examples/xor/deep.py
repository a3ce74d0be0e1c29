"""CPNA on networks with two and three hidden layers: `python -m examples.xor.deep`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from examples.arguments import run_sweep
from examples.command import finish, parse
from examples.data import Split, loader
from examples.quiet import quiet_trainer
from examples.results import Row, counted, mean_and_spread
from examples.xor.problem import XORData
from examples.xor.training import OF_WEIGHTS
from lightning_cpna import Annealing, CPNAPruning, Geometric, sparsity_of
from lightning_cpna.sweeps import grid

K, P, N = 3, 60, 3000
BATCH_SIZE, LR = 250, 1e-3  # these, the epochs, weight decays and counts were chosen on seeds 200 to 209
EPOCHS, FINE_TUNING = 400, 0.15  # of the run, as CPNAPruning leaves it
METHODS = {"nn": "NN", "cpna": "CPNA, nothing else said", "fsa_cpna": "features first, then CPNA"}
FIRST_SEED = 3000


class Depth(NamedTuple):
    """A network: its hidden layers' widths, the connections that remain of each layer, and its weight decay."""

    widths: tuple[int, ...]
    counts: tuple[int, ...]
    weight_decay: float


DEPTHS = {
    2: Depth((512, 64), (24, 64, 12), weight_decay=1e-2),
    3: Depth((512, 128, 32), (48, 128, 64, 16), weight_decay=5e-3),
}
SIZES = {"quick": (1, 200), "reduced": (5, EPOCHS), "full": (10, EPOCHS)}  # seeds, epochs


class DeepNet(pl.LightningModule):
    """Several hidden ReLU layers, one output, cross-entropy; the learning rate falls to a thirtieth in the end."""

    def __init__(self, widths: Sequence[int], weight_decay: float, steps: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise((P, *widths, 1)):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        self.weight_decay, self.steps = weight_decay, steps

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``(batch,)``, of ``(batch, P)``."""
        logits: Tensor = self.net(x).squeeze(-1)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        return nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Return Adam and its schedule."""
        optimizer = torch.optim.Adam(self.parameters(), lr=LR, weight_decay=self.weight_decay)
        start = (1 - FINE_TUNING) * self.steps

        def factor(step: int) -> float:
            return float(30 ** -max(0.0, (step - start) / (self.steps - start)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def weights(self) -> list[str]:
        """The weights' names, from the input on."""
        return [name for name, _ in self.named_parameters() if name.endswith("weight")]


def callbacks(method: str, weights: Sequence[str], counts: Sequence[int]) -> list[pl.Callback]:
    """Return what prunes: one callback that is told nothing but the counts, or features first and then each layer."""
    if method == "nn":
        return []
    if method == "cpna":
        return [CPNAPruning(dict(zip(weights, counts, strict=True)), shrink=True)]
    found: list[pl.Callback] = [
        CPNAPruning({weights[0]: K}, granularity="feature", schedule=Geometric(0.15, 0.3), name="features", shrink=True)
    ]
    width = (1 - 0.3 - FINE_TUNING) / len(weights)
    for position, (weight, count) in enumerate(zip(reversed(weights), reversed(counts), strict=True)):
        start = 0.3 + position * width
        last = position == 0
        found.append(
            CPNAPruning(
                {weight: count},
                schedule=Annealing(start, start + width / 2) if last else Geometric(start, start + width),
                normalize=last,
                name=f"layer_{len(weights) - position}",
                shrink=True,
            )
        )
    return found


def deep(*, depth: int, method: str, seed: int, epochs: int) -> Row:
    """Train one network.

    Args:
        depth: How many hidden layers, a key of ``DEPTHS``.
        method: A key of ``METHODS``.
        seed: Of data, initialisation and batches.
        epochs: How long.

    Returns:
        The AUC on the training and test set in percent, and the live connections.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = XORData(K, P, N, generator), XORData(K, P, N, generator)
    widths, counts, weight_decay = DEPTHS[depth]
    pl.seed_everything(seed + OF_WEIGHTS, verbose=False)
    batches = loader(Split(train.x, train.y), BATCH_SIZE, seed)
    module = DeepNet(widths, weight_decay, epochs * (N // BATCH_SIZE))
    trainer = quiet_trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks(method, module.weights, counts),
    )
    trainer.fit(module, batches)
    masks = sparsity_of(module).masks
    with torch.no_grad():
        aucs = [100 * float(binary_auroc(module(data.x), data.y.int())) for data in (train, test)]
    live = [masks[name].n_live if name in masks else module.get_parameter(name).numel() for name in module.weights]
    return {"train_auc": round(aucs[0], 4), "test_auc": round(aucs[1], 4), "connections": sum(live)}


def table(rows: list[Row]) -> str:
    """Return the results in Markdown."""
    lines = ["| hidden layers | method | seeds | train AUC % | test AUC % | > 95 | connections |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    test, train = (mean_and_spread(rows, ("depth", "method"), value) for value in ("test_auc", "train_auc"))
    for depth, method in test:
        own = [row for row in rows if (row["depth"], row["method"]) == (depth, method)]
        widths = " + ".join(map(str, DEPTHS[depth].widths))
        good = sum(row["test_auc"] > 95 for row in own)
        lines.append(
            f"| {widths} | {METHODS[method]} | {len(own)} | {train[depth, method][0]:.1f} ± {train[depth, method][1]:.1f} "
            f"| {test[depth, method][0]:.1f} ± {test[depth, method][1]:.1f} | {good} of {len(own)} "
            f"| {own[0]['connections']:,} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row]) -> Figure:
    """Draw the test AUC of every seed, one panel a depth."""
    drawn = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, depth in zip(drawn.subplots(1, len(DEPTHS), sharey=True), DEPTHS, strict=True):
        for position, method in enumerate(METHODS):
            aucs = [row["test_auc"] for row in rows if (row["depth"], row["method"]) == (depth, method)]
            axes.plot([position] * len(aucs), aucs, "o", alpha=0.6)
        axes.set_xticks(range(len(METHODS)), ["NN", "CPNA", "features,\nthen CPNA"])
        axes.set(title=f"hidden layers {' + '.join(map(str, DEPTHS[depth].widths))}", ylim=(45, 101), xlim=(-0.5, 2.5))
        axes.grid(alpha=0.3)
    drawn.axes[0].set_ylabel("test AUC, %")
    drawn.suptitle(f"{K}-D XOR in {P} dimensions, {counted(len({row['seed'] for row in rows}), 'seed')}")
    return drawn


def main(arguments: list[str] | None = None) -> None:
    """Train, write the results, and draw them."""
    sizes = {name: f"{counted(seeds, 'seed')} of {epochs} epochs" for name, (seeds, epochs) in SIZES.items()}
    args = parse("examples.xor.deep", __doc__, arguments, sizes=sizes)
    n_seeds, epochs = SIZES[args.size]
    seeds = range(FIRST_SEED, FIRST_SEED + n_seeds)
    rows = run_sweep(args, deep, grid(depth=DEPTHS, method=METHODS, seed=seeds, epochs=[epochs]), title="deep")
    finish(args, "examples.xor.deep", rows, draw(rows), table(rows))


if __name__ == "__main__":
    main()
