"""The circumstances of the matrix: each trains a network with some callbacks and returns it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from tests.compatibility.callbacks import Config, make
from tests.compatibility.networks import data, module
from tests.helpers import (
    AVERAGING,
    QUIET,
    RankSpy,
    checkpoint,
    checkpoints,
    live_masks,
    trainer,
    two_processes,
    weights,
)

EPOCHS = 9


class Outcome(NamedTuple):
    """What lives of each masked weight, and all weights."""

    live: dict[str, Tensor]
    weights: dict[str, Tensor]


Run = Callable[[str, list[Config], Path], Outcome]


def train(
    trained: Any, configs: list[Config], *, extra: Any = (), package: Any = pl, path: Path | None = None, **options: Any
) -> Outcome:
    """Train a module, or what compiled one, from the beginning or from a checkpoint."""
    fitting = trainer(*map(make, configs), *extra, epochs=EPOCHS, package=package, **options)
    fitting.fit(trained, data(), ckpt_path=path)
    return outcome(fitting.lightning_module)


def outcome(trained: Any) -> Outcome:
    return Outcome(live_masks(trained), weights(trained))


def ddp(network: str, configs: list[Config], folder: Path) -> Outcome:
    train(module(network, pl), configs, extra=[RankSpy(folder)], **two_processes())
    (masks, first), (others, second) = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    for name, live in masks.items():
        assert torch.equal(live, others[name])
    for name, weight in first.items():
        if "running" not in name:  # BatchNorm's statistics are each process's own
            assert torch.equal(weight, second[name])
    return Outcome(masks, first)


def skipping(network: str, configs: list[Config], folder: Path) -> Outcome:
    if network == "LSTM":
        pytest.skip("torch has no float16 LSTM on the CPU")

    class Exploding:
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == 1 else 1.0)  # type: ignore[misc]

    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    return train(module(network, pl, Exploding), configs, plugins=[precision])


def compiled(network: str, configs: list[Config], folder: Path) -> Outcome:
    torch._dynamo.reset()
    return train(torch.compile(module(network, pl), backend="eager"), configs)


def resumed(network: str, configs: list[Config], folder: Path) -> Outcome:
    files = checkpoint(folder, every_n_train_steps=4)
    whole = train(module(network, pl), configs, extra=[files], enable_checkpointing=True)
    end = train(module(network, pl), configs, path=checkpoints(folder)[4])
    for name, weight in whole.weights.items():
        assert torch.equal(weight, end.weights[name]), name
    return end


def again(network: str, configs: list[Config], folder: Path) -> Outcome:
    trained = module(network, pl)
    train(trained, configs)
    return train(trained, configs)


class StepSchedule:
    """A learning rate that changes after every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)  # type: ignore[attr-defined]
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=36)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual:
    """Two optimizers that are stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[attr-defined]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))  # type: ignore[attr-defined, misc]
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, *others = self.parameters()  # type: ignore[attr-defined]
        return [torch.optim.Adam([first], lr=1e-2), torch.optim.Adam(others, lr=1e-2)]


def late(network: str, configs: list[Config], folder: Path) -> Outcome:
    class Built:
        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = module(network, pl).net

    trained = module(network, pl, Built)
    del trained.net
    return train(trained, configs)


def cli(network: str, configs: list[Config], folder: Path) -> Outcome:
    pytest.importorskip("jsonargparse", reason="the extra 'cli' is not installed")
    from pytorch_lightning.cli import LightningCLI

    config = {"trainer": {"callbacks": configs, "max_epochs": EPOCHS, **QUIET}}
    (folder / "config.json").write_text(json.dumps(config))
    run = LightningCLI(
        type(module(network, pl)), run=False, save_config_callback=None, args=["--config", str(folder / "config.json")]
    )
    run.trainer.fit(run.model, data())
    return outcome(run.model)


def on_board(network: str, configs: list[Config], folder: Path) -> Outcome:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra 'examples' is not installed"
    )
    board = TensorBoardLogger(folder, name="", version="run")
    end = train(module(network, pl), configs, logger=board, log_every_n_steps=1)
    written = events.EventAccumulator(board.log_dir).Reload()
    assert any(tag.endswith("/connections") for tag in written.Tags()["scalars"])
    assert any(tag.endswith("/plan/text_summary") for tag in written.Tags()["tensors"])
    return end


def cuda(network: str, configs: list[Config], folder: Path) -> Outcome:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return train(module(network, pl), configs, accelerator="gpu", devices=1)


def _plain(*mixins: type, package: Any = pl, **options: Any) -> Run:
    return lambda network, configs, folder: train(
        module(network, package, *mixins), configs, package=package, **options
    )


def _averaged(kind: str) -> Run:
    return lambda network, configs, folder: train(module(network, pl), configs, extra=[AVERAGING[kind]()])


CIRCUMSTANCES: dict[str, Run] = {
    "one process": _plain(),
    "`lightning`": _plain(package=lightning.pytorch),
    "accumulation": _plain(accumulate_grad_batches=2),
    "clipping": _plain(gradient_clip_val=0.1),
    "LR by step": _plain(StepSchedule),
    "bf16-mixed": _plain(precision="bf16-mixed"),
    "fp16, skipping": skipping,
    "`torch.compile`": compiled,
    "resume": resumed,
    "second fit": again,
    "EMA": _averaged("EMA"),
    "SWA": _averaged("SWA"),
    "manual": _plain(Manual),
    "`configure_model`": late,
    "LightningCLI": cli,
    "TensorBoard": on_board,
    "DDP": ddp,
    "CUDA": cuda,
}
