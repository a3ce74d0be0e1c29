"""How much of a sweep's time is spent in the training that it repeats."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

pytest.importorskip("joblib", reason="the extra 'sweeps' is not installed")

from examples.data import Split, loader
from examples.quiet import quiet_trainer
from examples.xor.problem import XORData
from lightning_cpna import CPNAPruning
from lightning_cpna.sweeps import grid, sweep
from tests.helpers import Classifier

pytestmark = pytest.mark.benchmark
RUNS, WORKERS = 200, 2


def tiny(seed: int) -> dict[str, float]:
    """Prune a network of 32 units in 40 epochs of 10 steps."""
    pl.seed_everything(seed, verbose=False)
    data = XORData(3, 8, 500, torch.Generator().manual_seed(seed))
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    pruning = CPNAPruning({"net.0.weight": 24, "net.2.weight": 12})
    module, batches, fitted = (
        Classifier(net),
        loader(Split(data.x, data.y[:, None]), 50, seed),
        quiet_trainer(callbacks=pruning, max_epochs=40, accelerator="cpu"),
    )
    started = time.perf_counter()
    fitted.fit(module, batches)
    return {"seconds": time.perf_counter() - started}


@pytest.mark.parametrize("workers", [1, WORKERS])
def test_200_tiny_runs_spend_four_fifths_of_the_time_in_training(tmp_path: Path, workers: int) -> None:
    started = time.perf_counter()
    rows = sweep(tiny, grid(seed=range(RUNS)), tmp_path, n_jobs=workers)
    wall = time.perf_counter() - started
    share = sum(row["seconds"] for row in rows) / (workers * wall)
    print(
        f"{RUNS} runs of {sum(row['seconds'] for row in rows) / RUNS:.3f} s, {workers} workers: {share:.1%} in training"
    )
    assert share >= 0.8
