"""Small modules and trainers that the tests share."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import scipy.stats
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cpna import sparsity_of

N_FEATURES, N_ROWS = 6, 64


def mlp(hidden: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(N_FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, 1))


def data(n: int = N_ROWS, batch_size: int = 16, shuffle: bool = False) -> DataLoader[Any]:
    x = torch.rand(n, N_FEATURES, generator=torch.Generator().manual_seed(1)) * 2 - 1
    y = (x[:, :2].prod(1, keepdim=True) > 0).float()
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)


def loaders() -> dict[str, Callable[[], DataLoader[Any]]]:
    """Return loaders that shuffle, by what they draw from."""
    x, y = data().dataset.tensors  # type: ignore[attr-defined]
    files = TensorDataset(x, y)
    return {
        "torch's generator": lambda: DataLoader(files, batch_size=16, shuffle=True),
        "its own": lambda: DataLoader(files, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(4)),
        "workers": lambda: DataLoader(files, batch_size=16, shuffle=True, num_workers=1),
    }


class Net(nn.Module):
    """Parts a, b, ... and a forward written in place."""

    def __init__(self, code: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.code = code
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.code(self, *args, **kwargs)


class SinglePrecision(nn.Module):
    """A network that refuses float64, in which a trace runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError("single precision only")
        out: Tensor = self.inner(x)
        return out


class Steps:
    """The steps of a small classifier, for the LightningModule of either package."""

    net: Any

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.binary_cross_entropy_with_logits(self.forward_(x), y)

    def forward_(self, x: Tensor) -> Tensor:
        out: Tensor = self(x)  # type: ignore[operator]
        return out

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=1e-2, weight_decay=1e-3)


class Classifier(Steps, pl.LightningModule):
    def __init__(self, net: Any = None) -> None:
        super().__init__()
        self.net = net or mlp()


class TwoSteps(Classifier):
    """Takes steps with two optimizers by hand in every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx) * self.other.sum()
        self.manual_backward(loss)
        if batch_idx % 2:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD([self.other], lr=0.1)]


class OtherClassifier(Steps, lightning.pytorch.LightningModule):
    def __init__(self, net: Any = None) -> None:
        super().__init__()
        self.net = net or mlp()


class Spy(pl.Callback):
    """Asks a question after every batch, before or after what the callbacks beside it do."""

    def __init__(self, ask: Any) -> None:
        self.ask = ask
        self.answers: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.answers.append(self.ask(trainer, pl_module))


class RankSpy(pl.Callback):
    """Writes each rank's masks and weights where the test can read them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        torch.save((live_masks(pl_module), weights(pl_module)), self.folder / f"{trainer.global_rank}.pt")


def two_processes(start: Literal["fork", "spawn"] = "fork") -> dict[str, Any]:
    """Return a Trainer's options for two processes: forked ones start at once, but not where CUDA is in use."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    return {"strategy": f"ddp_{'spawn' if torch.cuda.is_initialized() else start}", "devices": 2}


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

AVERAGING: dict[str, Callable[[], pl.Callback]] = {
    "EMA": lambda: pl.callbacks.EMAWeightAveraging(decay=0.5),
    "SWA": lambda: pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=0.5),
}


def trainer(*callbacks: Any, epochs: int = 5, package: Any = pl, **options: Any) -> Any:
    return package.Trainer(callbacks=list(callbacks), **(QUIET | {"max_epochs": epochs} | options))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def live_masks(module: nn.Module) -> dict[str, Tensor]:
    return {name: mask.live.clone() for name, mask in sparsity_of(module).masks.items()}


def checkpoint(folder: Path, **options: Any) -> pl.callbacks.ModelCheckpoint:
    return pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **options)


def checkpoints(folder: Path) -> list[Path]:
    """Return the files of `checkpoint` in the order of their steps."""
    return sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))


def same(first: Any, second: Any) -> bool:
    """Tell whether two states are equal, to the last bit of their tensors."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def needs(name: str) -> None:
    """Skip the test if a set of the ASU repository is not there; none is downloaded."""
    from examples.data import DATA_VARIABLE, is_here

    if not os.environ.get(DATA_VARIABLE) or not is_here(name):
        pytest.skip(f"{name} is not there: {DATA_VARIABLE} names no folder with it")


def needs_uci(name: str) -> None:
    """Skip the test if a UCI set is not there; none is downloaded."""
    from examples.data import DATA_VARIABLE
    from examples.uci.data import FILES

    folder = os.environ.get(DATA_VARIABLE)
    if not folder or not all((Path(folder) / file.name).is_file() for file in FILES[name]):
        pytest.skip(f"{name} is not there: {DATA_VARIABLE} names no folder with {FILES[name][0].name}")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]
on_every_device = pytest.mark.parametrize("device", DEVICES)


def p_of_uniform(counts: Tensor, n_drawn: int, n_rounds: int) -> float:
    """Return the p-value of how often each cell came, if every round draws some, uniformly, each at most once."""
    n, expected = len(counts), n_rounds * n_drawn / len(counts)
    statistic = float((counts - expected).square().sum() / expected) * (n - 1) / (n - n_drawn)
    return float(scipy.stats.chi2.sf(statistic, n - 1))


def tensorboard(folder: Path) -> Callable[..., Any]:
    """Start a real TensorBoard on a folder; return a function that asks its plugins over HTTP."""
    program = pytest.importorskip("tensorboard.program", reason="the extra 'examples' is not installed")
    board = program.TensorBoard()
    at_once = ["--load_fast", "false", "--reload_task", "blocking", "--reload_interval", "0"]
    board.configure(argv=[None, "--logdir", str(folder), "--port", "0", "--host", "127.0.0.1", *at_once])
    address = board.launch()

    def ask(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}data/plugin/{path}", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            content = answer.read()
            return json.loads(content) if "json" in answer.headers["Content-Type"] else content

    return ask
