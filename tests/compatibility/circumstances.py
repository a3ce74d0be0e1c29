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
from torch import Tensor, nn

from lightning_cpna import sparsity_of
from tests.compatibility.callbacks import Config, make
from tests.compatibility.networks import data, module
from tests.helpers import RankSpy, checkpoint, trainer, weights

EPOCHS = 9


class Outcome(NamedTuple):
    """What lives of each masked weight, and all weights."""

    live: dict[str, Tensor]
    weights: dict[str, Tensor]


Run = Callable[[str, list[Config], Path], Outcome]


def outcome(trained: nn.Module) -> Outcome:
    live = {name: mask.live for name, mask in sparsity_of(trained).masks.items()}
    return Outcome(live, weights(trained))


def fit(network: str, configs: list[Config], *mixins: type, package: Any = pl, extra: Any = (), **options: Any) -> Any:
    trained = module(network, package, *mixins)
    callbacks = [make(config) for config in configs]
    trainer(*callbacks, *extra, epochs=EPOCHS, package=package, **options).fit(trained, data())
    return trained


def ddp(network: str, configs: list[Config], folder: Path) -> Outcome:
    torch.multiprocessing.set_sharing_strategy("file_system")
    fit(network, configs, extra=[RankSpy(folder)], strategy="ddp_fork", devices=2)
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
    return outcome(fit(network, configs, Exploding, plugins=[precision]))


def compiled(network: str, configs: list[Config], folder: Path) -> Outcome:
    torch._dynamo.reset()
    trained = module(network, pl)
    callbacks = [make(config) for config in configs]
    trainer(*callbacks, epochs=EPOCHS).fit(torch.compile(trained, backend="eager"), data())
    return outcome(trained)


def resumed(network: str, configs: list[Config], folder: Path) -> Outcome:
    files = checkpoint(folder, every_n_train_steps=4)
    whole = fit(network, configs, extra=[files], enable_checkpointing=True)
    middle = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))[4]
    trained = module(network, pl)
    trainer(*map(make, configs), epochs=EPOCHS).fit(trained, data(), ckpt_path=middle)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(trained)[name]), name
    return outcome(trained)


def again(network: str, configs: list[Config], folder: Path) -> Outcome:
    trained = fit(network, configs)
    trainer(*map(make, configs), epochs=EPOCHS).fit(trained, data())
    return outcome(trained)


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
    trainer(*map(make, configs), epochs=EPOCHS).fit(trained, data())
    return outcome(trained)


def cli(network: str, configs: list[Config], folder: Path) -> Outcome:
    pytest.importorskip("jsonargparse", reason="the extra 'cli' is not installed")
    from pytorch_lightning.cli import LightningCLI

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    config = {"trainer": {"callbacks": configs, "max_epochs": EPOCHS, "accelerator": "cpu", **quiet}}
    (folder / "config.json").write_text(json.dumps(config))
    run = LightningCLI(
        type(module(network, pl)), run=False, save_config_callback=None, args=["--config", str(folder / "config.json")]
    )
    run.trainer.fit(run.model, data())
    return outcome(run.model)


def cuda(network: str, configs: list[Config], folder: Path) -> Outcome:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return outcome(fit(network, configs, accelerator="gpu", devices=1))


def _plain(*mixins: type, **options: Any) -> Run:
    return lambda network, configs, folder: outcome(fit(network, configs, *mixins, **options))


def _average(average: Callable[[], Any]) -> Run:
    return lambda network, configs, folder: outcome(fit(network, configs, extra=[average()]))


def _ema() -> Any:
    return pl.callbacks.EMAWeightAveraging(decay=0.5)


def _swa() -> Any:
    return pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=0.5)


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
    "EMA": _average(_ema),
    "SWA": _average(_swa),
    "manual": _plain(Manual),
    "`configure_model`": late,
    "LightningCLI": cli,
    "DDP": ddp,
    "CUDA": cuda,
}
