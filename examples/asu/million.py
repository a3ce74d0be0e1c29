"""A million neurons on one core: `python -m examples.asu.million`."""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.asu.training import MLP, Recipe
from examples.quiet import quiet_trainer
from examples.results import load, save
from lightning_cpna import SETRewiring

WIDTHS = (65536, 333000, 333000, 333000, 2)
RECIPE = Recipe(optimizer="SGD", lr=1e-2, weight_decay=0.0)


class Noise(Dataset[Any]):
    """Batches of noise whose class is whether its first input is positive."""

    def __init__(self, steps: int, batch_size: int) -> None:
        self.steps, self.batch_size = steps, batch_size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Draw a batch, ``(batch, input)`` and ``(batch,)``."""
        if index >= self.steps:
            raise IndexError(index)
        x = torch.randn(self.batch_size, WIDTHS[0])
        return x, (x[:, 0] > 0).long()


class Clock(pl.Callback):
    """Times the steps, and from an epoch's last step to the next one's first: what is rewired."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.rewiring: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Stop the time between epochs."""
        if trainer.current_epoch:
            self.rewiring.append(time.perf_counter() - self.last)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the time of a step."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop the time of a step."""
        self.last = time.perf_counter()
        self.steps.append(self.last - self.start)


def peak_gigabytes() -> float:
    """Return the most memory that this process has had, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def main(arguments: list[str] | None = None) -> None:
    """Train for some steps, rewire, and train on."""
    parser = argparse.ArgumentParser(prog="python -m examples.asu.million", description=__doc__)
    parser.add_argument("--epsilon", type=float, default=20.0, help="connections (default: 20)")
    parser.add_argument("--steps", type=int, default=3, help="steps an epoch, of which there are two (default: 3)")
    parser.add_argument("--batch-size", type=int, default=32, help="examples a step (default: 32)")
    parser.add_argument("--out", type=Path, default=Path("runs/asu"), help="where the figures are written")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    start = time.perf_counter()
    module = MLP(WIDTHS, RECIPE, args.epsilon)
    made, clock = time.perf_counter() - start, Clock()
    trainer = quiet_trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[SETRewiring(["net.*.weight"]), clock],
    )
    trainer.fit(module, DataLoader(Noise(args.steps, args.batch_size), batch_size=None))
    row = {
        "epsilon": args.epsilon,
        "neurons": sum(WIDTHS),
        "connections": sum(weight.numel() for weight in module.weights.values()),
        "seconds to make": round(made, 2),
        "seconds a step": round(statistics.median(clock.steps), 2),
        "seconds to rewire": round(clock.rewiring[0], 2),
        "peak GB": round(peak_gigabytes(), 2),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    others = load(args.out, "million") if (args.out / "million.json").is_file() else []
    rows = [other for other in others if other["epsilon"] != args.epsilon]
    save(sorted([*rows, row], key=lambda row: row["epsilon"]), args.out, "million")
    for name, value in row.items():
        Console().print(f"{name:>18}: {value:,}")


if __name__ == "__main__":
    main()
