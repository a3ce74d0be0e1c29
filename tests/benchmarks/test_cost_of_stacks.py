"""What it costs to train many networks as one stack, against one fit each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

pytest.importorskip("joblib", reason="the extra 'sweeps' is not installed")

from examples.data import Split, loader
from examples.quiet import quiet_trainer
from examples.xor.problem import Phase, XORData, XORNet
from lightning_cpna import CPNAPruning, Geometric, member_loader, stack
from lightning_cpna.sweeps import grid, sweep

pytestmark = pytest.mark.benchmark
MEMBERS, WORKERS = 64, 2
P, HIDDEN, N, BATCH, PRETRAINING, ANNEALING = 80, 256, 3000, 250, 20, 60


def nets(seeds: range) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    data = XORData(3, P, N, torch.Generator().manual_seed(0))
    pl.seed_everything(seeds[0], verbose=False)
    return [XORNet(P, HIDDEN, [Phase(1)], N) for _ in seeds], data.x, data.y


def annealing() -> CPNAPruning:
    steps = N // BATCH
    schedule = Geometric(PRETRAINING * steps, (PRETRAINING + ANNEALING) * steps)
    return CPNAPruning({"net.0.weight": 3}, granularity="feature", schedule=schedule)


def separately(first: int, n: int) -> dict[str, float]:
    """Search with one fit for each network."""
    modules, x, y = nets(range(first, first + n))
    started = time.perf_counter()
    for seed, module in enumerate(modules, first):
        one = quiet_trainer(callbacks=annealing(), max_epochs=PRETRAINING + ANNEALING, accelerator="cpu")
        one.fit(module, loader(Split(x, y), BATCH, seed))
    return {"seconds": time.perf_counter() - started}


def stacked(first: int, n: int, device: str = "cpu") -> dict[str, float]:
    """Search with one fit for all."""
    modules, x, y = nets(range(first, first + n))
    data = [tensor.to(device).expand(n, *tensor.shape) for tensor in (x, y)]
    started = time.perf_counter()
    one = quiet_trainer(callbacks=annealing(), max_epochs=PRETRAINING + ANNEALING, accelerator=device)
    one.fit(stack(modules), member_loader(data, batch_size=BATCH, seeds=range(first, first + n)))
    return {"seconds": time.perf_counter() - started}


def test_64_members_of_the_3d_search_cost_at_most_half_of_64_fits(tmp_path: Path) -> None:
    each = MEMBERS // WORKERS
    settings = grid(first=range(0, MEMBERS, each), n=[each])
    seconds = {}
    for function in (stacked, separately):
        rows = sweep(function, settings, tmp_path, n_jobs=WORKERS)
        seconds[function.__name__] = max(row["seconds"] for row in rows)
    ratio = seconds["stacked"] / seconds["separately"]
    print(f"{MEMBERS} networks on {WORKERS} cores: {seconds}, ratio {ratio:.2f}")
    assert ratio <= 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_64_members_on_a_gpu_cost_less_than_two_fits() -> None:
    stacked(0, 1, "cuda")  # CUDA is made ready
    seconds = {n: stacked(0, n, "cuda")["seconds"] for n in (1, MEMBERS, 1000)}
    print(f"members and seconds on {torch.cuda.get_device_name()}: {seconds}")
    assert seconds[MEMBERS] <= 2 * seconds[1]
